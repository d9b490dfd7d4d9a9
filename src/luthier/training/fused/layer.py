"""One decoder layer (Llama's, Mistral's, Qwen's) as one autograd function over fused kernels.

    h = norm(x);  q, k, v = projections of h, turned to their positions
    x1 = x + o_proj(attention(q, k, v))
    h2 = norm(x1);  x2 = x1 + down_proj(silu(gate_proj(h2)) · up_proj(h2))

A projection is ``y = h Wᵀ + bias + s · (dropout(h) Aᵀ) Bᵀ``, with A and B where it has a LoRA. The low-rank products of
projections that read the same h share one product with A. Kept for the backward pass are what matrix products made;
norms, rotations, dropout and SwiGLU are computed again. ``recompute`` chooses to keep less: "mlp" lets go of gate and
up, the widest values, and True of all but x.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

Recompute = Literal[False, True, "mlp"]
"""What the backward pass computes again beside the cheap: nothing, the whole layer, gate and up."""

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Projection(NamedTuple):
    """The tensors of a linear layer, and of its LoRA where it has one."""

    weight: torch.Tensor
    """``[out, in]``"""
    bias: torch.Tensor | None
    a: torch.Tensor | None
    """``[r, in]``"""
    b: torch.Tensor | None
    """``[out, r]``"""


class Norms(NamedTuple):
    """Weights of a layer's norms; those of queries and keys are None where it has none."""

    first: torch.Tensor
    second: torch.Tensor
    query: torch.Tensor | None
    key: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What is fixed about a layer."""

    heads: int
    kv_heads: int
    d: int
    """values a head"""
    scale: float
    """factor of the attention scores"""
    window: int | None
    """tokens back that a token sees, itself included; None: all"""
    rotary: bool
    eps: tuple[float, float, float, float]
    """of the norms, in the order of :class:`Norms`"""
    lora_scale: tuple[float, ...]
    """for each projection in the order of ``NAMES``"""
    lora_dropout: tuple[float, ...]


@dataclass(slots=True)
class Call:
    """What one forward pass brings to a layer."""

    ops: Any
    """`kernels.Kernels`, `cuda.Cuda`, or the module `reference`"""
    segments: torch.Tensor
    """``[S, 4] int32`` on the CPU, see `reference.Segments`"""
    cosine: torch.Tensor
    """``[N, d] float32``; sine the same"""
    sine: torch.Tensor
    seeds: tuple[int, ...] = (0, 0, 0, 0)
    """of the dropout before q k v, o, gate up, down"""
    training: bool = False
    recompute: Recompute = False
    rows: torch.Tensor | None = None
    """Positions whose output is wanted, each once; None: all. The last layer need not compute the others."""


class Tensors(NamedTuple):
    """Everything a layer is made of."""

    norms: Norms
    projections: tuple[Projection, ...]

    def flat(self) -> list[torch.Tensor | None]:
        return [*self.norms, *(t for p in self.projections for t in p)]

    @classmethod
    def of(cls, flat: Sequence[Any]) -> Tensors:
        count = len(Norms._fields)
        rest = flat[count:]
        return cls(Norms(*flat[:count]), tuple(Projection(*rest[i : i + 4]) for i in range(0, len(rest), 4)))


class _Group:
    """Projections that read the same input.

    Args:
        numbers: which of ``NAMES``.
        seed: which of the call's seeds its dropout takes.
    """

    def __init__(self, plan: LayerPlan, tensors: Tensors, numbers: range, seed: int, call: Call) -> None:
        self.projections = [tensors.projections[i] for i in numbers]
        self.scales = [plan.lora_scale[i] for i in numbers]
        self.numbers = numbers
        self.ops = call.ops
        self.seed = call.seeds[seed]
        rates = [plan.lora_dropout[i] for i, p in zip(numbers, self.projections, strict=True) if p.a is not None]
        self.keep = 1.0 - rates[0] if rates and call.training else 1.0
        matrices = [p.a for p in self.projections if p.a is not None]
        self.a = None if not matrices else matrices[0] if len(matrices) == 1 else torch.cat(matrices)  # [R, in]

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        """x under the group's dropout; the same mask for the same seed."""
        return self.ops.dropout(x, self.seed, self.keep) if self.keep < 1 else x

    def low(self, x: torch.Tensor) -> Any:
        """The low-rank values ``[N, R]``, scaled; None where no projection has a LoRA."""
        if self.a is None:
            return None
        low = self.dropped(x) @ self.a.t()
        for _, scale, piece in self._with_pieces(low):
            if piece is not None:
                piece.mul_(scale)
        return low

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[list[torch.Tensor], Any]:
        """Each projection of x, ``residual`` added; and the low-rank values ``[N, R]``, scaled.

        The low-rank product comes first and the large one is added to it in float32, before the one rounding to
        bfloat16. The other way round, it would be added to values that lie on bfloat16's grid already, and whatever
        is less than half a step of it would vanish: early in training that is most of what a LoRA does.
        """
        low = self.low(x)
        outputs = []
        for projection, _, piece in self._with_pieces(low):
            weight, b = projection.weight.t(), projection.b
            if b is not None:
                y = piece @ b.t()
                if projection.bias is not None:
                    y += projection.bias
                y.addmm_(x, weight)
            else:
                y = x @ weight if projection.bias is None else torch.addmm(projection.bias, x, weight)
            outputs.append(y if residual is None else y.add_(residual))
        return outputs, low

    def _with_pieces(self, low: torch.Tensor | None) -> Iterator[tuple[Projection, float, Any]]:
        at = 0
        for projection, scale in zip(self.projections, self.scales, strict=True):
            rank = 0 if projection.a is None else len(projection.a)
            yield projection, scale, None if low is None or not rank else low[:, at : at + rank]
            at += rank

    def backward_input(self, grads: Sequence[torch.Tensor], wanted: bool = True) -> tuple[Any, Any]:
        """Gradient with respect to x (None where it is not wanted), and to the low-rank values ``[N, R]``."""
        dx = dlow = None
        if self.a is not None:
            pieces = [
                (grad @ p.b).mul_(scale)
                for p, scale, grad in zip(self.projections, self.scales, grads, strict=True)
                if p.b is not None
            ]
            dlow = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
            # First for the reason that `forward` gives.
            dx = self.dropped(dlow @ self.a) if wanted else None
        if wanted:
            for projection, grad in zip(self.projections, grads, strict=True):
                dx = grad @ projection.weight if dx is None else dx.addmm_(grad, projection.weight)
        return dx, dlow

    def backward_weights(
        self, x: torch.Tensor, grads: Sequence[torch.Tensor], low: Any, dlow: Any, wanted: Sequence[Projection]
    ) -> list[list[torch.Tensor | None]]:
        """Gradients of each projection's weight, bias, a and b, where ``wanted`` has true in their place."""
        da = None
        if dlow is not None and any(w[2] for w in wanted):
            da = dlow.t() @ self.dropped(x)
        result: list[list[torch.Tensor | None]] = []
        at = 0
        for (projection, _, piece), grad, want in zip(self._with_pieces(low), grads, wanted, strict=True):
            rank = 0 if projection.a is None else len(projection.a)
            result.append(
                [
                    grad.t() @ x if want[0] else None,
                    grad.float().sum(0).to(grad.dtype) if want[1] else None,
                    da[at : at + rank] if want[2] and da is not None else None,
                    grad.t() @ piece if want[3] else None,
                ]
            )
            at += rank
        return result


