"""Rows that repeat or contradict each other.

Exact copies have the same words (:func:`luthier.data.shingles.keys_of`). A row is a near copy of another where their
similarity reaches a threshold, taken over the whole rows and over their answers alone, and the smaller of both counts:
one long question with two different answers is a contradiction, or two tasks on one text, and no copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from luthier.data.encode import UNKNOWN_SOURCE
from luthier.data.examples import Reject, TrainingExample
from luthier.data.minhash import candidates, form, similarities, sketched
from luthier.data.shingles import all_keys, first_equal, normal, place, texts_of
from luthier.errors import UserError, shorten


@dataclass(frozen=True, slots=True)
class Copies:
    """Which rows repeat an earlier one."""

    exact_first: np.ndarray
    """``[n] int64``: the first row with the same words; the row itself where it is the first."""
    near_first: np.ndarray
    """``[n] int64``: the first kept row that this one is an exact or near copy of, itself where it is kept.

    Copies are found by walking the rows in order and keeping each that is like none kept before. In a chain A ~ B ~ C
    whose ends are unlike each other, A and C are kept."""
    similarity: np.ndarray
    """``[n] float64``: to ``near_first``."""
    pairs: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))
    """``[p, 2] int64``: near copies among the distinct rows, the later one first, those that were compared."""
    met: int = 0
    """Pairs whose sketches were compared."""

    def groups(self) -> np.ndarray:
        """The group of each row (``[n] int64``, the index of the group's first row).

        Whatever is linked by copies is one group, so a chain A ~ B ~ C is one, its ends too: what must be on one side
        of a split is more than what would be removed.
        """
        return components(len(self.exact_first), self.pairs, self.exact_first)


def components(count: int, pairs: np.ndarray, first: np.ndarray | None = None) -> np.ndarray:
    """Connected components: for each of ``count`` rows the first of its component (``[count] int64``).

    Args:
        count: rows.
        pairs: ``[p, 2]`` links.
        first: a link of each row to an earlier one or to itself, ``[count]``.
    """
    root = list(range(count)) if first is None else first.tolist()

    def find(row: int) -> int:
        while root[row] != row:
            root[row] = root[root[row]]
            row = root[row]
        return row

    for a, b in pairs.tolist():
        a, b = find(a), find(b)
        if a != b:
            root[max(a, b)] = min(a, b)
    return np.fromiter((find(row) for row in range(count)), dtype=np.int64, count=count)


def find_copies(examples: Sequence[TrainingExample], *, near: float | None = None) -> Copies:
    """Exact copies among the rows, and near ones.

    Args:
        examples: the rows; read once, and again where near copies are looked for.
        near: from which similarity rows are near copies, above 0 and at most 1; None: exact copies alone.

    Raises:
        UserError: ``near`` is out of range.
    """
    exact = first_equal(all_keys(examples)[1])
    count = len(exact)
    if near is None:
        return Copies(exact, exact, np.ones(count))
    check_threshold(near)
    rows = np.flatnonzero(exact == np.arange(count))
    common = form(examples, rows)
    sketches = sketched(examples, rows, near, common)
    found = candidates(sketches, near)
    counts = np.zeros(count, dtype=np.uint32)
    counts[rows] = sketches.counts
    pairs, alike = rows[found.pairs], np.ones(len(found.pairs))
    for of in ("whole", "answered"):
        alike = np.minimum(alike, similarities(examples, pairs, counts, common, of))
        pairs, alike = pairs[alike >= near], alike[alike >= near]
    first, similarity = np.arange(count), np.ones(count)
    # Ordered by the later row, so whether the earlier is kept is known when it is asked.
    for (later, earlier), value in zip(pairs.tolist(), alike.tolist(), strict=True):
        if first[later] == later and first[earlier] == earlier:
            first[later], similarity[later] = earlier, value
    return Copies(exact, first[exact], similarity[exact], pairs, found.met)


def check_threshold(value: float) -> None:
    """Raise a UserError where a similarity is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise UserError(
            f"{value!r} is no similarity above 0 and at most 1",
            where="data.near_threshold",
            remedy="0.8 means that 80% of the word 3-grams of two rows are in both",
        )


def contradictions(examples: Sequence[TrainingExample]) -> list[np.ndarray]:
    """Rows that ask the same and answer differently.

    Rows with other tools on offer do not ask the same. Answers that are all among one row's own answer and
    ``references`` are several right ones. Rows without an answer contradict nothing.

    Returns:
        for each such question the first row of each of its answers (``[k] int64``, k >= 2), in the rows' order.
    """
    prompts, rows = all_keys(examples)
    prompt, row = first_equal(prompts), first_equal(rows)
    order = np.argsort(prompt, kind="stable")
    found = []
    for group in np.split(order, np.flatnonzero(np.diff(prompt[order])) + 1):
        if len(group) < 2 or (row[group] == row[group[0]]).all():
            continue
        answers: dict[str, int] = {}
        right: list[set[str]] = []
        for index in group.tolist():
            text = normal(texts_of(examples[index])[1])
            if text:
                answers.setdefault(text, index)
                if examples[index].references:
                    right.append({text, *map(normal, examples[index].references)})
        if len(answers) > 1 and not any(answers.keys() <= allowed for allowed in right):
            found.append(np.array(list(answers.values()), dtype=np.int64))
    return found


def deduplicated(
    examples: Sequence[TrainingExample], mode: Literal["none", "exact", "near"], threshold: float = 0.8
) -> tuple[np.ndarray, list[Reject]]:
    """The rows to keep, and the refused copies of them.

    Args:
        examples: the rows.
        mode: ``data.deduplicate``.
        threshold: ``data.near_threshold``.

    Returns:
        indices of the rows to keep (``[k] int64``), and a reject for each other, with the reason ``duplicate`` or
        ``near_duplicate``.

    Raises:
        UserError: the mode or the threshold is unknown.
    """
    if mode not in ("none", "exact", "near"):
        raise UserError(f"unknown mode {mode!r}", where="data.deduplicate", remedy="known: none, exact, near")
    if mode == "none":
        return np.arange(len(examples)), []
    copies = find_copies(examples, near=threshold if mode == "near" else None)
    own = np.arange(len(examples))
    rejects = []
    for index in np.flatnonzero(copies.near_first != own).tolist():
        first = int(copies.near_first[index])
        if copies.exact_first[index] == first:
            reason, message = "duplicate", f"it repeats {place(examples[first].source, first)} word for word"
        else:
            reason = "near_duplicate"
            message = f"it is nearly the same as {place(examples[first].source, first)}"
            message += f" (similarity {copies.similarity[index]:.2f})"
        rejects.append(refused(examples[index], reason, message, "set data.deduplicate=none to keep it"))
    return np.flatnonzero(copies.near_first == own), rejects


def refused(example: TrainingExample, reason: str, message: str, remedy: str) -> Reject:
    """A row as the reject that says why."""
    source = example.source or UNKNOWN_SOURCE
    shown = shorten(texts_of(example)[0]).encode("utf-8", "backslashreplace").decode("utf-8")
    return Reject(source.file, source.line, reason, message, value=shown, remedy=remedy)
