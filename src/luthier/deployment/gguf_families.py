"""What llama.cpp wants to be different in each family of models: names and layout of weights, and hyper-parameters.

The names of tensors come from the ``gguf`` library's map. What is written here is the rest: which rows of q and k are
in another order, what is added to the weights of norms, how positions are rotated. A model whose config asks for
something that llama.cpp does not compute in its family is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from luthier.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter


@dataclass(frozen=True, slots=True)
class Family:
    """One of llama.cpp's architectures."""

    arch: str
    """Its name in a GGUF file."""
    activation: str
    """Of the feed-forward layers; llama.cpp computes no other in this family."""
    permuted: bool = False
    """Positions rotate neighbours in a head, not its halves: q and k have their rows in that order."""
    norms_from_one: bool = False
    """Norms are stored as what is added to 1, and llama.cpp multiplies by what it reads."""
    unable: Callable[[Any], str | None] = lambda config: None
    """Names what a config asks for that llama.cpp does not compute here."""


def _qwen_unable(config: Any) -> str | None:
    return "sliding-window attention" if getattr(config, "use_sliding_window", False) else None


def _mistral_unable(config: Any) -> str | None:
    window = getattr(config, "sliding_window", None)
    return "sliding-window attention" if window and window < config.max_position_embeddings else None


def _gemma3_unable(config: Any) -> str | None:
    layers = config.num_hidden_layers
    if list(config.layer_types) != [_gemma3_layer(i) for i in range(layers)]:
        return "layers in another order than five sliding, one full"
    if config.query_pre_attn_scalar != _gemma3_scale(config):
        return f"query_pre_attn_scalar={config.query_pre_attn_scalar}"
    if config.attn_logit_softcapping or config.final_logit_softcapping:
        return "soft-capped logits"
    if getattr(config, "use_bidirectional_attention", False):
        return "attention in both directions"
    return None


def _gemma3_layer(index: int) -> str:
    return "full_attention" if (index + 1) % 6 == 0 else "sliding_attention"


def _gemma3_scale(config: Any) -> float:
    # llama.cpp knows the 27B model by its 62 layers and scales by the width, not by a head's.
    wide = config.num_hidden_layers == 62
    return float(config.hidden_size // config.num_attention_heads if wide else config.head_dim)


FAMILIES = {
    "llama": Family("llama", "silu", permuted=True),
    "mistral": Family("llama", "silu", permuted=True, unable=_mistral_unable),
    "qwen2": Family("qwen2", "silu", unable=_qwen_unable),
    "qwen3": Family("qwen3", "silu", unable=_qwen_unable),
    "gemma3_text": Family("gemma3", "gelu_pytorch_tanh", norms_from_one=True, unable=_gemma3_unable),
}
"""By transformers' ``model_type``; each is held against transformers' logits in the tests."""


def family_of(config: Any, where: str) -> Family:
    """The family of a model.

    Raises:
        UserError: it is none that is exported here, or its config asks for what llama.cpp does not compute.
    """
    kind = str(config.model_type)
    if kind not in FAMILIES:
        raise UserError(
            f"models of type {kind!r} cannot be written as GGUF here",
            where=where,
            remedy=f"types that can: {', '.join(FAMILIES)}; others: `luthier export --format safetensors`, "
            "and llama.cpp's own converter",
        )
    family = FAMILIES[kind]
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    unable = f"the activation {activation!r}" if activation != family.activation else family.unable(config)
    if unable:
        raise UserError(
            f"llama.cpp does not compute {unable} in models of type {kind!r}",
            where=where,
            remedy="serve it as safetensors: `luthier export --format safetensors`",
        )
    return family


def heads_of(config: Any) -> tuple[int, int, int]:
    """Heads of the queries, of the keys, and the width of one."""
    heads = int(config.num_attention_heads)
    return heads, int(config.num_key_value_heads or heads), int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def permute(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows ``[heads * D, ...]`` of q or k, reordered in each head: transformers rotates row i with row i + D/2,
    llama.cpp row 2i with row 2i + 1."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def as_llamacpp(family: Family, name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """A weight of transformers' name in the layout that llama.cpp reads.

    Args:
        family: of the model.
        name: transformers' name, as in ``model.layers.0.self_attn.q_proj.weight``.
        tensor: as stored.
        config: of the model.
    """
    heads, key_heads, _ = heads_of(config)
    if family.permuted and ".q_proj." in name:
        return permute(tensor, heads)
    if family.permuted and ".k_proj." in name:
        return permute(tensor, key_heads)
    if family.norms_from_one and name.endswith("norm.weight"):
        return tensor.float() + 1
    return tensor


def put_hyperparameters(writer: GGUFWriter, family: Family, config: Any, where: str) -> None:
    """Sizes, norms and positions.

    Raises:
        UserError: the positions are scaled in a way that llama.cpp does not know.
    """
    heads, key_heads, width = heads_of(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = _rope(config)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope["rope_theta"])
    if family.arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_float32("gemma3.rope.freq_base_swa", config.rope_parameters["sliding_attention"]["rope_theta"])
    _put_scaling(writer, rope, config, where)


def rope_factors(config: Any) -> torch.Tensor | None:
    """``[D / 2] float32`` by which llama.cpp divides the frequencies of a head (Llama 3's scaling); None: by none."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = _rope(config)
    if rope.get("rope_type", "default") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = heads_of(config)[2]
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    return plain / scaled


def _rope(config: Any) -> dict[str, Any]:
    """Of the layers that see the whole text."""
    rope: dict[str, Any] = config.rope_parameters
    return rope.get("full_attention", rope)


def _put_scaling(writer: GGUFWriter, rope: dict[str, Any], config: Any, where: str) -> None:
    from gguf import RopeScalingType

    kind = rope.get("rope_type", "default")
    used = {"rope_type", "rope_theta"}
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
        used |= {"factor"}
    elif kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )
        used |= {"factor", "original_max_position_embeddings"}
    elif kind == "llama3":
        used |= set(rope)  # all of it is in the tensor of factors
    elif kind != "default":
        used = set()
    if kind == "default":
        return
    unread = [f"{key}={value}" for key, value in rope.items() if key not in used and value is not None]
    if unread:
        raise UserError(
            f"positions scaled by {', '.join(unread)} cannot be written as GGUF here",
            where=where,
            remedy="serve it as safetensors: `luthier export --format safetensors`",
        )
