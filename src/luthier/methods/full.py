"""Full fine-tuning: every parameter is trained, and a whole model is saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from luthier.data.advice import FULL_IS_BETTER_FROM, rows_for
from luthier.methods.base import Advice, TuningMethod, register
from luthier.recipe import FullMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _wrap(model: PreTrainedModel, options: FullMethod, new_token_ids: list[int]) -> torch.nn.Module:
    model.requires_grad_(True)
    return model


FULL = register(
    TuningMethod(
        name="full",
        wrap=_wrap,
        adapter=False,
        merges=False,
        learning_rate=2e-5,
        weight_decay=0.01,
        advice=Advice(
            learning_rate=(1e-5, 5e-5),
            epochs=(1, 3),
            examples=(rows_for("full", "full tuning")[0], FULL_IS_BETTER_FROM),
        ),
    )
)
