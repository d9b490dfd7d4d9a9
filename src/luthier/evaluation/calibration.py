"""Whether a classifier is as sure as it is right: what its probabilities are worth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 15
# A gap that is worth a word, and rows from which on one is.
_GAP, _ROWS = 0.05, 30
_SURE = 2.576  # standard errors: one classifier in a hundred that is calibrated gets the word


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows of like confidence."""

    low: float
    high: float
    count: int
    confidence: float
    """Mean probability given."""
    accuracy: float
    """Share that is right."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """How a classifier's probabilities fit what is right.

    Of texts of one class these are numbers of the class given, its probability and whether it is right (Guo et al.,
    2017, arXiv:1706.04599). Where a text can be of several, each label is a decision of its own; the numbers are means
    over the labels, and the bins hold the probability of each label and how often it is right.
    """

    ece: float
    """Expected calibration error: mean distance of confidence and accuracy over bins, weighted by their rows."""
    brier: float
    """Brier score, as scikit-learn has it: mean squared distance of probabilities and truth, summed over classes where
    there are more than two; from 0 (best)."""
    nll: float
    """Negative log-likelihood of what is right, nats."""
    confidence: float
    """Mean probability of what was decided."""
    accuracy: float
    """Share of decisions that are right."""
    gap_error: float
    """Standard error of the difference of the two."""
    rows: int
    bins: tuple[Bin, ...]
    by_label: dict[str, dict[str, float]]
    """``ece``, ``brier`` and ``nll`` of each label; empty where a text has one class."""

    def to_json(self) -> dict[str, Any]:
        """For JSON; bins without rows are left out."""
        return {
            "ece": self.ece,
            "brier": self.brier,
            "nll": self.nll,
            "confidence": self.confidence,
            "accuracy": self.accuracy,
            "bins": BINS,
            "reliability": [
                {
                    "from": round(b.low, 6),
                    "to": round(b.high, 6),
                    "count": b.count,
                    "confidence": b.confidence,
                    "accuracy": b.accuracy,
                }
                for b in self.bins
            ],
            "by_label": self.by_label,
        }

    def note(self, name: str) -> str | None:
        """A word where it is surely too sure, or not sure enough."""
        gap = self.confidence - self.accuracy
        if self.rows < _ROWS or abs(gap) < _GAP or abs(gap) < _SURE * self.gap_error:
            return None
        what = "more sure than right" if gap > 0 else "less sure than right"
        return (
            f"{name} is {what}: {self.confidence:.0%} sure on average, and right in {self.accuracy:.0%}; where its "
            "probabilities are used, divide its logits by a temperature fitted on validation rows"
        )


def calibration(scores: np.ndarray, right: np.ndarray, names: tuple[str, ...], *, multi_label: bool) -> Calibration:
    """What probabilities are worth.

    Args:
        scores: ``[N, C]`` probabilities, N at least 1.
        right: ``[N, C] bool``
        names: of the classes.
        multi_label: whether a text can be of several classes; else rows of ``scores`` add up to 1.
    """
    squared = (scores - right) ** 2
    eps = np.finfo(
        scores.dtype
    ).eps  # as scikit-learn: what is given no probability at all costs 36 nats, not infinitely
    if multi_label:
        likely = np.where(right, scores, 1 - scores)
        surprise = -np.log(np.clip(likely, eps, 1 - eps))
        sure, hits = np.maximum(scores, 1 - scores).mean(1), ((scores > 0.5) == right).mean(1)
        eces = [_ece(_bins(scores[:, i], right[:, i]), len(scores)) for i in range(len(names))]
        by_label = {
            name: {"ece": eces[i], "brier": float(squared[:, i].mean()), "nll": float(surprise[:, i].mean())}
            for i, name in enumerate(names)
        }
        bins = _bins(scores.ravel(), right.ravel())
        ece, brier, nll = float(np.mean(eces)), float(squared.mean()), float(surprise.mean())
    else:
        sure = scores.max(1)
        hits = right[np.arange(len(scores)), scores.argmax(1)].astype(float)
        bins, by_label = _bins(sure, hits), {}
        ece = _ece(bins, len(scores))
        # Of two classes the distances are the same, and count once.
        brier = float(squared.sum(1).mean()) / (2 if scores.shape[1] == 2 else 1)
        nll = float(-np.log(np.clip((scores * right).sum(1), eps, 1 - eps)).mean())
    apart = sure - hits
    error = float(apart.std(ddof=1) / math.sqrt(len(apart))) if len(apart) > 1 else math.inf
    return Calibration(ece, brier, nll, float(sure.mean()), float(hits.mean()), error, len(scores), bins, by_label)


def _bins(confidence: np.ndarray, hits: np.ndarray) -> tuple[Bin, ...]:
    """The bins that hold anything, of equal width; each without its lower bound and with its upper one."""
    edges = np.linspace(0, 1, BINS + 1)
    of = np.searchsorted(edges[1:-1], confidence)
    return tuple(
        Bin(
            float(edges[b]),
            float(edges[b + 1]),
            int((of == b).sum()),
            float(confidence[of == b].mean()),
            float(hits[of == b].mean()),
        )
        for b in range(BINS)
        if (of == b).any()
    )


def _ece(bins: tuple[Bin, ...], count: int) -> float:
    return sum(b.count * abs(b.confidence - b.accuracy) for b in bins) / count
