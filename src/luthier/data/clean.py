"""Cleaning texts: small functions in the order they were added."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from luthier.data.examples import Reject, Source, TrainingExample
from luthier.errors import UserError, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Cleaner = Callable[[str], str]

# Joiners that emoji and several scripts are written with.
_JOINERS = {"\u200c", "\u200d"}


class DataPreprocessor:
    """Cleans texts and examples with the cleaners that were added, in their order; without any, nothing changes.

    Rows of which cleaning left nothing to ask or to answer are in ``rejects``, and a warning counts them.
    """

    def __init__(self) -> None:
        self.cleaners: list[Cleaner] = []
        self.rejects: list[Reject] = []

    def add_cleaner(self, cleaner: Cleaner | str) -> DataPreprocessor:
        """Add a function from text to text, or the name of a built-in one.

        Raises:
            UserError: it cannot be called, or no built-in has that name.
        """
        if isinstance(cleaner, str):
            if cleaner not in _BUILT_IN:
                raise UserError(f"no cleaner is called {cleaner!r}", remedy=f"known: {', '.join(_BUILT_IN)}")
            cleaner = getattr(self, cleaner)
        if not callable(cleaner):
            raise UserError(
                f"a cleaner must be a function from text to text, not {type(cleaner).__name__}",
                remedy="for example DataPreprocessor.normalize_whitespace",
            )
        self.cleaners.append(cleaner)
        return self

    def clean_text(self, text: str) -> str:
        """The text after every cleaner.

        Raises:
            UserError: a cleaner gave back something else.
        """
        for cleaner in self.cleaners:
            cleaned = cleaner(text)
            if not isinstance(cleaned, str):
                name = getattr(cleaner, "__name__", repr(cleaner))
                raise UserError(f"the cleaner {name!r} returned {type(cleaned).__name__}, not text")
            text = cleaned
        return text

    def clean_examples(self, examples: Iterable[TrainingExample]) -> list[TrainingExample]:
        """Every example with its texts cleaned; the ones given stay as they are.

        A row of which cleaning left no prompt or no answer is not returned but added to ``rejects``: an empty
        answer would teach the model to say nothing.
        """
        cleaned: list[TrainingExample] = []
        refused: list[Reject] = []
        for example in examples:
            messages = None
            if example.messages is not None:
                messages = [
                    {**m, "content": self.clean_text(m["content"])} if isinstance(m.get("content"), str) else dict(m)
                    for m in example.messages
                ]
            output = None if example.output is None else self.clean_text(example.output)
            made = replace(example, input=self.clean_text(example.input), output=output, messages=messages)
            emptied = next(
                (b for b, a in zip(_texts(example), _texts(made), strict=True) if b.strip() and not a.strip()), None
            )
            if emptied is None:
                cleaned.append(made)
            else:
                refused.append(_emptied(example, emptied))
        self.rejects += refused
        if refused:
            warnings.warn(
                f"cleaning emptied {len(refused)} of {len(refused) + len(cleaned)} rows; first: {refused[0].file}:"
                f"{refused[0].line}: {refused[0].message}; all are in .rejects",
                stacklevel=2,
            )
        return cleaned

    @staticmethod
    def remove_special_chars(text: str) -> str:
        """Take out characters that nobody sees: controls, zero-width marks, private use, and the replacement character.

        Line ends, tabs, punctuation, emoji and the letters of every script stay.
        """
        return "".join(c for c in text if c in "\n\r\t" or c in _JOINERS or not _unseen(c))

    @staticmethod
    def normalize_whitespace(text: str) -> str:
        """One space for each run of spaces and tabs, no spaces at the ends of lines, none around the text."""
        text = re.sub(r"\r\n?", "\n", text)
        text = re.sub(r"[^\S\n]+", " ", text)
        return re.sub(r" ?\n ?", "\n", text).strip()

    @staticmethod
    def remove_empty_lines(text: str) -> str:
        """The text without lines that hold nothing but white space."""
        return "\n".join(line for line in text.split("\n") if line.strip())

    @staticmethod
    def truncate_by_tokens(tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Cleaner:
        """A cleaner that keeps at most the first ``max_tokens`` tokens of a text, cut between characters.

        Raises:
            UserError: max_tokens is below 1.
        """
        if max_tokens < 1:
            raise UserError(f"max_tokens={max_tokens} leaves nothing", remedy="give at least 1")

        def truncate(text: str) -> str:
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            offsets = encoded["offset_mapping"]
            if len(offsets) <= max_tokens:
                return text
            # A character may be several tokens; where the limit falls inside one, all of it goes.
            return text[: min(offsets[max_tokens - 1][1], offsets[max_tokens][0])]

        return truncate


_BUILT_IN = ("remove_special_chars", "normalize_whitespace", "remove_empty_lines")


def _texts(example: TrainingExample) -> list[str]:
    """The texts of an example that cleaning must not empty."""
    said = [m["content"] for m in example.messages or [] if isinstance(m.get("content"), str)]
    return [example.input, example.output or "", *said]


def _emptied(example: TrainingExample, text: str) -> Reject:
    source = example.source or Source("examples given in Python", 0)
    message = f"cleaning left nothing of {shorten(text)}"
    return Reject(source.file, source.line, "emptied", message, value=shorten(text), remedy="use gentler cleaners")


def _unseen(character: str) -> bool:
    return character == "\ufffd" or unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs")
