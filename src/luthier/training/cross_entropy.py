"""Cross-entropy of a linear head in chunks: memory does not grow with vocabulary × length."""

from __future__ import annotations

from typing import Any

import torch

from luthier.training.fused import cuda, kernels, reference

# Bytes of logits that exist at one time, in the model's precision. On a CPU they stay below the size that the
# allocator maps anew (see allocator), except where the head itself is trained: its gradient is added up in float32
# once a chunk, a pass over the whole vocabulary that few large chunks make cheap.
CHUNK_BYTES = 30 << 20
CHUNK_BYTES_TRAINED_HEAD = 96 << 20
# On a GPU, that a chunk's products take longer than reading the head: 1,000 rows of 128,000 tokens.
CHUNK_BYTES_GPU = 256 << 20


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of a linear head, gradients formed in the forward pass.

    The gradient of the loss with respect to the logits is softmax − one-hot, known as soon as the logits are, so
    they need not be kept or computed twice (the idea of Liger-Kernel's fused linear cross-entropy,
    arXiv:2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # [K, D]
        weight: torch.Tensor,  # [V, D]
        bias: torch.Tensor | None,  # [V]
        targets: torch.Tensor,  # [K]
    ) -> torch.Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None
        ops = ops_for(hidden)
        size = min(chunk_rows(weight, wants_weight), len(targets))
        room = hidden.new_empty(size, len(weight))  # one allocation for all chunks
        for begin in range(0, len(targets), size):
            rows, goal = hidden[begin : begin + size], targets[begin : begin + size]
            logits = torch.mm(rows, weight.t(), out=room[: len(rows)])  # [chunk, V]
            if bias is not None:
                logits += bias
            wanted = wants_hidden or wants_weight or wants_bias
            total += ops.cross_entropy_(logits, goal, gradient=wanted).sum()
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=torch.float32)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[begin : begin + size])
            if grad_weight is not None:
                grad_weight += logits.t() @ rows
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = [
            None if grad is None else grad.mul_(grad_output).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        ctx.grads = (None, None, None)
        return (*scaled, None)


def ops_for(hidden: torch.Tensor) -> Any:
    """The compiled kernels where they fit the tensor, else their plain reference."""
    if hidden.device.type == "cuda":
        return cuda.formulas()
    compiled = kernels.load() if hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16 else None
    return reference if compiled is None else compiled


def chunk_rows(weight: torch.Tensor, trained: bool = False) -> int:
    """Positions whose logits ``[chunk, V]`` exist at one time."""
    limit = CHUNK_BYTES_TRAINED_HEAD if trained else CHUNK_BYTES
    if weight.device.type != "cpu":
        limit = CHUNK_BYTES_GPU
    rows = limit // (len(weight) * weight.element_size())
    # Every chunk reads the whole head: fewer rows than this, and reading it takes longer than the products.
    return max(128, rows // 32 * 32)


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """Sum of cross-entropies of ``hidden @ weight.T + bias`` against ``targets``, in float32.

    Args:
        hidden: ``[K, D]``
        weight: ``[V, D]``
        bias: ``[V]`` or None
        targets: ``[K] int64``
    """
    loss: torch.Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets)
    return loss
