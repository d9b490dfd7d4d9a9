"""Several sources by weight: which rows of each are taken, so that the shares are the weights, to the row."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray

from luthier.errors import UserError

_MOST = 10**8


def mix(
    counts: Sequence[int],
    weights: Sequence[float | None],
    stopping_strategy: str = "first_exhausted",
    seed: int = 0,
) -> list[NDArray[np.int64]]:
    """Which rows of each source are taken.

    A total of T rows gives each source its quota, T times its share, rounded by largest remainders to a whole row.
    ``first_exhausted`` takes the largest total at which no source has less than its quota, so that no row repeats;
    which rows are taken of a source that has more is drawn by the seed. ``all_exhausted`` takes the smallest total at
    which no source has more than its quota, so that every row is there: one that is too small is gone through several
    times, and no two of its rows differ by more than one time. (``datasets.interleave_datasets`` has the same two
    strategies, but draws the source of each row, so that its shares hold on average alone.)

    >>> [len(rows) for rows in mix([900, 100], [0.7, 0.3])]  # of 333 rows, 0.7 are 233.1 and 0.3 are 99.9
    [233, 100]
    >>> [rows.tolist() for rows in mix([4, 2], [2, 3], "all_exhausted")]
    [[0, 1, 2, 3], [0, 1, 0, 1, 0, 1]]

    Args:
        counts: rows of each source.
        weights: shares, relative to each other; all None: every row of every source, once.
        stopping_strategy: ``first_exhausted`` or ``all_exhausted``.
        seed: of the draws.

    Returns:
        indices of rows for each source, ascending within each time through it.

    Raises:
        UserError: some sources have a weight and some have none, a weighted source has no row, or the weights would
            repeat rows into more than a hundred million.
    """
    if all(weight is None for weight in weights):
        return [np.arange(count, dtype=np.int64) for count in counts]
    shares = _shares(counts, weights)
    exact = [count / share for count, share in zip(counts, shares, strict=True)]
    if stopping_strategy == "first_exhausted":
        total = floor(min(exact))
    elif stopping_strategy == "all_exhausted":
        total = ceil(max(exact))
    else:
        raise UserError(
            f"unknown stopping strategy {stopping_strategy!r}", remedy="known: first_exhausted, all_exhausted"
        )
    if total > _MOST:
        raise UserError(
            f"the weights and {stopping_strategy} make {total:,} rows of {sum(counts):,}",
            where="data.train",
            remedy="give the small sources less weight, or set data.stopping_strategy: first_exhausted",
        )
    taken = _rounded([total * share for share in shares])
    return [_rows(count, number, seed, index) for index, (count, number) in enumerate(zip(counts, taken, strict=True))]


def _shares(counts: Sequence[int], weights: Sequence[float | None]) -> list[Fraction]:
    # As they are written: 0.1 is a tenth, not the nearest binary number, so that ten rows hold exactly one.
    given = [Fraction(repr(float(weight))) for weight in weights if weight is not None]
    if len(given) < len(weights):
        missing = [weight is None for weight in weights].index(True) + 1
        raise UserError(
            f"source {missing} has no weight and others have one",
            where="data.train",
            remedy="give every source a weight, or none",
        )
    for number, (count, weight) in enumerate(zip(counts, given, strict=True), 1):
        if weight <= 0:
            raise UserError(f"the weight of source {number} is not above 0", where="data.train", remedy="leave it out")
        if not count:
            raise UserError(
                f"source {number} has a weight and no row that can be used", where="data.train", remedy="leave it out"
            )
    return [weight / sum(given) for weight in given]


def _rounded(quotas: Sequence[Fraction]) -> list[int]:
    """Whole numbers with the same sum, each the floor or the ceiling of its quota: the largest remainders go up."""
    taken = [floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: (taken[i] - quotas[i], i))
    for index in by_remainder[: int(sum(quotas)) - sum(taken)]:
        taken[index] += 1
    return taken


def _rows(count: int, number: int, seed: int, index: int) -> NDArray[np.int64]:
    times, rest = divmod(number, count)
    draw = np.random.default_rng([seed, index])
    rows = [np.arange(count, dtype=np.int64)] * times
    if rest:
        rows.append(np.sort(draw.choice(count, rest, replace=False)).astype(np.int64))
    return np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
