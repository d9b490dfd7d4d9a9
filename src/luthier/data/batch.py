"""Batches: padding-free where the model can take them, right-padded where it cannot; the same targets either way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from luthier.data.encode import EncodedExample


@dataclass(slots=True)
class Batch:
    """One forward pass.

    Packed: the examples lie end to end in one row, N tokens in all, and nothing is padding.
    Padded: one row an example, L the longest, padding on the right.
    """

    input_ids: torch.Tensor
    """``[1, N] int64`` packed, ``[B, L]`` padded"""
    position_ids: torch.Tensor
    """the same shape; restarts at 0 for each example"""
    cu_seqlens: torch.Tensor
    """``[B + 1] int32``: where each example begins in the packed row"""
    kept: torch.Tensor
    """``[K] int64``: flat positions whose next token is trained"""
    targets: torch.Tensor
    """``[K] int64``: those next tokens"""
    attention_mask: torch.Tensor | None
    """``[B, L] int64``; None where packed"""
    tokens: int
    """tokens of the examples, padding not counted"""

    @property
    def packed(self) -> bool:
        return self.attention_mask is None

    @property
    def trained_tokens(self) -> int:
        return len(self.targets)

    @property
    def longest(self) -> int:
        return int((self.cu_seqlens[1:] - self.cu_seqlens[:-1]).max())

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        mask = None if self.attention_mask is None else self.attention_mask.to(device, non_blocking=True)
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=True),
            kept=self.kept.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            attention_mask=mask,
        )


def pack(examples: Sequence[EncodedExample]) -> Batch:
    """Examples end to end in one row; see :class:`Batch` for shapes."""
    lengths = np.array([len(e) for e in examples], dtype=np.int64)
    ids = np.concatenate([e.input_ids for e in examples]).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(len(ids), dtype=np.int64) - np.repeat(starts[:-1], lengths)
    target_at = np.flatnonzero(np.concatenate([e.trained for e in examples]))
    return Batch(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(positions)[None],
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        # The first token of an example is never trained, so the position before a target is in the same example.
        kept=torch.from_numpy(target_at - 1),
        targets=torch.from_numpy(ids[target_at]),
        attention_mask=None,
        tokens=len(ids),
    )


def pad(examples: Sequence[EncodedExample], pad_token_id: int) -> Batch:
    """Examples as right-padded rows, with the targets of :func:`pack`."""
    packed = pack(examples)
    lengths = [len(e) for e in examples]
    longest = max(lengths)
    ids = np.full((len(examples), longest), pad_token_id, dtype=np.int64)
    mask = np.zeros((len(examples), longest), dtype=np.int64)
    kept = []
    for row, example in enumerate(examples):
        ids[row, : len(example)] = example.input_ids
        mask[row, : len(example)] = 1
        kept.append(row * longest + np.flatnonzero(example.trained) - 1)
    positions = np.broadcast_to(np.arange(longest, dtype=np.int64), ids.shape)
    return replace(
        packed,
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions.copy()),
        kept=torch.from_numpy(np.concatenate(kept)),
        attention_mask=torch.from_numpy(mask),
    )


class Order:
    """Which examples each optimiser step takes, on each process: a new seeded order every epoch.

    The order is a function of the seed, the epoch and the step alone, so a resumed run needs no saved state. Every
    example is taken exactly once an epoch, whatever the counts: the last step is smaller, and a process may find
    nothing to do in it.
    """

    def __init__(
        self,
        count: int,
        *,
        batch_size: int,
        accumulation: int = 1,
        processes: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.count = count
        self.batch_size = batch_size
        self.processes = processes
        self.per_step = batch_size * accumulation * processes
        self.seed = seed
        self.shuffle = shuffle
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.count // self.per_step)

    def step(self, step: int, process: int = 0) -> list[list[int]]:
        """Indices of the forward passes of optimiser step ``step`` (from 0) on one process; may be empty."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._permutation = rng.permutation(self.count) if self.shuffle else np.arange(self.count)
            self._epoch = epoch
        taken = self._permutation[within * self.per_step : (within + 1) * self.per_step]
        mine = taken[process :: self.processes].tolist()
        return [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]
