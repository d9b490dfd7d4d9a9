"""Where words begin: for masking whole words, in languages with and without spaces between them."""

from __future__ import annotations

import logging
import warnings
from functools import cache
from typing import Any

import numpy as np
import regex

# Scripts that put no spaces between words and that no segmenter is at hand for: each character is on its own, so that
# a token is, and not a whole sentence.
_ALONE = r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Hiragana}\p{Katakana}"
_PIECES = regex.compile(rf"(?V1)\p{{Han}}+|[[\p{{L}}\p{{M}}\p{{N}}]--[\p{{Han}}{_ALONE}]]+|.", regex.DOTALL)
_HAN = regex.compile(r"\p{Han}")


def word_numbers(text: str) -> np.ndarray:
    """Which word each character of a text belongs to.

    Letters, marks and digits that stand together are a word; Chinese is cut into words by jieba, as for the masking of
    Cui et al., 2019, arXiv:1906.08101; any other character, and each one of a script that is written without spaces,
    stands alone.

    Returns:
        ``[characters] int64``, ascending
    """
    pieces = _PIECES.findall(text)
    if not text.isascii():
        pieces = [word for piece in pieces for word in (chinese_words(piece) if _HAN.match(piece) else (piece,))]
    lengths = np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces))
    return np.repeat(np.arange(len(pieces)), lengths)


def words_of_tokens(text: str, offsets: np.ndarray) -> np.ndarray:
    """Which word each token belongs to: that of its first character that is no space.

    The characters decide, not marks such as ``##`` or ``▁``, so WordPiece, byte-level and SentencePiece tokens are
    treated alike.

    Args:
        text: at least one character.
        offsets: ``[n, 2] int64`` character range of each token.

    Returns:
        ``[n] int64``
    """
    last = len(text) - 1
    start, end = np.minimum(offsets[:, 0], last), offsets[:, 1]
    space = np.fromiter(map(str.isspace, text), dtype=bool, count=len(text))
    while (leading := space[start] & (start + 1 < end)).any():
        start = start + leading
    found: np.ndarray = word_numbers(text)[start]
    return found


def chinese_words(run: str) -> list[str]:
    """A run of Chinese characters, cut into words by jieba."""
    words: list[str] = [run] if len(run) == 1 else _jieba().lcut(run)
    return words


@cache
def _jieba() -> Any:
    """jieba, without its messages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its regular expressions' escapes, as Python 3.12 reads them
        import jieba

    jieba.setLogLevel(logging.ERROR)
    jieba.initialize()
    return jieba
