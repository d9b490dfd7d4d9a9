"""Batches: padding-free where the model can take them, right-padded where it cannot; the same targets either way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from luthier.data.encode import EncodedExample
from luthier.data.prefixes import group_by_prefix

# A label that cross-entropy passes over, and that models' own shifting takes for padding.
IGNORED = -100


@dataclass(slots=True)
class Batch:
    """One forward pass.

    Packed: the examples lie end to end in one row, N tokens in all, and nothing is padding. For a model that reads
    forwards, what follows an example's last target is left out, for nothing depends on it; and where examples begin
    alike, their common beginning may stand in the row once, as a segment of its own, followed by the rest of each.
    Padded: one row an example, L the longest, padding on the right.
    """

    input_ids: torch.Tensor
    """``[1, N] int64`` packed, ``[B, L]`` padded"""
    position_ids: torch.Tensor
    """the same shape; restarts at 0 for each example"""
    segments: torch.Tensor
    """``[S, 4] int32``: where each run of tokens begins and ends in the packed row, where the prefix that it shares
    begins, and the length of that (0: it shares none); on the CPU, wherever the batch is"""
    kept: torch.Tensor
    """``[K] int64``: flat positions whose next token is trained, in the examples' order; for a model that reads from
    both sides, those of the trained tokens themselves"""
    targets: torch.Tensor
    """``[K] int64``: the trained tokens"""
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
    def shares(self) -> bool:
        """Whether some tokens stand for several examples."""
        return bool(self.segments[:, 3].any())

    @property
    def computed(self) -> int:
        """Tokens that the model computes: fewer than ``tokens`` where examples share them, more where it is padded."""
        return self.input_ids.numel()

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """``[S + 1] int32``: the borders of the segments, in the form of variable-length attention."""
        return torch.cat([self.segments[:1, 0], self.segments[:, 1]])

    @property
    def longest(self) -> int:
        """Tokens of the longest segment."""
        return int((self.segments[:, 1] - self.segments[:, 0]).max())

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device. What lays it out stays here, where reading it waits for nothing."""
        mask = None if self.attention_mask is None else self.attention_mask.to(device, non_blocking=True)
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            kept=self.kept.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            attention_mask=mask,
        )

    def pinned(self) -> Batch:
        """The same batch in page-locked memory, from where copies to a GPU need not be waited for."""
        mask = None if self.attention_mask is None else self.attention_mask.pin_memory()
        return replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            position_ids=self.position_ids.pin_memory(),
            kept=self.kept.pin_memory(),
            targets=self.targets.pin_memory(),
            attention_mask=mask,
        )


@dataclass(slots=True)
class PairBatch(Batch):
    """Sources as right-padded rows, and targets that the decoder reads shifted to the right.

    ``input_ids``, ``attention_mask`` and ``position_ids`` ``[B, L]`` are the sources'; ``kept`` are flat positions in
    ``decoder_input_ids``, whose outputs predict ``targets``.
    """

    decoder_input_ids: torch.Tensor
    """``[B, T] int64``"""

    @property
    def computed(self) -> int:
        """See :attr:`Batch.computed`."""
        return self.input_ids.numel() + self.decoder_input_ids.numel()

    def to(self, device: torch.device) -> PairBatch:
        """See :meth:`Batch.to`."""
        moved: Any = Batch.to(self, device)
        return replace(moved, decoder_input_ids=self.decoder_input_ids.to(device, non_blocking=True))

    def pinned(self) -> PairBatch:
        """See :meth:`Batch.pinned`."""
        pinned: Any = Batch.pinned(self)
        return replace(pinned, decoder_input_ids=self.decoder_input_ids.pin_memory())


