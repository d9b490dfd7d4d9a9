"""Answers that should come to a number, as those of GSM8K."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from luthier.evaluation.metrics.base import MeanMetric, Rows

_CURRENCY = r"[$€£¥₩₹]"
# 1,234.5 · 1234 · .5 · 1e-3; not what follows a letter (x2) or a point after digits (the last part of 1.2.3).
_NUMBER = (
    rf"(?:(?<![A-Za-z0-9_)\]])[-+](?:{_CURRENCY}\s?)?|{_CURRENCY}\s?[-+]?)?"
    r"(?<![A-Za-z_])(?<![0-9]\.)(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|(?<![0-9])[0-9]+)(?:\.[0-9]+)?"
    r"|(?<![0-9.])\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
)
_ANY = re.compile(_NUMBER)
_WHOLE = re.compile(rf"\s*({_NUMBER})\s*%?\s*\.?\s*")
# The mark, and what may stand between it and its number: white space, asterisks and the like, on the same line.
_MARKED = re.compile(rf"####[^\w\n.+$€£¥₩₹-]*({_NUMBER})")
# Full-width characters as Chinese text has them; its comma only between digits, else it divides clauses.
_WIDE_COMMA = re.compile("(?<=[0-9０-９])，(?=[0-9０-９]{3}(?![0-9０-９]))")
_NARROW = str.maketrans("０１２３４５６７８９．＋－−％＄￥￡＃。", "0123456789.+--%$¥£#.")


class NumericMatch(MeanMetric):
    """The answer's number is a reference's: 1,000 is 1000.0, and $5 is 5.

    A reference is a number, or ends in GSM8K's ``#### number`` (Cobbe et al., 2021, arXiv:2110.14168). The answer's
    number is the one after its last ``####``, else its last. Commas between thousands, signs of currency and per cent,
    a point at the end and full-width digits make no difference; compared are decimal numbers, exactly. Fractions and
    numbers in words are not read.
    """

    name, label, share, binary = "numeric_match", "right number", True, True
    wants = "references that are a number or end in #### and one"

    def applies(self, references: Rows) -> bool:
        return all(reference_number(reference) is not None for row in references for reference in row)

    def row(self, answer: str, references: Sequence[str]) -> float:
        said = answer_number(answer)
        return float(said is not None and any(said == reference_number(reference) for reference in references))


def reference_number(text: str) -> Decimal | None:
    """The number that a reference is, or that stands after its last ``####``; None where there is none."""
    whole = _WHOLE.fullmatch(_narrow(text).rpartition("####")[2])
    return _decimal(whole[1]) if whole else None


def answer_number(text: str) -> Decimal | None:
    """The number after an answer's last ``####``, else its last number; None where there is none."""
    text = _narrow(text)
    found = _MARKED.findall(text) or _ANY.findall(text)
    return _decimal(found[-1]) if found else None


def _narrow(text: str) -> str:
    return _WIDE_COMMA.sub(",", text).translate(_NARROW)


def _decimal(text: str) -> Decimal:
    return Decimal(re.sub(rf"{_CURRENCY}|[,\s]", "", text))
