"""The fused layers' operations on a GPU: `reference.py`'s formulas, compiled, and variable-length attention.

Each formula becomes one or two kernels by ``torch.compile`` (Ansel et al., 2024, doi:10.1145/3620665.3640366), at its
first use and for all sizes at once. Where it cannot be compiled (no Triton, no C++ compiler), it runs as it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from luthier.training.fused import reference, varlen


class _Compiled:
    """A formula, compiled at its first call; itself where that fails.

    Args:
        function: changes its arguments, if at all, after everything that can fail in compiling.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.plain = function
        self.run: Callable[..., Any] = torch.compile(function, dynamic=True)
        self.failure = ""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        # Without their history tensors are of fewer kinds, and each kind is compiled anew.
        arguments = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
        if self.failure:
            return self.plain(*arguments, **options)
        try:
            return self.run(*arguments, **options)
        except torch._dynamo.exc.TorchDynamoException as error:
            # The first line names the stage, the second what happened there.
            self.failure = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
            return self.plain(*arguments, **options)


def _cross_entropy_(logits: torch.Tensor, targets: torch.Tensor, *, gradient: bool) -> torch.Tensor:
    """`reference.cross_entropy_` with the one-hot as a comparison: a write at indices would be a kernel of its own."""
    wide = logits.float()
    normaliser = wide.logsumexp(-1)
    losses = normaliser - wide.gather(1, targets[:, None])[:, 0]
    if gradient:
        hit = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
        logits.copy_((wide - normaliser[:, None]).exp() - hit.float())
    return losses


class Formulas:
    """What `reference.py` computes element by element and row by row, compiled, with its signatures."""

    def __init__(self) -> None:
        self._compiled = {
            function.__name__: _Compiled(function)
            for function in (
                reference.rms_norm,
                reference.rms_norm_backward,
                reference.rotate_,
                reference.swiglu,
                reference.swiglu_backward_,
                reference.dropout,
            )
        }
        self._compiled["cross_entropy_"] = _Compiled(_cross_entropy_)

    @property
    def why_plain(self) -> str:
        """In words for the user, why formulas that were used are not compiled; empty where they are."""
        return next((f"{name}: {c.failure}" for name, c in self._compiled.items() if c.failure), "")

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        out, inverse = self._compiled["rms_norm"](x, weight, eps)
        return out, inverse

    def rms_norm_backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        inverse: torch.Tensor,
        residual: torch.Tensor | None = None,
        *,
        wants_weight: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        run = self._compiled["rms_norm_backward"]
        dx, grad_weight = run(grad, x, weight, inverse, residual, wants_weight=wants_weight)
        return dx, grad_weight

    def rotate_(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *, back: bool = False) -> torch.Tensor:
        self._compiled["rotate_"](x, cosine, sine, back=back)
        return x

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._compiled["swiglu"](gate, up)
        return out

    def swiglu_backward_(self, grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> None:
        self._compiled["swiglu_backward_"](grad, gate, up)

    def dropout(self, x: torch.Tensor, seed: int, keep: float) -> torch.Tensor:
        out: torch.Tensor = self._compiled["dropout"](x, seed, keep)
        return out

    def cross_entropy_(self, logits: torch.Tensor, targets: torch.Tensor, *, gradient: bool) -> torch.Tensor:
        losses: torch.Tensor = self._compiled["cross_entropy_"](logits, targets, gradient=gradient)
        return losses


class Cuda(Formulas):
    """The ops of the fused layers on a GPU.

    Args:
        attention: has ``attention`` and ``attention_backward`` of `reference.py`.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention.attention
        self.attention_backward = attention.attention_backward


@lru_cache(maxsize=1)
def formulas() -> Formulas:
    """The compiled formulas, which are the same for all devices and precisions."""
    return Formulas()


@lru_cache(maxsize=8)
def load(device: torch.device, dtype: torch.dtype) -> Cuda:
    """The ops for a device and a precision."""
    return Cuda(varlen.choose(device, dtype).attention)


def facts(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What runs on a GPU in a half precision, in words for the user, once it has run; what is slow begins "plain"."""
    why = load(device, dtype).why_plain or formulas().why_plain
    return {
        "attention": varlen.choose(device, dtype).reason,
        "formulas": f"plain formulas, for they could not be compiled ({why})" if why else "compiled",
    }
