"""IA3: vectors that scale keys, values and the inner values of each MLP; the weights stay as they are.

Liu et al., 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv:2205.05638. The model is wrapped by PEFT, so what is saved is a plain PEFT adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from luthier.data.advice import rows_for
from luthier.data.examples import TaskType
from luthier.errors import UserError
from luthier.method_options import Ia3Method
from luthier.methods.base import Advice, TuningMethod, peft_task, register, whole_modules, wrapped_by_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Where PEFT does not know a model: how decoders name these layers, and how most encoder-decoders do.
_SCALED = (("k_proj", "v_proj", "down_proj"), ("k_proj", "v_proj", "fc2"))


@register
class Ia3(TuningMethod):
    """Vectors that scale keys, values and inner values."""

    name = "ia3"
    trains = "vectors that scale keys, values and inner values"
    merges = True
    learning_rate = 5e-3
    advice = Advice(learning_rate=(1e-3, 3e-2), epochs=(1, 3), examples=rows_for("lora", "a light adaptation"))

    def wrap(
        self, model: PreTrainedModel, options: Ia3Method, new_token_ids: list[int], task: TaskType = TaskType.CAUSAL_LM
    ) -> torch.nn.Module:
        """See :meth:`TuningMethod.wrap`."""
        from peft import IA3Config

        targets, feedforward = options.target_modules, options.feedforward_modules
        if not targets:
            targets, feedforward = _layers_of(model)
        config = IA3Config(
            task_type=peft_task(task),
            target_modules=targets,
            feedforward_modules=feedforward,
            modules_to_save=whole_modules(model, (), task),
        )
        return wrapped_by_peft(
            model,
            config,
            "IA3",
            where="method.target_modules",
            remedy="name linear layers of this model, or leave it empty",
        )


def _layers_of(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """The layers to scale, and those of them whose inputs are scaled.

    Raises:
        UserError: the model names its layers otherwise.
    """
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD,
    )
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS,
    )

    kind = str(model.config.model_type)
    if kind in TARGETS and kind in FEEDFORWARD:
        return list(TARGETS[kind]), list(FEEDFORWARD[kind])
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for scaled in _SCALED:
        if set(scaled) <= names:
            return list(scaled), list(scaled[-1:])
    raise UserError(
        f"IA3 does not know which layers of a {kind} model make keys, values and inner values",
        where="method.target_modules",
        remedy="name them there and in method.feedforward_modules, or use method.name=lora",
    )
