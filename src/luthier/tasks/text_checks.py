"""Findings about texts that are read as they are, without a chat template."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from luthier.data.dataset import Dataset
from luthier.data.encode import EncodedExample
from luthier.data.findings import Finding, places

# Above this share of unknown tokens, a vocabulary is not made for the rows' language.
_UNKNOWN = 0.02
_SAMPLE = 2_000


def unknown_tokens(
    dataset: Dataset, what: str = "texts", length: Callable[[EncodedExample], int] = len
) -> list[Finding]:
    """Texts in characters that the vocabulary has no token for.

    Args:
        dataset: of which the training rows are looked at.
        what: they are called.
        length: how many of a row's tokens are of the text.
    """
    unknown = dataset.tokenizer.unk_token_id
    rows = dataset.train.encoded[:_SAMPLE]
    if unknown is None or not rows:
        return []
    counts = np.array([int((row.input_ids == unknown).sum()) for row in rows])
    share = counts.sum() / max(1, sum(map(length, rows)))
    if share < _UNKNOWN:
        return []
    return [
        Finding(
            "unknown_tokens",
            "warning",
            f"{share:.0%} of the {what}' tokens are unknown to the vocabulary, so the model reads none of what they "
            "say",
            "name a model that was trained on texts of this language in model.name",
            int((counts > 0).sum()),
            places(row.source for row, count in zip(rows, counts, strict=True) if count),
            share=float(share),
        )
    ]


def texts_cut(dataset: Dataset, remedy: str = "raise data.max_length if the model takes more") -> list[Finding]:
    """Texts of which a part alone is read."""
    found = []
    for part in dataset.parts:
        cut = [row for row in part.encoded if row.cut]
        if cut:
            found.append(
                Finding(
                    "text_cut",
                    "warning",
                    f"{part.name}: of {len(cut):,} texts the model reads the beginning alone; "
                    f"{sum(row.cut for row in cut):,} tokens are left out (data.truncation=cut)",
                    remedy,
                    len(cut),
                    places(row.source for row in cut),
                )
            )
    return found
