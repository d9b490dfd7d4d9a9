"""Training, validation and test parts: a seeded partition that loses no row and leaks none."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from luthier.data.examples import TrainingExample
from luthier.data.groups import column_values, groups_of, members_of, same_rows
from luthier.data.shingles import place
from luthier.data.times import reader_for
from luthier.errors import UserError, shorten

Strategy = Literal["random", "stratified", "time"]
PARTS = ("train", "validation", "test")
_OFF = 0.2  # a part that is further from its share than this fifth of it is told of


@dataclass(frozen=True, slots=True)
class SplitResult:
    """The rows of each part by their indices (``int64``), and what the user should know of them."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    notes: list[str] = field(default_factory=list)

    @property
    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.train, self.validation, self.test


def split_examples(
    examples: Sequence[TrainingExample], train_ratio: float = 0.8, val_ratio: float = 0.1, seed: int = 42
) -> tuple[list[TrainingExample], list[TrainingExample], list[TrainingExample]]:
    """Shuffle with a seed and cut into training, validation and test rows; test gets what the ratios leave.

    Rows that are the same word for word go to the same part, and copies made by augmentation go with the row they
    were made from, so that no held-out row was trained on; a part can then differ from its ratio by the copies of one
    row. :func:`split_indices` knows further ways to split.

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
    parts = _shuffled(members_of(same_rows(examples)), train_ratio, val_ratio, seed)
    train, validation, test = ([examples[i] for i in part] for part in parts)
    return train, validation, test


def split_indices(
    examples: Sequence[TrainingExample],
    *,
    validation: float = 0.1,
    test: float = 0.1,
    strategy: Strategy = "random",
    column: str | None = None,
    group_by: str | None = None,
    seed: int = 42,
    near_threshold: float = 0.8,
) -> SplitResult:
    """Deal rows to training, validation and test.

    Whatever the strategy, rows that are the same word for word, and copies made by augmentation with the row they were
    made from, are in one part.

    - ``random``: groups are shuffled with the seed and cut by the shares (as :func:`split_examples` does).
    - ``stratified``: so that each class keeps its share in every part, within one row where no group holds more than
      one. A class of few rows is in the training part first.
    - ``time``: the oldest rows for training, then validation, the newest for the test. Rows of one time are in one
      part. A group goes by its newest row, so nothing that is trained on is newer than what is validated on.

    Args:
        examples: the rows.
        validation: share of rows for validation.
        test: share of rows for the test.
        strategy: see above.
        column: the column of the time, or of the class where it is not the label.
        group_by: a column whose equal values stay in one part; ``near_duplicates``; or ``prompt``, for rows that ask
            the same.
        seed: the same rows and seed give the same parts.
        near_threshold: from which similarity rows are near duplicates.

    Returns:
        the indices of each part, shuffled for a random split without ``group_by``, else in the rows' order.

    Raises:
        UserError: a share or the strategy is out of range, a column is in no row, a time cannot be read, or no row is
            left for training.
    """
    for name, share in (("validation", validation), ("test", test)):
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise UserError(f"{share!r} is no share from 0 to below 1", where=f"data.split.{name}", remedy="e.g. 0.1")
    if validation + test >= 1:
        raise UserError(
            f"validation={validation} and test={test} leave no row to train on",
            where="data.split",
            remedy="let them add up to less than 1",
        )
    if strategy not in ("random", "stratified", "time"):
        raise UserError(
            f"unknown strategy {strategy!r}", where="data.split.strategy", remedy="known: random, stratified, time"
        )
    if strategy == "time" and column is None:
        raise UserError(
            "a split by time needs the column of the time", where="data.split.column", remedy="name the column"
        )
    notes: list[str] = []
    groups = groups_of(examples, group_by, near_threshold, notes)
    members = members_of(groups)
    if strategy == "random" and group_by is None:
        parts = _shuffled(members, 1 - validation - test, validation, seed)
        if not test:
            parts = (parts[0] + parts[2], parts[1], [])  # the shares add up to 1: what rounding left over
    elif strategy == "time":
        parts = _by_time(examples, members, str(column), validation, test, notes)
    else:
        classes = _classes(examples, column, notes) if strategy == "stratified" else [None] * len(examples)
        parts = _dealt(members, classes, validation, test, seed, notes)
    if strategy != "random" or group_by is not None:
        parts = (sorted(parts[0]), sorted(parts[1]), sorted(parts[2]))
    _check(parts, (validation, test), members, group_by, notes)
    arrays = [np.array(part, dtype=np.int64) for part in parts]
    return SplitResult(arrays[0], arrays[1], arrays[2], notes)


Parts = tuple[list[int], list[int], list[int]]


# --- how they are dealt ---


def _shuffled(members: list[list[int]], train: float, validation: float, seed: int) -> Parts:
    order = list(members)
    random.Random(seed).shuffle(order)
    total = sum(map(len, members))
    ends = (round(total * train), round(total * (train + validation)))
    parts: Parts = ([], [], [])
    placed = 0
    for group in order:
        parts[0 if placed < ends[0] else 1 if placed < ends[1] else 2].extend(group)
        placed += len(group)
    return parts


def _classes(examples: Sequence[TrainingExample], column: str | None, notes: list[str]) -> list[str | None]:
    if column is not None:
        values = column_values(examples, column, "data.split.column")
        if values is None:
            raise UserError(
                "the prompt is no class", where="data.split.column", remedy="name the column that holds the class"
            )
    else:
        values = [e.label for e in examples]
        if all(v is None for v in values):
            raise UserError(
                "no row has a label to stratify by",
                where="data.split.strategy",
                remedy="name the class's column in data.split.column, or use strategy: random",
            )
    missing = sum(v is None for v in values)
    if missing:
        notes.append(f"rows without a class: {missing:,}; they are dealt as a class of their own")
    return [None if v is None else v if isinstance(v, str) else repr(v) for v in values]


def _dealt(
    members: list[list[int]],
    classes: Sequence[str | None],
    validation: float,
    test: float,
    seed: int,
    notes: list[str],
) -> Parts:
    """Shuffled groups, each put where there is room for it, class by class; a group has the class of most its rows."""
    order = list(members)
    random.Random(seed).shuffle(order)
    by_class: dict[str | None, list[list[int]]] = {}
    for group in order:
        name = classes[group[0]] if len(group) == 1 else Counter(classes[i] for i in group).most_common(1)[0][0]
        by_class.setdefault(name, []).append(group)
    shares = (1 - validation - test, validation, test)
    owed = [0.0, 0.0, 0.0]
    parts: Parts = ([], [], [])
    scarce = []
    for name, groups in by_class.items():
        rows = sum(map(len, groups))
        wanted = _seats(rows, shares, owed)
        if any(share and not seats for share, seats in zip(shares, wanted, strict=True)):
            scarce.append(f"{name!r} ({rows})")
        room = [rows, *wanted[1:]]
        for group in groups:
            # The smaller parts first, where a group fits. Something is left for training: it has one of the seats.
            part = max((p for p in (1, 2) if len(group) <= room[p]), key=room.__getitem__, default=0)
            room[part] -= len(group)
            parts[part].extend(group)
        for p in (1, 2):
            owed[p] += room[p]
            owed[0] -= room[p]
    if scarce and len(by_class) > 1:
        shown = ", ".join(scarce[:5]) + (" …" if len(scarce) > 5 else "")
        notes.append(f"classes of too few rows for every part: {len(scarce):,}, {shown}")
    return _with_something(parts, order, classes, (validation, test))


def _seats(rows: int, shares: tuple[float, float, float], owed: list[float]) -> list[int]:
    """A class's rows by part: each exact share rounded down or up (largest remainder), at least one for training.

    What a part got too little of from earlier classes counts with its remainder, so that the sums keep the shares too.
    ``owed`` is brought up to date.
    """
    exact = [rows * share for share in shares]
    seats = [int(e + 1e-9) for e in exact]
    open_to = [p for p in range(3) if exact[p] - seats[p] > 1e-9]
    ranked = sorted(open_to, key=lambda p: (p == 0 and not seats[0], exact[p] - seats[p] + owed[p]), reverse=True)
    for p in ranked[: rows - sum(seats)]:
        seats[p] += 1
    for p in range(3):
        owed[p] += exact[p] - seats[p]
    return seats


def _with_something(
    parts: Parts, order: list[list[int]], classes: Sequence[str | None], shares: tuple[float, float]
) -> Parts:
    """Give a part that would stay empty the smallest group of the training rows.

    Not where that would take half of them, or the last of a class.
    """
    for part, share in zip(parts[1:], shares, strict=True):
        if part or not share:
            continue
        trained = set(parts[0])
        left = Counter(classes[i] for i in parts[0])
        for group in sorted((g for g in order if g[0] in trained), key=len):
            taken = Counter(classes[i] for i in group)
            if len(group) * 2 <= len(trained) and all(left[name] > count for name, count in taken.items()):
                part.extend(group)
                trained.difference_update(group)
                parts[0][:] = [i for i in parts[0] if i in trained]
                break
    return parts


def _by_time(
    examples: Sequence[TrainingExample],
    members: list[list[int]],
    column: str,
    validation: float,
    test: float,
    notes: list[str],
) -> Parts:
    values = column_values(examples, column, "data.split.column") or [None] * len(examples)
    read, times = reader_for(values), []
    for index, value in enumerate(values):
        try:
            times.append(read(value))
        except (ValueError, OverflowError) as error:
            raise UserError(
                f"the time in column {column!r} cannot be read: {shorten(value)}: {error}",
                where=place(examples[index].source, index),
                remedy="write 2024-03-05, 2024-03-05T08:30:00, 2024年3月5日 or a Unix timestamp",
            ) from None
    newest = sorted((max(times[i] for i in group), number) for number, group in enumerate(members))
    sizes = np.cumsum([len(members[number]) for _, number in newest])
    # Places to cut at: between two different times.
    moments = [moment for moment, _ in newest]
    edges = [0, *(k for k in range(1, len(moments)) if moments[k] != moments[k - 1]), len(moments)]
    rows_before = np.array([0, *sizes])[edges]
    total = len(examples)
    cuts = []
    for share in (1 - validation - test, 1 - test):
        nearest = int(np.argmin(np.abs(rows_before - total * share)))
        cuts.append(edges[max(nearest, min(1, len(edges) - 1))])
    if not test:
        cuts[1] = len(moments)
    if not validation:
        cuts[0] = cuts[1]
    parts: Parts = ([], [], [])
    for rank, (_, number) in enumerate(newest):
        parts[0 if rank < cuts[0] else 1 if rank < cuts[1] else 2].extend(members[number])
    straddling = sum(1 for group in members if len({times[i] for i in group}) > 1)
    if straddling:
        notes.append(f"groups with rows of several times: {straddling:,}; each goes by its newest")
    return parts


def _check(
    parts: Parts, shares: tuple[float, float], members: list[list[int]], group_by: str | None, notes: list[str]
) -> None:
    """Say where a part is not what was asked for.

    Raises:
        UserError: nothing is left to train on.
    """
    total = sum(map(len, parts))
    if not total:
        return
    largest = max(map(len, members))
    remedy = {
        None: "remove copies (data.deduplicate=exact), or name files for the parts",
        "near_duplicates": "raise data.near_threshold, set data.deduplicate=near, or group by a column",
    }.get(group_by, f"group by a column with more values than {group_by!r}, or name files for the parts")
    if not parts[0]:
        raise UserError("the split leaves no row to train on", where="data.split", remedy=remedy)
    for name, part, share in zip(PARTS[1:], parts[1:], shares, strict=True):
        wanted = total * share
        if share and (not part or abs(len(part) - wanted) > max(1, _OFF * wanted)):
            note = f"the {name} part holds {len(part):,} of {total:,} rows ({len(part) / total:.1%}, not {share:.1%})"
            if largest > 1:
                note += f"; the largest group that stays together has {largest:,}: {remedy}"
            notes.append(note)
