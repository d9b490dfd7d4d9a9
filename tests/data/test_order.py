"""Which rows each step takes on each process: each row once an epoch, whatever the counts."""

from __future__ import annotations

import itertools

import pytest

from luthier.data.batch import Order

COUNTS = [1, 2, 7, 8, 9, 21, 23, 64]
DIVISIONS = [(1, 8, 1), (2, 4, 1), (2, 2, 2), (3, 3, 1), (3, 2, 3), (8, 1, 1)]  # processes, batch size, accumulation


def epoch(order: Order, number: int) -> list[list[list[list[int]]]]:
    """Indices by step, process and forward pass."""
    first = number * order.steps_per_epoch
    return [[order.step(first + i, p) for p in range(order.processes)] for i in range(order.steps_per_epoch)]


def flat(nested: list) -> list[int]:
    return [nested] if isinstance(nested, int) else list(itertools.chain.from_iterable(map(flat, nested)))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("processes", "batch_size", "accumulation"), DIVISIONS)
def test_each_row_is_taken_once_an_epoch(count, processes, batch_size, accumulation):
    order = Order(count, batch_size=batch_size, accumulation=accumulation, processes=processes, seed=5)
    for number in range(3):
        steps = epoch(order, number)
        assert sorted(flat(steps)) == list(range(count))
        for step in steps:
            # No process has more than one row more than another, nor more forward passes than it was asked for.
            rows = [len(flat(passes)) for passes in step]
            assert max(rows) - min(rows) <= 1
            assert all(len(passes) <= accumulation for passes in step)
            assert all(0 < len(indices) <= batch_size for passes in step for indices in passes)


@pytest.mark.parametrize("count", COUNTS)
def test_a_step_takes_the_same_rows_however_it_is_divided(count):
    """With as many rows a step, on any number of processes: such runs can be compared, and resume one another."""
    orders = [
        Order(count, batch_size=24 // (processes * accumulation), accumulation=accumulation, processes=processes)
        for processes, accumulation in [(1, 1), (1, 4), (2, 1), (2, 3), (3, 2), (8, 1)]
    ]
    assert {order.steps_per_epoch for order in orders} == {-(-count // 24)}
    for number in range(2):
        rows = [[sorted(flat(step)) for step in epoch(order, number)] for order in orders]
        assert all(other == rows[0] for other in rows)
    if count > 6:
        assert flat(epoch(orders[0], 0)) != flat(epoch(orders[0], 1))
