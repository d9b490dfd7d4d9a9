"""A tuned model in fewer bits: one folder that plain transformers loads, behind the parity gate."""

from __future__ import annotations

import contextlib
import gc
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group

from luthier.data.examples import TrainingExample
from luthier.deployment.footprint import Footprint, footprints, render_footprints
from luthier.deployment.merge import PROMPTS, claim, hand_over, merge_adapter
from luthier.deployment.parity import ParityReport, check_parity, render_parity, require
from luthier.deployment.precision import check_packed, layers_to_pack
from luthier.deployment.rows import Rows
from luthier.errors import UserError, counted
from luthier.methods.answering import load_to_answer
from luthier.methods.saved import SavedModel, load_saved
from luthier.models.loading import load_config, load_model, load_tokenizer, resolve_model, set_stop_tokens, without_bars
from luthier.models.packed import PACKINGS, library_of, require_library
from luthier.runfolder import QUANTIZED, RunFolder
from luthier.training.checkpoint import writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD = "luthier_quantize.json"
CASTS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_SPELLINGS = {"fp16": "float16", "bf16": "bfloat16"}


@dataclass(slots=True)
class QuantizedResult:
    """What :func:`quantize_model` has written, and what it measured."""

    folder: Path
    quantization: str
    parity: ParityReport
    before: Footprint
    after: Footprint
    rows: int
    """How many rows the perplexities are of."""
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """What lies beside the weights."""
        measured = {"before": self.before.to_dict(), "after": self.after.to_dict(), "rows": self.rows}
        return {"quantization": self.quantization, "parity": self.parity.to_dict(), **measured, "notes": self.notes}

    def render(self) -> Group:
        """The gate's numbers, and size, speed and quality before and after."""
        table = render_footprints(self.before, self.after, self.quantization, self.rows)
        return Group(render_parity(self.parity), table, *self.notes)


def quantize_model(
    model_path: str | Path,
    output_path: str | Path,
    quantization: str = "int8",
    *,
    calibration: Any | None = None,
    data: str | Path | Sequence[TrainingExample] | None = None,
    prompts: Sequence[str] | None = None,
    max_rows: int = 64,
) -> QuantizedResult:
    """Store a model's weights in fewer bits.

    An adapter becomes part of its base first. The folder is written aside, loaded again as any user would, held against
    the model it was made from, and renamed where it passes.

    Args:
        model_path: a run, adapter or model folder, an embedded name or a hub id.
        output_path: a new or empty folder, or one that holds an earlier quantised model.
        quantization: ``int8`` (torchao, a scale a row), ``int4`` (torchao, a scale for 32 weights, a byte a weight on
            disk), ``nf4`` (bitsandbytes, half a byte a weight), ``float16`` or ``bfloat16``.
        calibration: rows that a method learns its rounding from. None of these methods does, so it is refused.
        data: rows, or a file of rows, that perplexity is measured on and the gate asks; None: the run's held-out ones.
        prompts: rendered texts for the gate; None: those of the rows, or a few plain ones.
        max_rows: how many rows the perplexity is of.

    Raises:
        UserError: there is no such kind or model, the library it needs is missing, the folder is in use, the disk is
            full, or the parity gate refuses; nothing is left behind.
    """
    kind = _known(quantization)
    if calibration is not None:
        raise UserError(
            f"{kind} rounds each weight by itself, and no method here learns its rounding from rows",
            where="quantize_model(calibration=...)",
            remedy="leave calibration out; rows to measure the loss of quality on go into data. GGUF's K-quants heed "
            "rows: `luthier export --kind q4_k_m --calibration FILE`",
        )
    target = Path(output_path).expanduser()
    claim(target, RECORD, "quantised model")
    if kind in PACKINGS:
        require_library(PACKINGS[kind].library, f"quantization={kind!r}")
    aside = target.parent / f".writing-{target.name}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with _whole_model(model_path, aside.parent / f".merging-{target.name}") as whole:
            rows = Rows.of(model_path, whole.tokenizer, data, max_rows)
            asked = list(prompts or rows.prompts or PROMPTS)
            parity = _written(whole, aside, kind, asked, target)
            gc.collect()
            sides = [load_to_answer(whole.place), load_to_answer(aside)]
            before, after = footprints(sides, [whole.place, aside], asked, rows.encoded)
        result = QuantizedResult(target, kind, parity, before, after, len(rows.encoded), rows.notes + whole.notes)
        hand_over(aside, target, RECORD, {"base": whole.base_name, **result.to_dict()})
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return result


def quantize_saved(
    model_path: str | Path,
    output: Path | None,
    quantization: str,
    *,
    data: Path | None = None,
    max_rows: int = 64,
) -> QuantizedResult:
    """:func:`quantize_model` into a run's own folder where no other is named: ``RUN/int8`` and so on.

    Raises:
        UserError: what is named is no folder of its own and no output is, or see there.
    """
    place = Path(model_path).expanduser()
    if output is None and not RunFolder(place).manifest:
        raise UserError(
            f"{str(model_path)!r} is no run, so the quantised model needs a folder of its own",
            remedy=f"name one: `luthier quantize {model_path} OUTPUT --to {quantization}`",
        )
    return quantize_model(
        model_path, output or place / _known(quantization), quantization, data=data, max_rows=max_rows
    )


