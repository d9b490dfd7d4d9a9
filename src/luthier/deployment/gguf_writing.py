"""A plain model, or a LoRA adapter, as a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

The ``gguf`` library knows the names of tensors, the layout of the file and the quantisation of blocks. Weights are read
and written one by one, so that a model need not fit in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.deployment.gguf_families import (
    Family,
    as_llamacpp,
    family_of,
    heads_of,
    permute,
    put_hyperparameters,
    rope_factors,
)
from luthier.deployment.gguf_vocabulary import put_vocabulary
from luthier.deployment.k_quants import K_QUANTS, Importance, quantise, require_quantiser
from luthier.errors import UserError
from luthier.methods.saved import AdapterFolder
from luthier.models.loading import load_config, load_tokenizer, resolve_model
from luthier.training.checkpoint import writing

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, TensorNameMap

WRITTEN = ("f32", "bf16", "f16", "q8_0", "q4_0")
"""Kinds that the ``gguf`` library writes."""
KINDS = (*WRITTEN, *K_QUANTS)
_FILE_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
}
_BLOCK = 32
"""Weights of a row that share a scale in q8_0 and q4_0."""


def require_kind(kind: str) -> None:
    """Refuse kinds of weights that cannot be written.

    Raises:
        UserError: it is one of those, or what makes it is not installed.
    """
    if kind not in KINDS:
        raise UserError(
            f"GGUF files of kind {kind!r} cannot be written", where="--kind", remedy=f"choose {', '.join(KINDS)}"
        )
    if kind in K_QUANTS:
        require_quantiser()


def write_gguf(
    model_folder: str | Path, target_file: str | Path, kind: str, *, importance: Importance | None = None
) -> Path:
    """Write a plain model with its tokenizer and chat template as one GGUF file.

    Vectors stay in float32. In q4_0 the embeddings and the output head are q8_0, as they cost the most where they are
    rounded coarsely, and rows that blocks of 32 do not divide are f16.

    Args:
        model_folder: a transformers folder with safetensors, or an embedded model's name.
        target_file: written aside and renamed when whole; an earlier file is replaced.
        kind: one of :data:`KINDS`. A K-quant is made of a whole file beside it, which is removed.
        importance: of inputs, by transformers' names, for a K-quant; see :mod:`luthier.deployment.k_quants`.

    Returns:
        the file.

    Raises:
        UserError: the kind, the family, the tokenizer or a weight cannot be written, or the disk is full.
    """
    from gguf import GGUFWriter, LlamaFileType

    require_kind(kind)
    if kind in K_QUANTS:
        return _write_k_quant(model_folder, Path(target_file).expanduser(), kind, importance)
    config = load_config(model_folder).get_text_config()
    folder = Path(resolve_model(model_folder))
    family = family_of(config, str(folder))
    weights = Weights.of(folder)
    target = Path(target_file).expanduser()
    aside = target.parent / f".writing-{target.name}"
    writer = GGUFWriter(aside, family.arch)
    try:
        writer.add_type("model")
        writer.add_name(folder.name)
        writer.add_file_type(LlamaFileType[_FILE_TYPES[kind]])
        if kind.startswith("q"):
            writer.add_quantization_version(2)
        put_hyperparameters(writer, family, config, str(folder))
        put_vocabulary(writer, folder, load_tokenizer(folder, chats=False), config.vocab_size)
        tensors = _planned(weights, family, config, kind)
        _write(writer, tensors, aside, target)
    finally:
        writer.close()
        aside.unlink(missing_ok=True)
    return target


def _write_k_quant(model_folder: str | Path, target: Path, kind: str, importance: Importance | None) -> Path:
    config = load_config(model_folder).get_text_config()
    folder = Path(resolve_model(model_folder))
    names = _name_map(family_of(config, str(folder)), config)
    columns = {_llamacpp_name(names, name): values for name, values in (importance or {}).items()}
    whole, aside = (target.parent / f".{part}-{target.name}" for part in ("whole", "writing"))
    try:
        write_gguf(folder, whole, "bf16" if Weights.of(folder).dtypes() == {"BF16"} else "f32")
        with writing(target):
            quantise(whole, aside, kind, columns)
            aside.replace(target)
    finally:
        for part in (whole, aside):
            part.unlink(missing_ok=True)
    return target


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of a folder, by transformers' names; none is in memory."""

    files: dict[str, Path]
    """The file of each."""

    @classmethod
    def of(cls, folder: Path) -> Weights:
        from safetensors import SafetensorError, safe_open

        index = folder / "model.safetensors.index.json"
        parts = [folder / "model.safetensors"]
        try:
            if index.is_file():
                named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                parts = [folder / name for name in sorted(named)]
            files: dict[str, Path] = {}
            for part in parts:
                with safe_open(part, framework="pt") as stream:
                    files |= dict.fromkeys(stream.keys(), part)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(
                f"the weights cannot be read: {error}", where=str(folder), remedy="save the model as safetensors"
            ) from None
        return cls(files)

    def shape(self, name: str) -> tuple[int, ...]:
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as stream:
            return tuple(stream.get_slice(name).get_shape())

    def dtypes(self) -> set[str]:
        """All precisions, by safetensors' names."""
        from safetensors import safe_open

        found = set()
        for part in set(self.files.values()):
            with safe_open(part, framework="pt") as stream:
                found |= {stream.get_slice(name).get_dtype() for name in stream.keys()}  # noqa: SIM118
        return found

    def read(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as stream:
            return stream.get_tensor(name)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One that is to be written."""

    name: str
    """llama.cpp's."""
    shape: tuple[int, ...]
    kind: str
    read: Any
    """Gives it, in llama.cpp's layout."""


def _planned(weights: Weights, family: Family, config: Any, kind: str) -> list[_Tensor]:
    names = _name_map(family, config)
    planned = []
    factors = rope_factors(config)
    if factors is not None:
        planned.append(_Tensor("rope_freqs.weight", tuple(factors.shape), "f32", lambda: factors))
    for name in weights.files:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embeddings where there is no head
        shape = weights.shape(name)
        planned.append(
            _Tensor(
                _llamacpp_name(names, name),
                shape,
                _kind_of(name, shape, kind),
                lambda name=name: as_llamacpp(family, name, weights.read(name), config),
            )
        )
    return planned


def _name_map(family: Family, config: Any) -> TensorNameMap:
    from gguf import MODEL_ARCH, get_tensor_name_map

    arch = next(arch for arch in MODEL_ARCH if arch.name.lower() == family.arch)
    return get_tensor_name_map(arch, config.num_hidden_layers)


def _llamacpp_name(names: TensorNameMap, name: str) -> str:
    # A Gemma 3 that was tuned as a text model may keep the name of the part that it was.
    plain = name.replace("language_model.", "")
    found = names.get_name(plain, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise UserError(
            f"llama.cpp has no place for the weight {name!r} in this family of models",
            remedy="a method that adds weights is merged first; other models: `luthier export --format safetensors`",
        )
    return found


def _kind_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """Precision of one tensor in a file of a kind."""
    if len(shape) < 2:
        return "f32"
    if not kind.startswith("q"):
        return kind
    if shape[-1] % _BLOCK:
        return "f16"
    if kind == "q4_0" and ("embed_tokens" in name or "lm_head" in name):
        return "q8_0"
    return kind


def _write(writer: GGUFWriter, tensors: list[_Tensor], aside: Path, target: Path) -> None:
    """The tensors behind what the writer has been given, aside; named when whole."""
    import numpy as np
    from gguf import GGMLQuantizationType

    for tensor in tensors:
        number = GGMLQuantizationType[tensor.kind.upper()]
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), _bytes(tensor.shape, number), raw_dtype=number
        )
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_packed(tensor))
        writer.close()
        aside.replace(target)