def pack(examples: Sequence[EncodedExample], *, share: bool = False) -> Batch:
    """Examples end to end in one row; see :class:`Batch` for shapes.

    Args:
        examples: one without a trained token takes no part.
        share: let examples share what they begin with.
    """
    targets = [np.flatnonzero(e.trained) for e in examples]
    # The last target is predicted from the token before it; what follows is no input of anything.
    inputs = [e.input_ids[: at[-1] if len(at) else 0] for e, at in zip(examples, targets, strict=True)]
    groups = group_by_prefix(inputs) if share else [([i], 0) for i in range(len(examples))]
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    segments: list[tuple[int, int, int, int]] = []
    kept: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(examples)
    end = 0

    def append(tokens: np.ndarray, position: int, prefix: int, shared: int) -> int:
        nonlocal end
        ids.append(tokens)
        positions.append(np.arange(position, position + len(tokens)))
        begin, end = end, end + len(tokens)
        segments.append((begin, end, prefix, shared))
        return begin

    for members, shared in groups:
        prefix = append(inputs[members[0]][:shared], 0, 0, 0) if shared else 0
        for number in members:
            if not len(targets[number]):
                continue
            begin = append(inputs[number][shared:], shared, prefix, shared)
            # A target's position is that of the token before it.
            before = targets[number] - 1
            kept[number] = np.where(before < shared, prefix + before, begin + before - shared)
    return Batch(
        input_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64))[None],
        position_ids=torch.from_numpy(np.concatenate(positions))[None],
        segments=torch.tensor(segments, dtype=torch.int32),
        kept=torch.from_numpy(np.concatenate(kept)),
        targets=torch.from_numpy(
            np.concatenate([e.input_ids[at] for e, at in zip(examples, targets, strict=True)]).astype(np.int64)
        ),
        attention_mask=None,
        tokens=sum(map(len, examples)),
    )


def pack_whole(examples: Sequence[EncodedExample]) -> Batch:
    """Examples end to end in one row with all their tokens, for a model that reads from both sides; see :class:`Batch`.

    A trained token is kept where it stands.
    """
    ids = np.concatenate([e.input_ids for e in examples]).astype(np.int64)
    kept = np.flatnonzero(np.concatenate([e.trained for e in examples]))
    ends = np.cumsum([len(e) for e in examples])
    begins = np.concatenate([[0], ends[:-1]])
    segments = np.zeros((len(examples), 4), dtype=np.int32)
    segments[:, 0], segments[:, 1] = begins, ends
    return Batch(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(np.arange(len(ids)) - np.repeat(begins, ends - begins))[None],
        segments=torch.from_numpy(segments),
        kept=torch.from_numpy(kept),
        targets=torch.from_numpy(ids[kept]),
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


def source_length(row: EncodedExample) -> int:
    """Tokens of the source of a pair (see ``data.pairs``); the target is the rest of the row."""
    return int(row.trained.argmax())


def pad_pairs(
    examples: Sequence[EncodedExample], pad_token_id: int, shift: Callable[[torch.Tensor], torch.Tensor]
) -> PairBatch:
    """Pairs as a batch.

    Args:
        examples: rows of a ``PairEncoder``.
        pad_token_id: fills the sources' rows; masked.
        shift: gives what the decoder reads to write ``[B, T]`` labels, which are padded with ``IGNORED``.
    """
    borders = [source_length(e) for e in examples]
    sources = _right_padded([e.input_ids[:at] for e, at in zip(examples, borders, strict=True)], pad_token_id)
    targets = [e.input_ids[at:] for e, at in zip(examples, borders, strict=True)]
    labels = _right_padded(targets, IGNORED)
    longest = sources.shape[1]
    return PairBatch(
        input_ids=sources,
        position_ids=torch.arange(longest).expand(sources.shape).contiguous(),
        segments=torch.tensor([(0, longest, 0, 0)], dtype=torch.int32),
        kept=(labels.flatten() != IGNORED).nonzero()[:, 0],
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        attention_mask=(torch.arange(longest) < torch.tensor(borders)[:, None]).long(),
        tokens=sum(map(len, examples)),
        decoder_input_ids=shift(labels),
    )


def _right_padded(rows: Sequence[np.ndarray], fill: int) -> torch.Tensor:
    """``[B, longest] int64``"""
    padded = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(padded)


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
