"""One call of variable-length flash attention (Dao et al., 2022, arXiv:2205.14135), by the library at hand."""

from __future__ import annotations

import itertools
from typing import NamedTuple, Protocol

import torch


class Runs(NamedTuple):
    """Runs of queries, each against a run of keys; both lie end to end."""

    queries: torch.Tensor
    """``[R + 1] int32`` borders"""
    keys: torch.Tensor
    longest_query: int
    longest_key: int

    @classmethod
    def of(cls, queries: list[int], keys: list[int], device: torch.device) -> Runs:
        """Runs of so many tokens each."""
        borders = [on_device(list(itertools.accumulate(n, initial=0)), torch.int32, device) for n in (queries, keys)]
        return cls(borders[0], borders[1], max(queries), max(keys))


class Flash(Protocol):
    """One call of variable-length flash attention. Causal runs and windows are aligned at the last query and key."""

    name: str

    def forward(
        self,
        q: torch.Tensor,  # [N, H, d]
        k: torch.Tensor,  # [M, Hkv, d]
        v: torch.Tensor,
        runs: Runs,
        *,
        scale: float,
        causal: bool,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[N, H, d]`` and the scores' log-sum-exp ``[H, N] float32``; ``window`` only where causal."""
        ...

    def backward(
        self,
        grad: torch.Tensor,  # [N, H, d]
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        runs: Runs,
        *,
        scale: float,
        causal: bool,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients with respect to q, k and v, where out and lse may count keys of other calls."""
        ...


def _sides(causal: bool, window: int | None) -> tuple[int, int]:
    """How many keys to the left and to the right of its own a query sees; -1: all."""
    return (-1 if window is None else window - 1, 0) if causal else (-1, -1)


class TorchFlash:
    """``torch.nn.attention.varlen``. Its backward pass is the operator that PyTorch registers for autograd."""

    name = "PyTorch's variable-length flash attention"

    def __init__(self) -> None:
        from torch.nn.attention import varlen

        self._varlen = varlen

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        runs: Runs,
        *,
        scale: float,
        causal: bool,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = self._varlen.varlen_attn(
            *(q, k, v, *runs),
            return_aux=self._varlen.AuxRequest(lse=True),
            scale=scale,
            window_size=_sides(causal, window),
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out, lse

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        runs: Runs,
        *,
        scale: float,
        causal: bool,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sides = _sides(causal, window)
        # The state of dropout's random numbers, of which there are none.
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        dq, dk, dv = torch.ops.torch_attn._varlen_attn_backward(
            *(grad, q, k, v, out, lse, *runs, sides == (-1, 0), state, scale, list(sides))
        )
        return dq, dk, dv


class FlashAttn:
    """The package ``flash-attn``, version 2.7 and later."""

    name = "the variable-length attention of the package flash-attn"

    def __init__(self) -> None:
        from flash_attn import flash_attn_interface

        self._library = flash_attn_interface

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        runs: Runs,
        *,
        scale: float,
        causal: bool,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = _sides(causal, window)
        out, lse, *_ = self._library._flash_attn_varlen_forward(
            *(q, k, v, *runs),
            dropout_p=0.0,
            softmax_scale=scale,
            causal=causal,
            window_size_left=left,
            window_size_right=right,
        )
        return out, lse

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        runs: Runs,
        *,
        scale: float,
        causal: bool,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        left, right = _sides(causal, window)
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        self._library._flash_attn_varlen_backward(
            *(grad, q, k, v, out, lse, dq, dk, dv, *runs),
            dropout_p=0.0,
            softmax_scale=scale,
            causal=causal,
            window_size_left=left,
            window_size_right=right,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv


def on_device(values: list[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor on the device, copied without waiting for the work before it."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
