"""Start a server and stay until it is told to stop."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from luthier.deployment.serving.requests import Limits
from luthier.errors import UserError

ENGINES = ("llamacpp", "transformers")


def serve(
    path: str,
    *,
    adapters: Mapping[str, str] | None = None,
    name: str | None = None,
    engine: str = "llamacpp",
    kind: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_env: str | None = None,
    adapter_root: Path | None = None,
    max_model_len: int | None = None,
    max_tokens: int | None = None,
    max_requests: int = 256,
    max_body: int = 2**20,
    slots: int = 16,
    threads: int | None = None,
    temperature: float = 0.0,
    console: Console | None = None,
) -> None:
    """Answer OpenAI's API until the process is told to stop (Ctrl-C, SIGTERM); answers that are being written end
    first.

    Args:
        path: a run, adapter or model folder, or an embedded model's name.
        adapters: further adapters of the same base, by the names that requests call them.
        name: of what ``path`` holds; None: its folder's.
        engine: ``llamacpp``, or ``transformers`` (slow; the reference).
        kind: precision of the weights in llama.cpp, see ``luthier.deployment.gguf_writing.KINDS``; None: bf16 where
            the base is stored so and llama.cpp multiplies it by the processor's own instructions, else f16.
        host: address to listen on; beyond loopback only with a key.
        port: 0: any free one.
        api_key_env: environment variable that holds the key, or several with commas between.
        adapter_root: folder in which adapters lie that may be added while the server runs.
        max_model_len: longest prompt with its answer, in tokens; None: the model's, at most 4,096.
        max_tokens: longest answer, in tokens; None: what the context leaves.
        max_requests: answers that are written or wait at once.
        max_body: longest request, in bytes.
        slots: answers that are written at once by llama.cpp.
        threads: that compute; None: one a core.
        temperature: of requests that name none; 0: the likeliest token, as in evaluation.
        console: where to say what happens.

    Raises:
        UserError: something cannot be loaded, exported or bound, or the parity gate refuses an export.
    """
    uvicorn = _require_server()
    from luthier.deployment.serving.api import Api
    from luthier.deployment.serving.prepare import Sources, context_for, serve_llamacpp, serve_transformers

    console = console or Console()
    if engine not in ENGINES:
        raise UserError(f"there is no engine {engine!r}", where="--engine", remedy=f"choose {' or '.join(ENGINES)}")
    keys = _keys(api_key_env)
    _require_safe(host, keys)
    with bound(host, port) as listener:
        sources = Sources.of(path, adapters or {}, name)
        limits = Limits(context_for(sources, max_model_len), max_tokens, temperature)
        if engine == "llamacpp":
            served = serve_llamacpp(
                sources, limits, adapter_root, kind=kind, slots=slots, threads=threads, console=console
            )
        else:
            served = serve_transformers(sources, limits, adapter_root)
        api = Api(served, keys=keys, max_body=max_body, max_requests=max_requests)
        logging.getLogger("luthier.serve").addHandler(logging.StreamHandler())
        names = ", ".join(model.name for model in served.models)
        shown = f"[{host}]" if ":" in host else host
        console.print(f"serving {names} at http://{shown}:{listener.getsockname()[1]}/v1", highlight=False)
        config = uvicorn.Config(
            api.app(), log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=60
        )
        server = uvicorn.Server(config)
        try:
            server.run(sockets=[listener])
        finally:
            api.close()
            served.engine.close()
    console.print("stopped", highlight=False)


def _require_server() -> Any:
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(f"{error.name} is not installed", remedy="pip install 'luthier[serve]'") from None
    return uvicorn


def _keys(variable: str | None) -> list[str]:
    if variable is None:
        return []
    keys = [key.strip() for key in os.environ.get(variable, "").split(",") if key.strip()]
    if not keys:
        raise UserError(
            f"the environment variable {variable!r} is empty or not set", where="--api-key-env", remedy="set it"
        )
    return keys


def _require_safe(host: str, keys: list[str]) -> None:
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not keys:
        raise UserError(
            f"{host!r} can be reached from other machines, and no key is asked for",
            where="--host",
            remedy="name the variable that holds a key: --api-key-env LUTHIER_API_KEY",
        )


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything is loaded: a port in use is told at once."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen on {host}:{port}: {reason}",
            where="--host, --port",
            remedy="choose others; --port 0 is free",
        ) from None
    return listener
