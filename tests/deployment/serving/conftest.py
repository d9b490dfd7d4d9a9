"""Servers on real ports, with two adapters whose answers differ."""

from __future__ import annotations

from pathlib import Path

import pytest
from live import VLLM, VLLM_ARGUMENTS, running
from rich.console import Console
from saved_adapters import tuned
from tiny_models import tiny_llama

from luthier.deployment.serving.prepare import Sources, serve_llamacpp, serve_transformers
from luthier.deployment.serving.prepare_vllm import serve_vllm
from luthier.deployment.serving.requests import Limits
from luthier.deployment.vllm import find_vllm

CONTEXT = 512


@pytest.fixture(scope="package")
def adapters(tiny_model_dir, tmp_path_factory) -> dict[str, Path]:
    """Folders of adapters of the tiny model; they share a root."""
    return three_adapters(tmp_path_factory.mktemp("served"), tiny_model_dir)


def three_adapters(root: Path, base: Path) -> dict[str, Path]:
    return {
        name: tuned(root / name, base, seed=seed, size=0.1, r=4)
        for seed, name in enumerate(("orders", "polite", "terse"))
    }


def sources(adapters: dict[str, Path], *names: str) -> Sources:
    first, *others = names
    return Sources.of(str(adapters[first]), {other: str(adapters[other]) for other in others}, None)


@pytest.fixture(scope="package", params=["llamacpp", "transformers", "vllm"])
def server(request, adapters, tmp_path_factory, tokenizer):
    """Base, ``orders`` and ``polite``; ``terse`` can be loaded."""
    limits, console = Limits(CONTEXT), Console(quiet=True)
    if request.param == "vllm":
        if find_vllm(VLLM) is None:
            pytest.skip("vLLM is not installed")
        # With heads of 32, the smallest that vLLM computes.
        base = tiny_llama(tmp_path_factory.mktemp("wide-llama"), tokenizer, hidden=128)
        adapters = three_adapters(tmp_path_factory.mktemp("served-by-vllm"), base)
    root = adapters["orders"].parent
    found = sources(adapters, "orders", "polite")
    if request.param == "llamacpp":
        served = serve_llamacpp(found, limits, root, kind="f32", slots=8, threads=1, console=console)
    elif request.param == "vllm":
        served = serve_vllm(
            found, limits, root, program=VLLM, arguments=VLLM_ARGUMENTS, kind="f32", slots=8, console=console
        )
    else:
        served = serve_transformers(found, limits, root)
    with running(served, adapters, max_requests=64, max_body=20_000) as live:
        yield live
