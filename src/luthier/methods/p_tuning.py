"""P-tuning: vectors before every text, made by a small network that is trained with them.

Liu et al., 2021, "GPT Understands, Too", arXiv:2103.10385. PEFT saves the vectors that the network makes in the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.data.examples import TaskType
from luthier.method_options import PTuningMethod
from luthier.methods.base import Advice, peft_task, register
from luthier.methods.before import BeforeTheText

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@register
class PTuning(BeforeTheText):
    """A network that makes vectors before every text."""

    name = "p_tuning"
    trains = "a network that makes vectors before every text"
    learning_rate = 3e-4
    advice = Advice(learning_rate=(1e-4, 5e-4), epochs=(3, 30), examples=(100, 1_000))

    def wrap(
        self,
        model: PreTrainedModel,
        options: PTuningMethod,
        new_token_ids: list[int],
        task: TaskType = TaskType.CAUSAL_LM,
    ) -> torch.nn.Module:
        """See :meth:`TuningMethod.wrap`."""
        from peft import PromptEncoderConfig

        config = PromptEncoderConfig(
            task_type=peft_task(task),
            num_virtual_tokens=options.num_virtual_tokens,
            encoder_reparameterization_type=options.encoder_reparameterization_type,
            encoder_hidden_size=options.encoder_hidden_size or model.config.get_text_config().hidden_size,
            encoder_num_layers=options.encoder_num_layers,
            encoder_dropout=options.encoder_dropout,
        )
        return self.wrapped(model, config)
