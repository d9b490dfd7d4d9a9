"""LoRA: low-rank matrices A (r × in) and B (out × r) beside frozen weights, W' = W + (alpha / r) · B·A.

Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685. The model is wrapped by
PEFT, so what is saved is a plain PEFT adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from luthier.data.advice import rows_for
from luthier.data.examples import TaskType
from luthier.method_options import LoraMethod
from luthier.methods.base import Advice, TuningMethod, peft_task, register, wrapped_by_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register
class Lora(TuningMethod):
    """Low-rank matrices beside frozen weights."""

    name = "lora"
    trains = "low-rank matrices beside frozen weights"
    merges = True
    learning_rate = 2e-4
    advice = Advice(
        learning_rate=(1e-4, 2e-4), epochs=(1, 3), examples=rows_for("lora", "a light adaptation"), rank=(4, 16)
    )

    def wrap(
        self, model: PreTrainedModel, options: LoraMethod, new_token_ids: list[int], task: TaskType = TaskType.CAUSAL_LM
    ) -> torch.nn.Module:
        """See :meth:`TuningMethod.wrap`."""
        from peft import LoraConfig

        extra: dict[str, Any] = {}
        if new_token_ids and not {"embed_tokens", "wte"} & set(options.modules_to_save):
            # Only the new rows of the embeddings are trained and saved, not the whole matrix.
            extra["trainable_token_indices"] = new_token_ids
        config = LoraConfig(
            task_type=peft_task(task),
            r=options.r,
            lora_alpha=options.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=options.lora_dropout,
            target_modules=options.target_modules,
            modules_to_save=options.modules_to_save or None,
            use_rslora=options.use_rslora,
            **extra,
        )
        return wrapped_by_peft(model, config, "LoRA")
