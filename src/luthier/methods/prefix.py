"""Prefix tuning: keys and values before every text are trained, in every layer.

Li and Liang, 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv:2101.00190. PEFT saves the
keys and values themselves, not the network that makes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luthier.data.examples import TaskType
from luthier.errors import UserError
from luthier.method_options import MixedMethod, PrefixMethod
from luthier.methods.base import Advice, peft_task, register
from luthier.methods.before import BeforeTheText

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from luthier.recipe import Recipe


@register
class Prefix(BeforeTheText):
    """Keys and values before every text."""

    name = "prefix"
    trains = "keys and values before every text, in every layer"
    learning_rate = 1e-3
    advice = Advice(learning_rate=(3e-4, 2e-3), epochs=(3, 30), examples=(100, 1_000))

    def check(self, recipe: Recipe) -> None:
        """See :meth:`TuningMethod.check`; also refuses gradient checkpointing, in which transformers drops caches."""
        super().check(recipe)
        if recipe.training.gradient_checkpointing:
            raise UserError(
                f"method {self.name} cannot recompute layers: their trained keys and values would be dropped",
                where="training.gradient_checkpointing",
                remedy=f"set it to false and lower per_device_train_batch_size, or use {self.instead}",
            )

    def wrap(
        self,
        model: PreTrainedModel,
        options: PrefixMethod,
        new_token_ids: list[int],
        task: TaskType = TaskType.CAUSAL_LM,
    ) -> torch.nn.Module:
        """See :meth:`TuningMethod.wrap`."""
        return self.wrapped(model, prefix_config(model, options, task))


def prefix_config(model: PreTrainedModel, options: PrefixMethod | MixedMethod, task: TaskType) -> Any:
    """PEFT's configuration of the keys and values that options ask for."""
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(
        task_type=peft_task(task),
        num_virtual_tokens=options.num_virtual_tokens,
        prefix_projection=options.prefix_projection,
        encoder_hidden_size=options.encoder_hidden_size or model.config.get_text_config().hidden_size,
    )
