"""Which rows may be nearly the same: MinHash sketches by rensa, met in bands and checked by their true similarity.

Similarity is Jaccard's, of the word 3-grams of :mod:`luthier.data.shingles`: those in both rows over those in either.
64 hashes stand for a row's n-grams (Broder, 1997); rows that agree in all hashes of one band are compared. Bands are
laid out so that a pair of just the threshold's similarity meets with a probability of at least 0.999. What meets is
compared by the sketches, then in full, so no pair is called similar that is not.

Left out of the comparison are n-grams which at least a twentieth of the distinct rows share, and twenty of them: a
system message or an instruction that stands in every row is the data's form, and by it all rows would be copies.

The cost is linear in rows: a band that many rows share (10,000 rows that begin alike) is parted by the bands after it,
and each row is compared with the first few of its part alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from luthier.data.examples import TrainingExample
from luthier.data.shingles import Grams, grams, mixed

HASHES = 64
_RECALL = 0.999
_FIRST = 8  # rows of a bucket that the others are compared with
_DEPTH = 4  # how often a bucket of more rows is parted further
_CANDIDATES = 16  # earliest rows that each is compared with in full
_SAMPLE, _SHARE, _LEAST = 2_000, 0.05, 20  # rows looked at for n-grams that are the data's form
_BATCH = 1 << 21  # n-grams compared at once
_SEED = 42

Part = Literal["whole", "asked", "answered"]
"""What of two rows is compared."""


@dataclass(slots=True)
class Sketches:
    """What is kept of each row: 128 bytes and a count."""

    bands: np.ndarray
    """``[bands, n] uint32``: a hash of each band."""
    bytes: np.ndarray
    """``[n, 64] uint8``: the low byte of each hash, for an estimate."""
    counts: np.ndarray
    """``[n] uint32``: n-grams; 0 for an empty text, which is similar to nothing."""

    def joined(self, others: Sketches) -> Sketches:
        """These rows, then the others."""
        return Sketches(
            np.concatenate([self.bands, others.bands], axis=1),
            np.concatenate([self.bytes, others.bytes]),
            np.concatenate([self.counts, others.counts]),
        )


def _width(threshold: float) -> int:
    """Hashes in a band: the most by which a pair of this similarity is met nearly always."""
    return max(
        width for width in range(1, 17) if width == 1 or 1 - (1 - threshold**width) ** (HASHES // width) >= _RECALL
    )


def form(examples: Sequence[TrainingExample], rows: np.ndarray) -> np.ndarray:
    """The hashed n-grams that are the form of the data, not its content (sorted, ``[k] uint64``)."""
    picked = rows[np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLE)).astype(np.int64)]
    parts = [(g.hashes, np.diff(g.offsets())) for g in grams(examples, picked)]
    if not parts:
        return np.zeros(0, dtype=np.uint64)
    kinds, ids = np.unique(np.concatenate([p[0] for p in parts]), return_inverse=True)
    owner = np.repeat(np.arange(len(picked)), np.concatenate([p[1] for p in parts]))
    once = distinct(ids.astype(np.int64) * len(picked) + owner)
    rows_with = np.bincount(once // len(picked), minlength=len(kinds))
    return kinds[rows_with >= max(_LEAST, _SHARE * len(picked))]


def distinct(values: np.ndarray) -> np.ndarray:
    """The values in order, each once. (``np.unique`` hashes, which takes ten times as long for millions of them.)"""
    ordered = np.sort(values)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]]


def among(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Which values are among the ordered ones (``[len(values)] bool``)."""
    if not len(ordered):
        return np.zeros(len(values), dtype=bool)
    # Most are not: a table of some bits of each tells so without a search.
    size = 1 << max(16, len(ordered).bit_length() + 4)
    bits = np.uint64(size - 1)
    table = np.zeros(size, dtype=bool)
    table[(ordered & bits).astype(np.int64)] = True
    there = table.take((values & bits).astype(np.int64))
    some = np.flatnonzero(there)
    at = np.minimum(np.searchsorted(ordered, values[some]), len(ordered) - 1)
    there[some] = ordered[at] == values[some]
    return there