def _known(quantization: str) -> str:
    """A kind's own name.

    Raises:
        UserError: there is no such kind.
    """
    kind = _SPELLINGS.get(str(quantization), str(quantization))
    if kind not in QUANTIZED:
        raise UserError(
            f"there is no quantization {quantization!r}",
            where="quantization",
            remedy=f"one of {', '.join(QUANTIZED)}",
        )
    return kind


@dataclass(slots=True)
class _Whole:
    """A model without adapters, as it lies on disk."""

    place: str
    """A folder, or a hub id."""
    tokenizer: PreTrainedTokenizerBase
    base: SavedModel | None
    """What gives the base by ``as_base``; None where none is known."""
    base_name: str | None
    dtype: torch.dtype
    """Of what is not packed: as the base is stored, for adapters are often trained in a finer one."""
    notes: list[str] = field(default_factory=list)


@contextlib.contextmanager
def _whole_model(model_path: str | Path, folder: Path) -> Iterator[_Whole]:
    """A model folder for a while: an adapter is merged into ``folder``, which is removed afterwards."""
    saved = load_saved(model_path)
    if not saved.head.writes:
        raise UserError(
            f"{str(model_path)!r} holds no language model that writes", remedy="name the run of a causal language model"
        )
    if saved.kind == "model" and library_of(saved.model.config) is not None:
        raise UserError(f"{str(model_path)!r} is quantised already", remedy="name the model that it was made from")
    tokenizer = saved.tokenizer
    if saved.kind != "adapter":
        place = _folder_of(model_path, saved)
        known = saved.base_name is not None and saved.base_name != str(model_path)
        dtype = load_config(str(saved.base_name)).dtype if known else saved.model.dtype
        base = SavedModel(saved.model, tokenizer, "model", saved.base_name) if known else None
        yield _Whole(place, tokenizer, base, saved.base_name if known else None, dtype or saved.model.dtype)
        return
    shutil.rmtree(folder, ignore_errors=True)
    try:
        merge_adapter(model_path, folder)
        stored = load_config(str(saved.base_name)).dtype or saved.model.dtype
        yield _Whole(str(folder), tokenizer, saved, saved.base_name, stored, ["the adapter was merged first"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _folder_of(model_path: str | Path, saved: SavedModel) -> str:
    place = str(saved.model.name_or_path or resolve_model(model_path))
    if place.endswith(".gguf"):
        raise UserError(
            f"{str(model_path)!r} is a GGUF file, which cannot be quantised again",
            remedy="name a folder or a hub id that holds the weights as safetensors",
        )
    return place


def _written(whole: _Whole, aside: Path, kind: str, prompts: Sequence[str], target: Path) -> ParityReport:
    """The quantised model in ``aside``, loaded again and held against the model it was made from.

    Raises:
        UserError: the gate refuses.
    """
    reference = load_model(whole.place, dtype=torch.float32)
    set_stop_tokens(reference, whole.tokenizer)
    with writing(target), without_bars():
        made = _made(whole, reference, kind)
        set_stop_tokens(made, whole.tokenizer)
        made.save_pretrained(aside)
        whole.tokenizer.save_pretrained(aside)
    del made
    candidate, travelled = load_model(aside), load_tokenizer(aside)
    with contextlib.nullcontext() if whole.base is None else whole.base.as_base() as base:
        arguments: dict[str, Any] = {"base": base, "candidate_tokenizer": travelled, "name": kind}
        if kind in CASTS:
            report = check_parity(reference, candidate, whole.tokenizer, prompts, **arguments)
        else:
            report = check_packed(reference, candidate, whole.tokenizer, prompts, PACKINGS[kind], **arguments)
    require(report)
    return report


def _made(whole: _Whole, reference: Any, kind: str) -> Any:
    """The model with its weights in fewer bits.

    Raises:
        UserError: none of its layers can be packed.
    """
    from transformers import AutoModelForCausalLM

    if kind in CASTS:
        return load_model(whole.place, dtype=CASTS[kind])
    packing = PACKINGS[kind]
    packed, left = layers_to_pack(reference, packing)
    if not packed:
        raise UserError(
            f"no layer of this model can be stored as {kind}: "
            + (f"their rows are no multiples of {packing.block}" if left else "it has no linear layers"),
            remedy="use float16 or bfloat16",
        )
    if left:
        whole.notes.append(f"{counted(len(left), 'layer')} stayed whole: rows are no multiples of {packing.block}")
    head = reference.get_output_embeddings()
    names = [n for n, m in reference.named_modules() if m is head]
    return AutoModelForCausalLM.from_pretrained(
        whole.place,
        dtype=whole.dtype,
        quantization_config=packing.config(whole.dtype, [*names, *left]),
        # Where all models are loaded; a GPU may not hold what is not yet quantised.
        device_map={"": "cpu"},
    ).eval()
