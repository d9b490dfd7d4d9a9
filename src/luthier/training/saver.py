"""Checkpoints written beside training: the loop hands them over and goes on.

Hashing and flushing to disk take seconds for a large model, in which the next step's forward and backward pass can
run. What keeps a checkpoint whole (written aside, hashed, renamed) stays where it is, in `checkpoint.Checkpoints`.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import torch

from luthier.training.checkpoint import Checkpoints, TrainState

# Bytes of tensors that are copied so that training need not wait for the writer: the adapters of most runs fit. More
# would raise the peak memory of full tuning by three quarters of its optimiser, for as long as the disk takes.
COPIED = 512_000_000


class Saver:
    """Writes the checkpoints of a store in a thread, one at a time.

    A small checkpoint is copied first, so that training goes on at once. A large one is written from the tensors in
    use: they change only when the optimiser steps, so :meth:`before_update` waits for what is not written by then.

    Args:
        store: writes one checkpoint, whole or not at all.
        copied: up to how many bytes tensors are copied first.
    """

    def __init__(self, store: Checkpoints, *, copied: int = COPIED) -> None:
        self.store = store
        self.copied = copied
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._live = False
        self.step: int | None = None
        """the step that was saved last, or that is being saved"""

    def save(self, state: TrainState, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]) -> None:
        """Begin to write a checkpoint, after the one before is whole; the step saved last is not saved again.

        Args:
            state: where the run stands; copied.
            weights: by name; must not be changed before :meth:`before_update` has returned.
            moments: the optimiser's state by name; as ``weights``.

        Raises:
            UserError: the checkpoint before this one could not be written.
        """
        if state.step == self.step:
            return
        self.wait()
        tensors = [*weights.values(), *moments.values()]
        self._live = sum(t.numel() * t.element_size() for t in tensors) > self.copied
        if not self._live:
            weights, moments = _copied(weights), _copied(moments)
        self.step = state.step
        # Not a daemon: a process that ends by itself ends after its last checkpoint.
        self._thread = threading.Thread(
            target=self._write, args=(replace(state), weights, moments), name="checkpoint", daemon=False
        )
        self._thread.start()

    def before_update(self) -> None:
        """Return when the tensors given to :meth:`save` may change. Errors are kept for :meth:`wait`."""
        if self._live:
            self._join()

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            UserError: the last checkpoint could not be written; raised once.
        """
        error = self.close()
        if error is not None:
            self.step = None
            raise error

    def close(self) -> BaseException | None:
        """Return when nothing is being written; gives an error that nothing has raised yet."""
        self._join()
        error, self._error = self._error, None
        return error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread, self._live = None, False

    def _write(self, state: TrainState, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]) -> None:
        try:
            self.store.save(state, weights, moments)
        except BaseException as error:  # raised again by `wait`, in the thread that trains
            self._error = error


def _copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in the host's memory."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
