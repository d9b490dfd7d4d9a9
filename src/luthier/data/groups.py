"""Which rows belong together: on one side of a split, whatever the split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.data.duplicates import components, find_copies
from luthier.data.examples import TrainingExample
from luthier.data.shingles import all_keys, first_equal
from luthier.errors import UserError


def same_rows(examples: Sequence[TrainingExample]) -> np.ndarray:
    """The group of each row by its words, and by the row it was made from."""
    first = first_equal(all_keys(examples, tools=False)[1])
    origins = [(e.metadata or {}).get("augmented_from") for e in examples]
    if not any(origins):
        return first
    named: dict[str, int] = {}
    for index, example in enumerate(examples):
        if example.source is not None and not origins[index]:
            named.setdefault(str(example.source), index)
    links = [(i, named.setdefault(str(origin), i)) for i, origin in enumerate(origins) if origin]
    return components(len(first), np.array(links), first)


def groups_of(
    examples: Sequence[TrainingExample], group_by: str | None, near_threshold: float, notes: list[str]
) -> np.ndarray:
    """The group of each row (``[n] int64``, the first row of the group); see :func:`luthier.data.split.split_indices`.

    Raises:
        UserError: no row has the column.
    """
    same = same_rows(examples)
    if group_by is None or not len(same):
        return same
    if group_by == "near_duplicates":
        other = find_copies(examples, near=near_threshold).groups()
    else:
        values = column_values(examples, group_by, "data.split.group_by")
        if values is None:
            other = first_equal(all_keys(examples, tools=False)[0])  # by the prompt
        else:
            missing = sum(v is None for v in values)
            if missing:
                notes.append(f"rows without {group_by!r}: {missing:,}; each is a group of its own")
            seen: dict[str, int] = {}
            other = np.array([i if v is None else seen.setdefault(repr(v), i) for i, v in enumerate(values)])
    return components(len(same), np.stack([np.arange(len(same)), other], axis=1), same)


def column_values(examples: Sequence[TrainingExample], name: str, where: str) -> list[Any] | None:
    """The values of a column, None where a row has none; None in place of all for the prompt itself."""
    values: list[Any] = [(e.metadata or {}).get(name) for e in examples]
    if all(v is None for v in values) and name == "label":
        values = [e.label for e in examples]
    if any(v is not None for v in values):
        return values
    if name == "prompt":
        return None
    have = sorted({str(key) for e in examples for key in e.metadata or {}})
    raise UserError(
        f"no row has a column {name!r}",
        where=where,
        remedy=f"name one of {', '.join(map(repr, have[:20]))}, label or prompt (columns that became the prompt or the "
        "answer are not kept under their own names)"
        if have
        else "the rows have no further column; label and prompt can be named",
    )


def members_of(groups: np.ndarray) -> list[list[int]]:
    """The rows of each group, groups in the order of their first rows."""
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups.tolist()):
        members.setdefault(group, []).append(row)
    return list(members.values())
