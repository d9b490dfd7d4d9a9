"""A tuned model as an ONNX folder, behind the parity gate: onnxruntime must say and answer what transformers does."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.data.render import end_of_turn_ids
from luthier.deployment.merge import PROMPTS, claim, hand_over, merge_model, untuned
from luthier.deployment.onnx_graph import require_exportable, require_onnx, write_graph
from luthier.deployment.onnx_runtime import OnnxRuntime
from luthier.deployment.parity import FLOOR, MULTIPLE, ParityReport, require
from luthier.deployment.runtimes import check_runtime
from luthier.deployment.tokens import limit_of, token_ids
from luthier.methods.saved import SavedModel, load_saved
from luthier.models.heads import Head
from luthier.models.loading import load_model, set_padding, set_stop_tokens, without_bars
from luthier.models.quantized import quantized_from
from luthier.training.checkpoint import writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD = "luthier_onnx.json"
_LIBRARIES = ("transformers", "torch", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, slots=True)
class OnnxExport:
    """An exported folder and what was measured of it."""

    files: list[Path]
    """All that were written."""
    report: ParityReport
    sizes: dict[str, int]
    """Bytes of each, by name."""


def export_onnx(path: str | Path, output_dir: str | Path, *, prompts: Sequence[str] | None = None) -> OnnxExport:
    """Write a model as ONNX in float32, with its tokenizer, template, generation config and stop tokens.

    An adapter is merged first. The folder is written aside, run by onnxruntime, compared with the model that was
    tuned, and renamed when it passes.

    Args:
        path: a run folder, an adapter folder, a model folder, an embedded model's name or a hub id.
        output_dir: an empty or new folder, or one that holds an earlier ONNX export.
        prompts: rendered texts for the parity gate; None: a few plain ones.

    Raises:
        UserError: a library is missing, there is no model, it is of a kind that is not exported, its method does not
            merge, the folder is in use, the disk is full, or the parity gate refuses; nothing is left behind.
    """
    require_onnx()
    target = Path(output_dir).expanduser()
    claim(target, RECORD, "ONNX export")
    saved = load_saved(path, dtype=torch.float32)
    require_exportable(saved.model)
    asked = prompts or PROMPTS
    aside = target.parent / f".writing-{target.name}"
    merged = target.parent / f".writing-{target.name}-merged"
    for folder in (aside, merged):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        plain = saved.model if saved.kind == "model" else _merged(saved, merged, asked)
        with writing(target), without_bars():
            aside.mkdir(parents=True)
            _write(plain, saved.tokenizer, aside)
        # What an adapter learnt beside a quantised base is held against the merge, which has its own gate.
        reference = plain if quantized_from(saved.model) is not None else saved.model
        report = check_export(reference, saved.tokenizer, aside, asked, base=_base(saved, path, plain))
        require(report)
        versions = {name: version(name) for name in _LIBRARIES}
        hand_over(aside, target, RECORD, report.to_dict() | {"base": saved.base_name, "versions": versions})
    finally:
        for folder in (aside, merged):
            shutil.rmtree(folder, ignore_errors=True)
    files = sorted(p for p in target.iterdir() if p.is_file())
    return OnnxExport(files, report, {p.name: p.stat().st_size for p in files})


def check_export(
    reference: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    prompts: Sequence[str],
    *,
    base: Any | None = None,
) -> ParityReport:
    """Run an exported folder in onnxruntime and compare it with the model that it was made from.

    Args:
        reference: the model that was tested, in float32; plain or PEFT.
        tokenizer: the reference's.
        folder: the export.
        prompts: rendered texts, or plain ones for a model that does not write.
        base: the untuned model, or a PEFT model whose adapter is switched off to get it.

    Returns:
        the report: of a model that writes as :func:`check_runtime` makes it, of others the |Δ logit|. ``batch_max``
        is the greatest |Δ logit| between the texts run one by one and all at once, padded.
    """
    runtime, head = OnnxRuntime(folder), Head.of(reference)
    limit = limit_of(reference, tokenizer)
    if head.writes:
        stops = end_of_turn_ids(tokenizer)
        report = check_runtime(reference, runtime, tokenizer, prompts, noise={}, base=base, stops=stops, name="ONNX")
        missing = [i for i in stops if i not in runtime.stops]
        if missing:
            names = ", ".join(repr(t) for t in tokenizer.convert_ids_to_tokens(missing))
            report.reasons.append(f"generation does not stop at {names}, which ends an answer")
        if runtime.tokenizer.chat_template != tokenizer.chat_template:
            report.reasons.append("the chat template was lost")
    else:
        report = _check_scores(reference, runtime, token_ids(tokenizer, prompts, limit), base)
        report.prompts = len(prompts)
        if _classes(folder) != head.classes:
            report.reasons.append("the classes' names or numbers were lost")
    if token_ids(runtime.tokenizer, prompts, limit) != (ids := token_ids(tokenizer, prompts, limit)):
        report.reasons.append("the tokenizer gives other tokens for the same text")
    _check_batch(report, runtime, ids)
    report.passed = not report.reasons
    return report


def _check_scores(reference: Any, runtime: OnnxRuntime, ids: Sequence[Sequence[int]], base: Any | None) -> ParityReport:
    """Logits of a model that does not write: those of each place, or of the classes."""
    ours, theirs = [_scores(reference, i) for i in ids], [runtime.logits(i) for i in ids]
    apart = torch.cat([(a - b).abs().flatten() for a, b in zip(ours, theirs, strict=True)])
    bound = MULTIPLE * FLOOR["mean"] * _scale(ours)
    numbers = {"candidate_mean": float(apart.mean()), "candidate_max": float(apart.max()), "bound_mean": bound}
    same = [bool((a.argmax(-1) == b.argmax(-1)).all()) for a, b in zip(ours, theirs, strict=True)]
    numbers["answers_same"] = sum(same) / len(same)
    reasons = []
    if not numbers["candidate_mean"] <= bound:
        reasons.append(f"the mean |Δ logit| is {numbers['candidate_mean']:.3g}; the bound is {bound:.3g}")
    if base is not None:
        untouched = _untuned_scores(base, ids)
        moved = float(torch.cat([(a - b).abs().flatten() for a, b in zip(ours, untouched, strict=True)]).mean())
        numbers["tuning_mean"] = moved
        if moved == 0:
            reasons.append("the tuned model does not differ from its base: nothing was learnt, or the adapter is off")
        elif not moved > numbers["candidate_mean"]:
            reasons.append(
                f"it lies as far from the tuned model ({numbers['candidate_mean']:.3g}) as the base does ({moved:.3g})"
            )
    return ParityReport("ONNX", not reasons, reasons, numbers)


def _check_batch(report: ParityReport, runtime: OnnxRuntime, ids: Sequence[Sequence[int]]) -> None:
    """A graph that has lost its free batch, or reads padding, answers one row right and several wrong."""
    alone = [runtime.logits(i) for i in ids]
    apart = [float((a - b).abs().max()) for a, b in zip(alone, runtime.batch_logits(ids), strict=True)]
    report.numbers["batch_max"] = max(apart)
    bound = FLOOR["max"] * _scale(alone)
    if not max(apart) <= bound:
        report.reasons.append(f"padded rows of a batch differ from the same rows alone by {max(apart):.3g}")


def _scale(logits: Sequence[torch.Tensor]) -> float:
    """Mean |logit|, at least 1: rounding in float32 grows with it."""
    return max(1.0, float(torch.cat([a.flatten() for a in logits]).abs().mean()))


@torch.no_grad()
def _scores(model: Any, ids: Sequence[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0]
    return logits.float()


def _untuned_scores(base: Any, ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    if hasattr(base, "disable_adapter"):
        with base.disable_adapter():
            return [_scores(base, i) for i in ids]
    return [_scores(base, i) for i in ids]


def _write(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    set_padding(model, tokenizer)
    set_stop_tokens(model, tokenizer)
    write_graph(model, tokenizer, folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if Head.of(model).writes:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _merged(saved: SavedModel, folder: Path, prompts: Sequence[str]) -> Any:
    assert saved.method is not None
    saved.method.require_merging()
    merge_model(saved.model, saved.tokenizer, folder, prompts=prompts)
    return load_model(folder, dtype=torch.float32)


def _base(saved: SavedModel, path: str | Path, plain: Any) -> Any | None:
    """The untuned model; None where nothing says what it was, or it is not at hand."""
    if saved.kind == "adapter" and quantized_from(saved.model) is None:
        return saved.model
    if saved.base_name is None or not Path(str(path)).expanduser().is_dir():
        return None
    return untuned(saved.base_name, plain, saved.head)


def _classes(folder: Path) -> Any:
    from transformers import AutoConfig

    return Head.of_config(AutoConfig.from_pretrained(folder)).classes
