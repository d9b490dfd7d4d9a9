"""An adapter becomes part of its base on a machine that cannot hold the base: one layer in memory at a time.

The base's files are read tensor by tensor. Those under an adapter are merged by PEFT's own arithmetic, in float32, and
rounded once, as :mod:`luthier.deployment.merge` does with the whole model; the tensors are the same bit for bit. The
parity gate then runs both models block by block, from disk.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.deployment.merge import PROMPTS, RECORD, claim, hand_over
from luthier.deployment.offloaded_adapter import IN_MEMORY, OffloadedTuned, adapter_layers, owner_of
from luthier.deployment.parity import ParityReport, jitter, judge, judge_routing, require
from luthier.deployment.routing import Routing
from luthier.deployment.shards import ShardWriter
from luthier.deployment.tokens import left_behind, token_ids
from luthier.errors import UserError
from luthier.methods.saved import AdapterFolder, adapter_dtype
from luthier.models.catalogue import CATALOGUE
from luthier.models.fingerprint import fingerprint
from luthier.models.heads import Head
from luthier.models.loading import load_config, load_tokenizer, resolve_model, set_stop_tokens, without_bars
from luthier.models.memory import free_memory
from luthier.models.offloaded import OffloadedModel, block_by_block, load_offloaded
from luthier.training.checkpoint import writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD = 5 * 10**9
"""Bytes of one file at most, where nothing else is asked for."""
# What the gate holds beside a block: so many prompts of so many tokens as activations, and so many bytes of logits.
_PROMPTS, _TOKENS, _LOGITS = 8, 128, 2**26


def is_needed(adapter_path: str | Path) -> bool:
    """Whether this machine's free memory would not hold a merge in memory, and one shard by shard can take its place.

    The merge and its gate hold the model in its own precision and a float32 copy of it, each with what is made of it.
    What cannot be judged by files that are here, such as a base that is yet to be fetched, is not needed.
    """
    try:
        adapter = AdapterFolder.read(adapter_path)
        folder = _local_folder(adapter.base_name)
        if folder is None or _refusal(adapter) is not None:
            return False
    except UserError:
        return False  # the merge itself says what is wrong
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    stored = getattr(load_config(adapter.base_name), "dtype", None) or torch.float32
    return size // stored.itemsize * (2 * stored.itemsize + 4) > free_memory(torch.device("cpu"))


def _refusal(adapter: AdapterFolder) -> UserError | None:
    """Why an adapter cannot be merged shard by shard, where that shows before anything is loaded."""
    where, remedy = str(adapter.folder), IN_MEMORY
    if not adapter.head.writes:
        return UserError("only models that write are merged shard by shard", where=where, remedy=remedy)
    start = str(adapter.config.get("init_lora_weights", True)).lower()
    if start.startswith(("pissa", "olora", "corda", "lora_ga", "loftq")):
        return UserError(f"an adapter that began as {start} changes its base's weights", where=where, remedy=remedy)
    folder = _local_folder(adapter.base_name)
    if folder is None:
        return None
    if not any(folder.glob("*.safetensors")):
        return UserError("the base is not stored as safetensors", where=str(folder), remedy=remedy)
    if getattr(load_config(adapter.base_name), "quantization_config", None) is not None:
        return UserError("the base is stored quantised", where=str(folder), remedy="name the model it was made from")
    return None


def _local_folder(name: str) -> Path | None:
    """Where a model's files lie; None: not on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    place = Path(resolve_model(name))
    if place.is_file():
        return place.parent / "no safetensors"
    if place.is_dir() or name in CATALOGUE:
        return place
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def merge_sharded(
    adapter_path: str | Path,
    output_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    prompts: Sequence[str] | None = None,
    max_shard_size: int = SHARD,
) -> ParityReport:
    """Merge a saved adapter into its base, never holding more than a block of it in memory, and save the result.

    Peak memory is that of the greatest single matrix under an adapter, a few times in float32, or of one block (a
    layer of the stack, or the embeddings) in float32, whichever is more. Beside a base that was quantised, the adapter
    becomes part of the base as it is stored; what it costs to leave the quantised weights is not measured here.

    Args:
        adapter_path: a run or adapter folder.
        output_dir: an empty or new folder, or one that holds an earlier merge.
        dtype: see :func:`luthier.deployment.merge.merge_adapter`.
        prompts: rendered texts for the parity gate, of which a few are taken; None: a few plain ones.
        max_shard_size: of one file, in bytes.

    Raises:
        UserError: there is no adapter, or none that can be merged so, the folder is in use, the disk is full, or the
            parity gate refuses; nothing is left behind.
    """
    adapter = AdapterFolder.read(adapter_path)
    adapter.method.require_merging()
    if (refused := _refusal(adapter)) is not None:
        raise refused
    target = Path(output_dir).expanduser()
    claim(target)
    aside = target.parent / f".writing-{target.name}"
    scratch = target.parent / f".offloading-{target.name}"
    try:
        for folder in (aside, scratch):
            shutil.rmtree(folder, ignore_errors=True)
        with writing(target), without_bars():
            aside.mkdir(parents=True)
            tokenizer = adapter.tokenizer()
            base, merged_dtype = _base(adapter, dtype, scratch / "base")
            plan = _Plan.of(base, merged_dtype)
            tuned = OffloadedTuned.load(adapter, base)
            _save(tuned, plan, tokenizer, aside, max_shard_size)
            merged = load_offloaded(aside, scratch / "merged", dtype=merged_dtype)
        report = _gate(tuned, merged, tokenizer, load_tokenizer(aside), prompts or PROMPTS)
        require(report)
        hand_over(aside, target, RECORD, report.to_dict())
    finally:
        for folder in (aside, scratch):
            shutil.rmtree(folder, ignore_errors=True)
    return report