def _bytes(shape: tuple[int, ...], number: GGMLQuantizationType) -> int:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[number]
    return math.prod(shape) // block * size


def _packed(tensor: _Tensor) -> np.ndarray[Any, Any]:
    from gguf import GGMLQuantizationType, quants

    value = tensor.read().to(torch.float32).contiguous().numpy()
    packed = quants.quantize(value, GGMLQuantizationType[tensor.kind.upper()])
    if tensor.kind == "f16" and not (abs(value) <= 65504).all():
        raise UserError(
            f"{tensor.name} holds values beyond float16 (65,504), or none that are numbers",
            where="--kind",
            remedy="choose kind bf16",
        )
    return packed


def write_adapter_gguf(adapter_folder: str | Path, target_file: str | Path) -> Path:
    """Write a LoRA as a GGUF adapter in float32, for ``llama-server --lora`` or Ollama's ``ADAPTER``.

    llama.cpp scales by one alpha over each matrix's rank; what is scaled otherwise (rsLoRA, patterns of alpha) has the
    difference in its B.

    Args:
        adapter_folder: a run or adapter folder.
        target_file: written aside and renamed when whole.

    Returns:
        the file.

    Raises:
        UserError: it is no plain LoRA, its base cannot be written as GGUF, or the disk is full.
    """
    from gguf import GGUFWriter

    adapter = AdapterFolder.read(adapter_folder)
    require_plain_lora(adapter)
    config = load_config(adapter.base_name).get_text_config()
    family = family_of(config, adapter.base_name)
    alpha = float(adapter.config["lora_alpha"])
    target = Path(target_file).expanduser()
    aside = target.parent / f".writing-{target.name}"
    writer = GGUFWriter(aside, family.arch)
    try:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        tensors = list(_lora_tensors(adapter, family, config, alpha))
        _write(writer, tensors, aside, target)
    finally:
        writer.close()
        aside.unlink(missing_ok=True)
    return target


