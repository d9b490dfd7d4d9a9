"""Attention within segments on a GPU, with the signatures of `reference.py`, over the flash attention at hand.

Variable-length flash attention (Dao et al., 2022, arXiv:2205.14135) takes runs of queries that lie end to end, each
against one run of keys. A segment that shares a prefix has keys in two places, so there are two calls: every segment
against itself, causal, and all sharers of a prefix, as one run of queries, against the prefix, whole. Softmaxes over
two sets of keys merge exactly by their log-sum-exps:

    lse = log(exp lse₁ + exp lse₂),   out = exp(lse₁ − lse) · out₁ + exp(lse₂ − lse) · out₂

and the backward pass of flash attention reads nothing of the forward pass but out and lse: given the merged ones, each
call returns its own keys' share of the gradients, and the queries' gradients add up.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from luthier.training.fused import reference
from luthier.training.fused.flash import Flash, FlashAttn, Runs, TorchFlash, on_device
from luthier.training.fused.reference import Segments


class Prefixes(NamedTuple):
    """The call of sharers against their prefixes, whose rows are copied together."""

    queries: torch.Tensor
    """``[n] int64``"""
    keys: torch.Tensor
    """``[m] int64``"""
    runs: Runs


class Layout:
    """What the calls need to know of segments, on the device, made once a batch.

    Raises:
        ValueError: the segments do not cover the row in order.
    """

    def __init__(self, segments: Segments, device: torch.device) -> None:
        self.segments, self.device = segments, device
        rows: list[list[int]] = segments.tolist()
        ends = [0, *(end for _, end, _, _ in rows)]
        if any(begin != end for (begin, *_), end in zip(rows, ends, strict=False)):
            raise ValueError("segments must cover the row in order, without gaps")
        # A row that is nothing but its prefix leaves an empty segment, which is no run.
        self.rows = [row for row in rows if row[0] < row[1]]
        lengths = [end - begin for begin, end, _, _ in self.rows]
        self.own = Runs.of(lengths, lengths, device)
        self.longest = max(end - begin + shared for begin, end, _, shared in self.rows)
        self.prefixes = self._prefixes()
        self._windows: dict[int, tuple[torch.Tensor, Runs]] = {}

    def _prefixes(self) -> Prefixes | None:
        """None where nothing is shared."""
        runs = [
            (prefix, shared, list(members))
            for (prefix, shared), members in itertools.groupby(self.rows, key=lambda row: (row[2], row[3]))
            if shared
        ]
        if not runs:
            return None
        # Sharers that follow each other are one run of queries: each sees the whole prefix, so borders do not matter.
        spans = [(members[0][0], members[-1][1]) for _, _, members in runs]
        return Prefixes(
            _rows(spans, self.device),
            _rows([(prefix, prefix + shared) for prefix, shared, _ in runs], self.device),
            Runs.of([end - begin for begin, end in spans], [shared for _, shared, _ in runs], self.device),
        )

    def within(self, window: int) -> tuple[torch.Tensor, Runs]:
        """Rows of the keys of the one call under a sliding window, and its runs.

        A window is aligned at the end of the keys, so that prefixes cannot be a call for themselves: each segment's
        keys are what its first query sees of the prefix, followed by its own.
        """
        if window not in self._windows:
            seen = [min(shared, window - 1) for *_, shared in self.rows]
            spans = [
                span
                for (begin, end, prefix, shared), n in zip(self.rows, seen, strict=True)
                for span in ((prefix + shared - n, prefix + shared), (begin, end))
            ]
            lengths = [end - begin for begin, end, _, _ in self.rows]
            keys = [length + n for length, n in zip(lengths, seen, strict=True)]
            self._windows[window] = (_rows(spans, self.device), Runs.of(lengths, keys, self.device))
        return self._windows[window]


def _rows(spans: list[tuple[int, int]], device: torch.device) -> torch.Tensor:
    return on_device([row for begin, end in spans for row in range(begin, end)], torch.int64, device)


class SegmentAttention:
    """Attention within segments by calls of flash attention."""

    def __init__(self, flash: Flash) -> None:
        self.flash = flash
        self.name = flash.name
        self._layout: Layout | None = None

    def layout(self, segments: Segments, device: torch.device) -> Layout:
        """Of the last segments asked for, which all layers of a batch share."""
        if self._layout is None or self._layout.segments is not segments or self._layout.device != device:
            self._layout = Layout(segments, device)
        return self._layout

    def attention(
        self,
        q: torch.Tensor,  # [N, H, d]
        k: torch.Tensor,  # [N, Hkv, d]
        v: torch.Tensor,
        segments: Segments,
        *,
        scale: float,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layout = self.layout(segments, q.device)
        window = None if window is None or window >= layout.longest else window
        shared = layout.prefixes
        if shared is not None and window is not None:
            keys, runs = layout.within(window)
            return self.flash.forward(q, k[keys], v[keys], runs, scale=scale, causal=True, window=window)
        out, lse = self.flash.forward(q, k, v, layout.own, scale=scale, causal=True, window=window)
        if shared is not None:
            rows, keys, runs = shared
            more, more_lse = self.flash.forward(q[rows], k[keys], v[keys], runs, scale=scale, causal=False)
            before = lse[:, rows]
            both = torch.logaddexp(before, more_lse)
            mixed = out[rows].float() * _share(before, both) + more.float() * _share(more_lse, both)
            out[rows] = mixed.to(out.dtype)
            lse[:, rows] = both
        return out, lse

    def attention_backward(
        self,
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
        layout = self.layout(segments, q.device)
        window = None if window is None or window >= layout.longest else window
        shared = layout.prefixes
        if shared is not None and window is not None:
            keys, runs = layout.within(window)
            dq, *pieces = self.flash.backward(
                grad, q, k[keys], v[keys], out, lse, runs, scale=scale, causal=True, window=window
            )
            dk, dv = (_added(torch.zeros_like(t), piece, keys) for t, piece in zip((k, v), pieces, strict=True))
            return dq, dk, dv
        dq, dk, dv = self.flash.backward(grad, q, k, v, out, lse, layout.own, scale=scale, causal=True, window=window)
        if shared is not None:
            rows, keys, runs = shared
            chosen = (grad[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows].contiguous())
            more, more_k, more_v = self.flash.backward(*chosen, runs, scale=scale, causal=False)
            dq, dk, dv = _added(dq, more, rows), _added(dk, more_k, keys), _added(dv, more_v, keys)
        return dq, dk, dv


def _share(lse: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
    """``[n, H, 1] float32``: the part of the softmax's sum that one call saw."""
    return (lse - both).exp().t()[..., None]


