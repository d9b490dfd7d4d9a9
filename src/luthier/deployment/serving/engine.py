"""What an engine is asked, and what it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_STOPS = 16
"""Texts that may end one answer."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One answer that is wanted."""

    ids: tuple[int, ...]
    """The prompt's tokens."""
    max_tokens: int
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    seed: int | None = None
    """Of what is drawn by chance; None: another one each time."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are no part of it."""
    logprobs: int | None = None
    """How many of the likeliest tokens are told at each place, beside the one that was taken; None: nothing is."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    schema: dict[str, Any] | None = None
    """A JSON schema that the answer must fit."""
    said: str = ""
    """What the answer begins with; its tokens are the last of ``ids``."""
    closing: str = ""
    """What is added to an answer that has ended by itself."""


@dataclass(frozen=True, slots=True)
class Told:
    """A token and how likely it was, of all tokens before any of the settings above."""

    text: str
    bytes: tuple[int, ...]
    logprob: float
    top: tuple[Told, ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, token: int, logprob: float, top: tuple[Told, ...] = ()) -> Told:
        """A token that an engine tells by its id."""
        text = str(tokenizer.decode([token]))
        return cls(text, tuple(text.encode()), logprob, top)


@dataclass(slots=True)
class Piece:
    """What was written since the last piece: whole characters; the last piece of an answer says how it ended."""

    text: str
    told: list[Told] = field(default_factory=list)
    finish: str | None = None
    """``stop`` or ``length``; None: more is to come."""
    written: int = 0
    """With ``finish``: tokens of the answer."""


Put = Callable[[Piece], bool]
"""Takes a piece; True: nobody wants any more."""


class Engine(Protocol):
    """Something that runs one base and adapters on it. Its calls come from several threads at once."""

    @property
    def name(self) -> str:
        """As ``--engine`` calls it."""

    @property
    def context(self) -> int:
        """Longest prompt with its answer, in tokens."""

    @property
    def can_hold_to_schema(self) -> bool:
        """Whether ``Ask.schema`` can be kept."""

    @property
    def can_penalise(self) -> bool:
        """Whether penalties and ``logit_bias`` can be used."""

    def healthy(self) -> bool:
        """Whether it can answer now."""

    def write(self, adapter: str | None, ask: Ask, put: Put) -> None:
        """Write an answer by an adapter (None: the base), piece by piece, the last one with ``finish``; return when
        it has ended or nobody wants it.

        Raises:
            ApiError: what the request asks for cannot be had.
            UserError: it cannot be written.
        """

    def add(self, name: str, folder: Path) -> None:
        """Put an adapter on the base.

        Raises:
            UserError: it does not fit.
        """

    def remove(self, name: str) -> None:
        """Take an adapter away; answers that are being written by it are finished first."""

    def close(self) -> None:
        """Let everything go."""
