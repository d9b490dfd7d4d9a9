"""What answers are like, whatever is right: how varied, how repetitive, how long."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.evaluation.metrics.base import MeanMetric
from luthier.evaluation.metrics.words import ngrams, words


class Distinct(MeanMetric):
    """Different runs of ``n`` words over all runs of an answer (Li et al., 2016, arXiv:1510.03055); the mean over rows.

    The paper counts over all answers together, which is no sum over rows and falls as rows are added. An answer without
    such a run scores 0.
    """

    better = None

    def __init__(self, n: int) -> None:
        self.name = f"distinct_{n}"
        self.label = f"distinct-{n}"
        self._n = n

    def row(self, answer: str, references: Sequence[str]) -> float:
        found = ngrams(words(answer), self._n)
        return len(found) / max(found.total(), 1)


class Repetition(MeanMetric):
    """Share of an answer's runs of four words that were there before: seq-rep-4 of Welleck et al., 2020 (1908.04319).

    An answer without such a run scores 0.
    """

    name, label, better, share = "repetition", "repetition", "lower", True

    def row(self, answer: str, references: Sequence[str]) -> float:
        found = ngrams(words(answer), 4)
        return 1 - len(found) / found.total() if found else 0.0


class AnswerCharacters(MeanMetric):
    """Characters of an answer."""

    name, label, better, digits = "answer_characters", "answer characters", None, 1

    def row(self, answer: str, references: Sequence[str]) -> float:
        return len(answer)
