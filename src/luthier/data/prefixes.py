"""Which rows of a batch begin alike, so that what they share is computed once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Shorter beginnings are not worth a segment of their own.
SHORTEST = 16
# Rows that are grouped at one time; the search is quadratic in it.
_AT_ONCE = 64


# One way to group some rows: tokens saved, the groups, and the rows left to a group of a shorter beginning.
_Plan = tuple[int, list[tuple[list[int], int]], list[int]]


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
    order = sorted(range(len(rows)), key=lambda i: rows[i][:-1].tolist())
    groups: list[tuple[list[int], int]] = []
    for begin in range(0, len(order), _AT_ONCE):
        _, best, _ = _plans(rows, order[begin : begin + _AT_ONCE], shortest)[0]
        groups += best
    return groups


def _plans(rows: Sequence[np.ndarray], order: list[int], shortest: int) -> list[_Plan]:
    """For rows in lexicographic order, the plan that saves the most for each number of rows left, from 0 up.

    What rows share at their beginnings is a tree, and each of its nodes can hold one group. The plans of a node's
    children are added up; then a group of the node's depth takes some of the rows that they left.
    """
    if len(order) == 1:
        return [(0, [(order, 0)], []), (0, [], order)]
    depth = _common(rows[order[0]], rows[order[-1]])  # in this order, no two have less in common
    plans: list[_Plan] = [(0, [], [])]
    begin = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or _common(rows[order[end - 1]], rows[order[end]]) == depth:
            plans = _added(plans, _plans(rows, order[begin:end], shortest))
            begin = end
    if depth >= shortest:
        for keep in range(len(plans) - 2):
            for saved, groups, left in plans[keep + 2 :]:
                if (with_group := saved + (len(left) - keep - 1) * depth) > plans[keep][0]:
                    plans[keep] = (with_group, [*groups, (left[keep:], depth)], left[:keep])
    return plans


def _added(some: list[_Plan], more: list[_Plan]) -> list[_Plan]:
    """The best plans of two sets of rows that share nothing deeper."""
    best: list[_Plan] = [(-1, [], [])] * (len(some) + len(more) - 1)
    for a, (saved, groups, left) in enumerate(some):
        for b, (also, others, waiting) in enumerate(more):
            if saved + also > best[a + b][0]:
                best[a + b] = (saved + also, groups + others, left + waiting)
    return best


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two rows have in common at their beginning, the last of each left to itself."""
    n = min(len(a), len(b)) - 1
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
