"""What can be asked questions in a comparison: a loaded model, or an endpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from luthier.data.encode import EncodedExample
from luthier.data.pairs import PairEncoder
from luthier.data.render import RenderError, prompt_text
from luthier.decoding import Decoding
from luthier.endpoint import Endpoint
from luthier.errors import UserError, counted
from luthier.evaluation.generation import Answer, Progress
from luthier.evaluation.kept import kept_answers
from luthier.evaluation.perplexity import losses_of_examples, predicted_bytes
from luthier.evaluation.question import Question
from luthier.models.fingerprint import KnownIdentity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@runtime_checkable
class Contestant(Protocol):
    """Something that answers questions."""

    notes: list[str]
    """What went wrong that the scores do not say."""
    kept: int
    """How many of the last answers an earlier evaluation had kept."""

    def answer(
        self,
        questions: Sequence[Question],
        *,
        max_new_tokens: int,
        batch_size: int,
        decoding: Decoding,
        progress: Progress | None,
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
    """A loaded model, for as long as it is asked and not trained.

    Args:
        model: a decoder or an encoder-decoder.
        tokenizer: its own.
        encoded: right answers, encoded by it, for the perplexity.
        pairs: how sources were encoded for training, of an encoder-decoder.
        renders: whether questions are rendered anew by this tokenizer's template, for they are of another.
        resume: whether answers that an interrupted evaluation has kept are taken up; all are kept.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        encoded: Sequence[EncodedExample] | None = None,
        pairs: PairEncoder | None = None,
        renders: bool = False,
        resume: bool = True,
    ) -> None:
        self.model, self.tokenizer, self.pairs, self.renders = model, tokenizer, pairs, renders
        self.encoded, self.resume = encoded, resume
        self._identity = KnownIdentity(model)
        self.notes: list[str] = []
        self.kept = 0

    def answer(
        self,
        questions: Sequence[Question],
        *,
        max_new_tokens: int,
        batch_size: int,
        decoding: Decoding,
        progress: Progress | None,
    ) -> list[Answer]:
        """See :class:`Contestant`, and :func:`~luthier.evaluation.kept.kept_answers`.

        Raises:
            UserError: the template refuses a question, or the model cannot be decoded so.
        """
        said = kept_answers(
            self.model,
            self.tokenizer,
            [self._prompt(question) for question in questions],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            max_source_length=None if self.pairs is None else self.pairs.max_length,
            decoding=decoding,
            resume=self.resume,
            progress=progress,
            model_identity=self._identity(),
        )
        self.kept = said.found
        return said.answers

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
        endpoint: asked with its own limit of tokens.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.notes: list[str] = []
        self.kept = 0

    def answer(
        self,
        questions: Sequence[Question],
        *,
        max_new_tokens: int,
        batch_size: int,
        decoding: Decoding,
        progress: Progress | None,
    ) -> list[Answer]:
        """See :class:`Contestant`: greedy answers are those at temperature 0.

        Raises:
            UserError: the endpoint cannot be used at all, or not be told to decode so.
        """
        from luthier.data.convert import openai_turns

        before = self.endpoint.usage.cached
        said = self.endpoint(
            [openai_turns(question.messages) for question in questions],
            [decoding.seed if decoding.do_sample else 0] * len(questions),
            tools=[question.tools for question in questions],
            parameters=self._parameters(decoding),
            progress=progress,
        )
        self.kept = self.endpoint.usage.cached - before
        failed = Counter(answer.what for answer in said if isinstance(answer, UserError))
        for reason, count in failed.most_common(3):
            were = "was" if count == 1 else "were"
            self.notes.append(
                f"{count:,} of {counted(len(said), 'question')} {were} not answered, which scores as empty: {reason}"
            )
        return [Answer("" if isinstance(a, UserError) else a, [], not isinstance(a, UserError), 0) for a in said]

    def _parameters(self, decoding: Decoding) -> Mapping[str, Any]:
        """The request's fields; OpenAI's interface has those of sampling without ``top_k``."""
        for name, plain in (("num_beams", 1), ("no_repeat_ngram_size", 0), ("top_k", 0)):
            if (value := getattr(decoding, name)) != plain:
                raise UserError(
                    f"an OpenAI-compatible endpoint has no {name}, so its answers would be made in another way",
                    where=f"{self.endpoint.base_url}, {name}={value}",
                    remedy=f"leave {name} out, or compare local models alone",
                )
        if not decoding.do_sample:
            return {"temperature": 0.0}
        more = {"top_p": decoding.top_p} if decoding.top_p < 1 else {}
        return {"temperature": decoding.temperature, **more}

    def losses(self) -> np.ndarray | None:
        """See :class:`Contestant`; an endpoint does not say."""
        return None
