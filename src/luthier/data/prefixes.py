"""Which rows of a batch begin alike, so that what they share is computed once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

# Shorter beginnings are not worth a segment of their own.
SHORTEST = 16
# Rows that are grouped at one time; the search is quadratic in it.
_AT_ONCE = 64


def group_by_prefix(rows: Sequence[np.ndarray], shortest: int = SHORTEST) -> list[tuple[list[int], int]]:
    """Partition rows into groups, each with the length of the beginning that its rows share.

    The groups are those that save the most tokens: a group of c rows with p shared tokens saves (c − 1) · p.

    Args:
        rows: token ids of each row, ``[n] int``.
        shortest: fewest tokens that are shared.

    Returns:
        ``(row numbers, shared tokens)`` of each group; 0 where a row shares nothing. A row keeps a token of its own
        beyond what it shares.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i].tolist())
    groups: list[tuple[list[int], int]] = []
    for begin in range(0, len(order), _AT_ONCE):
        groups.extend(_best_groups(rows, order[begin : begin + _AT_ONCE], shortest))
    return groups


def _best_groups(rows: Sequence[np.ndarray], order: list[int], shortest: int) -> list[tuple[list[int], int]]:
    """The best partition of rows in lexicographic order into runs, by dynamic programming."""
    count = len(order)
    alike = [_common(rows[a], rows[b]) for a, b in itertools.pairwise(order)]
    best = [0] * (count + 1)  # tokens saved by the first j rows
    choice = [(j - 1, 0) for j in range(count + 1)]  # where the last of their groups begins, and what it shares
    for j in range(1, count + 1):
        best[j] = best[j - 1]
        shared = len(rows[order[j - 1]]) - 1
        for i in range(j - 2, -1, -1):
            shared = min(shared, alike[i], len(rows[order[i]]) - 1)
            if shared < shortest:
                break
            if (saved := best[i] + (j - 1 - i) * shared) > best[j]:
                best[j], choice[j] = saved, (i, shared)
    groups = []
    j = count
    while j:
        i, shared = choice[j]
        groups.append((order[i:j], shared))
        j = i
    return groups[::-1]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two rows have in common at their beginning."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
