"""Servers on real ports."""

from __future__ import annotations

import os
import shlex
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import uvicorn

from luthier.deployment.serving.api import Api
from luthier.deployment.serving.run import bound

VLLM = os.environ.get("LUTHIER_VLLM")
"""The program, where it belongs to another environment."""
VLLM_ARGUMENTS = shlex.split(os.environ.get("LUTHIER_VLLM_ARGS", ""))


@dataclass
class Running:
    """A server and ways to talk to it."""

    url: str
    api: Api
    adapters: dict[str, Path]
    """Folders of some that are served, or can be; they share a root."""

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=300)

    def post(self, path: str, body: Any, **more: Any) -> httpx2.Response:
        kind = {"content": body} if isinstance(body, bytes) else {"json": body}
        return httpx2.post(self.url + path, timeout=300, **kind, **more)

    def get(self, path: str, **more: Any) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=300, **more)


@contextmanager
def running(served, adapters: dict[str, Path] | None = None, **options: Any):
    """A server in a thread, until the end of the block."""
    api = Api(served, **options)
    listener = bound("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(api.app(), log_level="warning", timeout_graceful_shutdown=10))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", api, adapters or {})
    finally:
        server.should_exit = True
        thread.join(30)
        api.close()
        served.engine.close()
