"""Start a server and stay until it is told to stop."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import shlex
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from luthier.deployment.serving.requests import Limits
from luthier.deployment.vllm import DTYPES, find_vllm
from luthier.errors import UserError

ENGINES = ("llamacpp", "vllm", "transformers")
_SLOTS = 16


def serve(
    path: str,
    *,
    adapters: Mapping[str, str] | None = None,
    name: str | None = None,
    engine: str | None = None,
    kind: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_env: str | None = None,
    adapter_root: Path | None = None,
    max_model_len: int | None = None,
    max_tokens: int | None = None,
    max_requests: int = 256,
    max_body: int = 2**20,
    slots: int | None = None,
    threads: int | None = None,
    vllm: str | None = None,
    vllm_args: str = "",
    temperature: float = 0.0,
    console: Console | None = None,
) -> None:
    """Answer OpenAI's API until the process is told to stop (Ctrl-C, SIGTERM); answers that are being written end
    first.

    Args:
        path: a run, adapter or model folder, or an embedded model's name.
        adapters: further adapters of the same base, by the names that requests call them.
        name: of what ``path`` holds; None: its folder's.
        engine: ``llamacpp``, ``vllm``, or ``transformers`` (slow; the reference); None: vLLM where there are a GPU and
            a program ``vllm``, else llama.cpp.
        kind: precision of the weights; in llama.cpp see ``luthier.deployment.gguf_writing.KINDS``, None: bf16 where
            the base is stored so and llama.cpp multiplies it by the processor's own instructions, else f16; in vLLM
            bf16, f16 or f32, None: as they are stored.
        host: address to listen on; beyond loopback only with a key.
        port: 0: any free one.
        api_key_env: environment variable that holds the key, or several with commas between.
        adapter_root: folder in which adapters lie that may be added while the server runs.
        max_model_len: longest prompt with its answer, in tokens; None: the model's, at most 4,096.
        max_tokens: longest answer, in tokens; None: what the context leaves.
        max_requests: answers that are written or wait at once.
        max_body: longest request, in bytes.
        slots: answers that are written at once; None: by llama.cpp 16, by vLLM as many as it thinks fit.
        threads: of llama.cpp; None: one a core.
        vllm: the program ``vllm``, which may belong to another environment; None: this one's, else the first of PATH.
        vllm_args: further arguments of ``vllm serve``, as a shell reads them.
        temperature: of requests that name none; 0: the likeliest token, as in evaluation.
        console: where to say what happens.

    Raises:
        UserError: something cannot be loaded, exported or bound, or the parity gate refuses an export.
    """
    uvicorn = _require_server()
    from luthier.deployment.serving.api import Api
    from luthier.deployment.serving.prepare import Sources, context_for, serve_llamacpp, serve_transformers
    from luthier.deployment.serving.prepare_vllm import serve_vllm

    console = console or Console()
    engine = _chosen(engine, vllm, kind, threads)
    _require_heeded(engine, threads=threads, vllm=vllm, vllm_args=vllm_args)
    arguments = _split(vllm_args)
    keys = _keys(api_key_env)
    _require_safe(host, keys)
    with _ended_by_signals(), bound(host, port) as listener:
        sources = Sources.of(path, adapters or {}, name)
        limits = Limits(context_for(sources, max_model_len), max_tokens, temperature)
        if engine == "llamacpp":
            served = serve_llamacpp(
                sources, limits, adapter_root, kind=kind, slots=slots or _SLOTS, threads=threads, console=console
            )
        elif engine == "vllm":
            served = serve_vllm(
                sources,
                limits,
                adapter_root,
                program=vllm,
                arguments=arguments,
                kind=kind,
                slots=slots,
                console=console,
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


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that what was started for it is ended as well."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _chosen(engine: str | None, vllm: str | None, kind: str | None, threads: int | None) -> str:
    if engine is None and vllm is None:
        for_llamacpp = threads is not None or not (kind is None or kind in DTYPES)
        return "vllm" if not for_llamacpp and torch.cuda.is_available() and find_vllm() else "llamacpp"
    if engine is None:
        return "vllm"
    if engine not in ENGINES:
        raise UserError(f"there is no engine {engine!r}", where="--engine", remedy=f"choose {' or '.join(ENGINES)}")
    return engine


def _require_heeded(engine: str, *, threads: int | None, vllm: str | None, vllm_args: str) -> None:
    """Refuse what the engine would not heed."""
    for option, given, of in (
        ("--threads", threads, "llamacpp"),
        ("--vllm", vllm, "vllm"),
        ("--vllm-args", vllm_args, "vllm"),
    ):
        if given and engine != of:
            raise UserError(
                f"{option} is for the engine {of}, and this is {engine}", where=option, remedy="leave it out"
            )


def _split(arguments: str) -> list[str]:
    try:
        return shlex.split(arguments)
    except ValueError as error:
        raise UserError(
            f"the arguments are not as a shell reads them: {error}", where="--vllm-args", remedy="close the quotes"
        ) from None


def _require_server() -> Any:
    try:
        import llguidance  # noqa: F401
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
