"""Sources mixed by weight: the shares hold to the row, nothing repeats, or nothing is lost."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import luthier.data.mixing
from luthier.data.mixing import mix
from luthier.errors import UserError

SOURCES = st.lists(
    st.tuples(st.integers(1, 300), st.one_of(st.integers(1, 20), st.floats(0.01, 5))), min_size=1, max_size=5
)


def off(taken, weights):
    total = sum(len(rows) for rows in taken)
    return max(abs(len(r) - total * w / sum(weights)) for r, w in zip(taken, weights, strict=True))


@settings(max_examples=200, deadline=None)
@given(sources=SOURCES, seed=st.integers(0, 9))
def test_first_exhausted_repeats_no_row_and_is_the_largest(sources, seed):
    counts, weights = zip(*sources, strict=True)
    taken = mix(counts, weights, "first_exhausted", seed)
    for rows, count in zip(taken, counts, strict=True):
        assert len(set(rows.tolist())) == len(rows) and all(0 <= row < count for row in rows)
        assert np.all(np.diff(rows) > 0)
    assert off(taken, weights) < 1 + 1e-9
    # One row more would ask some source for more than it has.
    total = sum(map(len, taken)) + 1
    assert any(total * w / sum(weights) > c - 1e-9 for w, c in zip(weights, counts, strict=True))
    again = mix(counts, weights, "first_exhausted", seed)
    assert all(np.array_equal(a, b) for a, b in zip(taken, again, strict=True))


@settings(max_examples=200, deadline=None)
@given(sources=SOURCES, seed=st.integers(0, 9))
def test_all_exhausted_loses_no_row_and_repeats_evenly(sources, seed):
    counts, weights = zip(*sources, strict=True)
    taken = mix(counts, weights, "all_exhausted", seed)
    for rows, count in zip(taken, counts, strict=True):
        times = np.bincount(rows, minlength=count)
        assert len(times) == count and times.min() >= 1 and times.max() - times.min() <= 1
    assert off(taken, weights) < 1 + 1e-9
    # One row less would give some source less than all of its rows.
    total = sum(map(len, taken)) - 1
    assert any(total * w / sum(weights) < c + 1e-9 for w, c in zip(weights, counts, strict=True))


def test_sizes_that_can_be_counted_by_hand():
    def sizes(*given):
        return [len(rows) for rows in mix(*given)]

    assert sizes([900, 100], [0.7, 0.3]) == [233, 100]
    assert sizes([1000, 1000], [7, 3]) == [1000, 428]
    assert sizes([10, 10, 10], [0.1, 0.2, 0.7]) == [1, 3, 10]
    assert sizes([10, 10], [0.1, 0.9]) == [1, 10]
    assert sizes([900, 100], [0.7, 0.3], "all_exhausted") == [900, 386]
    assert sizes([4, 2], [0.5, 0.5], "all_exhausted") == [4, 4]
    assert sizes([5, 3], [None, None]) == [5, 3]


def test_the_seed_draws_other_rows():
    first, second = (mix([1000, 10], [1, 1], "first_exhausted", seed)[0] for seed in (1, 2))
    assert not np.array_equal(first, second)


def test_weights_that_cannot_be_used():
    for counts, weights, strategy, words in (
        ([5, 5], [1, None], "first_exhausted", "source 2 has no weight"),
        ([5, 0], [1, 1], "first_exhausted", "source 2 has a weight and no row"),
        ([5, 5], [1, 1], "until_bored", "unknown stopping strategy"),
        ([5, 10**7], [0.999, 0.001], "all_exhausted", "make"),
    ):
        with pytest.raises(UserError, match=words):
            mix(counts, weights, strategy)


def test_the_example_in_the_documentation():
    assert doctest.testmod(luthier.data.mixing).failed == 0
