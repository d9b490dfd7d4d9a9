"""Rows that stand on two sides: in training and in a test, or in training and in a published benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from luthier.data.duplicates import check_threshold, refused
from luthier.data.examples import Reject, TrainingExample
from luthier.data.minhash import Part, among, candidates, distinct, form, similarities, sketched
from luthier.data.shingles import all_keys, first_equal, grams, place
from luthier.data.store import Joined

LONG = 8
"""Words in the n-grams by which a question is found inside a longer text."""
HELD = 0.7
"""Share of a question's n-grams that make it held by a text (Chowdhery et al., 2022, "PaLM": 70% of its 8-grams; Brown
et al., 2020, "Language Models are Few-Shot Learners", appendix C, took n-grams of 8 to 13 words)."""
_FORM = 20  # an n-gram of so many questions is their form; so is a question of so many rows with different answers


@dataclass(frozen=True, slots=True)
class Overlaps:
    """Rows that are among other rows. Each array is ``[n] int64``: the first other row concerned, or -1.

    A row is counted once, by the first of these that holds.
    """

    exact: np.ndarray
    """The same question and answer, word for word."""
    prompt: np.ndarray
    """The same question word for word, with another answer."""
    near: np.ndarray
    """Nearly the same question, or question and answer together."""
    similarity: np.ndarray
    """``[n] float64``: to the row in ``near``; 0 where there is none."""

    def pairs(self, kind: Literal["exact", "prompt", "near"], limit: int = 20) -> list[tuple[int, int, float]]:
        """The first few ``(row, other row, similarity)`` of a kind; 1.0 stands for the same words."""
        other = getattr(self, kind)
        rows = np.flatnonzero(other >= 0)[:limit].tolist()
        return [(i, int(other[i]), float(self.similarity[i]) if kind == "near" else 1.0) for i in rows]


def overlap(
    rows: Sequence[TrainingExample], others: Sequence[TrainingExample], *, threshold: float | None = 0.8
) -> Overlaps:
    """Which rows are among the others too: the same, the same question, or nearly the same.

    A question that twenty of the others and a twentieth of them have, with different answers ("Go on with the
    story."), is no sign of a leak and is not compared.

    Args:
        rows: those asked about, for example the test rows.
        others: those they must not be among, for example the training rows.
        threshold: from which similarity two rows are nearly the same; None: only the same words are looked for.

    Raises:
        UserError: the threshold is out of range.
    """
    if threshold is not None:
        check_threshold(threshold)
    edge = len(others)
    joined = Joined(others, rows)
    theirs, ours = all_keys(others, tools=False), all_keys(rows, tools=False)
    first_row = first_equal(np.concatenate([theirs[1], ours[1]]))
    first_prompt = first_equal(np.concatenate([theirs[0], ours[0]]))
    distinct = first_row[:edge] == np.arange(edge)
    answers = np.bincount(first_prompt[:edge][distinct], minlength=len(joined))
    first_prompt[answers[first_prompt] >= max(_FORM, edge / _FORM)] = edge
    exact, prompt = (np.where(first[edge:] < edge, first[edge:], -1) for first in (first_row, first_prompt))
    prompt[exact >= 0] = -1
    near, similarity = np.full(len(rows), -1, dtype=np.int64), np.zeros(len(rows))
    if threshold is not None:
        left = np.flatnonzero((exact < 0) & (prompt < 0))
        _nearest(joined, np.flatnonzero(distinct), left + edge, threshold, near, similarity)
    return Overlaps(exact, prompt, near, similarity)


def _nearest(
    joined: Joined[TrainingExample],
    others: np.ndarray,
    rows: np.ndarray,
    threshold: float,
    near: np.ndarray,
    similarity: np.ndarray,
) -> None:
    """Fill in, for each of some rows, the most similar of the others, by the question and by the whole."""
    if not len(others) or not len(rows):
        return
    edge = len(joined.first)
    common = np.union1d(form(joined, others), form(joined, rows))
    both = np.concatenate([others, rows])
    parts: tuple[Part, Part] = ("asked", "whole")
    for of in parts:
        sketches = sketched(joined, both, threshold, common, of)
        pairs = both[candidates(sketches, threshold, first=len(others)).pairs]
        counts = np.zeros(len(joined), dtype=np.uint32)
        counts[both] = sketches.counts
        alike = similarities(joined, pairs, counts, common, of)
        # By similarity, so that the most similar is written last; of equals the first row.
        for at in np.lexsort((-pairs[:, 1], alike)).tolist():
            row = pairs[at, 0] - edge
            if alike[at] >= max(threshold, similarity[row]):
                near[row], similarity[row] = pairs[at, 1], alike[at]


def held(
    rows: Sequence[TrainingExample], questions: Sequence[TrainingExample], share: float = HELD
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows hold one of the questions somewhere in their text.

    Measured is how many of the question's word 8-grams the row has. Questions of fewer words are not looked for, for
    they stand by chance in longer texts, and 8-grams of twenty questions and more count for none.

    Returns:
        for each row the question of which it holds most (``[n] int64``, -1: of none the share), and how much of it.
    """
    found, most = np.full(len(rows), -1, dtype=np.int64), np.zeros(len(rows))
    pairs = []
    for batch in grams(questions, np.arange(len(questions)), words=LONG, whole_short=False):
        sizes = np.diff(batch.offsets(parts=True))
        asked = np.repeat(np.arange(len(sizes)) % 2 == 0, sizes)
        pairs.append(np.stack([batch.hashes, np.repeat(np.repeat(batch.rows, 2), sizes).astype(np.uint64)])[:, asked])
    if not pairs:
        return found, most
    both = np.unique(np.concatenate(pairs, axis=1), axis=1)  # [2, p]: n-gram and question, ordered by n-gram
    _, times = np.unique(both[0], return_counts=True)
    both = both[:, np.repeat(times, times) < _FORM]
    kinds, begins, times = np.unique(both[0], return_index=True, return_counts=True)
    owners = both[1].astype(np.int64)
    sizes = np.bincount(owners, minlength=len(questions))
    for batch in grams(rows, np.arange(len(rows)), words=LONG, whole_short=False):
        hit = among(batch.hashes, kinds)
        row = np.repeat(batch.rows, np.diff(batch.offsets()))[hit]
        once = distinct(row * max(len(kinds), 1) + np.searchsorted(kinds, batch.hashes[hit]))
        row, kind = np.divmod(once, max(len(kinds), 1))
        # Each n-gram stands for all questions that have it.
        each = times[kind]
        within = np.arange(each.sum()) - np.repeat(np.cumsum(each) - each, each)
        owner = owners[np.repeat(begins[kind], each) + within]
        met, had = np.unique(np.repeat(row, each) * len(questions) + owner, return_counts=True)
        row, owner = np.divmod(met, len(questions))
        part = had / sizes[owner]
        for at in np.flatnonzero(part >= share).tolist():
            if part[at] > most[row[at]]:
                found[row[at]], most[row[at]] = owner[at], part[at]
    return found, most


def decontaminated(
    examples: Sequence[TrainingExample], benchmark: Sequence[TrainingExample], threshold: float = 0.8
) -> tuple[np.ndarray, list[Reject]]:
    """The training rows that hold no row of a benchmark, and the refused others.

    Refused is a row that is a row of the benchmark, asks the same, is nearly the same, or holds one's question
    somewhere in its text (:func:`held`).

    Returns:
        indices of the rows to keep (``[k] int64``), and a reject with the reason ``in_benchmark`` for each other.

    Raises:
        UserError: the threshold is out of range.
    """
    found = overlap(examples, benchmark, threshold=threshold)
    question, share = held(examples, benchmark)
    kinds = (
        (found.exact, np.ones(len(examples)), "it is {} of a benchmark, word for word"),
        (found.prompt, np.ones(len(examples)), "it asks what {} of a benchmark asks"),
        (found.near, found.similarity, "it is nearly the same as {} of a benchmark (similarity {:.2f})"),
        (question, share, "it holds the question of {} of a benchmark ({:.0%} of its 8-grams)"),
    )
    refuse = np.maximum.reduce([others for others, _, _ in kinds]) >= 0
    rejects = []
    for index in np.flatnonzero(refuse).tolist():
        others, measure, message = next(kind for kind in kinds if kind[0][index] >= 0)
        other = int(others[index])
        message = message.format(place(benchmark[other].source, other), measure[index])
        remedy = "leave it out, or take the file out of data.benchmarks"
        rejects.append(refused(examples[index], "in_benchmark", message, remedy))
    return np.flatnonzero(~refuse), rejects
