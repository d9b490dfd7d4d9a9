"""The batches of each optimiser step, made ahead of time where a device computes meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from luthier.data.batch import Batch, Order
from luthier.data.encode import EncodedExample


class MakeBatch(Protocol):
    """:meth:`LossFunction.batch`."""

    def __call__(self, examples: list[EncodedExample], *, draw: int) -> Batch: ...


class StepInput:
    """Makes the batches of a process's steps, in the order's order.

    A GPU waits for nothing then: while it computes a step, a thread makes the next one's batches, in page-locked
    memory, from where they are copied while it computes. What a batch draws at random follows from the step's number
    and the rows, and from no generator's state, so that a step is the same either way. On a CPU a thread would take
    time from the products.

    Args:
        make: examples to a batch, with the number of the step, from 1, as ``draw``.
        rows: all rows.
        order: which rows each step takes.
        process: this process's number.
        steps: steps in all.
        ahead: whether the next step's batches are made in a thread.
        pin: whether batches are put into page-locked memory.
    """

    def __init__(
        self,
        make: MakeBatch,
        rows: Sequence[EncodedExample],
        order: Order,
        process: int,
        *,
        steps: int,
        ahead: bool,
        pin: bool,
    ) -> None:
        self._make_batch = make
        self._rows = rows
        self._order = order
        self._process = process
        self._steps = steps
        self._pin = pin
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches") if ahead else None
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def take(self, step: int) -> list[Batch]:
        """The batches of a step (from 0), one for each of its forward passes; may be empty."""
        if self._next is not None and self._next[0] == step:
            batches = self._next[1].result()
        else:
            batches = self._make(self._order.step(step, self._process), step)
        self._next = None
        if self._thread is not None and step + 1 < self._steps:
            # The order keeps its epoch's permutation and is asked here alone, not in the thread.
            rows = self._order.step(step + 1, self._process)
            self._next = (step + 1, self._thread.submit(self._make, rows, step + 1))
        return batches

    def close(self) -> None:
        """Let the thread go; what it was making is not wanted."""
        self._next = None
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, passes: list[list[int]], step: int) -> list[Batch]:
        batches = [self._make_batch([self._rows[i] for i in indices], draw=step + 1) for indices in passes]
        return [batch.pinned() for batch in batches] if self._pin else batches