def require_plain_lora(adapter: AdapterFolder) -> None:
    """Refuse what is more than two matrices beside each layer.

    Raises:
        UserError: it is.
    """
    config = adapter.config
    start = str(config.get("init_lora_weights", True)).lower()
    reasons = {
        f"method {adapter.method.name} ({config.get('peft_type')})": config.get("peft_type") != "LORA"
        or len(adapter.parts) > 1,
        "DoRA": config.get("use_dora"),
        f"an adapter that began as {start}, which changes its base": start.startswith(
            ("pissa", "olora", "corda", "lora_ga")
        ),
        f"modules that were trained whole ({config.get('modules_to_save')})": config.get("modules_to_save"),
        "rows of embeddings that were trained": config.get("trainable_token_indices"),
        "biases that were trained": config.get("bias", "none") != "none" or config.get("lora_bias"),
    }
    for what, holds in reasons.items():
        if holds:
            raise UserError(
                f"only a plain LoRA can be served beside its base, and this is {what}",
                where=str(adapter.folder),
                remedy="merge it first: export without --adapter",
            )


def require_unquantised(adapter: AdapterFolder, engine: str) -> None:
    """Refuse an adapter whose base was held in 8 or 4 bits while it was trained.

    Raises:
        UserError: it was.
    """
    if adapter.quantization is not None:
        raise UserError(
            f"it was trained beside a quantised base, which {engine} does not hold",
            where=str(adapter.folder),
            remedy="merge it and serve the merged folder, or use `luthier serve --engine transformers`",
        )


def _lora_tensors(adapter: AdapterFolder, family: Family, config: Any, alpha: float) -> Iterator[_Tensor]:
    names = _name_map(family, config)
    heads, key_heads, _ = heads_of(config)
    weights = _adapter_weights(adapter)
    modules = sorted({name.rpartition(".lora_")[0] for name in weights})
    for module in modules:
        a, b = weights.pop(f"{module}.lora_A.weight", None), weights.pop(f"{module}.lora_B.weight", None)
        plain = module.removeprefix("base_model.model.")
        if a is None or b is None:
            raise UserError(
                f"the adapter holds no plain matrices A and B for {plain}",
                where=str(adapter.folder),
                remedy="merge it first: export without --adapter",
            )
        b = b.float() * (_scale(adapter.config, plain, len(a)) / (alpha / len(a)))
        if family.permuted and plain.endswith(".q_proj"):
            b = permute(b, heads)
        elif family.permuted and plain.endswith(".k_proj"):
            b = permute(b, key_heads)
        name = _llamacpp_name(names, f"{plain}.weight")
        yield _Tensor(f"{name}.lora_a", tuple(a.shape), "f32", lambda a=a: a)
        yield _Tensor(f"{name}.lora_b", tuple(b.shape), "f32", lambda b=b: b)


def _adapter_weights(adapter: AdapterFolder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    file = adapter.folder / "adapter_model.safetensors"
    if file.is_file():
        return load_file(file)
    weights: dict[str, torch.Tensor] = torch.load(file.with_suffix(".bin"), map_location="cpu", weights_only=True)
    return weights


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """PEFT's: alpha over the rank, or over its root (rsLoRA), with the alpha of the module's own pattern."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
