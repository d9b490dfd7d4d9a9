"""Chinese synonyms, by the word that jieba finds and its part of speech."""

from __future__ import annotations

import logging
import warnings
from functools import cache
from importlib import resources
from itertools import product
from typing import Any

from luthier.data.augmentation.text import Field, Piece

_Table = dict[tuple[str, str], tuple[str, ...]]
"""From a word and the first letter of jieba's tag to its substitutes."""

# jieba's tags of people, places, organisations and other names.
_NAMES = ("nr", "ns", "nt", "nz")


def chinese_words(field: Field) -> tuple[list[tuple[Piece, tuple[str, ...]]], int]:
    """The words of a text that have synonyms there, with these; and how many words may vary at all."""
    runs = field.chinese()
    if not runs:
        return [], 0
    found, words = [], 0
    for run in runs:
        at = run.start
        for word, tag in _jieba().cut(run.text):
            piece, at = Piece(at, at + len(word), word), at + len(word)
            words += len(word) > 1
            options = _table().get((word, tag[0])) if tag not in _NAMES else None
            # 不但是 is no 但是: what follows 不 belongs to it.
            bound = tag[0] in "cd" and field.text[piece.start - 1 : piece.start] == "不"
            if options and not bound and not field.keeps(piece.start, piece.end):
                found.append((piece, options))
    return found, words


def is_chinese_word(word: str) -> bool:
    """Whether jieba's dictionary has a word of two characters or more."""
    _jieba()
    import jieba

    return len(word) > 1 and bool(jieba.dt.FREQ.get(word))  # beginnings of words stand there with 0


@cache
def _jieba() -> Any:
    """jieba's tagging segmenter, without its messages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its regular expressions' escapes, as Python 3.12 reads them
        import jieba
        import jieba.posseg

    jieba.setLogLevel(logging.ERROR)
    jieba.initialize()
    return jieba.posseg.dt


@cache
def _table() -> _Table:
    table: dict[tuple[str, str], list[str]] = {}
    text = resources.files(__package__).joinpath("judged.zh.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        pos, _, rest = line.partition(" ")
        targets, colon, substitutes = rest.partition(":")
        group = targets.split()
        for target, other in product(group, substitutes.split() if colon else group):
            if target != other:
                table.setdefault((target, pos), []).append(other)
    return {key: tuple(dict.fromkeys(others)) for key, others in table.items()}
