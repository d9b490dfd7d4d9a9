"""Full fine-tuning: every parameter is trained, and a whole model is saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from luthier.data.advice import FULL_IS_BETTER_FROM, rows_for
from luthier.data.examples import TaskType
from luthier.method_options import FullMethod
from luthier.methods.base import Advice, TuningMethod, register

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register
class Full(TuningMethod):
    """Every parameter of the model."""

    name = "full"
    trains = "the whole model"
    adapter = False
    embeds = True
    learning_rate = 2e-5
    weight_decay = 0.01
    advice = Advice(
        learning_rate=(1e-5, 5e-5),
        epochs=(1, 3),
        examples=(rows_for("full", "full tuning")[0], FULL_IS_BETTER_FROM),
    )

    def wrap(
        self, model: PreTrainedModel, options: FullMethod, new_token_ids: list[int], task: TaskType = TaskType.CAUSAL_LM
    ) -> torch.nn.Module:
        """See :meth:`TuningMethod.wrap`."""
        model.requires_grad_(True)
        return model
