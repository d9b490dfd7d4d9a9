"""Attention within each example of a packed row, registered with transformers as ``luthier``.

On a CPU, plain matrix products per example with the query heads of a group folded into rows are faster than
scaled-dot-product attention for examples of some hundreds of tokens: one large product a key head, no repeated keys.
Long examples, and other devices, take transformers' own scaled-dot-product attention per example, whose memory does
not grow with the square of the length. On a GPU, bfloat16 and float16 take variable-length flash attention
(`fused/varlen.py`).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from luthier.training.fused import varlen

NAME = "luthier"

# Longest example, in tokens, whose score matrix is held in memory: beyond it SDPA is as fast and leaner.
PLAIN_LIMIT = 1024


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What a model's attention module asks of its attention function."""

    scaling: float
    sliding_window: int | None
    softcap: float | None


_recorded: dict[torch.nn.Module, AttentionCall] | None = None


@contextlib.contextmanager
def recording() -> Iterator[dict[torch.nn.Module, AttentionCall]]:
    """Collects what each attention module asks for while packed rows run through a model."""
    global _recorded
    _recorded = {}
    try:
        yield _recorded
    finally:
        _recorded = None


def record(module: torch.nn.Module, call: AttentionCall) -> None:
    """Note what a module asks for, where :func:`recording` collects it."""
    if _recorded is not None:
        _recorded[module] = call


def register() -> str:
    """Make the implementation known to transformers; returns its name for ``set_attn_implementation``."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    return NAME


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention that never crosses an example's border.

    Args:
        query: ``[1, H, N, d]``; key and value ``[1, Hkv, N, d]`` with H a multiple of Hkv.
        attention_mask: None; borders are given by ``cu_seq_lens_q``.
        scaling: factor of the scores; None: ``d ** -0.5``.
        sliding_window: how many tokens back, itself included, a token sees; None: all.
        softcap: scores become ``softcap · tanh(scores / softcap)`` (Gemma 2).
        cu_seq_lens_q: ``[B + 1] int32`` borders of the examples; None: the row is one example.
        segments: ``[S, 4] int32`` of :class:`~luthier.data.batch.Batch`, which take the place of the borders.

    Returns:
        ``[1, N, H, d]`` and no weights.

    Raises:
        ValueError: the model asks for an attention that this is not (sinks, position bias, two-way).
    """
    unknown = [k for k in ("s_aux", "position_bias", "head_mask") if kwargs.get(k) is not None]
    if unknown or attention_mask is not None or not kwargs.get("is_causal", getattr(module, "is_causal", True)):
        raise ValueError(f"packed attention does not do {unknown or 'masks or two-way attention'}")
    if query.shape[2] != key.shape[2]:
        raise ValueError("packed attention takes whole sequences, not a cache")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    record(module, AttentionCall(float(scale), sliding_window, softcap))
    if not dropout and softcap is None and (variable := variable_length(query)) is not None:
        if segments is None:
            segments = _segments([0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist())
        tokens = (t[0].transpose(0, 1) for t in (query, key, value))
        return _WithinSegments.apply(*tokens, variable, segments, scale, sliding_window)[None], None
    if segments is not None and segments[:, 3].any():
        return _shared(query[0], key[0], value[0], segments, scale, dropout, sliding_window, softcap), None
    borders = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    lengths = [end - begin for begin, end in itertools.pairwise(borders)]
    if sliding_window is not None and sliding_window >= max(lengths):
        sliding_window = None
    special = bool(dropout) or sliding_window is not None or softcap is not None
    if query.device.type == "cpu" and not special and max(lengths) <= PLAIN_LIMIT:
        return _Folded.apply(query[0], key[0], value[0], borders, scale)[None], None
    outputs = []
    for begin, end in itertools.pairwise(borders):
        q, k, v = (t[0, :, begin:end] for t in (query, key, value))
        if sliding_window is not None or softcap is not None:
            window = sliding_window if sliding_window is not None and sliding_window < end - begin else None
            outputs.append(_plain(q, k, v, scale, dropout, window, softcap))
            continue
        groups = q.shape[0] // k.shape[0]
        k, v = (t.repeat_interleave(groups, 0)[None] for t in (k, v))
        out = F.scaled_dot_product_attention(q[None], k, v, dropout_p=dropout, is_causal=True, scale=scale)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)[None], None


# Values a head that flash attention takes at the most.
_WIDEST_HEAD = 256


def variable_length(query: torch.Tensor) -> Any:
    """Variable-length attention where the device has it for this tensor; else None."""
    d = query.shape[-1]
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.device.type != "cuda" or not half or d > _WIDEST_HEAD or d % 8:
        return None
    choice = varlen.choose(query.device, query.dtype)
    return None if choice.plain else choice.attention


def _segments(borders: list[int]) -> torch.Tensor:
    """Segments that share nothing."""
    return torch.tensor([(begin, end, 0, 0) for begin, end in itertools.pairwise(borders)], dtype=torch.int32)


