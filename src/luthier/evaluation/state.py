"""A model borrowed for measuring and given back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
