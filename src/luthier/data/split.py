"""Training, validation and test parts: a seeded partition that loses no row and leaks none."""

from __future__ import annotations

import random
from collections.abc import Sequence

from luthier.data.examples import TrainingExample
from luthier.errors import UserError


def split_examples(
    examples: Sequence[TrainingExample], train_ratio: float = 0.8, val_ratio: float = 0.1, seed: int = 42
) -> tuple[list[TrainingExample], list[TrainingExample], list[TrainingExample]]:
    """Shuffle with a seed and cut into training, validation and test rows; test gets what the ratios leave.

    Rows that are the same word for word go to the same part, so that no held-out row was trained on; a part can
    then differ from its ratio by the copies of one row.

    Args:
        examples: any rows.
        train_ratio: share of training rows, above 0.
        val_ratio: share of validation rows.
        seed: the same rows and seed give the same parts.

    Raises:
        UserError: a ratio is out of range or both exceed 1 together.
    """
    for name, ratio in (("train_ratio", train_ratio), ("val_ratio", val_ratio)):
        if not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
            raise UserError(f"{name}={ratio!r} is no share between 0 and 1", remedy="for example train_ratio=0.8")
    if train_ratio == 0:
        raise UserError("train_ratio=0 leaves no row to train on", remedy="for example train_ratio=0.8")
    if train_ratio + val_ratio > 1 + 1e-9:
        raise UserError(
            f"train_ratio={train_ratio} and val_ratio={val_ratio} are more than the whole",
            remedy="let them add up to at most 1; the rest is for testing",
        )
    groups: dict[tuple[str, str | None, str], list[int]] = {}
    for index, example in enumerate(examples):
        key = (example.input, example.output, repr(example.messages))
        groups.setdefault(key, []).append(index)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    total = len(examples)
    ends = (round(total * train_ratio), round(total * (train_ratio + val_ratio)))
    parts: tuple[list[TrainingExample], ...] = ([], [], [])
    placed = 0
    for group in order:
        part = parts[0 if placed < ends[0] else 1 if placed < ends[1] else 2]
        part.extend(examples[index] for index in group)
        placed += len(group)
    return parts[0], parts[1], parts[2]
