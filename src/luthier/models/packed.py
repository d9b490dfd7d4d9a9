"""Models that are stored quantised, to answer from: torchao or bitsandbytes hold the weights of their linear layers.

Everything else (embeddings, output head, norms, biases) stays in the precision that the model is stored in. A base that
is quantised while an adapter is trained on it is another matter: :mod:`luthier.models.quantized`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from luthier.errors import UserError


@dataclass(frozen=True, slots=True)
class Packing:
    """How the weights of linear layers are stored: rounded to nearest, by scales of their own blocks."""

    library: Literal["torchao", "bitsandbytes"]
    levels: tuple[float, ...]
    """What a weight can be, as shares of the greatest one of its block; ascending."""
    block: int | None
    """Weights in a row that share a scale; None: the whole row."""

    def fits(self, layer: torch.nn.Linear) -> bool:
        """Whether a layer's rows can be cut into such blocks."""
        whole = self.block is None or self.library == "bitsandbytes"  # which fills the last block up
        return whole or layer.in_features % int(self.block or 1) == 0

    def config(self, dtype: torch.dtype, whole: Sequence[str]) -> Any:
        """For transformers.

        Args:
            dtype: precision of what is not packed, and of products.
            whole: names of modules that are not packed.
        """
        import transformers

        if self.library == "bitsandbytes":
            return transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=list(whole),
            )
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

        if self.block is None:
            made: Any = Int8WeightOnlyConfig(version=2)
        else:
            # Of torchao's forms of 4 bits that can be saved, the packed ones need an accelerator; this one lies
            # a weight a byte and runs anywhere.
            four: torch.dtype = torch.int4  # type: ignore[attr-defined]
            made = IntxWeightOnlyConfig(weight_dtype=four, granularity=PerGroup(self.block))
        return transformers.TorchAoConfig(made, modules_to_not_convert=list(whole))

    @torch.no_grad()
    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """What a matrix ``[out, in]`` becomes, ``float32``: the plain definition, by no library's kernels."""
        flat = weight.float().reshape(-1, self.block or weight.shape[-1])
        levels = torch.tensor(self.levels, device=weight.device)
        scale = flat.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        middles = (levels[1:] + levels[:-1]) / 2
        return (levels[torch.bucketize(flat / scale, middles)] * scale).reshape(weight.shape)


def _even(lowest: int, highest: int) -> tuple[float, ...]:
    """torchao's symmetric integers: the greatest weight lies half a step outside the range on one side."""
    return tuple(n / ((highest - lowest) / 2) for n in range(lowest, highest + 1))


# Quantiles of a normal distribution, appendix E of Dettmers et al., 2023, arXiv:2305.14314.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
PACKINGS = {
    "int8": Packing("torchao", _even(-128, 127), None),
    "int4": Packing("torchao", _even(-8, 7), 32),
    "nf4": Packing("bitsandbytes", _NF4, 64),
}


def require_library(library: str, where: str) -> None:
    """Refuse packed weights where the library that holds them is not installed.

    Args:
        library: ``torchao`` or ``bitsandbytes``.
        where: what wants it, for the message.

    Raises:
        UserError: it is not.
    """
    extra = {"torchao": "quantize", "bitsandbytes": "qlora"}[library]
    if importlib.util.find_spec(library) is None:
        raise UserError(
            f"this needs {library}, which is not installed", where=where, remedy=f"pip install 'luthier[{extra}]'"
        )


def load_torchao_quietly() -> None:
    """Import torchao, where it is installed, before transformers does: without its warnings of kernels for other
    machines and of PyTorch's next release, which would come with every model."""
    if "torchao" in sys.modules or importlib.util.find_spec("torchao") is None:
        return
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # A torchao that does not fit this PyTorch is no matter of models that do not need it.
        with contextlib.suppress(Exception):
            importlib.import_module("torchao.prototype.safetensors.safetensors_support")
    finally:
        logging.disable(before)


def library_of(config: Any) -> str | None:
    """The library that holds a stored model's weights, by its config; None where it is neither of the two."""
    told = getattr(config, "quantization_config", None)
    method = told.get("quant_method") if isinstance(told, dict) else getattr(told, "quant_method", None)
    name = str(getattr(method, "value", method))
    return name if name in ("torchao", "bitsandbytes") else None


def is_packed(parameter: Any) -> bool:
    """Whether a parameter is a matrix that torchao or bitsandbytes holds."""
    return hasattr(parameter, "tensor_data_names") or getattr(parameter, "quant_state", None) is not None


def packed_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The layers whose weights are packed, by name."""
    return {n: m for n, m in model.named_modules() if is_packed(getattr(m, "weight", None))}


@torch.no_grad()
def plain_weight(layer: Any) -> torch.Tensor:
    """``[out, in] float32``: what a packed layer multiplies by."""
    weight = layer.weight
    if hasattr(weight, "tensor_data_names"):
        # One type rounds to its own precision, the other is told.
        fine = weight.to(torch.float32) if hasattr(weight, "target_dtype") else weight
        return torch.Tensor.float(fine.dequantize())
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).float()


def multiplied_in(model: Any) -> torch.dtype:
    """The precision of a packed model's products on this machine.

    On CPUs with AVX512-BF16, bitsandbytes multiplies by matrices in 4 bits in bfloat16, whatever it was told.
    """
    layers = packed_layers(model).values()
    if any(getattr(m, "support_avx512bf16_for_cpu", False) and m.weight.device.type == "cpu" for m in layers):
        return torch.bfloat16
    dtype: torch.dtype = model.dtype
    return dtype


@torch.no_grad()
def compute_in(model: Any, dtype: torch.dtype) -> Any:
    """Make a packed model multiply in another precision; its packed weights stay as they are. Returns the model."""
    for layer in packed_layers(model).values():
        if hasattr(layer.weight, "quant_state"):
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
            layer.support_avx512bf16_for_cpu = False  # see `multiplied_in`
        elif hasattr(layer.weight, "target_dtype"):
            layer.weight = torch.nn.Parameter(layer.weight.to(dtype), requires_grad=False)
    for parameter in model.parameters():
        if not is_packed(parameter) and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model
