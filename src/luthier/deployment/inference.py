"""Answers from a folder, whatever precision its weights are stored in: :class:`QuantizedModelInference`."""

from __future__ import annotations

from pathlib import Path

from luthier.data.examples import Message, TrainingExample
from luthier.errors import UserError
from luthier.evaluation.evaluator import FineTuneEvaluator
from luthier.methods.answering import load_to_answer


class QuantizedModelInference:
    """A model that answers prompts through its own chat template.

    Args:
        model_path: what ``quantize_model`` has written, or any run, adapter or model folder, or an embedded name.
        system: a system message for prompts that have none.

    Raises:
        UserError: nothing is there, the library that holds its weights is missing, or it does not answer prompts.
    """

    def __init__(self, model_path: str | Path, *, system: str | None = None) -> None:
        saved = load_to_answer(model_path)
        if not (saved.head.writes or saved.head.pairs):
            raise UserError(
                f"{str(model_path)!r} holds a model that does not write", remedy="name one that answers prompts"
            )
        self._evaluator = FineTuneEvaluator(saved.model, saved.tokenizer, system=system)
        self.model, self.tokenizer = saved.model, saved.tokenizer

    def generate(self, prompt: str | list[Message] | TrainingExample, max_new_tokens: int = 256) -> str:
        """The likeliest answer to a prompt or a conversation; see :meth:`FineTuneEvaluator.generate`.

        Raises:
            UserError: the prompt is empty or of another kind, or the chat template refuses it.
        """
        return self._evaluator.generate(prompt, max_new_tokens)
