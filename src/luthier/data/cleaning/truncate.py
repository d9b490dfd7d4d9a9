"""Truncation, by the model's own tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def truncate_by_tokens(
    text: str, *, max_tokens: Annotated[int, Field(ge=1)], tokenizer: PreTrainedTokenizerBase
) -> str:
    """Keep at most the first so many tokens of each text, cut between characters.

    Args:
        text: any text.
        max_tokens: the most that stay.
        tokenizer: the model's.
    """
    while True:
        # A token has one character or more, but for a blank that some tokenizers put first.
        if text.isascii() and len(text) < max_tokens:
            return text
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]
        if len(offsets) <= max_tokens:
            return text
        # A character may be several tokens; where the limit falls inside one, all of it goes.
        end = min(offsets[max_tokens - 1][1], offsets[max_tokens][0])
        if end >= len(text):
            return text
        # What is left may be divided otherwise than it was within the whole.
        text = text[:end]
