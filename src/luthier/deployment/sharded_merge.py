"""An adapter becomes part of its base on a machine that cannot hold the base: one layer in memory at a time.

The base's files are read tensor by tensor. Those under an adapter are merged by PEFT's own arithmetic, in float32, and
rounded once, as :mod:`luthier.deployment.merge` does with the whole model; the tensors are the same bit for bit. The
parity gate then runs both models block by block, from disk.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.deployment.merge import PROMPTS, RECORD, claim
from luthier.deployment.parity import ParityReport, jitter, judge, left_behind, require, token_ids
from luthier.deployment.shards import ShardWriter
from luthier.errors import UserError
from luthier.methods.base import peft_warnings_apart
from luthier.methods.saved import AdapterFolder, adapter_dtype
from luthier.models.catalogue import CATALOGUE
from luthier.models.fingerprint import fingerprint
from luthier.models.heads import Head
from luthier.models.loading import load_config, load_tokenizer, resolve_model, set_stop_tokens, without_bars
from luthier.models.memory import free_memory
from luthier.models.offloaded import OffloadedModel, Read, block_by_block, load_offloaded, resident
from luthier.training.checkpoint import writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD = 5 * 10**9
"""Bytes of one file at most, where nothing else is asked for."""
_PREFIX = "base_model.model."
_IN_MEMORY = "merge it on a machine whose memory holds the model, without shard_by_shard"
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
    where, remedy = str(adapter.folder), _IN_MEMORY
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
            tuned = _Tuned.load(adapter, base)
            _save(tuned, plan, tokenizer, aside, max_shard_size)
            merged = load_offloaded(aside, scratch / "merged", dtype=merged_dtype)
        report = _gate(tuned, merged, tokenizer, load_tokenizer(aside), prompts or PROMPTS)
        require(report)
        with writing(target):
            (aside / RECORD).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
            if target.exists():
                shutil.rmtree(target)
            aside.rename(target)
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


@dataclass(frozen=True, slots=True)
class _Tuned:
    """A base with its adapter, both on disk."""

    model: Any
    """PEFT's, on the meta device."""
    sources: Mapping[str, Read]
    """What reads each parameter, by its name in PEFT's model."""
    dtype: torch.dtype
    """All is rounded to this, as it is where the base is loaded in it."""

    @classmethod
    def load(cls, adapter: AdapterFolder, base: OffloadedModel) -> _Tuned:
        """An adapter's layers on its base.

        Raises:
            UserError: it does not fit, or some of its weights lie nowhere.
        """
        from peft import PeftConfig, get_peft_model

        dtype = next(base.model.parameters()).dtype
        with adapter.fitting(), peft_warnings_apart():
            config = PeftConfig.from_pretrained(str(adapter.folder))
            config.inference_mode = True
            model = get_peft_model(base.model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True).eval()
        trained = _adapter_tensors(model, adapter)
        sources: dict[str, Read] = {}
        by_parameter: dict[int, Read] = {}
        named = list(model.named_parameters(remove_duplicate=False))
        for name, parameter in named:
            source = trained.get(name)
            if source is None and (plain := _plain_name(name)) in base.stored:
                _require_rows(model, plain, parameter, base, adapter)
                source = _reading(base.stored, plain, len(parameter) if parameter.ndim else 0)
            if source is not None:
                sources[name] = by_parameter[id(parameter)] = source
        for name, parameter in named:  # tied ones lie under one name
            if name not in sources and id(parameter) not in by_parameter:
                raise UserError(
                    f"neither the adapter nor its base holds {_plain_name(name)}",
                    where=str(adapter.folder),
                    remedy=f"save the adapter again; or {_IN_MEMORY}",
                )
            sources.setdefault(name, by_parameter.get(id(parameter), _nothing))
        return cls(model, sources, dtype)

    def read(self, name: str) -> torch.Tensor:
        """A parameter in float32."""
        tensor = self.sources[name](name)
        return tensor.to(self.dtype).float() if tensor.is_floating_point() else tensor

    def layers(self) -> dict[str, Any]:
        """The modules under an adapter, by their names in the base; none lies in another."""
        found: dict[str, Any] = {}
        for name, module in self.model.get_base_model().named_modules():
            if isinstance(module, _adapter_layers()) and _owner(name, found) is None:
                found[name] = module
        return found

    def merged(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters of the merged model by their names in it, in float32, those of a layer together."""
        layers = self.layers()
        wanted: dict[str, list[str]] = {}
        for name in names:
            owner = _owner(name, layers)
            if owner is None:
                yield name, self.read(_PREFIX + name)
            else:
                wanted.setdefault(owner, []).append(name)
        for owner, inside in wanted.items():
            with resident(layers[owner], _PREFIX + owner, self.read):
                state = _merge_layer(layers[owner])
            for name in inside:
                yield name, state.pop(name.removeprefix(f"{owner}."))


def _adapter_layers() -> tuple[type, ...]:
    """PEFT's kinds of modules that hold an adapter and use the weights of the module under it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return (BaseTunerLayer, AuxiliaryTrainingWrapper)


def _owner(name: str, layers: Mapping[str, Any]) -> str | None:
    """Which of the layers a name lies in."""
    parts = name.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
    return next((prefix for prefix in prefixes if prefix in layers), None)


def _nothing(name: str) -> torch.Tensor:
    raise KeyError(name)


def _plain_name(name: str) -> str:
    """A base's parameter, by its name in PEFT's model."""
    name = name.removeprefix(_PREFIX)
    for part in (".token_adapter", ".base_layer", ".original_module"):
        name = name.replace(part, "")
    return name


def _reading(stored: Mapping[str, torch.Tensor], name: str, rows: int) -> Read:
    """Reads a base's parameter, with rows of zeros for tokens whose own come with the adapter."""

    def read(_: str) -> torch.Tensor:
        tensor = stored[name]
        missing = rows - len(tensor) if tensor.ndim else 0
        return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing > 0 else tensor

    return read


def _adapter_tensors(model: Any, adapter: AdapterFolder) -> dict[str, Read]:
    """What the adapter's file holds, by its name in PEFT's model.

    Raises:
        UserError: it is no safetensors file, or some of it has no place.
    """
    from peft.utils.save_and_load import get_peft_model_state_dict
    from safetensors import safe_open

    path = adapter.folder / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(
            "the adapter is not stored as safetensors", where=str(adapter.folder), remedy="save it again with PEFT"
        )
    # PEFT says under which name it would save each parameter: one is marked for each.
    marks = {name: torch.empty(0) for name, _ in model.named_parameters(remove_duplicate=False)}
    names = {id(mark): name for name, mark in marks.items()}
    saved = get_peft_model_state_dict(model, state_dict=marks, save_embedding_layers=True)
    places = {key: names[id(mark)] for key, mark in saved.items() if id(mark) in names}

    def reading(key: str) -> Read:
        def read(_: str) -> torch.Tensor:
            with safe_open(path, framework="pt") as tensors:
                tensor: torch.Tensor = tensors.get_tensor(key)
            return tensor

        return read

    with safe_open(path, framework="pt") as tensors:
        keys = list(tensors.keys())
    for key in keys:
        if key not in places:
            raise UserError(
                f"the adapter holds {key}, which has no place in {adapter.base_name!r}",
                where=str(path),
                remedy=f"check its base; or {_IN_MEMORY}",
            )
    return {places[key]: reading(key) for key in keys}


def _require_rows(model: Any, name: str, parameter: torch.Tensor, base: OffloadedModel, adapter: AdapterFolder) -> None:
    """Refuse a base whose embeddings have grown by rows that the adapter does not hold.

    Raises:
        UserError: it does not.
    """
    if not adapter.record.get("rows") or not name.endswith((".weight", ".bias")):
        return
    place = name.rpartition(".")[0]
    embeddings = model.get_base_model().get_submodule(place)
    if embeddings not in (model.get_input_embeddings(), model.get_output_embeddings()):
        return
    before = len(base.stored[name])
    if before >= len(parameter) or hasattr(embeddings, "modules_to_save"):
        return
    trained = getattr(getattr(embeddings, "token_adapter", None), "token_indices", {}).get("default", ())
    if not set(range(before, len(parameter))) <= set(trained):
        raise UserError(
            f"tokens were added in training, and the adapter holds no rows of {place} for them",
            where=str(adapter.folder),
            remedy=f"{_IN_MEMORY}; or train with that module in method.modules_to_save",
        )


def _merge_layer(layer: Any) -> dict[str, torch.Tensor]:
    """The plain layer's state that becomes of one with an adapter, by PEFT's own arithmetic."""
    if hasattr(layer, "unload_and_optionally_merge_module"):
        plain = layer.unload_and_optionally_merge_module(True, False, None)
    else:
        layer.merge(safe_merge=False)
        plain = layer.get_base_layer()
    state = {name: tensor.detach() for name, tensor in plain.state_dict().items()}
    # Its weights leave memory; they come back unmerged.
    for part in layer.modules():
        if hasattr(part, "merged_adapters"):
            part.merged_adapters.clear()
    return state


def _save(tuned: _Tuned, plan: _Plan, tokenizer: PreTrainedTokenizerBase, folder: Path, max_shard_size: int) -> None:
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
                remedy=_IN_MEMORY,
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
            remedy=_IN_MEMORY,
        ) from None
    return parts


def _heads_differ(tuned: _Tuned, plan: _Plan) -> bool:
    """Whether training has made embeddings differ that were one."""
    layers = tuned.layers()
    for pair in plan.tied.items():
        if any(_owner(name, layers) for name in pair):
            one, other = (tensor.to(plan.dtype) for name in pair for _, tensor in tuned.merged([name]))
            if not torch.equal(one, other):
                return True
    return False


def _gate(
    tuned: _Tuned,
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
    ours = _log_probabilities(tuned.model, tuned.read, ids, at)
    with tuned.model.disable_adapter():
        untouched = _log_probabilities(tuned.model, tuned.read, ids, at)
    jittered = _log_probabilities(tuned.model, moved, ids, at)
    theirs = _log_probabilities(merged.model, plain, ids, at)
    return judge("merged", len(asked), reasons, [ours], [jittered], [theirs], [untouched])


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
        held.enter_context(block_by_block(model, read, _adapter_layers()))
        held.callback(base.get_output_embeddings().register_forward_pre_hook(chosen).remove)
        logits: torch.Tensor = model(input_ids=padded, attention_mask=mask, use_cache=False).logits[0]
    return logits.float().log_softmax(-1)