class _WithinSegments(torch.autograd.Function):
    """Attention with the signatures of `fused/reference.py` for autograd: ``[N, H, d]`` each."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        ops: Any,
        segments: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        q, k, v = (t.contiguous() for t in (q, k, v))
        out, lse = ops.attention(q, k, v, segments, scale=scale, window=window)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = (ops, segments, scale, window)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        ops, segments, scale, window = ctx.call
        dq, dk, dv = ops.attention_backward(grad.contiguous(), *ctx.saved_tensors, segments, scale=scale, window=window)
        return dq, dk, dv, None, None, None, None


def _shared(
    q: torch.Tensor,  # [H, N, d]
    k: torch.Tensor,  # [Hkv, N, d]
    v: torch.Tensor,
    segments: torch.Tensor,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Segments whose keys are a shared prefix and their own tokens: ``[1, N, H, d]``."""
    from torch.nn.attention.bias import causal_lower_right

    outputs = []
    for begin, end, prefix, shared in segments.tolist():
        own = q[:, begin:end]
        keys, values = (torch.cat([t[:, prefix : prefix + shared], t[:, begin:end]], 1) for t in (k, v))
        if softcap is not None or (window is not None and window < keys.shape[1]):
            outputs.append(_plain(own, keys, values, scale, dropout, window, softcap))
            continue
        keys, values = (t.repeat_interleave(len(q) // len(k), 0)[None] for t in (keys, values))
        mask = causal_lower_right(own.shape[1], keys.shape[2])
        out = F.scaled_dot_product_attention(own[None], keys, values, attn_mask=mask, dropout_p=dropout, scale=scale)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)[None]


def _plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One example by matrix products and autograd, softmax in float32; the plain reference of `_Folded`.

    q ``[H, n, d]``, k and v ``[Hkv, m, d]`` with the keys of a shared prefix before the n own ones → ``[n, H, d]``.
    """
    heads, n, d = q.shape
    kv_heads, m, _ = k.shape
    scores = torch.bmm(q.reshape(kv_heads, -1, d), k.transpose(1, 2)).float().view(heads, n, m) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = torch.ones(n, m, dtype=torch.bool, device=q.device).tril_(m - n)
    if window is not None:
        seen = seen.triu_(m - n + 1 - window)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).to(v.dtype)
    if dropout:
        weights = F.dropout(weights, dropout)
    out = torch.bmm(weights.view(kv_heads, -1, m), v)
    return out.view(heads, n, d).transpose(0, 1)


class _Folded(torch.autograd.Function):
    """`_plain` for all examples of a row at once, without dropout, window and softcap, backward by hand.

    Autograd would keep the scores and the weights in float32 as well; here the weights alone are kept, in the
    values' dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,  # [H, N, d]
        k: torch.Tensor,  # [Hkv, N, d]
        v: torch.Tensor,  # [Hkv, N, d]
        borders: list[int],
        scale: float,
    ) -> torch.Tensor:
        heads, total, d = q.shape
        kv_heads = k.shape[0]
        out = q.new_empty(total, heads, d)
        kept: list[torch.Tensor] = []
        for begin, end in itertools.pairwise(borders):
            n = end - begin
            folded = q[:, begin:end].reshape(kv_heads, -1, d)  # [Hkv, G·n, d]
            scores = torch.bmm(folded, k[:, begin:end].transpose(1, 2)).float()
            scores.view(heads, n, n).mul_(scale).add_(_causal(n))
            weights = scores.softmax(-1).to(v.dtype)  # [Hkv, G·n, n]
            mixed = torch.bmm(weights, v[:, begin:end])
            out[begin:end] = mixed.view(heads, n, d).transpose(0, 1)
            kept.append(weights)
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.borders, ctx.scale = borders, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        q, k, v, out, *kept = ctx.saved_tensors
        heads, _, d = q.shape
        kv_heads = k.shape[0]
        # Gradients lie token by token, as the projections that made q, k and v want them: no copies there.
        grad_q, grad_k, grad_v = (torch.empty_like(t.transpose(0, 1).contiguous()).transpose(0, 1) for t in (q, k, v))
        for begin, end, weights in zip(ctx.borders, ctx.borders[1:], kept, strict=False):
            n = end - begin
            grad_out = grad[begin:end].transpose(0, 1).reshape(kv_heads, -1, d)  # [Hkv, G·n, d]
            mixed = out[begin:end].transpose(0, 1).reshape(kv_heads, -1, d)
            grad_v[:, begin:end] = torch.bmm(weights.transpose(1, 2), grad_out)
            # Softmax backward: dS = P · (dP − rowsum(dO · O)), Dao et al., 2022, arXiv:2205.14135, appendix B.
            row = (grad_out.float() * mixed).sum(-1, keepdim=True)
            grad_scores = torch.bmm(grad_out, v[:, begin:end].transpose(1, 2)).float()
            grad_scores = grad_scores.sub_(row).mul_(weights).mul_(ctx.scale).to(q.dtype)
            grad_q[:, begin:end] = torch.bmm(grad_scores, k[:, begin:end]).view(heads, n, d)
            folded = q[:, begin:end].reshape(kv_heads, -1, d)
            grad_k[:, begin:end] = torch.bmm(grad_scores.transpose(1, 2), folded)
        return grad_q, grad_k, grad_v, None, None


@lru_cache(maxsize=32)
def _causal(n: int) -> torch.Tensor:
    """``[n, n] float32``: minus infinity where a token would see a later one, else 0."""
    return torch.full((n, n), float("-inf")).triu_(1)