def _added(total: torch.Tensor, pieces: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``total`` with ``pieces`` added at ``rows``, which may repeat, in float32."""
    return total.float().index_add_(0, rows, pieces.float()).to(total.dtype)


class FlexAttention:
    """PyTorch's flex-attention under a mask of the segments (Dong et al., 2024, arXiv:2412.05496).

    Its backward pass is autograd's alone, so it runs the forward pass once more: for GPUs that have no flash attention.

    Raises:
        NotImplementedError: on a CPU, where it has no backward pass.
    """

    name = "flex-attention"

    def __init__(self, device: torch.device) -> None:
        from torch.nn.attention import flex_attention

        if device.type == "cpu":
            raise NotImplementedError("it has no backward pass on CPUs")
        self._library = flex_attention
        self._run: Any = torch.compile(flex_attention.flex_attention)
        self._masks: tuple[Segments, dict[int | None, Any]] | None = None

    def _mask(self, segments: Segments, window: int | None, tokens: int, device: torch.device) -> Any:
        if self._masks is None or self._masks[0] is not segments:
            self._masks = (segments, {})
        masks = self._masks[1]
        if window not in masks:
            sees = segment_mask(segments, window, device)
            masks[window] = self._library.create_block_mask(sees, None, None, tokens, tokens, device=device)
        return masks[window]

    def _call(self, q: Any, k: Any, v: Any, segments: Segments, scale: float, window: int | None) -> Any:
        mask = self._mask(segments, window, len(q), q.device)
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # [1, H, N, d]
        out, aux = self._run(
            q,
            k,
            v,
            block_mask=mask,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=self._library.AuxRequest(lse=True),
        )
        return out[0].transpose(0, 1), aux.lse[0]

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        segments: Segments,
        *,
        scale: float,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            out, lse = self._call(q, k, v, segments, scale, window)
        return out.contiguous(), lse

    def attention_backward(
        self,
        grad: torch.Tensor,
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
        with torch.enable_grad():
            q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
            again, _ = self._call(q, k, v, segments, scale, window)
            dq, dk, dv = torch.autograd.grad(again, (q, k, v), grad)
        return dq.contiguous(), dk.contiguous(), dv.contiguous()


def segment_mask(segments: Segments, window: int | None, device: torch.device) -> Any:
    """Flex-attention's mask function of segments: whether the query at row i sees the key at row j."""
    begin, end, prefix, shared = segments.long().unbind(1)
    number = torch.repeat_interleave(torch.arange(len(segments)), end - begin).to(device)  # [N]
    begin, first, past = (t.to(device)[number] for t in (begin, prefix, prefix + shared))

    def sees(batch: Any, head: Any, i: Any, j: Any) -> Any:
        own = (number[i] == number[j]) & (j <= i)
        ahead = (j >= first[i]) & (j < past[i])
        if window is not None:
            own = own & (i - j < window)
            # As if the segment followed its prefix at once.
            ahead = ahead & (past[i] - j + i - begin[i] < window)
        return own | ahead

    return sees


class Choice(NamedTuple):
    """How attention within segments is computed."""

    attention: Any
    """has ``attention`` and ``attention_backward`` of `reference.py`"""
    reason: str
    """which it is and why none before it in the order of preference, in words for the user"""
    plain: bool
    """whether it is the plain reference, for want of anything better"""


_CANDIDATES = (
    (TorchFlash.name, lambda device: SegmentAttention(TorchFlash())),
    (FlashAttn.name, lambda device: SegmentAttention(FlashAttn())),
    (FlexAttention.name, FlexAttention),
)


@lru_cache(maxsize=8)
def choose(device: torch.device, dtype: torch.dtype) -> Choice:
    """The first way of the list that is installed and gives the reference's values and gradients on this device."""
    refused: list[str] = []
    for name, make in _CANDIDATES:
        try:
            attention: Any = make(device)
            why = _why_not(attention, device, dtype)
        except Exception as error:  # whatever a library raises that does not fit this machine
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not why:
            return Choice(attention, "; ".join([name, *refused]), plain=False)
        refused.append(f"not {name}: {why}")
    return Choice(reference, "; ".join(["plain attention, one segment at a time", *refused]), plain=True)


def _why_not(attention: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Empty where a small trial gives the reference's values and gradients, with shared prefixes and a window."""
    segments = torch.tensor([[0, 37, 0, 0], [37, 60, 0, 37], [60, 101, 0, 37], [101, 150, 0, 0]], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers stay as they are
    shapes = ((150, 4, 64), (150, 2, 64), (150, 2, 64), (150, 4, 64))
    q, k, v, grad = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    for window in (None, 20):
        found = []
        for ops, inputs in ((attention, (q, k, v, grad)), (reference, tuple(t.float() for t in (q, k, v, grad)))):
            q_, k_, v_, grad_ = inputs
            out, lse = ops.attention(q_, k_, v_, segments, scale=0.1, window=window)
            grads = ops.attention_backward(grad_, q_, k_, v_, out, lse, segments, scale=0.1, window=window)
            found.append([out, lse, *grads])
        for ours, theirs in zip(*found, strict=True):
            if ours.shape != theirs.shape:
                return f"it gives the shape {tuple(ours.shape)} for {tuple(theirs.shape)}"
            # bfloat16 rounds by 1/256 at the most; a key too many or too few changes far more.
            apart = float((ours.float() - theirs).norm() / theirs.norm())
            if not apart <= 0.02:
                return f"it is {apart:.2g} of its size away from the reference"
    return ""
