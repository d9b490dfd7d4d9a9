"""Servers on real ports, with two adapters whose answers differ."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import uvicorn
from rich.console import Console
from saved_adapters import tuned

from luthier.deployment.serving.api import Api
from luthier.deployment.serving.prepare import Sources, serve_llamacpp, serve_transformers
from luthier.deployment.serving.requests import Limits
from luthier.deployment.serving.run import bound

CONTEXT = 512


@pytest.fixture(scope="package")
def adapters(tiny_model_dir, tmp_path_factory) -> dict[str, Path]:
    """Folders of adapters of the tiny model; they share a root."""
    root = tmp_path_factory.mktemp("served")
    return {
        name: tuned(root / name, tiny_model_dir, seed=seed, size=0.1, r=4)
        for seed, name in enumerate(("orders", "polite", "terse"))
    }


@dataclass
class Running:
    """A server and ways to talk to it."""

    url: str
    api: Api
    root: Path

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=300)

    def post(self, path: str, body: Any, **more: Any) -> httpx2.Response:
        kind = {"content": body} if isinstance(body, bytes) else {"json": body}
        return httpx2.post(self.url + path, timeout=300, **kind, **more)

    def get(self, path: str, **more: Any) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=300, **more)


@contextmanager
def running(served, root: Path, **options: Any):
    """A server in a thread, until the end of the block."""
    api = Api(served, **options)
    listener = bound("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(api.app(), log_level="warning", timeout_graceful_shutdown=10))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", api, root)
    finally:
        server.should_exit = True
        thread.join(30)
        api.close()
        served.engine.close()


def sources(tiny_model_dir: Path, adapters: dict[str, Path], *names: str) -> Sources:
    first, *others = names
    return Sources.of(str(adapters[first]), {other: str(adapters[other]) for other in others}, None)


@pytest.fixture(scope="package", params=["llamacpp", "transformers"])
def server(request, tiny_model_dir, adapters):
    """Base, ``orders`` and ``polite``; ``terse`` can be loaded."""
    found = sources(tiny_model_dir, adapters, "orders", "polite")
    root, limits = adapters["orders"].parent, Limits(CONTEXT)
    if request.param == "llamacpp":
        served = serve_llamacpp(found, limits, root, kind="f32", slots=8, threads=1, console=Console(quiet=True))
    else:
        served = serve_transformers(found, limits, root)
    with running(served, root, max_requests=64, max_body=20_000) as live:
        yield live
