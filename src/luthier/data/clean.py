"""Cleaning texts: small functions in the order they were added."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from luthier.data.examples import TrainingExample
from luthier.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Cleaner = Callable[[str], str]

# Joiners that emoji and several scripts are written with.
_JOINERS = {"\u200c", "\u200d"}


class DataPreprocessor:
    """Cleans texts and examples with the cleaners that were added, in their order; without any, nothing changes."""

    def __init__(self) -> None:
        self.cleaners: list[Cleaner] = []

    def add_cleaner(self, cleaner: Cleaner) -> DataPreprocessor:
        """Add a function from text to text.

        Raises:
            UserError: it cannot be called.
        """
        if not callable(cleaner):
            raise UserError(
                f"a cleaner must be a function from text to text, not {type(cleaner).__name__}",
                remedy="for example DataPreprocessor.normalize_whitespace",
            )
        self.cleaners.append(cleaner)
        return self

    def clean_text(self, text: str) -> str:
        """The text after every cleaner."""
        for cleaner in self.cleaners:
            text = cleaner(text)
        return text

    def clean_examples(self, examples: Iterable[TrainingExample]) -> list[TrainingExample]:
        """Every example with its texts cleaned; the ones given stay as they are, and none is dropped."""
        cleaned = []
        for example in examples:
            messages = None
            if example.messages is not None:
                messages = [
                    {**m, "content": self.clean_text(m["content"])} if isinstance(m.get("content"), str) else dict(m)
                    for m in example.messages
                ]
            output = None if example.output is None else self.clean_text(example.output)
            cleaned.append(replace(example, input=self.clean_text(example.input), output=output, messages=messages))
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
        """A cleaner that keeps the first ``max_tokens`` tokens of a text, cut between characters.

        Raises:
            UserError: max_tokens is below 1.
        """
        if max_tokens < 1:
            raise UserError(f"max_tokens={max_tokens} leaves nothing", remedy="give at least 1")

        def truncate(text: str) -> str:
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            offsets = encoded["offset_mapping"]
            # Offsets name whole characters, so that none is cut in two.
            return text if len(offsets) <= max_tokens else text[: offsets[max_tokens - 1][1]]

        return truncate


def _unseen(character: str) -> bool:
    return character == "\ufffd" or unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs")