def _base(adapter: AdapterFolder, dtype: torch.dtype | None, scratch: Path) -> tuple[OffloadedModel, torch.dtype]:
    """An adapter's base on disk, read in the precision it is merged in, and that of what is written.

    Raises:
        UserError: it is another than the adapter was trained on.
    """
    base = load_offloaded(adapter.base_name, scratch, head=adapter.head)
    held = next(base.model.parameters()).dtype
    finest = torch.promote_types(held, adapter_dtype(adapter.folder) or held)
    if dtype is not None:
        # A quantised base is loaded anew as it is stored, and is not rounded before.
        finest = dtype if adapter.quantization is None else torch.promote_types(held, dtype)
    if finest != held:
        base = load_offloaded(adapter.base_name, scratch, dtype=finest, head=adapter.head)
    adapter.require_base(fingerprint(base.model, base.read))
    rows = int(base.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    if adapter.record.get("rows", rows) > rows:
        base.model.resize_token_embeddings(adapter.record["rows"], mean_resizing=False)
        base.model.tie_weights()
    return base, dtype or finest


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is written of a base."""

    dtype: torch.dtype
    state: dict[str, torch.Tensor]
    """By the names of a plain model, on the meta device but for buffers."""
    tied: dict[str, str]
    """Those that are not written, and the one that each is the same as."""

    @classmethod
    def of(cls, base: OffloadedModel, dtype: torch.dtype) -> _Plan:
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        state = dict(base.model.state_dict())
        for ignored in base.model._keys_to_ignore_on_save or ():
            state.pop(ignored, None)
        written = remove_tied_weights_from_state_dict(dict(state), base.model)
        same = {id(base.model.get_parameter_or_buffer(name)): name for name in written}
        tied = {n: same[id(base.model.get_parameter_or_buffer(n))] for n in state if n not in written}
        return cls(dtype, {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}, tied)


def _save(
    tuned: OffloadedTuned, plan: _Plan, tokenizer: PreTrainedTokenizerBase, folder: Path, max_shard_size: int
) -> None:
    """Write the merged model as ``save_pretrained`` writes it."""
    base = tuned.model.get_base_model()
    written = dict(plan.state)
    if _heads_differ(tuned, plan):
        base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False
    else:
        written = {name: tensor for name, tensor in written.items() if name not in plan.tied}
    announced: dict[str, torch.Tensor] = {}
    for name, tensor in written.items():
        parts = _as_stored(base, name, tensor.to("meta"))
        if announced.keys() & parts.keys():
            raise UserError(
                f"{next(iter(parts))} is stored as one and held as several weights",
                remedy=IN_MEMORY,
            )
        announced |= parts
    with ShardWriter(folder, announced, max_shard_size) as shards, torch.no_grad():
        for name in [n for n, t in written.items() if not t.is_meta]:  # buffers
            for part, tensor in _as_stored(base, name, written.pop(name)).items():
                shards.write(part, tensor)
        for name, tensor in tuned.merged(list(written)):
            for part, piece in _as_stored(base, name, tensor.to(written[name].dtype)).items():
                shards.write(part, piece)
    set_stop_tokens(base, tokenizer)
    base.config.dtype = str(plan.dtype).removeprefix("torch.")
    base.config.architectures = [type(base).__name__]
    base.config.save_pretrained(folder)
    base.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _as_stored(base: Any, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight as transformers writes it, under the names and in the parts that other programs know.

    Raises:
        UserError: it is written together with others.
    """
    from transformers.core_model_loading import revert_weight_conversion

    try:
        parts: dict[str, torch.Tensor] = revert_weight_conversion(base, {name: tensor})
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"{name} is stored together with other weights: {error}",
            remedy=IN_MEMORY,
        ) from None
    return parts