@dataclass(slots=True)
class _Kept:
    """What the backward pass reads: token-major values, in the order in which they were made."""

    inverse1: torch.Tensor
    raw: tuple[torch.Tensor, torch.Tensor] | None
    """queries and keys before their norms, with the norms' inverses after"""
    inverses: tuple[torch.Tensor, torch.Tensor] | None
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    x1: torch.Tensor
    inverse2: torch.Tensor
    gate_up: tuple[torch.Tensor, torch.Tensor] | None
    """None: made again from x1"""
    lows: tuple[Any, Any, Any, Any]


def kept_bytes(plan: LayerPlan, tensors: Tensors, recompute: Recompute) -> int:
    """Bytes a token that the input of a layer and its :class:`_Kept` hold."""
    size = tensors.projections[0].weight.element_size()
    if recompute is True:
        return tensors.projections[0].weight.shape[1] * size
    q, k, v, o, gate, up, _ = (len(p.weight) for p in tensors.projections)
    ranks = sum(len(p.a) for p in tensors.projections if p.a is not None)
    values = 2 * o + 2 * q + k + v + ranks
    if not recompute:
        values += gate + up
    floats = 2 + plan.heads  # of float32: the norms' factors and attention's log-sum-exp
    if tensors.norms.query is not None:
        values += q + k
        floats += plan.heads + plan.kv_heads
    return values * size + floats * torch.float32.itemsize


