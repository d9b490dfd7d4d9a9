"""Bases whose weights are held in 4 or 8 bits while an adapter beside them is trained.

Dettmers et al., 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314 (4 bits); Dettmers et al.,
2022, "LLM.int8()", arXiv:2208.07339 (8 bits). bitsandbytes holds and multiplies the weights.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from luthier.errors import UserError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the weights of a base's linear layers are held in memory."""

    bits: Literal[4, 8] = 4
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """Of 4 bits."""
    double_quant: bool = True
    """The scales of blocks of 4-bit weights are quantised as well."""

    def config(self, compute: torch.dtype, whole: Sequence[str] = ()) -> BitsAndBytesConfig:
        """For transformers; embeddings and output head stay as they are, which is its default.

        Args:
            compute: precision that weights are unpacked to for a product.
            whole: modules that stay as they are, in the place of the output head; none: that default.
        """
        from transformers import BitsAndBytesConfig

        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(whole) or None)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=compute,
            llm_int8_skip_modules=list(whole) or None,
        )


@dataclass(frozen=True, slots=True)
class QuantizedFrom:
    """The model that a base was quantised from; its attribute ``quantized_from``."""

    name: str
    """The name that loads it."""
    revision: str | None
    quantization: Quantization
    dtype: torch.dtype
    """Precision that it is stored in."""
    fingerprint: str


def require_bitsandbytes() -> None:
    """Refuse quantised bases where the library that holds them is not installed.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "bases in 4 or 8 bits need bitsandbytes, which is not installed",
            where="method.name",
            remedy="pip install 'luthier[qlora]', or use method.name=lora",
        )


def quantized_from(model: Any) -> QuantizedFrom | None:
    """What a base, or the base under an adapter, was quantised from; None where it is held as it is stored."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    origin: QuantizedFrom | None = getattr(base, "quantized_from", None)
    return origin


def settle(model: PreTrainedModel, origin: QuantizedFrom) -> PreTrainedModel:
    """Make a model that transformers has just quantised fit to be trained, and note where it comes from.

    Raises:
        UserError: none of its layers are quantised.
    """
    if not any(is_quantized(p) for p in model.parameters()):
        raise UserError(
            f"{origin.name!r} has no linear layers that bitsandbytes can quantise",
            where="model.name",
            remedy="use method.name=lora",
        )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # With it, CPUs that have AVX512-BF16 repack the weights at a forward pass without gradients, in place,
            # and the gradients of what follows are wrong without an error.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    model.quantized_from = origin  # type: ignore[assignment]
    return model


def is_quantized(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter is a matrix that bitsandbytes holds."""
    return getattr(parameter, "quant_state", None) is not None or hasattr(parameter, "SCB")


def rounds_inputs(model: torch.nn.Module) -> bool:
    """Whether some products round their inputs to 8 bits, by scales that depend on what else is in the batch."""
    origin = quantized_from(model)
    return origin is not None and origin.quantization.bits == 8


def unpacked(model: Any) -> tuple[Any, list[str]]:
    """A copy whose quantised layers are plain ones of the same weights, in float32: what it computes is rounded by
    the weights' quantisation alone, not by the inputs' (8 bits) nor by the precision of products.

    Args:
        model: a quantised base, or one with adapters beside it.

    Returns:
        the copy, and the layers' names in the plain model.
    """
    from peft.utils.integrations import dequantize_bnb_weight

    fine = copy.deepcopy(model)
    base = fine.get_base_model() if hasattr(fine, "get_base_model") else fine
    found = {n: m for n, m in base.named_modules() if any(is_quantized(p) for p in m.parameters(recurse=False))}
    for name, layer in found.items():
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        # The scales of 8 bits move from the weight to the layer's state at the first product.
        weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
        plain.weight, plain.bias = torch.nn.Parameter(weight, requires_grad=False), layer.bias
        place, _, last = name.rpartition(".")
        setattr(base.get_submodule(place), last, plain)
    return fine.float(), [name.removesuffix(".base_layer") for name in found]


def count(parameter: torch.nn.Parameter) -> int:
    """How many weights a parameter holds: two 4-bit ones lie in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters as they are held, with the scales of quantised ones; tied ones once."""
    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        scales = [getattr(parameter, "SCB", None)]
        while state is not None:
            scales += [state.absmax, state.offset]
            state = state.state2
        total += sum(t.numel() * t.element_size() for t in scales if isinstance(t, torch.Tensor))
    return total
