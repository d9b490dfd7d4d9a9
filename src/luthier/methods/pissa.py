"""PiSSA: LoRA whose matrices begin as the principal part of each weight, instead of as noise and zeros.

Meng et al., 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
arXiv:2404.02948. With W = U·S·V and the scale s, A₀ = √(S/s)·V and B₀ = U·√(S/s) of the r largest singular values; the
paper freezes W − s·B₀·A₀ and trains A and B from there. Here the base stays as it is, and what the paper takes from it
is the frozen half of a LoRA of rank 2r:

    W − s·B₀·A₀ + s·B·A  =  W + s·[B, −B₀]·[A; A₀]

So the start is the base itself, the base is what is left with the adapter off, and what is saved is a plain LoRA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils import parametrize

from luthier.errors import UserError


class _WithFrozenHalf(torch.nn.Module):
    """A matrix whose first half is trained: ``[r, in]`` to ``[2r, in]``, or ``[out, r]`` to ``[out, 2r]``."""

    frozen: torch.Tensor

    def __init__(self, frozen: torch.Tensor, dim: int) -> None:
        super().__init__()
        # No parameter: switching adapters on makes all of theirs trainable.
        self.register_buffer("frozen", frozen)
        self.dim = dim

    def forward(self, trained: torch.Tensor) -> torch.Tensor:
        return torch.cat([trained, self.frozen], self.dim)

    def right_inverse(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.chunk(2, self.dim)[0].clone()


@torch.no_grad()
def begin_as_principal(model: Any) -> None:
    """Set the matrices of a LoRA of rank 2r, freshly made, and freeze their second halves.

    The decomposition is exact and in float32, so that every process and every resumed run forms the same.

    Args:
        model: wrapped by PEFT.

    Raises:
        UserError: matrices stand beside something that is no linear layer, or a layer is too small for the rank.
    """
    for name, layer in model.get_base_model().named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        if "default" not in layer.lora_A:
            raise UserError(
                f"PiSSA takes linear layers apart, and {name!r} is none",
                where="method.target_modules",
                remedy="leave it out, or set method.init_lora_weights=default",
            )
        weight = layer.get_base_layer().weight.float()
        left, values, right = torch.linalg.svd(weight.T if layer.fan_in_fan_out else weight, full_matrices=False)
        rank = layer.r["default"] // 2
        if rank > len(values):
            raise UserError(
                f"{name!r} has {len(values)} singular values, fewer than the rank {rank}",
                where="method.r",
                remedy=f"set it to {len(values)} at the most, or give this layer another in method.rank_pattern",
            )
        root = (values[:rank] / layer.scaling["default"]).sqrt()
        a, b = root[:, None] * right[:rank], left[:, :rank] * root
        for matrix, halves, dim in ((layer.lora_A, (a, a), 0), (layer.lora_B, (b, -b), 1)):
            linear = matrix["default"]
            linear.weight.copy_(torch.cat(halves, dim))
            frozen = linear.weight.chunk(2, dim)[1].clone()
            parametrize.register_parametrization(linear, "weight", _WithFrozenHalf(frozen, dim))


def whole_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's state, with both halves of each matrix under the one name that plain LoRA has for it."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            for part in [key for key in state if key.startswith(f"{name}.parametrizations.weight.")]:
                del state[part]
            state[f"{name}.weight"] = module.weight.detach()
    return state
