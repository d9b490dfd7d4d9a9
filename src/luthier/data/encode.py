"""Rows as token ids and the mask of trained tokens, and what all encoders share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from luthier.data.examples import Reject, Source, TrainingExample
from luthier.data.render import special_tokens
from luthier.errors import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNKNOWN_SOURCE = Source("examples given in Python", 0)
Run = tuple[int, int]
"""A half-open range of tokens."""


@dataclass(slots=True)
class EncodedExample:
    """Token ids of one example and which of them are targets."""

    input_ids: np.ndarray
    """``[n] int32``"""
    trained: np.ndarray
    """``[n] bool``: True where the token is to be predicted. The first token never is: nothing precedes it."""
    source: Source | None
    index: int
    """Which example of its part it comes from; several share one where a long text was split."""
    cut: int = 0
    """Trained tokens lost because the example was longer than ``max_length``."""
    extra: tuple[int, ...] = ()
    """What a task keeps of a row beside its tokens: for classification the numbers of its classes."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(slots=True)
class EncodedRow:
    """An :class:`EncodedExample` in fewer words: its trained tokens are ranges."""

    input_ids: np.ndarray
    runs: list[Run]
    source: Source | None
    index: int
    cut: int = 0
    extra: tuple[int, ...] = ()


@dataclass(slots=True)
class Encoded:
    """A part of the data, encoded: ``examples in = kept + refused``."""

    examples: list[EncodedExample] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(e) for e in self.examples)

    @property
    def trained_tokens(self) -> int:
        return int(sum(e.trained.sum() for e in self.examples))


class Encoder:
    """Turns examples into token ids: one subclass a kind of row.

    Args:
        tokenizer: whose tokens they are.
        max_length: longest row in tokens; None: no limit.
        truncation: what is done with longer ones: ``reject``, ``cut``, or ``split`` where the kind of row allows it.
        allow_special_tokens: take rows whose text holds control tokens, instead of refusing them.

    Attributes:
        by_words: whether rows are encoded word by word where the tokenizer allows it; the ids are the same.
    """

    by_words = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        truncation: str = "reject",
        allow_special_tokens: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncation = truncation
        self.allow_special_tokens = allow_special_tokens

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the ids of an example beside the tokenizer; :meth:`made` takes them."""
        return {name: getattr(self, name) for name in ("max_length", "truncation", "allow_special_tokens")}

    @classmethod
    def made(cls, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], *, by_words: bool) -> Self:
        """The encoder of these settings, in another process."""
        return cls(tokenizer, **settings)

    def encode(self, examples: Sequence[TrainingExample], *, chunk: int = 1000) -> Encoded:
        """Every example as token ids, or as a reject that says why not."""
        result = Encoded()
        try:
            for item in self.stream(examples, chunk=chunk):
                if isinstance(item, Reject):
                    result.rejects.append(item)
                else:
                    result.examples.append(item)
        except WordsDiffer:
            self.distrust_words()
            return self.encode(examples, chunk=chunk)
        return result

    def stream(
        self, examples: Iterable[TrainingExample], *, first: int = 0, chunk: int = 1000
    ) -> Iterator[EncodedExample | Reject]:
        """Every example as token ids or as a reject, in order; see :meth:`rows`."""
        for row in self.rows(examples, first=first, chunk=chunk):
            if isinstance(row, Reject):
                yield row
            else:
                trained = mask(row.runs, len(row.input_ids))
                yield EncodedExample(row.input_ids, trained, row.source, row.index, row.cut, row.extra)

    def rows(
        self, examples: Iterable[TrainingExample], *, first: int = 0, chunk: int = 1000
    ) -> Iterator[EncodedRow | Reject]:
        """Every example as token ids or as a reject, in order, in constant memory.

        Args:
            examples: any number.
            first: the number of the first one.
            chunk: how many are tokenised at a time.

        Raises:
            WordsDiffer: begin again, after :meth:`distrust_words`.
        """
        taken: list[TrainingExample] = []
        for example in examples:
            taken.append(example)
            if len(taken) == chunk:
                yield from self._encode(taken, first)
                first += len(taken)
                taken = []
        yield from self._encode(taken, first)

    def distrust_words(self) -> None:
        """From now on encode by the tokenizer alone."""
        self.by_words = False

    def told(self, row: EncodedExample) -> dict[str, Any]:
        """What ``extra`` of a row means, as what ``json.dumps`` takes."""
        return {}

    def _encode(self, examples: Sequence[TrainingExample], first: int) -> Iterator[EncodedRow | Reject]:
        """Of each example one row, several, or why there is none."""
        raise NotImplementedError

    def _unreadable(self, example: TrainingExample, text: str, what: str = "text") -> Reject | None:
        """Why a text that no template renders cannot be read as it is; None: it can."""
        if not text.strip():
            return reject(example, "empty_text", f"the {what} is empty", "give it a text, or take the row out")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            message = f"the {what} has half a character (a lone surrogate) at {error.start:,}"
            return reject(example, "half_character", message, "mend the text")
        found = None if self.allow_special_tokens else self._special.search(text)
        if found is None:
            return None
        return reject(
            example,
            "special_token_in_text",
            f"the {what} holds the control token {found.group()!r}, which the model would read as control",
            "remove it from the text, or set data.special_tokens_in_text=allow if it is meant",
        )

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, filter(None, special_tokens(self.tokenizer)))) or "(?!)")


class WordsDiffer(RuntimeError):
    """A text's tokens, word by word, are not those of its tokenizer. Never seen; the rows before it are in doubt."""


def runs_of(trained: np.ndarray) -> list[Run]:
    """The ranges of consecutive trained tokens of a mask, ``[n] bool``."""
    edges = (np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist()
    if len(trained) and trained[0]:
        edges.insert(0, 0)
    if len(edges) % 2:
        edges.append(len(trained))
    return list(zip(edges[::2], edges[1::2], strict=True))


def between(runs: Iterable[Run], first: int, end: int) -> list[Run]:
    """What of some ranges lies in another."""
    return [(max(a, first), min(b, end)) for a, b in runs if min(b, end) > max(a, first)]


def mask(runs: Iterable[Run], length: int) -> np.ndarray:
    """The inverse of :func:`runs_of`; the first token is never trained."""
    trained = np.zeros(length, dtype=bool)
    for begin, end in runs:
        trained[begin:end] = True
    trained[:1] = False
    return trained


def reject(example: TrainingExample, reason: str, message: str, remedy: str | None) -> Reject:
    """An example refused, with the beginning of its text."""
    source = example.source or UNKNOWN_SOURCE
    value = example.input or (str(example.messages[-1].get("content")) if example.messages else "")
    shown = shorten(value).encode("utf-8", "backslashreplace").decode("utf-8")
    return Reject(source.file, source.line, reason, message, value=shown, remedy=remedy)
