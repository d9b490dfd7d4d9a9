"""Texts that end an answer where a model writes them, beside the tokens that do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Until:
    """Whether an answer has come to one of some texts, and what of it stands before the first.

    Args:
        tokenizer: whose tokens an answer is made of.
        texts: that end an answer, those of control tokens among them; empty ones end nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.texts = [text for text in texts if text]
        # A token is a byte at least; of the first ones of a tail the white space may be lost.
        self._tail = max((len(text.encode()) for text in self.texts), default=0) + 2

    def reached(self, ids: list[int]) -> bool:
        """Whether one of the texts stands at the end of an answer's tokens, the last of which is new."""
        if not self.texts:
            return False
        said = str(self.tokenizer.decode(ids[-self._tail :], clean_up_tokenization_spaces=False))
        return any(text in said for text in self.texts)

    def cut(self, text: str) -> str:
        """What stands before the first of the texts."""
        return text[: min((at for stop in self.texts if (at := text.find(stop)) >= 0), default=len(text))]
