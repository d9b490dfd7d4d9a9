"""An adapter becomes part of its base's weights: one plain model, behind the parity gate."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.deployment.parity import ParityReport, check_parity, require
from luthier.deployment.quantized_merge import weigh_merge
from luthier.errors import UserError
from luthier.methods import get_method
from luthier.methods.saved import AdapterFolder, adapter_dtype, load_saved
from luthier.models.heads import Head
from luthier.models.loading import load_model, load_tokenizer, resolve_model, set_stop_tokens, without_bars
from luthier.models.quantized import QuantizedFrom, quantized_from
from luthier.training.checkpoint import writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD = "luthier_merge.json"
PROMPTS = ("The capital of France is", "def add(a, b):\n    return", "今天天气很好，我们")


def merge_adapter(
    adapter_path: str | Path,
    output_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    prompts: Sequence[str] | None = None,
    shard_by_shard: bool | None = None,
    max_shard_size: int | None = None,
) -> ParityReport:
    """Merge a saved adapter into its base and save the result.

    Where memory does not hold the model, it is merged one layer at a time (``deployment.sharded_merge``), which gives
    the same weights; the gate then compares fewer positions.

    Args:
        adapter_path: a run or adapter folder.
        output_dir: an empty or new folder, or one that holds an earlier merge.
        dtype: precision of the merged weights; None: the base's, or the adapter's where that is finer, as where a
            base that is stored in bfloat16 was tuned in float32.
        prompts: rendered texts for the parity gate; None: a few plain ones.
        shard_by_shard: whether it is merged one layer at a time; None: where ``max_shard_size`` is given or free
            memory would not hold the model, and it can be.
        max_shard_size: of one file of weights, in bytes; None: 5 GB where it is merged one layer at a time.

    Raises:
        UserError: there is no adapter, the folder is in use, the disk is full, or the parity gate refuses.
    """
    from luthier.deployment import sharded_merge

    if shard_by_shard is None:
        shard_by_shard = max_shard_size is not None or sharded_merge.is_needed(adapter_path)
    if shard_by_shard:
        size = max_shard_size or sharded_merge.SHARD
        return sharded_merge.merge_sharded(adapter_path, output_dir, dtype=dtype, prompts=prompts, max_shard_size=size)
    if max_shard_size is not None:
        raise UserError("max_shard_size goes with shard_by_shard", remedy="leave one of them out")
    saved = load_saved(adapter_path, dtype=dtype)
    if saved.kind != "adapter":
        raise UserError(f"{str(adapter_path)!r} holds no adapter", remedy="name the folder of a LoRA run")
    if saved.method is not None:
        saved.method.require_merging()
    if dtype is None and saved.folder is not None:
        # In a coarser base's precision, small updates would be rounded before they are added, and with them.
        held = next(saved.model.parameters()).dtype
        finest = torch.promote_types(held, adapter_dtype(saved.folder) or held)
        if finest != held:
            saved = load_saved(adapter_path, dtype=finest)
    return _merge(saved.model, saved.tokenizer, output_dir, prompts, dtype)


def plain_model(path: str | Path, work: Path, prompts: Sequence[str]) -> tuple[Path, str | None]:
    """A folder of plain weights, for what other programs read.

    Args:
        path: a run, adapter or model folder, or an embedded model's name.
        work: a folder; an adapter is merged in it.
        prompts: rendered texts for the gate of that merge.

    Returns:
        the folder, and the name of what it was tuned from; None: nothing says that.

    Raises:
        UserError: there is no model, or the merge is refused.
    """
    folder = Path(path).expanduser()
    try:
        adapter = AdapterFolder.read(path)
    except UserError:
        if not folder.is_dir() or (folder / "config.json").is_file():
            return Path(resolve_model(path)), None
        saved = load_saved(path)
        return Path(saved.model.name_or_path), saved.base_name
    merge_adapter(path, work / "merged", prompts=prompts)
    return work / "merged", adapter.base_name


def merge_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    *,
    prompts: Sequence[str] | None = None,
) -> ParityReport:
    """Merge a PEFT model into one plain model and save it with its tokenizer, template and stop tokens.

    The low-rank product is formed and added in float32 and rounded once to the weights' precision. The result is
    written aside, loaded again as any user would, compared with the unmerged model, and renamed when it passes.

    A quantised base is loaded once more as it is stored, and the adapter becomes part of that: in 4 bits most of
    what was learnt would be rounded away. What each way costs is measured beside.

    Args:
        model: a PEFT model whose method merges; it is left as it was.
        tokenizer: saved beside the weights.
        output_dir: an empty or new folder, or one that holds an earlier merge.
        prompts: rendered texts for the parity gate; None: a few plain ones.

    Raises:
        UserError: the folder is in use, the disk is full, or the parity gate refuses; nothing is left behind.
    """
    return _merge(model, tokenizer, output_dir, prompts, None)


def _merge(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    prompts: Sequence[str] | None,
    dtype: torch.dtype | None,
) -> ParityReport:
    """See :func:`merge_model`; ``dtype`` is that of merged weights whose base is quantised, None: the adapter's, or
    the stored base's where that is finer."""
    if not hasattr(model, "merge_and_unload"):
        raise UserError("this model has no adapter to merge", remedy="use the folder of the tuned model as it is")
    target = Path(output_dir).expanduser()
    claim(target)
    aside = target.parent / f".writing-{target.name}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with writing(target), without_bars():
            aside.mkdir(parents=True)
            origin = quantized_from(model)
            whole = model if origin is None else _on_stored_base(model, origin, aside / "adapter")
            merged = _merged(whole, None if origin is None else dtype)
            set_stop_tokens(merged, tokenizer)
            merged.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
        stored = merged.dtype
        del merged
        reloaded = load_model(aside, dtype=stored)
        asked = prompts or PROMPTS
        report = check_parity(
            whole,
            reloaded,
            tokenizer,
            asked,
            base=whole,
            candidate_tokenizer=load_tokenizer(aside),
            name="merged",
        )
        if origin is not None:
            again = load_model(aside, dtype=next(model.parameters()).dtype, quantization=origin.quantization)
            weigh_merge(report, model, whole, reloaded, again, tokenizer, asked)
        require(report)
        hand_over(aside, target, RECORD, report.to_dict())
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return report