class Layer(torch.autograd.Function):
    """See the module's text. ``apply(x, plan, call, *Tensors.flat())``: ``[N, D]`` to ``[N or len(rows), D]``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: LayerPlan, call: Call, *flat: Any) -> torch.Tensor:
        tensors = Tensors.of(flat)
        needed = any(ctx.needs_input_grad)
        x2, kept = _forward(plan, call, tensors, x)
        assert x2 is not None
        ctx.save_for_backward(x, *flat)
        ctx.plan, ctx.call = plan, call
        if call.recompute == "mlp":
            kept.gate_up = None
        ctx.kept = None if call.recompute is True or not needed else kept
        return x2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, *flat = ctx.saved_tensors
        plan, call, tensors = ctx.plan, ctx.call, Tensors.of(flat)
        kept = ctx.kept if ctx.kept is not None else _forward(plan, call, tensors, x, again=True)[1]
        ctx.kept = None
        wants = Tensors.of(ctx.needs_input_grad[3:])
        dx, grads = _backward(plan, call, tensors, wants, x, kept, grad.contiguous(), ctx.needs_input_grad[0])
        return dx, None, None, *grads


def _groups(plan: LayerPlan, tensors: Tensors, call: Call) -> tuple[_Group, _Group, _Group, _Group]:
    ranges = (range(3), range(3, 4), range(4, 6), range(6, 7))
    first, second, third, fourth = (_Group(plan, tensors, r, i, call) for i, r in enumerate(ranges))
    return first, second, third, fourth


def _forward(
    plan: LayerPlan, call: Call, tensors: Tensors, x: torch.Tensor, *, again: bool = False
) -> tuple[torch.Tensor | None, _Kept]:
    """The layer's output and what its backward pass reads; ``again``: the latter alone, with no output."""
    ops, norms = call.ops, tensors.norms
    into_attention, out_of_attention, into_mlp, out_of_mlp = _groups(plan, tensors, call)
    h, inverse1 = ops.rms_norm(x, norms.first, plan.eps[0])
    (q, k, v), low1 = into_attention.forward(h)
    q, k, v = (t.view(len(x), -1, plan.d) for t in (q, k, v))
    raw = inverses = None
    if norms.query is not None and norms.key is not None:
        raw = (q, k)
        q, inverse_q = _norm_heads(ops, q, norms.query, plan.eps[2])
        k, inverse_k = _norm_heads(ops, k, norms.key, plan.eps[3])
        inverses = (inverse_q, inverse_k)
    if plan.rotary:
        q, k = (ops.rotate_(t, call.cosine, call.sine) for t in (q, k))
    out, lse = ops.attention(q, k, v, call.segments, scale=plan.scale, window=plan.window)
    residual, mixed = _rows(x, call.rows), _rows(out.view(len(x), -1), call.rows)
    (x1,), low2 = out_of_attention.forward(mixed, residual)
    h2, inverse2 = ops.rms_norm(x1, norms.second, plan.eps[1])
    (gate, up), low3 = into_mlp.forward(h2)
    mixed, x2 = ops.swiglu(gate, up), None
    if again:
        low4 = out_of_mlp.low(mixed)
    else:
        (x2,), low4 = out_of_mlp.forward(mixed, x1)
    kept = _Kept(inverse1, raw, inverses, q, k, v, out, lse, x1, inverse2, (gate, up), (low1, low2, low3, low4))
    return x2, kept


