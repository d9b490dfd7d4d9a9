"""How sure a comparison is: intervals by the bootstrap over rows, significance by swapping models' rows.

Everything is computed from sufficient statistics of rows, whose sums give a metric's value over a set of rows (see
:mod:`luthier.evaluation.metrics`), so that a thousand resamples of BLEU cost one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Value = Callable[[np.ndarray, int], np.ndarray]
"""``[..., S]`` sums of statistics over so many rows → ``[...]`` values of a metric."""

RESAMPLES = 2_000
TRIALS = 10_000
CONFIDENCE = 0.95
# Of a resample of so many rows, what exists at one time: 32 MiB.
_AT_ONCE = 4_194_304
_QUANTILE = 1.959963984540054  # of the normal distribution, at 0.975


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and the 95% confidence interval around it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Change:
    """How a model differs from another on the same rows."""

    value: float
    """Its value less that of the other."""
    low: float
    high: float
    """The 95% confidence interval of the difference."""
    p: float
    """How likely a difference as large is where the models are equally good."""
    wins: int
    """Rows on which it is better; 0 where neither direction is."""
    ties: int
    losses: int

    @property
    def significant(self) -> bool:
        """At the level of 5%, of this one comparison: of twenty of equal models, one is so by chance."""
        return self.p < 0.05


class Resampling:
    """Random sets of rows, the same ones for every model and metric, so that differences are paired.

    Args:
        rows: how many there are.
        resamples: bootstrap samples (Efron, 1979), each of as many rows drawn with replacement.
        trials: of the randomisation test.
        seed: the same one gives the same numbers.
    """

    def __init__(self, rows: int, *, resamples: int = RESAMPLES, trials: int = TRIALS, seed: int = 42) -> None:
        self.rows, self.resamples, self.trials, self.seed = rows, resamples, trials, seed

    def sums(self, statistics: np.ndarray) -> np.ndarray:
        """``[B, S]``: the sums of ``[N, S]`` statistics over each bootstrap sample."""
        rng = np.random.default_rng([self.seed, 0])
        found = np.empty((self.resamples, statistics.shape[1]))
        for begin, end in _pieces(self.resamples, self.rows):
            drawn = rng.integers(0, self.rows, (end - begin, self.rows))
            drawn += np.arange(end - begin)[:, None] * self.rows
            times = np.bincount(drawn.ravel(), minlength=(end - begin) * self.rows).reshape(end - begin, self.rows)
            found[begin:end] = times @ statistics
        return found

    def swapped(self, statistics: np.ndarray) -> np.ndarray:
        """``[T, S]``: the sums of ``[N, S]`` statistics over each trial's random half of the rows."""
        rng = np.random.default_rng([self.seed, 1])
        found = np.empty((self.trials, statistics.shape[1]))
        for begin, end in _pieces(self.trials, self.rows):
            found[begin:end] = rng.integers(0, 2, (end - begin, self.rows)) @ statistics
        return found


