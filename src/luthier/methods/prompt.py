"""Prompt tuning: vectors before every text are trained, and nothing else.

Lester et al., 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv:2104.08691, whose small models
learn far better where the vectors begin as those of tokens than as noise. Saved by PEFT as its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from luthier.data.examples import TaskType
from luthier.errors import UserError
from luthier.method_options import PromptMethod
from luthier.methods.base import Advice, peft_task, register
from luthier.methods.before import BeforeTheText
from luthier.models.loading import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register
class Prompt(BeforeTheText):
    """Vectors before every text."""

    name = "prompt"
    trains = "vectors before every text"
    learning_rate = 1e-2
    advice = Advice(learning_rate=(3e-3, 1e-1), epochs=(3, 30), examples=(100, 1_000))

    def wrap(
        self,
        model: PreTrainedModel,
        options: PromptMethod,
        new_token_ids: list[int],
        task: TaskType = TaskType.CAUSAL_LM,
    ) -> torch.nn.Module:
        """See :meth:`TuningMethod.wrap`."""
        from peft import PromptTuningConfig

        config = PromptTuningConfig(
            task_type=peft_task(task),
            num_virtual_tokens=options.num_virtual_tokens,
            prompt_tuning_init="SAMPLE_VOCAB",
        )
        wrapped = self.wrapped(model, config)
        if options.prompt_tuning_init_text is not None:
            _begin_as(wrapped, options.prompt_tuning_init_text)
        return wrapped


@torch.no_grad()
def _begin_as(model: torch.nn.Module, text: str) -> None:
    """Set the vectors to those of a text's tokens, by the model's own tokenizer; PEFT would save its folder's name."""
    base: Any = model.get_base_model()  # type: ignore[operator]
    # Of a hub's model, the revision that was loaded.
    tokenizer = load_tokenizer(base.name_or_path, revision=getattr(base.config, "_commit_hash", None))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise UserError("the text has no token", where="method.prompt_tuning_init_text", remedy="give a longer one")
    vectors = model.prompt_encoder.default.embedding.weight  # type: ignore[union-attr]
    count = len(vectors)  # type: ignore[arg-type]
    repeated = torch.tensor((ids * -(-count // len(ids)))[:count])
    vectors.copy_(model.word_embeddings(repeated))  # type: ignore[operator]