def _content(batch: Grams, common: np.ndarray, of: Part) -> Grams:
    """A batch without the form of the data, and without the part that is not wanted.

    A part that is nothing but form keeps it, so that rows are not alike for want of words; where the questions alone
    are compared, such a question ("Go on with the story.") is left empty instead, for it says nothing.
    """
    kept = ~among(batch.hashes, common)
    offsets = batch.offsets(parts=True)
    sizes = np.diff(offsets)
    if of != "asked":
        left = np.diff(np.concatenate([[0], np.cumsum(kept)])[offsets])
        kept |= np.repeat(left == 0, sizes)
    if of != "whole":
        unwanted = np.arange(len(sizes)) % 2 != (of == "answered")
        kept &= ~np.repeat(unwanted, sizes)
    return Grams(batch.rows, batch.hashes[kept], np.concatenate([[0], np.cumsum(kept)])[batch.ends])


def sketched(
    examples: Sequence[TrainingExample], rows: np.ndarray, threshold: float, common: np.ndarray, of: Part = "whole"
) -> Sketches:
    """The sketches of some rows.

    Args:
        examples: the rows.
        rows: indices of those wanted, ``[m] int64``.
        threshold: the similarity that is looked for.
        common: n-grams to leave out.
        of: what of the rows is compared.
    """
    from rensa import RMinHash

    width = _width(threshold)
    sketches = Sketches(
        np.empty((HASHES // width, len(rows)), dtype=np.uint32),
        np.empty((len(rows), HASHES), dtype=np.uint8),
        np.empty(len(rows), dtype=np.uint32),
    )
    done = 0
    factors = mixed(np.arange(1, width + 1, dtype=np.uint64)) | np.uint64(1)
    for batch in grams(examples, rows):
        batch = _content(batch, common, of)
        offsets = batch.offsets()
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(batch.hashes, offsets.astype(np.uint64), HASHES, _SEED)
        hashes = np.array(matrix.to_rows(), dtype=np.uint32)  # [rows, 64]
        here = slice(done, done + len(hashes))
        done += len(hashes)
        banded = hashes[:, : len(sketches.bands) * width].reshape(len(hashes), -1, width)
        sketches.bands[:, here] = (mixed((banded * factors).sum(2)) >> np.uint64(32)).T
        sketches.bytes[here] = hashes & 0xFF
        sketches.counts[here] = np.diff(offsets)
    return sketches


@dataclass(slots=True)
class Candidates:
    """Pairs that may be similar."""

    pairs: np.ndarray
    """``[p, 2] int64``: a row and an earlier one, ordered; at most the sixteen earliest of each row."""
    met: int
    """Pairs whose sketches were compared."""


def candidates(sketches: Sketches, threshold: float, first: int = 0) -> Candidates:
    """Pairs of rows whose sketches say that they may be as similar as the threshold.

    Args:
        sketches: of all rows.
        threshold: the similarity that is looked for.
        first: only pairs of a row from here on with one before; 0: all pairs.
    """
    # 3 standard deviations below what two rows of just this similarity agree in.
    least = HASHES * threshold - 3 * (HASHES * threshold * (1 - threshold)) ** 0.5
    count = len(sketches.counts)
    found, met = np.zeros(0, dtype=np.int64), 0
    for band in range(len(sketches.bands)):
        fresh = [found]
        for later, earlier in _meeting(sketches, band, first):
            met += len(later)
            for begin in range(0, len(later), 1 << 17):
                a, b = later[begin : begin + (1 << 17)], earlier[begin : begin + (1 << 17)]
                agree = np.count_nonzero(sketches.bytes[a] == sketches.bytes[b], axis=1) >= least
                fresh.append(a[agree] * count + b[agree])
        found = _earliest(distinct(np.concatenate(fresh)), count)
    return Candidates(np.stack(np.divmod(found, max(count, 1)), axis=1), met)


def _earliest(pairs: np.ndarray, count: int) -> np.ndarray:
    """Of ordered pairs ``later * count + earlier``, the first few of each later row."""
    later = pairs // max(count, 1)
    rank = np.arange(len(pairs)) - np.searchsorted(later, later)
    return pairs[rank < _CANDIDATES]


def _meeting(sketches: Sketches, band: int, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """``(later rows, earlier rows)`` that share a band, each row with the first few of its bucket."""
    rows = np.flatnonzero(sketches.counts)
    keys = sketches.bands[band][rows]
    for depth in range(1, _DEPTH + 1):
        order = np.argsort(keys, kind="stable")  # rows of a bucket stay in their order
        ordered = keys[order]
        opens = np.ones(len(keys), dtype=bool)
        opens[1:] = ordered[1:] != ordered[:-1]
        begins = np.flatnonzero(opens)
        sizes = np.diff(np.append(begins, len(keys)))
        shared = np.flatnonzero(np.repeat(sizes > 1, sizes))
        begin = np.repeat(begins, sizes)[shared]
        here = rows[order]
        for k in range(_FIRST):
            late = shared > begin + k
            later, earlier = here[shared[late]], here[begin[late] + k]
            if first:
                across = (earlier < first) & (later >= first)
                later, earlier = later[across], earlier[across]
            yield later, earlier
        large = np.sort(order[np.repeat(sizes > _FIRST + 1, sizes)])
        if not len(large) or len(sketches.bands) == 1:
            return
        rows = rows[large]
        following = sketches.bands[(band + depth) % len(sketches.bands)][rows]
        keys = mixed(keys[large].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + following)


def similarities(
    examples: Sequence[TrainingExample], pairs: np.ndarray, counts: np.ndarray, common: np.ndarray, of: Part = "whole"
) -> np.ndarray:
    """True similarities of pairs of rows (``[p] float64``); of two without n-grams: 1.

    Args:
        examples: the rows.
        pairs: ``[p, 2] int64`` indices.
        counts: n-grams of each row, by which the work is portioned.
        common: n-grams to leave out.
        of: what of the rows is compared.
    """
    result = np.empty(len(pairs))
    portion = np.cumsum(counts[pairs].sum(1, dtype=np.int64)) // _BATCH
    for begin, end in _portions(portion):
        rows, at = np.unique(pairs[begin:end], return_inverse=True)
        batches = [_content(batch, common, of) for batch in grams(examples, rows)]
        sizes = np.concatenate([np.diff(b.offsets()) for b in batches])
        kinds, ids = np.unique(np.concatenate([b.hashes for b in batches]), return_inverse=True)
        left, right = at.reshape(-1, 2).T
        result[begin:end] = _jaccard(ids, sizes, left, right, len(kinds))
    return result


def _portions(numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)] if len(numbers) else []
    yield from itertools.pairwise(edges)


def _jaccard(ids: np.ndarray, sizes: np.ndarray, left: np.ndarray, right: np.ndarray, kinds: int) -> np.ndarray:
    """Similarity of sets ``left[i]`` and ``right[i]``; the members of all sets lie end to end in ``ids``."""
    if not kinds:
        return np.ones(len(left))
    members = distinct(np.repeat(np.arange(len(sizes)), sizes) * kinds + ids)
    sizes = np.bincount(members // kinds, minlength=len(sizes))
    begins, taken = np.cumsum(sizes) - sizes, sizes[left]
    pair = np.repeat(np.arange(len(left)), taken)
    within = np.arange(len(pair)) - np.repeat(np.cumsum(taken) - taken, taken)
    wanted = right[pair] * kinds + members[begins[left][pair] + within] % kinds
    at = np.minimum(np.searchsorted(members, wanted), len(members) - 1)
    both = np.bincount(pair[members[at] == wanted], minlength=len(left))
    either = taken + sizes[right] - both
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)
