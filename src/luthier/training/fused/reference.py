"""What each fused kernel computes, in plain PyTorch: the reference of `kernels.py`, with the same signatures.

Shapes: N tokens, D values a token, H query heads and Hkv key heads of d values. Arguments named with a trailing
underscore in a function's name are changed in place.
"""

from __future__ import annotations

import torch

Segments = torch.Tensor
"""``[S, 4] int32``, one row a segment: the first query's position in the row, the position after the last one, where
its shared prefix begins and how many tokens that has (0: none). A query sees the whole prefix and, of its own segment,
itself and what precedes it."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight · x / rms(x)`` over the last dimension of ``[N, D]``, and ``1 / rms`` ``[N] float32``."""
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    return (wide * inverse[:, None] * weight.float()).to(x.dtype), inverse


def rms_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    inverse: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    wants_weight: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradient with respect to x, ``residual`` added, and with respect to the weight where it is wanted."""
    wide, scale = x.float(), inverse[:, None]
    scaled = grad.float() * weight.float()
    dx = (scaled - wide * (scaled * wide).mean(-1, keepdim=True) * scale * scale) * scale
    if residual is not None:
        dx += residual.float()
    grad_weight = (grad.float() * wide * scale).sum(0).to(weight.dtype) if wants_weight else None
    return dx.to(x.dtype), grad_weight


def rotate_(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *, back: bool = False) -> torch.Tensor:
    """Rotary positions (Su et al., 2021, arXiv:2104.09864), halves paired, in place.

    Args:
        x: ``[N, H, d]``
        cosine: ``[N, d] float32``; sine the same.
        back: the transposed rotation, which is the gradient's.
    """
    wide, half = x.float(), x.shape[-1] // 2
    cosine, sine = cosine[:, None], sine[:, None]
    if back:
        turned = wide * sine
        turned = torch.cat([turned[..., half:], -turned[..., :half]], -1)
    else:
        turned = torch.cat([-wide[..., half:], wide[..., :half]], -1) * sine
    return x.copy_(wide * cosine + turned)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) · up``"""
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)


def swiglu_backward_(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> None:
    """In place: gate and up become their gradients, and grad becomes ``silu(gate) · up``."""
    dy, g, u = grad.float(), gate.float(), up.float()
    s = torch.sigmoid(g)
    y = g * s
    # All three before any is written: of float32 tensors, dy, g and u are the tensors themselves.
    new = (dy * u * (s + y * (1 - s)), dy * y, y * u)
    for tensor, value in zip((gate, up, grad), new, strict=True):
        tensor.copy_(value)


def dropout(x: torch.Tensor, seed: int, keep: float) -> torch.Tensor:
    """x / keep where a random number that follows from ``seed`` and the place is below ``keep``, else 0.

    The numbers are MurmurHash3's finaliser over a Weyl sequence, so that the backward pass needs no saved mask.
    """
    mask = 0xFFFFFFFF
    h = torch.arange(x.numel(), device=x.device, dtype=torch.int64) * 0x9E3779B9 + seed & mask
    h = (h ^ h >> 16) * 0x85EBCA6B & mask
    h = (h ^ h >> 13) * 0xC2B2AE35 & mask
    h = h ^ h >> 16
    kept = (h >> 8) < int(keep * 2**24)
    return torch.where(kept.view_as(x), (x.float() / keep).to(x.dtype), 0)


def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor, *, gradient: bool) -> torch.Tensor:
    """``[K] float32`` losses of ``[K, V]`` logits; with ``gradient``, the logits become softmax − one-hot."""
    wide = logits.float()
    normaliser = wide.logsumexp(-1)
    losses = normaliser - wide.gather(1, targets[:, None])[:, 0]
    if gradient:
        wide = (wide - normaliser[:, None]).exp_()
        wide[torch.arange(len(targets), device=targets.device), targets] -= 1
        logits.copy_(wide)
    return losses


def _seen(begin: int, end: int, shared: int, window: int | None, device: torch.device) -> torch.Tensor:
    """``[n, shared + n] bool``: which keys of a segment each of its queries sees."""
    query = torch.arange(shared, shared + end - begin, device=device)[:, None]
    key = torch.arange(shared + end - begin, device=device)[None]
    seen = key <= query
    return seen if window is None else seen & (query - key < window)


def attention(
    q: torch.Tensor,  # [N, H, d]
    k: torch.Tensor,  # [N, Hkv, d]
    v: torch.Tensor,  # [N, Hkv, d]
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention within segments: ``[N, H, d]``, and the scores' log-sum-exp ``[H, N] float32``."""
    out = torch.empty_like(q)
    lse = q.new_empty((q.shape[1], len(q)), dtype=torch.float32)
    for begin, end, prefix, shared in segments.tolist():
        scores, _, values = _scores(q, k, v, (begin, end, prefix, shared), scale, window)
        lse[:, begin:end] = scores.logsumexp(-1)
        weights = scores.softmax(-1)
        out[begin:end] = (weights @ values).transpose(0, 1).to(q.dtype)
    return out, lse


def attention_backward(
    grad: torch.Tensor,  # [N, H, d]
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`attention` with respect to q, k and v."""
    groups = q.shape[1] // k.shape[1]
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(len(t), q.shape[1], t.shape[2], device=t.device) for t in (k, v))  # float32
    for begin, end, prefix, shared in segments.tolist():
        scores, keys, values = _scores(q, k, v, (begin, end, prefix, shared), scale, window)
        weights = (scores - lse[:, begin:end, None]).exp()
        grad_out = grad[begin:end].float().transpose(0, 1)  # [H, n, d]
        row = (grad_out * out[begin:end].float().transpose(0, 1)).sum(-1, keepdim=True)
        grad_scores = weights * (grad_out @ values.transpose(1, 2) - row) * scale
        dq[begin:end] = (grad_scores @ keys).transpose(0, 1).to(q.dtype)
        for total, piece in (
            (dk, grad_scores.transpose(1, 2) @ q[begin:end].float().transpose(0, 1)),
            (dv, weights.transpose(1, 2) @ grad_out),
        ):
            total[prefix : prefix + shared] += piece[:, :shared].transpose(0, 1)
            total[begin:end] += piece[:, shared:].transpose(0, 1)
    dk, dv = (t.view(len(t), -1, groups, t.shape[2]).sum(2) for t in (dk, dv))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segment: tuple[int, int, int, int],
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masked scores ``[H, n, m]`` of a segment, its keys and its values ``[H, m, d]``, all float32."""
    begin, end, prefix, shared = segment
    groups = q.shape[1] // k.shape[1]
    keys, values = (
        torch.cat([t[prefix : prefix + shared], t[begin:end]]).float().repeat_interleave(groups, 1).transpose(0, 1)
        for t in (k, v)
    )
    scores = q[begin:end].float().transpose(0, 1) @ keys.transpose(1, 2) * scale
    seen = _seen(begin, end, shared, window, q.device)
    return scores.masked_fill(~seen, float("-inf")), keys, values
