"""What a metric is, and the check of what it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from luthier.errors import UserError, shorten

References = Sequence[str] | Sequence[Sequence[str]]
"""One right answer a row, or several of which the best counts."""
Rows = Sequence[Sequence[str]]
"""The right answers of each row, as :func:`check_rows` gives them."""


class Metric(ABC):
    """How good answers are, from numbers of each row that add up.

    The value of any choice of rows is ``value(statistics[chosen].sum(0), len(chosen))``. So ten thousand bootstrap
    resamples of N rows are one product, ``[10000, N] @ [N, S]``, and no text is read again.
    """

    name: str
    """as in results and recipes"""
    label: str
    """as in tables"""
    better: Literal["higher", "lower"] | None = "higher"
    """None: neither is better as such"""
    share: bool = False
    """whether it is a share of the rows, or of parts of them, that reads well as per cent"""
    binary: bool = False
    """whether a row is right or wrong and nothing between, so that the score is a share of the rows"""
    wants: ClassVar[str] = ""
    """what it applies to, where that is not everything"""
    digits: ClassVar[int] = 3
    """after the point, where it is shown as a number"""

    def applies(self, references: Rows) -> bool:
        """Whether it means something for rows with these right answers."""
        return True

    def signature(self, references: Rows) -> str | None:
        """What must be said for the score to be computed again elsewhere; None where the name says it all."""
        return None

    @abstractmethod
    def statistics(self, answers: Sequence[str], references: Rows) -> np.ndarray:
        """``[N, S] float64``, what of each row is summed."""

    @abstractmethod
    def value(self, sums: np.ndarray, count: np.ndarray | int) -> np.ndarray:
        """The score from sums.

        Args:
            sums: ``[..., S]``, statistics summed over rows.
            count: ``[...]`` or one number, of how many rows; at least 1.

        Returns:
            ``[...] float64``
        """

    @abstractmethod
    def rows(self, answers: Sequence[str], references: Rows) -> np.ndarray:
        """``[N] float64``, each row's own score, to find rows that were won and lost."""

    def score(self, answers: Sequence[str], references: References) -> float:
        """The score of all rows.

        Raises:
            UserError: as :func:`check_rows`.
        """
        checked = check_rows(answers, references)
        return float(self.value(self.statistics(answers, checked).sum(axis=0), len(answers)))


class MeanMetric(Metric):
    """A metric that is the mean of its rows' own scores."""

    def statistics(self, answers: Sequence[str], references: Rows) -> np.ndarray:
        return self.rows(answers, references)[:, None]

    def value(self, sums: np.ndarray, count: np.ndarray | int) -> np.ndarray:
        return np.asarray(sums)[..., 0] / count

    def rows(self, answers: Sequence[str], references: Rows) -> np.ndarray:
        pairs = zip(answers, references, strict=True)
        return np.array([self.row(answer, right) for answer, right in pairs], dtype=np.float64)

    @abstractmethod
    def row(self, answer: str, references: Sequence[str]) -> float:
        """The score of one answer."""


def f_measure(counts: np.ndarray) -> np.ndarray:
    """F1 from counts; 0 where nothing is found in common.

    Args:
        counts: ``[..., 3]``, what is in both, in the answer, and in the reference.

    Returns:
        ``[...] float64``
    """
    both, said, right = np.moveaxis(np.asarray(counts, dtype=np.float64), -1, 0)
    return 2 * both / np.maximum(said + right, 1)


def check_rows(answers: Sequence[str], references: References) -> list[list[str]]:
    """The references as lists.

    Raises:
        UserError: no rows, unequal lengths, a row without a reference, or something that is no text.
    """
    for name, value in (("answers", answers), ("references", references)):
        if value is None or isinstance(value, str) or not isinstance(value, Sequence):
            raise UserError(f"{name} must be a list with one item a row, not {shorten(value)}")
    if len(answers) != len(references):
        raise UserError(
            f"{len(answers):,} answers but {len(references):,} references",
            remedy="give one reference (or list of references) for each answer",
        )
    if not answers:
        raise UserError("there are no answers to score", remedy="give at least one row")
    rows = [[row] if isinstance(row, str) else _listed(row) for row in references]
    for number, (answer, row) in enumerate(zip(answers, rows, strict=True), 1):
        if not isinstance(answer, str):
            raise UserError(f"an answer must be text, not {shorten(answer)}", where=f"answers, row {number}")
        if not row or not all(isinstance(reference, str) for reference in row):
            raise UserError(
                f"a reference must be text or a list of texts, not {shorten(references[number - 1])}",
                where=f"references, row {number}",
                remedy="give the row a right answer, or leave it out",
            )
    return rows


def _listed(row: object) -> list[str]:
    """A row's references; empty where it is no list, which is refused with its number."""
    return list(row) if isinstance(row, Sequence) else []