def untuned(base_name: str | None, tuned: Any, head: Head | None = None) -> Any | None:
    """What a model was tuned from, in float32 and with as many rows of embeddings, for a gate to hold it against.

    Args:
        base_name: its name; None: nothing says it.
        tuned: the model.
        head: of it; None: it writes.

    Returns:
        None where it is not known, or not at hand.
    """
    if base_name is None:
        return None
    try:
        base = load_model(base_name, dtype=torch.float32, head=head or Head.of(tuned))
    except UserError:
        return None
    rows = tuned.get_input_embeddings().weight.shape[0]
    if rows > base.get_input_embeddings().weight.shape[0]:  # type: ignore[index]
        base.resize_token_embeddings(rows, mean_resizing=False)
    return base


def claim(target: Path, record: str = RECORD, what: str = "merge") -> None:
    """Only an empty folder or an earlier hand-over of the same kind is written over.

    Args:
        target: the folder.
        record: the file that such a hand-over leaves.
        what: its kind, for the message.

    Raises:
        UserError: the folder is another.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"{str(target)!r} is a file", remedy="name a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / record).is_file():
        raise UserError(
            f"{str(target)!r} is not empty and holds no earlier {what}",
            remedy="name another folder; nothing was touched",
        )


def hand_over(aside: Path, target: Path, record: str, told: dict[str, Any]) -> None:
    """Give a folder that has passed its gate its name, in place of an earlier one.

    Args:
        aside: the folder, whole but for its record.
        target: its name, which :func:`claim` has let through.
        record: the file that such a hand-over leaves.
        told: what that says.

    Raises:
        UserError: the disk is full, or the place cannot be written.
    """
    with writing(target):
        (aside / record).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)


def _on_stored_base(model: Any, origin: QuantizedFrom, folder: Path) -> Any:
    """The adapter of a model whose base is quantised, on that base as it is stored; ``folder`` is used and removed.

    The precision is the finer one of the stored weights and of the adapter, so that neither is rounded.
    """
    method = get_method("lora")  # what is beside quantised weights is a plain LoRA
    method.save(model, folder)
    finest = torch.promote_types(origin.dtype, next(model.parameters()).dtype)
    base = load_model(origin.name, revision=origin.revision, dtype=finest, head=Head.of(model))
    rows = model.get_input_embeddings().weight.shape[0]
    if rows > base.get_input_embeddings().weight.shape[0]:  # type: ignore[index]
        base.resize_token_embeddings(rows, mean_resizing=False)
    whole = method.load(base, folder)
    shutil.rmtree(folder)
    return whole.eval()


def _merged(model: Any, dtype: torch.dtype | None = None) -> Any:
    """A merged copy: added in float32, rounded once to the precision of each weight, or to ``dtype``."""
    fine = copy.deepcopy(model)
    dtype = dtype or next(fine.parameters()).dtype
    base = fine.get_base_model()
    inputs, outputs = base.get_input_embeddings(), base.get_output_embeddings()
    if hasattr(outputs, "base_layer") or hasattr(inputs, "base_layer"):
        # One of a tied pair is adapted: merged into the shared weight, it would change the other as well.
        plain = getattr(outputs, "base_layer", outputs)
        plain.weight = torch.nn.Parameter(plain.weight.detach().clone(), requires_grad=False)
    _take_whole_modules(base)
    merged = fine.float().merge_and_unload().to(dtype)
    _separate_heads(merged)
    return merged


def _take_whole_modules(base: Any) -> None:
    """Put modules that were trained whole into their places: PEFT's merge of IA3 does so for linear layers alone."""
    from peft.utils.other import ModulesToSaveWrapper

    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            base.set_submodule(name, module.modules_to_save[module.active_adapters[0]])


def _separate_heads(merged: Any) -> None:
    """Where training has made input and output embeddings differ, the saved model must not tie them again."""
    inputs, outputs = merged.get_input_embeddings(), merged.get_output_embeddings()
    config = merged.config.get_text_config()
    if outputs is None or not getattr(config, "tie_word_embeddings", False):
        return
    if not torch.equal(inputs.weight, outputs.weight):
        config.tie_word_embeddings = False
        merged.config.tie_word_embeddings = False
    elif inputs.weight is not outputs.weight:
        outputs.weight = inputs.weight
