"""Checkpoints that all processes write together, each its own pieces, with the guarantees of a plain one.

``checkpoints/step-N`` holds ``weights-I-of-COUNT.safetensors`` and ``optimizer-I-of-COUNT.safetensors`` of each process
I, and one ``state.json`` with the SHA-256 of all and the whole shapes. It gets its name when every piece is on the
disk. :meth:`luthier.training.checkpoint.Checkpoints.load` puts the pieces together, whoever asks.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from luthier.errors import UserError
from luthier.training.checkpoint import (
    Checkpoint,
    Checkpoints,
    TrainState,
    read_hashed,
    safetensors_bytes,
    shard_files,
    sync_folder,
    write_flushed,
    writing,
)
from luthier.training.processes import Processes


class ShardedCheckpoints(Checkpoints):
    """The checkpoints of a run whose processes each hold a piece of every tensor, along its first dimension.

    Args:
        folder: ``RUN/checkpoints``, on a file system that all processes see.
        shapes: the whole shape of each weight.
        processes: all of them call :meth:`save` and :meth:`newest` together.
        keep: newest ones kept; the best one is kept besides.
    """

    def __init__(self, folder: Path, shapes: dict[str, list[int]], processes: Processes, *, keep: int = 2) -> None:
        super().__init__(folder, keep=keep)
        self._shapes = shapes
        self._processes = processes

    def save(self, state: TrainState, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]) -> Path:
        """Write a checkpoint from every process's pieces; the older ones stay until it is whole.

        Raises:
            UserError: a disk is full or cannot be written, or the processes do not write to the same place.
            FailedElsewhere: that happened to another process.
        """
        target = self.folder / f"step-{state.step}"
        aside = self.folder / f".writing-step-{state.step}"
        main, count = self._processes.main, self._processes.count
        with writing(target):
            if main:
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
            self._processes.wait()
            try:
                names = shard_files(self._processes.index, count)
                hashes = {
                    name: write_flushed(aside / name, safetensors_bytes(tensors))
                    for name, tensors in zip(names, (weights, moments), strict=True)
                }
                sync_folder(aside)
                every = {name: value for each in self._processes.gather(hashes) for name, value in each.items()}
                if main:
                    self._require_here(aside, list(every))
                    self._seal(aside, target, state, every, {"count": count, "shapes": self._shapes})
            except BaseException:
                if main:
                    shutil.rmtree(aside, ignore_errors=True)
                raise
        if main:
            self._prune(state)
        self._processes.wait()
        return target

    def newest(self, refused: list[str]) -> Checkpoint | None:
        """The newest checkpoint whose pieces are whole for every process."""
        for step in self._processes.gather(self.steps())[0]:
            checkpoint, reason = None, None
            try:
                checkpoint = self.load(step)
            except ValueError as error:
                reason = str(error)
            reasons = [r for r in self._processes.gather(reason) if r is not None]
            if not reasons:
                return checkpoint
            refused += dict.fromkeys(reasons)
        return None

    def _tensors(self, path: Path, record: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """This process's pieces: its own files, or a share of the whole where other processes wrote it."""
        index, count = self._processes.index, self._processes.count
        if record.get("shards", {}).get("count") == count:
            weights, moments = (read_hashed(path / n, record["sha256"][n]) for n in shard_files(index, count))
            return weights, moments
        weights, moments = (
            {name: _piece(tensor, index, count) for name, tensor in tensors.items()}
            for tensors in super()._tensors(path, record)
        )
        return weights, moments

    def _require_here(self, aside: Path, names: list[str]) -> None:
        absent = [name for name in names if not (aside / name).is_file()]
        if absent:
            raise UserError(
                f"process 0 does not see what another process wrote: {absent[0]}",
                where=str(aside),
                remedy="put output_dir on a file system that all machines share",
            )


def _piece(tensor: torch.Tensor, index: int, count: int) -> torch.Tensor:
    """What process ``index`` of ``count`` holds of a tensor: FSDP2's division of the first dimension."""
    if not tensor.ndim:
        return tensor
    pieces = tensor.chunk(count)
    return pieces[index].clone() if index < len(pieces) else tensor[:0].clone()
