"""What was saved, ready to answer: on the accelerator where there is one, in a precision that is fast there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from luthier.methods.saved import SavedModel, load_saved
from luthier.models.loading import training_dtype
from luthier.models.memory import free_memory
from luthier.models.packed import compute_in, packed_layers

# The share of free memory that weights may take more of.
_SHARE = 0.5


def load_to_answer(path: str | Path, *, dtype: torch.dtype | None = None) -> SavedModel:
    """Load what a run has saved, to be asked.

    A CPU without bfloat16 instructions answers from 16-bit weights several times slower than from the same weights in
    float32, which holds every one of them exactly: so they are held in float32 there, where memory suffices.

    Args:
        path: see :func:`~luthier.methods.saved.load_saved`.
        dtype: precision of the weights; None: as the base is stored, or float32 as above.

    Raises:
        UserError: see :func:`~luthier.methods.saved.load_saved`.
    """
    saved = load_saved(path, dtype=dtype)
    place_to_answer(saved.model, dtype)
    return saved


def place_to_answer(model: Any, dtype: torch.dtype | None = None) -> None:
    """Move a model, in place, to where it answers fastest, in the precision that :func:`load_to_answer` tells of."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cpu":
        model.to(device)
    elif dtype is None and training_dtype("auto", device) is torch.float32:
        halves = sum(p.nbytes for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16))
        if halves < _SHARE * free_memory(device):
            # Weights in 8 or 4 bits stay as they are.
            compute_in(model, torch.float32) if packed_layers(model) else model.float()
