"""Attention in both directions within each text of a packed row, registered with transformers as ``luthier_two_way``.

On a CPU each text goes through scaled-dot-product attention by itself. On a GPU, where a call a text would cost more
than its arithmetic, bfloat16 and float16 take variable-length flash attention, not causal; what that does not do
(dropout, sliding windows, float32) is done in rows that are padded for the attention alone.

Calls without a packed row, and their masks, are transformers' own, so that a model left with this implementation still
reads padded rows rightly.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from luthier.training import attention
from luthier.training.fused import varlen
from luthier.training.fused.flash import Flash, Runs

NAME = "luthier_two_way"


def register() -> str:
    """Make the implementation known to transformers; returns its name for ``set_attn_implementation``."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, two_way_attention)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME


def two_way_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    segments: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention to all of a token's own text, and to nothing else.

    Args:
        query: ``[B, H, N, d]``; key and value ``[B, Hkv, N, d]`` with H a multiple of Hkv; B is 1 where packed.
        attention_mask: of padded rows; a packed row has none.
        scaling: factor of the scores; None: ``d ** -0.5``.
        sliding_window: a token sees those that are fewer than so many places away, on either side; None: all.
        segments: ``[S, 4] int32`` of :class:`~luthier.data.batch.Batch`, none sharing; None: each row is one text.

    Returns:
        ``[B, N, H, d]`` and no weights.

    Raises:
        ValueError: the model asks for an attention that this is not (one way, sinks, position bias, soft caps).
    """
    asked = [k for k in ("s_aux", "position_bias", "head_mask", "softcap") if kwargs.get(k) is not None]
    if asked or kwargs.get("is_causal", getattr(module, "is_causal", True)):
        raise ValueError(f"attention in both directions does not do {asked or 'one direction'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    attention.record(module, attention.AttentionCall(scale, sliding_window, None))
    if segments is None:
        if attention_mask is None:
            attention_mask = _near(query.shape[2], sliding_window, query.device)
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scale)
        return out.transpose(1, 2), None
    lengths = (segments[:, 1] - segments[:, 0]).tolist()
    window = None if sliding_window is None or sliding_window >= max(lengths) else sliding_window
    variable = attention.variable_length(query)
    if isinstance(variable, varlen.SegmentAttention) and not dropout and window is None:
        tokens = (t[0].transpose(0, 1) for t in (query, key, value))
        runs = variable.layout(segments, query.device).own
        return _Whole.apply(*tokens, variable.flash, runs, scale)[None], None
    if query.device.type == "cpu":
        outputs = []
        for q, k, v in zip(*(t.split(lengths, 2) for t in (query, key, value)), strict=True):
            near = _near(q.shape[2], window, q.device)
            outputs.append(F.scaled_dot_product_attention(q, k, v, near, dropout, scale=scale))
        return torch.cat(outputs, 2).transpose(1, 2), None
    return _in_padded_rows(query[0], key[0], value[0], segments, scale, dropout, window), None


def _mask(*, batch_size: int, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """transformers' mask of padded rows.

    The mask of texts that lie in one row has more rows than that and is for the model's head alone.
    """
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None or len(attention_mask) != batch_size:
        return None
    mask: torch.Tensor | None = sdpa_mask(batch_size=batch_size, attention_mask=attention_mask, **kwargs)
    return mask


def _near(n: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """``[n, n] bool``: whether a token sees another by a sliding window; None where it sees all."""
    if window is None or window >= n:
        return None
    places = torch.arange(n, device=device)
    return (places[:, None] - places).abs() < window


class PaddedRows:
    """Where the tokens of a packed row stand in right-padded ones, a text a row.

    Attributes:
        mask: ``[B, L] bool``: True where a token stands.
    """

    _latest: ClassVar[PaddedRows | None] = None

    def __init__(self, segments: torch.Tensor, device: torch.device) -> None:
        self.segments, self.device = segments, device
        lengths = (segments[:, 1] - segments[:, 0]).long()
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        self.mask = mask.to(device, non_blocking=True)
        self._places = mask.flatten().nonzero()[:, 0].to(device, non_blocking=True)  # [N]

    @classmethod
    def of(cls, segments: torch.Tensor, device: torch.device) -> PaddedRows:
        """Of the last segments asked for, which all layers of a batch share."""
        latest = cls._latest
        if latest is None or latest.segments is not segments or latest.device != device:
            cls._latest = latest = cls(segments, device)
        return latest

    def laid(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[B, L, ...]`` of ``[N, ...]``, with zeros where there is no token."""
        rows = tokens.new_zeros(self.mask.numel(), *tokens.shape[1:]).index_copy(0, self._places, tokens)
        return rows.view(*self.mask.shape, *tokens.shape[1:])

    def taken(self, rows: torch.Tensor) -> torch.Tensor:
        """``[N, ...]`` of ``[B, L, ...]``."""
        return rows.flatten(0, 1)[self._places]


def _in_padded_rows(
    q: torch.Tensor,  # [H, N, d]
    k: torch.Tensor,
    v: torch.Tensor,
    segments: torch.Tensor,
    scale: float,
    dropout: float,
    window: int | None,
) -> torch.Tensor:
    """All texts by one call: ``[1, N, H, d]``."""
    rows = PaddedRows.of(segments, q.device)
    q, k, v = (rows.laid(t.transpose(0, 1)).transpose(1, 2) for t in (q, k, v))  # [B, H, L, d]
    seen = rows.mask[:, None, None]
    near = _near(seen.shape[-1], window, q.device)
    if near is not None:
        # Padding sees itself, for a softmax over nothing is not a number.
        seen = (seen & near) | torch.eye(len(near), dtype=torch.bool, device=q.device)
    out = F.scaled_dot_product_attention(q, k, v, seen, dropout, scale=scale)
    return rows.taken(out.transpose(1, 2))[None]


class _Whole(torch.autograd.Function):
    """Variable-length flash attention to whole texts: ``[N, H, d]`` each."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, flash: Flash, runs: Runs, scale: float
    ) -> torch.Tensor:
        q, k, v = (t.contiguous() for t in (q, k, v))
        out, lse = flash.forward(q, k, v, runs, scale=scale, causal=False)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = (flash, runs, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        flash, runs, scale = ctx.call
        gradients = flash.backward(grad.contiguous(), *ctx.saved_tensors, runs, scale=scale, causal=False)
        return *gradients, None, None, None
