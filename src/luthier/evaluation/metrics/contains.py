"""Short answers that may stand within a sentence."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from luthier.evaluation.metrics.base import MeanMetric

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_PIECE = re.compile(r"[a-z\u00c0-\u024f]+|\d+|[^\W_]")
_NUMERALS = "零一二两三四五六七八九十百千万亿"
_NEGATIONS = "不没非未无"


class ContainsAnswer(MeanMetric):
    """A reference stands in the answer: as whole words, or as characters where a script has no spaces.

    Case, punctuation, full-width forms and commas between thousands make no difference. A part of another number
    (12 in 3.12, 八 in 十八) is not the reference, nor is it behind a negation (not hot, 不重要).
    """

    name, label, share, binary = "contains_answer", "holds a right answer", True, True

    def row(self, answer: str, references: Sequence[str]) -> float:
        said = _plain(answer)
        return float(any(_pattern(reference).search(said) is not None for reference in references))


def _plain(text: str) -> str:
    return _THOUSANDS.sub("", unicodedata.normalize("NFKC", text).lower())


@lru_cache(maxsize=4096)
def _pattern(reference: str) -> re.Pattern[str]:
    """What finds a reference in a text of :func:`_plain`; nothing where the reference has neither letter nor digit."""
    pieces = _PIECE.findall(_plain(reference))
    if not pieces:
        return re.compile("(?!)")
    found = re.escape(pieces[0])
    for before, piece in itertools.pairwise(pieces):
        apart = before[-1].isascii() and piece[0].isascii() and before[-1].isdigit() == piece[0].isdigit()
        found += (r"[\W_]+" if apart else r"[\W_]*") + re.escape(piece)
    return re.compile(_before(pieces[0]) + found + _behind(pieces[-1]))


def _before(piece: str) -> str:
    """What must not stand before a reference that begins with this."""
    if piece[0].isdigit() and piece[0].isascii():
        return r"(?<![a-z0-9])(?<!\d[.,])(?<![^\w)]-)(?<!^-)(?<!\bnot\s)"
    if piece[0].isascii() or len(piece) > 1:
        return r"(?<![a-z0-9\u00c0-\u024f])(?<![a-z]['’])(?<!\bnot\s)"
    return f"(?<![{_NEGATIONS}{_NUMERALS if piece in _NUMERALS else ''}])"


def _behind(piece: str) -> str:
    """What must not stand behind a reference that ends with this."""
    if piece[-1].isdigit() and piece[-1].isascii():
        return r"(?![a-z0-9])(?![.,]\d)"
    if piece[-1].isascii() or len(piece) > 1:
        return r"(?![a-z0-9\u00c0-\u024f])"
    return f"(?![{_NUMERALS}])" if piece in _NUMERALS else ""
