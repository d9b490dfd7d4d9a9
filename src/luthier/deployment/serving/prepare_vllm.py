"""From a run's folder to vLLM, each model behind the parity gate before it answers anybody."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from luthier.deployment.gguf_writing import Weights
from luthier.deployment.parity import distance, render_parity, require
from luthier.deployment.runtimes import at_places, check_runtime, stops_lost
from luthier.deployment.serving.prepare import (
    QUESTIONS,
    Sources,
    gate_prompts,
    key_of,
    require_same_base,
    require_writing,
    served_by,
)
from luthier.deployment.serving.requests import Limits
from luthier.deployment.serving.served import Served
from luthier.deployment.serving.vllm import VllmEngine
from luthier.deployment.tokens import token_ids
from luthier.deployment.vllm import DTYPES, VllmRuntime, VllmServer, lora_rank, require_arguments, require_vllm
from luthier.errors import UserError
from luthier.evaluation.generation import stop_tokens
from luthier.methods.saved import AdapterFolder, load_saved
from luthier.models.heads import Head
from luthier.models.loading import load_model, load_tokenizer
from luthier.runfolder import cache_root
from luthier.training.checkpoint import writing

_MORE_QUESTIONS = (
    "What is 2 + 2? Think step by step.",
    "Name three rivers in Europe.",
    "How do I sort a list in Python?",
    "把“早上好”翻译成英文。",
    "Write a short letter to a friend who has moved to another city.",
)
"""Rounding in 16 bits differs from place to place; more of them tell more."""
_MOST_AT_ONCE = 16
"""Adapters that one batch may use: each takes memory of its own, whether it is used or not."""
_LATER = 4
"""Adapters that room is made for where some may come later, of a rank up to the second number."""
_LATER_RANK = 64


def serve_vllm(
    sources: Sources,
    limits: Limits,
    adapter_root: Path | None,
    *,
    program: str | None,
    arguments: Sequence[str],
    kind: str | None,
    slots: int | None,
    console: Console,
) -> Served:
    """The models in vLLM, from the files that they are saved in.

    Args:
        sources: what is served.
        limits: of requests.
        adapter_root: folder of adapters that may be added.
        program: vLLM's; None: see :func:`~luthier.deployment.vllm.find_vllm`.
        arguments: further ones of ``vllm serve``.
        kind: of the weights, one of :data:`DTYPES`; None: as they are stored, bf16 where they are stored in 32 bits.
        slots: answers that are written at once; None: as many as vLLM thinks fit.
        console: where to say what happens.

    Raises:
        UserError: vLLM is not there or cannot hold the models, or the parity gate refuses what it makes of them.
    """
    program = require_vllm(program)
    require_arguments(arguments)
    folder = sources.base_folder()
    dtype = _dtype(kind, folder)
    ranks = [lora_rank(adapter) for adapter in sources.adapters.values()]
    rank = max([*ranks, *([_LATER_RANK] if adapter_root else [])], default=0)
    console.print(f"starting vLLM in {dtype}", highlight=False)
    server = VllmServer(
        program,
        folder,
        dtype=dtype,
        context=limits.context,
        rank=rank,
        adapters=min(_MOST_AT_ONCE, len(ranks) + (_LATER if adapter_root else 0)) or 1,
        slots=slots,
        arguments=arguments,
    )
    try:
        gate = _Gate(server, sources, folder, dtype, console, arguments)
        stops = gate.base()
        engine = VllmEngine(server, load_tokenizer(folder), context=limits.context, put_on=gate.adapter, stops=stops)
        for name, adapter in sources.adapters.items():
            engine.add(name, adapter.folder)
        return served_by(engine, sources, limits, adapter_root)
    except BaseException:
        server.close()
        raise


def _dtype(kind: str | None, folder: Path) -> str:
    if kind is None:
        return {frozenset({"F16"}): "float16"}.get(frozenset(Weights.of(folder).dtypes()), "bfloat16")
    if kind not in DTYPES:
        raise UserError(
            f"vLLM serves no weights of kind {kind}", where="--kind", remedy=f"choose {', '.join(DTYPES)}, or none"
        )
    return DTYPES[kind]


class _Gate:
    """Asks each model of a server before it answers anybody; what has passed once, in a vLLM that was started alike, is
    not asked again."""

    def __init__(
        self,
        server: VllmServer,
        sources: Sources,
        folder: Path,
        dtype: str,
        console: Console,
        arguments: Sequence[str] = (),
    ) -> None:
        self._server, self._sources, self._folder, self._console = server, sources, folder, console
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        self._dtype = dtype
        self._started = f"vllm {server.version} {dtype} {shlex.join(arguments)} {device} {key_of(folder, '')}"
        self._cache = cache_root() / "serving"

    def base(self) -> list[int]:
        """Asks the base; the tokens that end its answers."""

        def load(dtype: torch.dtype) -> tuple[Any, Any]:
            model = load_model(self._folder, dtype=dtype)
            require_writing(Head.of(model), str(self._folder))
            return model, load_tokenizer(self._folder)

        return self._passes(VllmServer.BASE, self._folder, load, tuned=False)

    def adapter(self, name: str, folder: Path) -> list[int]:
        """Puts an adapter on the base, and asks it; the tokens that end its answers.

        Raises:
            UserError: it stands on another base, vLLM cannot hold it, or the gate refuses; it is taken off again.
        """
        adapter = AdapterFolder.read(folder)
        require_same_base(adapter, self._sources.base)
        lora_rank(adapter)
        if len(adapter.tokenizer()) > len(load_tokenizer(self._folder)):
            raise UserError(
                "it was trained with tokens that its base does not have",
                where=str(adapter.folder),
                remedy="merge it (`luthier merge`) and serve the merged folder",
            )

        def load(dtype: torch.dtype) -> tuple[Any, Any]:
            saved = load_saved(adapter.folder, dtype=dtype)
            for parameter in saved.model.parameters():
                parameter.data = parameter.data.to(dtype)  # an adapter's are in float32 whatever its base's are
            return saved.model, saved.tokenizer

        self._server.load(name, adapter.folder)
        try:
            return self._passes(name, adapter.folder, load, tuned=True)
        except BaseException:
            with contextlib.suppress(UserError):
                self._server.unload(name)
            raise

    def _passes(
        self, name: str, folder: Path, load: Callable[[torch.dtype], tuple[Any, Any]], *, tuned: bool
    ) -> list[int]:
        record = self._cache / f"{key_of(folder, self._started)}.json"
        if record.is_file():
            stops: list[int] = json.loads(record.read_text(encoding="utf-8"))["stops"]
            return stops
        model, tokenizer = load(torch.float32)
        stops, prompts = stop_tokens(model, tokenizer), gate_prompts(tokenizer, (*QUESTIONS, *_MORE_QUESTIONS))
        runtime = VllmRuntime(self._server, name, vocabulary=model.config.get_text_config().vocab_size, stops=stops)
        report = check_runtime(
            model,
            runtime,
            tokenizer,
            prompts,
            noise=self._noise(model, load, token_ids(tokenizer, prompts, None)),
            base=model if tuned else None,
            stops=stops,
            name=f"vLLM {self._dtype}" + (f", adapter {folder}" if tuned else ""),
        )
        report.reasons += stops_lost(runtime, tokenizer, stops)
        report.passed = not report.reasons
        self._console.print(render_parity(report))
        require(report)
        with writing(record):
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(report.to_dict() | {"stops": stops}, indent=2) + "\n", encoding="utf-8")
        return stops

    def _noise(
        self, model: Any, load: Callable[[torch.dtype], tuple[Any, Any]], ids: Sequence[Sequence[int]]
    ) -> dict[str, float]:
        """What computing in the server's precision costs transformers itself at the places that are compared.

        A few places tell most of a divergence, and which these are is chance. So an adapter is computed in both ways
        that there are, beside its base and merged into it, and the dearer one counts. Of SmolLM2 with two adapters, 29
        prompts each, vLLM lay 0.84 to 1.13 times as far from float32 as transformers in bfloat16 (mean |Δ
        log-probability|).
        """
        if self._dtype == "float32":
            return {}
        plain = at_places(model, ids)
        rough, _ = load(getattr(torch, self._dtype))
        found = [distance(plain, at_places(rough, ids))]
        if hasattr(rough, "merge_and_unload"):
            found.append(distance(plain, at_places(rough.merge_and_unload(), ids)))
        return {key: max(each[key] for each in found) for key in found[0]}