def _heads_differ(tuned: OffloadedTuned, plan: _Plan) -> bool:
    """Whether training has made embeddings differ that were one."""
    layers = tuned.layers()
    for pair in plan.tied.items():
        if any(owner_of(name, layers) for name in pair):
            one, other = (tensor.to(plan.dtype) for name in pair for _, tensor in tuned.merged([name]))
            if not torch.equal(one, other):
                return True
    return False


def _gate(
    tuned: OffloadedTuned,
    merged: OffloadedModel,
    tokenizer: PreTrainedTokenizerBase,
    travelled: PreTrainedTokenizerBase,
    prompts: Sequence[str],
) -> ParityReport:
    """The parity gate, both models run from disk, block by block: at a few positions of a few prompts."""
    head = Head.of(tuned.model)
    reasons = left_behind(head, merged.model, tokenizer, travelled, prompts, None)
    asked = list(prompts)[:: math.ceil(len(prompts) / _PROMPTS)]
    ids = [i[-_TOKENS:] for i in token_ids(tokenizer, asked, None)]
    vocabulary = int(merged.model.get_output_embeddings().weight.shape[0])
    at = _places(ids, max(len(ids), _LOGITS // (4 * vocabulary)))

    def plain(name: str) -> torch.Tensor:
        return merged.read(name).float()

    def moved(name: str) -> torch.Tensor:
        weight = tuned.read(name)
        if name in rounded:
            jitter(weight, dtype, torch.Generator().manual_seed(zlib.crc32(name.encode())))
        return weight

    dtype = next(merged.model.parameters()).dtype
    matrices = [n for n, p in tuned.model.named_parameters(remove_duplicate=False) if p.ndim >= 2]
    rounded = {n for n in matrices if n.endswith(".base_layer.weight")} or set(matrices)
    routing = Routing()
    with routing.recorded(tuned.model):
        ours = _log_probabilities(tuned.model, tuned.read, ids, at)
    with tuned.model.disable_adapter():
        untouched = _log_probabilities(tuned.model, tuned.read, ids, at)
    with routing.followed(tuned.model) as by_rounding:
        jittered = _log_probabilities(tuned.model, moved, ids, at)
    with routing.followed(merged.model) as detours:
        theirs = _log_probabilities(merged.model, plain, ids, at)
    report = judge("merged", len(asked), reasons, [ours], [jittered], [theirs], [untouched])
    judge_routing(report, detours, by_rounding)
    return report


def _places(ids: Sequence[Sequence[int]], most: int) -> tuple[list[int], list[int]]:
    """Rows and columns of at most so many tokens, at equal distances, the last one of all among them."""
    every = [(row, column) for row, tokens in enumerate(ids) for column in range(len(tokens))]
    rows, columns = zip(*every[:: -math.ceil(len(every) / most)], strict=True)
    return list(rows), list(columns)


@torch.no_grad()
def _log_probabilities(
    model: Any, read: Callable[[str], torch.Tensor], ids: Sequence[Sequence[int]], at: tuple[list[int], list[int]]
) -> torch.Tensor:
    """``[K, V] float32`` at some positions of some texts. All of them pass a block before the next one is read."""
    longest = max(map(len, ids))
    # A text's own tokens look at none that come after them, and so at no padding.
    padded = torch.tensor([[*i, *[0] * (longest - len(i))] for i in ids])
    mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in ids])

    def chosen(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0][at][None], *inputs[1:])  # [1, K, D] of [B, L, D]

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    native = model.config._attn_implementation
    with contextlib.ExitStack() as held:
        if native != "sdpa":
            model.set_attn_implementation("sdpa")
            held.callback(model.set_attn_implementation, native)
        held.enter_context(block_by_block(model, read, adapter_layers()))
        held.callback(base.get_output_embeddings().register_forward_pre_hook(chosen).remove)
        logits: torch.Tensor = model(input_ids=padded, attention_mask=mask, use_cache=False).logits[0]
    return logits.float().log_softmax(-1)
