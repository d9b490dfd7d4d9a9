"""Near copies between two sets of texts: MinHash over word 5-grams, checked by their true Jaccard similarity.

Broder, 1997, "On the resemblance and containment of documents". 64 hashes in 16 bands of 4: a pair of similarity
0.8 is met with probability 0.9998, one of 0.3 with 0.12, and every candidate is then compared in full.
"""

from __future__ import annotations

import random
import re
import zlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

_HASHES, _BANDS = 64, 16
_PRIME = np.uint64((1 << 31) - 1)
_LIMIT = 20_000


def shingles(text: str, size: int = 5) -> np.ndarray:
    """Hashes of a text's word 5-grams (``[n] uint64``, each once); Chinese characters count as words."""
    words = re.findall(r"[一-鿿぀-ヿ]|\w+", text.casefold())
    grams = [" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))]
    return np.unique(np.array([zlib.crc32(g.encode()) for g in grams], dtype=np.uint64))


def near_copies(texts: Sequence[str], others: Sequence[str], *, threshold: float = 0.8) -> list[int]:
    """Indices of ``texts`` whose word 5-grams agree with those of one of ``others`` to ``threshold`` (Jaccard).

    Above 20,000 texts on a side a seeded sample of that size stands for all.
    """
    ours, theirs = _sampled(len(texts)), _sampled(len(others))
    if not ours or not theirs:
        return []
    rng = np.random.default_rng(0)
    factors = rng.integers(1, int(_PRIME), (2, _HASHES)).astype(np.uint64)
    kept = {j: shingles(others[j]) for j in theirs}
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for j, grams in kept.items():
        for band in _bands(grams, factors):
            buckets[band].append(j)
    found = []
    for i in ours:
        grams = shingles(texts[i])
        candidates = {j for band in _bands(grams, factors) for j in buckets.get(band, ())[:50]}
        if any(_jaccard(grams, kept[j]) >= threshold for j in candidates):
            found.append(i)
    return found


def _sampled(count: int) -> list[int]:
    return list(range(count)) if count <= _LIMIT else sorted(random.Random(0).sample(range(count), _LIMIT))


def _bands(grams: np.ndarray, factors: np.ndarray) -> list[tuple[int, bytes]]:
    hashed = (grams[:, None] % _PRIME * factors[0] + factors[1]) % _PRIME  # [n, 64]
    sketch = hashed.min(0).reshape(_BANDS, -1)
    return [(band, row.tobytes()) for band, row in enumerate(sketch)]


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)
