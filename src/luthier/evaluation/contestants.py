"""What can be asked questions in a comparison: a loaded model, or an endpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from luthier.data.encode import EncodedExample
from luthier.data.pairs import PairEncoder
from luthier.data.render import RenderError, prompt_text
from luthier.endpoint import Endpoint
from luthier.errors import UserError
from luthier.evaluation.generation import Answer, Progress, generate_answers
from luthier.evaluation.perplexity import losses_of_examples, predicted_bytes
from luthier.evaluation.question import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@runtime_checkable
class Contestant(Protocol):
    """Something that answers questions."""

    notes: list[str]
    """What went wrong that the scores do not say."""

    def answer(
        self, questions: Sequence[Question], *, max_new_tokens: int, batch_size: int, progress: Progress | None
    ) -> list[Answer]:
        """An answer to each question."""
        ...

    def losses(self) -> np.ndarray | None:
        """``[N, 3] float64``: of each right answer its summed loss in nats, its tokens and its bytes; None: unknown."""
        ...


Models = Sequence[tuple[str, Callable[[], AbstractContextManager[Any]]]]
"""Names, and what gives each model for as long as it is asked: one PEFT model can so be base and tuned. A context may
give a :class:`Contestant` as well."""


class LocalModel:
    """A loaded model.

    Args:
        model: a decoder or an encoder-decoder.
        tokenizer: its own.
        encoded: right answers, encoded by it, for the perplexity.
        pairs: how sources were encoded for training, of an encoder-decoder.
        renders: whether questions are rendered anew by this tokenizer's template, for they are of another.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        encoded: Sequence[EncodedExample] | None = None,
        pairs: PairEncoder | None = None,
        renders: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.pairs, self.renders = model, tokenizer, pairs, renders
        self.encoded = encoded
        self.notes: list[str] = []

    def answer(
        self, questions: Sequence[Question], *, max_new_tokens: int, batch_size: int, progress: Progress | None
    ) -> list[Answer]:
        """See :class:`Contestant`: greedy.

        Raises:
            UserError: the template refuses a question.
        """
        return generate_answers(
            self.model,
            self.tokenizer,
            [self._prompt(question) for question in questions],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            max_source_length=None if self.pairs is None else self.pairs.max_length,
            progress=progress,
        )

    def losses(self) -> np.ndarray | None:
        """See :class:`Contestant`."""
        if not self.encoded:
            return None
        counted = losses_of_examples(self.model, self.encoded)
        return np.concatenate([counted, predicted_bytes(self.tokenizer, self.encoded)[:, None]], 1)

    def _prompt(self, question: Question) -> str:
        if not self.renders:
            return question.prompt
        try:
            return prompt_text(self.tokenizer, question.messages, question.tools)
        except RenderError as error:
            raise UserError(str(error), where=question.where, remedy=error.remedy) from None


class EndpointModel:
    """A model behind an OpenAI-compatible endpoint. What it does not answer counts as an empty answer, and is noted.

    Args:
        endpoint: asked with its own limit of tokens; to be compared with greedy answers, at temperature 0.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.notes: list[str] = []

    def answer(
        self, questions: Sequence[Question], *, max_new_tokens: int, batch_size: int, progress: Progress | None
    ) -> list[Answer]:
        """See :class:`Contestant`.

        Raises:
            UserError: the endpoint cannot be used at all.
        """
        said = self.endpoint([question.messages for question in questions], [0] * len(questions))
        failed = Counter(answer.what for answer in said if isinstance(answer, UserError))
        for reason, count in failed.most_common(3):
            self.notes.append(
                f"{count:,} of {len(said):,} questions were not answered, which scores as empty: {reason}"
            )
        if tools := sum(bool(question.tools) for question in questions):
            self.notes.append(f"{tools:,} questions offer tools, of which an endpoint is not told here")
        if progress is not None:
            progress(len(questions), len(questions))
        return [Answer("" if isinstance(a, UserError) else a, [], not isinstance(a, UserError), 0) for a in said]

    def losses(self) -> np.ndarray | None:
        """See :class:`Contestant`; an endpoint does not say."""
        return None
