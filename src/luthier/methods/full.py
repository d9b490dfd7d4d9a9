"""Full fine-tuning: every parameter is trained but what the recipe freezes, and a whole model is saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from luthier.data.advice import FULL_IS_BETTER_FROM, rows_for
from luthier.data.examples import TaskType
from luthier.errors import UserError
from luthier.method_options import FullMethod
from luthier.methods.base import Advice, TuningMethod, register
from luthier.methods.parts import layer_numbers, layers_of, module_names
from luthier.models.heads import fresh_modules

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
        if options.frozen_layers is not None:
            layers = layers_of(model)
            for number in layer_numbers(model, options.frozen_layers, "method.frozen_layers"):
                layers[number].requires_grad_(False)
        for name in module_names(model, options.frozen_modules, "method.frozen_modules"):
            model.get_submodule(name).requires_grad_(False)
        if new_token_ids and not model.get_input_embeddings().weight.requires_grad:
            raise UserError(
                "the embeddings of added tokens would stay as they are",
                where="method.frozen_modules",
                remedy="leave the embeddings out of it, or add no tokens",
            )
        fresh = {name: model.get_submodule(name).parameters() for name in fresh_modules(model)}
        untrained = [name for name, parameters in fresh.items() if not all(p.requires_grad for p in parameters)]
        if untrained:
            raise UserError(
                f"{untrained[0]!r} is new to the model and would stay as it begins, at random",
                where="method.frozen_modules",
                remedy="leave it out of it",
            )
        if not any(p.requires_grad for p in model.parameters()):
            raise UserError(
                "nothing is left to train", where="method.frozen_modules", remedy="freeze fewer layers or modules"
            )
        return model
