"""BLEU and chrF of a whole set of answers, from sacrebleu's counts of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.evaluation.metrics.base import Metric, References, Rows, check_rows
from luthier.evaluation.metrics.words import is_chinese


@dataclass(frozen=True, slots=True)
class SignedScore:
    """A score, and how it was computed."""

    score: float
    """0 to 1: sacrebleu's score over 100"""
    signature: str
    """sacrebleu's, to be given wherever the score is published (Post, 2018, arXiv:1804.08771)"""


class _Sacrebleu(Metric):
    """A metric of sacrebleu's: each row's counts are its own, and its formula is computed for many sums at once."""

    def signature(self, references: Rows) -> str:
        metric = self._metric(references)
        numbers = {len(row) for row in references}
        metric.num_refs = numbers.pop() if len(numbers) == 1 else -1  # -1: sacrebleu's "var"
        return str(metric.get_signature())

    def statistics(self, answers: Sequence[str], references: Rows) -> np.ndarray:
        most = max(map(len, references))
        streams = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
        counts = self._metric(references)._extract_corpus_statistics(answers, streams)
        return np.array(counts, dtype=np.float64)

    def signed_score(self, answers: Sequence[str], references: References) -> SignedScore:
        """Score and signature.

        Raises:
            UserError: as :func:`~luthier.evaluation.metrics.base.check_rows`.
        """
        rows = check_rows(answers, references)
        return SignedScore(self.score(answers, rows), self.signature(rows))

    def _metric(self, references: Rows) -> Any:
        raise NotImplementedError


class Bleu(_Sacrebleu):
    """Corpus BLEU (Papineni et al., 2002, P02-1040), which counts runs of up to four words and all rows together.

    sacrebleu cuts words as ``zh`` where the references are mostly Chinese, else as ``13a``; a run length of which none
    is right is smoothed (``exp``). Answers that are all shorter than four words score 0, even where they are right. A
    row's own score takes the run lengths that it has.
    """

    name, label = "bleu", "BLEU"

    def value(self, sums: np.ndarray, count: np.ndarray | int) -> np.ndarray:
        return _bleu(sums, own_orders=False)

    def rows(self, answers: Sequence[str], references: Rows) -> np.ndarray:
        return _bleu(self.statistics(answers, references), own_orders=True)

    def _metric(self, references: Rows) -> Any:
        from sacrebleu.metrics import BLEU

        chinese = is_chinese("".join(text for row in references for text in row))
        # force: sacrebleu else warns of texts that end in " .", as if the user had cut the words beforehand.
        return BLEU(tokenize="zh" if chinese else "13a", force=True)


class Chrf(_Sacrebleu):
    """chrF (Popović, 2015, W15-3049): runs of one to six characters, recall weighted twice; all rows together.

    It needs no words, so it suits any language and forgives endings.

    Args:
        word_order: longest run of words counted beside; 2 is chrF++ (Popović, 2017, W17-4770).
    """

    def __init__(self, word_order: int = 0) -> None:
        self.name = "chrf" + "+" * word_order
        self.label = "chrF" + "+" * word_order
        self._word_order = word_order

    def value(self, sums: np.ndarray, count: np.ndarray | int) -> np.ndarray:
        return _chrf(sums)

    def rows(self, answers: Sequence[str], references: Rows) -> np.ndarray:
        return _chrf(self.statistics(answers, references))

    def _metric(self, references: Rows) -> Any:
        from sacrebleu.metrics import CHRF

        return CHRF(word_order=self._word_order)


def bleu(answers: Sequence[str], references: References) -> SignedScore:
    """Corpus BLEU and its signature: see :class:`Bleu`.

    Raises:
        UserError: as :func:`~luthier.evaluation.metrics.base.check_rows`.
    """
    return Bleu().signed_score(answers, references)


def chrf(answers: Sequence[str], references: References, word_order: int = 0) -> SignedScore:
    """Corpus chrF and its signature: see :class:`Chrf`.

    Raises:
        UserError: as :func:`~luthier.evaluation.metrics.base.check_rows`.
    """
    return Chrf(word_order).signed_score(answers, references)


def _bleu(stats: np.ndarray, own_orders: bool) -> np.ndarray:
    """sacrebleu's ``BLEU.compute_bleu`` with ``exp`` smoothing.

    Args:
        stats: ``[..., 10]``: length of the answers, of the nearest references; right runs of 1 to 4 words; all runs.
        own_orders: leave out lengths of which the answers have no run (sacrebleu's ``effective_order``).

    Returns:
        ``[...]``, 0 to 1
    """
    said, right, correct, total = stats[..., 0], stats[..., 1], stats[..., 2:6], stats[..., 6:10]
    brevity = np.exp(np.minimum(1 - right / np.maximum(said, 1), 0))  # an empty answer has no right run: 0 below
    has = total > 0
    missed = has & (correct == 0)
    smoothed = 0.5 ** np.cumsum(missed, axis=-1)
    precision = np.where(missed, smoothed, correct) / np.maximum(total, 1)
    logs = np.where(has, np.log(np.where(has, precision, 1)), 0 if own_orders else -np.inf)
    orders = np.maximum(has.sum(axis=-1), 1) if own_orders else 4
    score = brevity * np.exp(logs.sum(axis=-1) / orders)
    return np.where(correct.any(axis=-1), score, 0.0)


def _chrf(stats: np.ndarray) -> np.ndarray:
    """sacrebleu's ``CHRF._compute_f_score`` with beta 2, without epsilon smoothing.

    Args:
        stats: ``[..., 3 * orders]``: runs of the answers, of the references, and in both, for each length.

    Returns:
        ``[...]``, 0 to 1
    """
    said, right, both = stats[..., 0::3], stats[..., 1::3], stats[..., 2::3]
    has = (said > 0) & (right > 0)
    orders = np.maximum(has.sum(axis=-1), 1)
    precision = (np.where(has, both, 0) / np.maximum(said, 1)).sum(axis=-1) / orders
    recall = (np.where(has, both, 0) / np.maximum(right, 1)).sum(axis=-1) / orders
    weighed = 4 * precision + recall
    return 5 * precision * recall / np.where(weighed > 0, weighed, 1)
