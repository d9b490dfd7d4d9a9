"""What prompt tuning, P-tuning and prefix tuning have in common: something trained stands before every text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luthier.data.examples import TaskType
from luthier.errors import UserError
from luthier.methods.base import TuningMethod, peft_warnings_apart

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from luthier.recipe import Recipe


class BeforeTheText(TuningMethod):
    """A method that trains virtual tokens; `luthier.models.virtual` runs what it makes."""

    divides = False
    tasks = frozenset({TaskType.CAUSAL_LM, TaskType.INSTRUCTION})

    def check(self, recipe: Recipe) -> None:
        """See :meth:`TuningMethod.check`; also refuses new tokens and divided models."""
        super().check(recipe)
        if recipe.model.added_tokens:
            self.refuse_new_tokens()
        if recipe.training.sharding == "full":
            raise UserError(
                f"method {self.name} does not train a model that is divided among processes",
                where="training.sharding",
                remedy="set it to none, or use method.name=lora",
            )

    def refuse_new_tokens(self) -> None:
        """Raises:
        UserError: always; new tokens need trained embeddings.
        """
        raise UserError(
            f"method {self.name} leaves the model as it is, so new tokens would stay untrained",
            where="model.added_tokens",
            remedy="leave it empty, or use method.name=lora, which trains their embeddings",
        )

    def virtual_tokens(self, options: Any) -> int:
        """See :meth:`TuningMethod.virtual_tokens`."""
        return int(options.num_virtual_tokens)

    def wrapped(self, model: PreTrainedModel, config: Any, new_token_ids: list[int]) -> torch.nn.Module:
        """The model in PEFT's wrapper.

        Raises:
            UserError: tokens were added, or the model cannot take what this method trains.
        """
        from peft import get_peft_model

        if new_token_ids:
            self.refuse_new_tokens()
        try:
            with peft_warnings_apart():
                return get_peft_model(model, config, autocast_adapter_dtype=False)
        except (ValueError, AttributeError) as error:
            raise UserError(
                f"method {self.name} does not fit this model: {str(error).splitlines()[0]}",
                where="method.name",
                remedy="use method.name=lora",
            ) from None
