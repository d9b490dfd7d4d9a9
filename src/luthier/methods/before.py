"""What prompt tuning, P-tuning and prefix tuning have in common: something trained stands before every text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luthier.data.examples import TaskType
from luthier.methods.base import TuningMethod, wrapped_by_peft

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class BeforeTheText(TuningMethod):
    """A method that trains virtual tokens; `luthier.models.virtual` runs what it makes."""

    divides = False
    tasks = frozenset({TaskType.CAUSAL_LM, TaskType.INSTRUCTION})

    def virtual_tokens(self, options: Any) -> int:
        """See :meth:`TuningMethod.virtual_tokens`."""
        return int(options.num_virtual_tokens)

    def wrapped(self, model: PreTrainedModel, config: Any) -> torch.nn.Module:
        """The model in PEFT's wrapper.

        Raises:
            UserError: the model cannot take what this method trains.
        """
        return wrapped_by_peft(model, config, f"method {self.name}", where="method.name", remedy="use method.name=lora")
