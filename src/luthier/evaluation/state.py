"""A model borrowed for measuring and given back as it was, and the rows it is given at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from luthier.data.encode import EncodedExample

# Tokens of one forward pass, padding among them.
_TOKENS = 4096


@contextmanager
def measuring(model: torch.nn.Module, attention: str | None = None) -> Iterator[None]:
    """Eval mode and no gradients inside; the modes of all modules and the attention are restored afterwards.

    Args:
        model: any transformers model, wrapped by PEFT or not.
        attention: the attention implementation to use inside; None: leave it.
    """
    training = [module for module in model.modules() if module.training]
    native = model.config._attn_implementation  # type: ignore[union-attr]
    model.eval()
    if attention is not None and attention != native:
        model.set_attn_implementation(attention)  # type: ignore[operator]
    try:
        with torch.no_grad():
            yield
    finally:
        if model.config._attn_implementation != native:  # type: ignore[union-attr]
            model.set_attn_implementation(native)  # type: ignore[operator]
        for module in training:
            module.training = True


def by_length(rows: Sequence[EncodedExample]) -> Iterator[list[int]]:
    """Numbers of rows of like length together, as many as fit ``_TOKENS`` with padding, one at least."""
    return _filled(rows, sorted(range(len(rows)), key=lambda n: len(rows[n])))


def by_context(rows: Sequence[EncodedExample]) -> Iterator[list[int]]:
    """The same with rows of one context next to each other, so that a packed batch computes that once."""

    def key(number: int) -> tuple[int, bytes, int]:
        row = rows[number]
        context = row.input_ids[: int(row.trained.argmax())]
        return len(context), context.tobytes(), len(row)

    return _filled(rows, sorted(range(len(rows)), key=key))


def _filled(rows: Sequence[EncodedExample], order: Sequence[int]) -> Iterator[list[int]]:
    taken: list[int] = []
    longest = 0
    for number in order:
        longest = max(longest, len(rows[number]))
        if taken and longest * (len(taken) + 1) > _TOKENS:
            yield taken
            taken, longest = [], len(rows[number])
        taken.append(number)
    if taken:
        yield taken
