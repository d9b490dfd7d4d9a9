"""Evaluation from Python: :class:`FineTuneEvaluator`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from luthier.data.examples import Message, TrainingExample
from luthier.data.pairs import PairEncoder
from luthier.data.render import RenderError, prompt_messages, prompt_text
from luthier.decoding import BATCH_SIZE
from luthier.errors import UserError, shorten
from luthier.evaluation.generation import Answer, generate_answers
from luthier.evaluation.metrics import score
from luthier.evaluation.question import ask, ask_source
from luthier.models.heads import Head


class FineTuneEvaluator:
    """Asks a model and scores what it says, with prompts rendered as in training.

    Args:
        model: a causal language model or an encoder-decoder, wrapped by PEFT or not.
        tokenizer: its tokenizer, with the chat template of training; an encoder-decoder needs no template.
        system: a system message for prompts that have none: the one of training (``data.system``).
        source_prefix: put before every prompt of an encoder-decoder: the one of training (``task.source_prefix``).

    Raises:
        UserError: the model or the tokenizer is something else, a name for example.
    """

    def __init__(self, model: Any, tokenizer: Any, *, system: str | None = None, source_prefix: str = "") -> None:
        import torch
        from transformers import PreTrainedTokenizerBase

        if not isinstance(model, torch.nn.Module) or not hasattr(model, "generation_config"):
            raise UserError(
                f"model must be a loaded language model, not {shorten(model)}",
                where="FineTuneEvaluator(model=...)",
                remedy="give the tuner's .model, or AutoModelForCausalLM.from_pretrained(folder)",
            )
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise UserError(
                f"tokenizer must be a loaded tokenizer, not {shorten(tokenizer)}",
                where="FineTuneEvaluator(tokenizer=...)",
                remedy="give the tuner's .tokenizer, or AutoTokenizer.from_pretrained(folder)",
            )
        pairs = Head.of(model).pairs
        if system is not None and pairs:
            raise UserError(
                "an encoder-decoder reads no system message",
                where="FineTuneEvaluator(system=...)",
                remedy="leave it out, or put its words into source_prefix",
            )
        if source_prefix and not pairs:
            raise UserError(
                "only sources of an encoder-decoder have a prefix",
                where="FineTuneEvaluator(source_prefix=...)",
                remedy="leave it out, or put its words into system",
            )
        # Control tokens in a prompt are the caller's own business here, as in prompts that a template renders.
        self._pairs = PairEncoder(tokenizer, source_prefix=source_prefix, allow_special_tokens=True) if pairs else None
        if not tokenizer.chat_template and not pairs:
            raise UserError(
                "the tokenizer has no chat template, so prompts cannot be rendered as in training",
                where="FineTuneEvaluator(tokenizer=...)",
                remedy="load it from the folder that training saved",
            )
        self.model = model
        self.tokenizer = tokenizer
        self.system = system

    def generate(self, prompt: str | list[Message] | TrainingExample, max_new_tokens: int = 256) -> str:
        """The model's answer to a prompt, a conversation, or an example's question.

        Raises:
            UserError: the prompt is empty or of another kind, or the chat template refuses it.
        """
        if isinstance(prompt, str):
            example = TrainingExample(input=prompt)
        elif isinstance(prompt, list) and prompt and all(isinstance(m, Mapping) and "role" in m for m in prompt):
            example = TrainingExample(messages=[dict(m) for m in prompt])
        elif isinstance(prompt, TrainingExample):
            example = prompt
        else:
            raise UserError(
                f"prompt must be a text, a list of messages or a TrainingExample, not {shorten(prompt)}",
                remedy='for example [{"role": "user", "content": "…"}]',
            )
        if example.messages is None and not example.input.strip():
            raise UserError("the prompt is empty", remedy="ask something")
        if self._pairs is not None:
            try:
                text, _ = self._pairs.texts(example)
            except RenderError as error:
                raise UserError(str(error), remedy=error.remedy) from None
            return self._answers([text], max_new_tokens)[0].text
        # A conversation given as such is answered after its last turn; an example is asked for its own answer.
        asked = isinstance(prompt, TrainingExample)
        messages = prompt_messages(example, self.system) if asked else example.to_chat_format(self.system)
        try:
            text = prompt_text(self.tokenizer, messages, example.tools)
        except RenderError as error:
            raise UserError(str(error), remedy=error.remedy) from None
        return self._answers([text], max_new_tokens)[0].text

    def _answers(self, prompts: list[str], max_new_tokens: int, batch_size: int = 1) -> list[Answer]:
        return generate_answers(
            self.model, self.tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size
        )

    def evaluate_generation(
        self,
        test_examples: Iterable[TrainingExample | Mapping[str, Any]],
        max_length: int = 256,
        batch_size: int = BATCH_SIZE,
    ) -> dict[str, float]:
        """Answers every example greedily and scores the answers.

        Args:
            test_examples: examples with answers.
            max_length: longest answer, in new tokens.
            batch_size: examples answered at once.

        Returns:
            Every metric that applies, by name: see :func:`luthier.evaluation.metrics.score`. ``bleu``, ``chrf``,
            ``rouge1``, ``rouge2``, ``rougeL`` and ``exact_match`` always, from 0 to 1.

        Raises:
            UserError: no example, or one without an answer, which is named.
        """
        if isinstance(test_examples, str | TrainingExample | Mapping) or not isinstance(test_examples, Iterable):
            raise UserError(f"test_examples must be a list of examples, not {shorten(test_examples)}")
        examples = [TrainingExample.from_any(e) for e in test_examples]
        if not examples:
            raise UserError("there are no test examples", remedy="give at least one with an answer")
        questions = [
            ask(self.tokenizer, e, i, self.system) if self._pairs is None else ask_source(self._pairs, e, i)
            for i, e in enumerate(examples, 1)
        ]
        answers = self._answers([q.prompt for q in questions], max_length, batch_size)
        return score([a.text for a in answers], [q.references for q in questions])