def _backward(
    plan: LayerPlan,
    call: Call,
    tensors: Tensors,
    wants: Tensors,
    x: torch.Tensor,
    kept: _Kept,
    grad: torch.Tensor,  # of x2
    wants_x: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    ops, norms = call.ops, tensors.norms
    into_attention, out_of_attention, into_mlp, out_of_mlp = _groups(plan, tensors, call)
    low1, low2, low3, low4 = kept.lows
    want = wants.projections

    # The MLP. `mixed` is silu(gate) · up from here on, gate and up are their gradients.
    mixed, dlow = out_of_mlp.backward_input([grad])
    h2, _ = ops.rms_norm(kept.x1, norms.second, plan.eps[1])
    gate, up = kept.gate_up if kept.gate_up is not None else into_mlp.forward(h2)[0]
    ops.swiglu_backward_(mixed, gate, up)
    down_grads = out_of_mlp.backward_weights(mixed, [grad], low4, dlow, want[6:])
    dh, dlow = into_mlp.backward_input([gate, up])
    mlp_grads = into_mlp.backward_weights(h2, [gate, up], low3, dlow, want[4:6])
    grad1, second = ops.rms_norm_backward(
        dh, kept.x1, norms.second, kept.inverse2, grad, wants_weight=bool(wants.norms.second)
    )

    # Attention.
    dout, dlow = out_of_attention.backward_input([grad1])
    out = kept.out.view(len(x), -1)
    o_grads = out_of_attention.backward_weights(_rows(out, call.rows), [grad1], low2, dlow, want[3:4])
    residual = _unrows(grad1, call.rows, len(x))
    dq, dk, dv = ops.attention_backward(
        *(_unrows(dout, call.rows, len(x)).view_as(kept.q), kept.q, kept.k, kept.v, kept.out, kept.lse),
        call.segments,
        scale=plan.scale,
        window=plan.window,
    )
    if plan.rotary:
        dq, dk = (ops.rotate_(t, call.cosine, call.sine, back=True) for t in (dq, dk))
    query = key = None
    if kept.raw is not None and kept.inverses is not None:
        dq, query = _norm_heads_backward(ops, dq, kept.raw[0], norms.query, kept.inverses[0], bool(wants.norms.query))
        dk, key = _norm_heads_backward(ops, dk, kept.raw[1], norms.key, kept.inverses[1], bool(wants.norms.key))
    dqkv = [t.view(len(x), -1) for t in (dq, dk, dv)]
    wants_h = wants_x or bool(wants.norms.first)
    dh, dlow = into_attention.backward_input(dqkv, wants_h)
    h, _ = ops.rms_norm(x, norms.first, plan.eps[0])
    qkv_grads = into_attention.backward_weights(h, dqkv, low1, dlow, want[:3])
    dx = first = None
    if wants_h:
        dx, first = ops.rms_norm_backward(
            dh, x, norms.first, kept.inverse1, residual, wants_weight=bool(wants.norms.first)
        )
    projections = [*qkv_grads, *o_grads, *mlp_grads, *down_grads]
    return dx if wants_x else None, [first, second, query, key, *(g for four in projections for g in four)]


def _norm_heads(ops: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    out, inverse = ops.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps)
    return out.view_as(x), inverse


def _norm_heads_backward(
    ops: Any, grad: torch.Tensor, x: torch.Tensor, weight: Any, inverse: torch.Tensor, wants_weight: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    flat = (grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]))
    dx, grad_weight = ops.rms_norm_backward(*flat, weight, inverse, wants_weight=wants_weight)
    return dx.view_as(grad), grad_weight


def _rows(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return x if rows is None else x.index_select(0, rows)


def _unrows(x: torch.Tensor, rows: torch.Tensor | None, count: int) -> torch.Tensor:
    """The transpose of :func:`_rows`: zeros where no row was taken."""
    return x if rows is None else x.new_zeros(count, x.shape[1]).index_copy_(0, rows, x)


class Norm(torch.autograd.Function):
    """The final norm: ``apply(x, weight, eps, ops)``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, ops: Any) -> torch.Tensor:
        out, inverse = ops.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.ops = ops
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, weight, inverse = ctx.saved_tensors
        wants_weight = ctx.needs_input_grad[1]
        dx, dweight = ctx.ops.rms_norm_backward(grad.contiguous(), x, weight, inverse, wants_weight=wants_weight)
        return dx, dweight, None, None