def _pieces(count: int, rows: int) -> list[tuple[int, int]]:
    size = max(1, _AT_ONCE // max(1, rows))
    return [(begin, min(begin + size, count)) for begin in range(0, count, size)]


def interval(value: Value, statistics: np.ndarray, resampling: Resampling, *, binary: bool = False) -> Interval:
    """A metric's value over all rows, and how far it would move with other rows of the same kind.

    The percentiles of the bootstrap; of a share of the rows, Wilson's interval (1927), for resamples of rows that are
    all right, or all wrong, would say that nothing else is possible.

    Args:
        value: the metric's.
        statistics: ``[N, S]``
        resampling: of as many rows.
        binary: whether it is the share of rows that are right.
    """
    count = len(statistics)
    whole = float(value(statistics.sum(0), count))
    if binary:
        return wilson(whole, count)
    low, high = _percentiles(value(resampling.sums(statistics), count))
    return Interval(whole, low, high)


def change(
    value: Value,
    before: np.ndarray,
    after: np.ndarray,
    rows: tuple[np.ndarray, np.ndarray],
    resampling: Resampling,
    *,
    better: str | None,
    binary: bool = False,
) -> Change:
    """How a model differs from another, paired by rows.

    The interval is the percentiles of the differences over the same bootstrap samples; of a share of the rows, that of
    Agresti and Min (2005, Statistics in Medicine 24). ``p`` is the two-sided approximate randomisation test's (Noreen,
    1989; Riezler and Maxwell, 2005): how often models that have swapped a random half of their rows differ more.

    Args:
        value: the metric's.
        before: ``[N, S]`` statistics of the other model.
        after: of the model.
        rows: of both ``[N]``, the value of each row.
        resampling: of as many rows.
        better: ``higher``, ``lower``, or None where neither is.
        binary: whether it is the share of rows that are right.
    """
    count = len(before)
    whole = float(value(after.sum(0), count)) - float(value(before.sum(0), count))
    if binary:
        low, high = _agresti_min(int(((after - before) > 0).sum()), int(((after - before) < 0).sum()), count)
    else:
        width = before.shape[1]
        sums = resampling.sums(np.concatenate([before, after], 1))
        with np.errstate(invalid="ignore"):
            low, high = _percentiles(value(sums[:, width:], count) - value(sums[:, :width], count))
    moved = resampling.swapped(after - before)
    with np.errstate(invalid="ignore"):  # of a broken model, ∞ − ∞
        differences = value(after.sum(0) - moved, count) - value(before.sum(0) + moved, count)
    # Rounding must not let an equal difference count as a smaller one.
    as_large = int((np.abs(differences) >= abs(whole) - 1e-12).sum())
    apart = np.sign(rows[1] - rows[0]) * {"higher": 1, "lower": -1, None: 0}[better]
    return Change(
        whole,
        low,
        high,
        (as_large + 1) / (resampling.trials + 1),
        wins=int((apart > 0).sum()),
        ties=int((apart == 0).sum()),
        losses=int((apart < 0).sum()),
    )


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def wilson(share: float, count: int) -> Interval:
    """A share of so many rows with Wilson's interval."""
    z = _QUANTILE
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    whole = 1 + z * z / count
    # Rounding would leave 1e-17 of what is 0.
    return Interval(share, max(0.0, round((middle - half) / whole, 12)), min(1.0, round((middle + half) / whole, 12)))


def _agresti_min(gained: int, lost: int, count: int) -> tuple[float, float]:
    """Wald's interval with half a row added to each of the four cells."""
    b, c, n = gained + 0.5, lost + 0.5, count + 2
    middle = (b - c) / n
    half = _QUANTILE * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return max(-1.0, middle - half), min(1.0, middle + half)


def preference(wins: int, ties: int, losses: int) -> Change:
    """How much oftener one of two is preferred: the share of rows that it wins less that of rows that it loses.

    The interval is that of Agresti and Min; ``p`` is the exact sign test's, of the rows that are not tied. A win rate
    that counts ties as half is ``(1 + value) / 2``, and so are its bounds: Wilson's interval, which takes a tie for as
    uncertain as a won or lost row, would be 1.4 times as wide where half of the rows are tied.

    Args:
        wins: rows that it wins.
        ties: rows that neither wins.
        losses: rows that it loses; together at least one row.
    """
    count = wins + ties + losses
    return Change(
        (wins - losses) / count,
        *_agresti_min(wins, losses, count),
        sign_test(wins, losses),
        wins=wins,
        ties=ties,
        losses=losses,
    )


def sign_test(wins: int, losses: int) -> float:
    """How often so many tosses of a fair coin fall at least as unevenly: exact, two-sided."""
    tosses = wins + losses
    tail = sum(math.comb(tosses, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**tosses)


def smallest_difference(share: float, rows: int) -> float:
    """The difference between two models' shares that so many rows can show (80% power, 5% level, unpaired).

    A planning number: 1.96 + 0.84 standard errors of a difference of two shares near ``share``.

    Args:
        share: of rows that are right, about.
        rows: that both answer.
    """
    share = min(max(share, 1 / (rows + 2)), 1 - 1 / (rows + 2))
    return min(1.0, 2.8 * math.sqrt(2 * share * (1 - share) / rows))


def mean_value(sums: np.ndarray, count: int) -> np.ndarray:
    """The :data:`Value` of a mean over rows."""
    found: np.ndarray = sums[..., 0] / count
    return found


def column(values: Sequence[float]) -> np.ndarray:
    """``[N, 1]`` statistics of a mean over rows."""
    return np.asarray(values, dtype=np.float64)[:, None]


def unpaired(
    values: np.ndarray, others: np.ndarray, *, resamples: int = RESAMPLES, trials: int = TRIALS, seed: int = 42
) -> Change:
    """How the mean over some rows differs from that over other rows.

    The interval is the percentiles of the bootstrap of both; ``p`` is the two-sided permutation test's: how often rows
    dealt anew between the two differ more. Of wins and losses there are none.

    Args:
        values: ``[N]``
        others: ``[M]``
        resamples: bootstrap samples.
        trials: of the permutation test.
        seed: the same one gives the same numbers.
    """
    whole = float(values.mean() - others.mean())
    means = [
        Resampling(len(part), resamples=resamples, seed=seed + number).sums(part[:, None])[:, 0] / len(part)
        for number, part in enumerate((values, others))
    ]
    low, high = _percentiles(means[0] - means[1])
    rng, both = np.random.default_rng([seed, 2]), np.concatenate([values, others])
    as_large = 0
    for begin, end in _pieces(trials, len(both)):
        dealt = rng.permuted(np.broadcast_to(both, (end - begin, len(both))), axis=1)
        apart = dealt[:, : len(values)].mean(1) - dealt[:, len(values) :].mean(1)
        as_large += int((np.abs(apart) >= abs(whole) - 1e-12).sum())
    return Change(whole, low, high, (as_large + 1) / (trials + 1), 0, 0, 0)
