"""Answers that should be the reference, or have its words: exact match, token F1 and ROUGE."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from luthier.evaluation.metrics.base import MeanMetric, References, Rows, check_rows, f_measure
from luthier.evaluation.metrics.words import ngrams, normalized, normalized_words, words

ROUGE = ("rouge1", "rouge2", "rougeL")


class ExactMatch(MeanMetric):
    """Equal to a reference, white space around both left out."""

    name, label, share, binary = "exact_match", "exact match", True, True

    def row(self, answer: str, references: Sequence[str]) -> float:
        return float(is_exact(answer, references))


class ExactMatchNormalized(MeanMetric):
    """Equal to a reference once case, punctuation, English articles and white space are left out, as in SQuAD."""

    name, label, share, binary = "exact_match_normalized", "normalised match", True, True

    def row(self, answer: str, references: Sequence[str]) -> float:
        said = normalized(answer)
        return float(any(said == normalized(reference) for reference in references))


class TokenF1(MeanMetric):
    """F1 of the words that an answer shares with the nearest reference, both normalised.

    SQuAD's for languages with spaces, and CMRC's characters for Chinese: see
    :func:`~luthier.evaluation.metrics.words.normalized`.
    """

    name, label = "token_f1", "token F1"

    def row(self, answer: str, references: Sequence[str]) -> float:
        said = Counter(normalized_words(answer))
        return _best(_shared(said, Counter(normalized_words(reference))) for reference in references)


class Rouge(MeanMetric):
    """ROUGE (Lin, 2004, W04-1013) as rouge-score computes it without stemming: F1 against the nearest reference.

    Args:
        kind: ``rouge1`` or ``rouge2``, runs of one word or two; ``rougeL``, the longest common subsequence.
        cut: gives a text's words.
        name: where it is not ``kind``.
    """

    def __init__(self, kind: str, cut: Callable[[str], Sequence[str]] = words, name: str | None = None) -> None:
        self.name = name or kind
        self.label = kind.replace("rouge", "ROUGE-") + ("" if name is None else f" ({name.removeprefix(f'{kind}_')})")
        self._kind = kind
        self._cut = cut

    def row(self, answer: str, references: Sequence[str]) -> float:
        said = self._cut(answer)
        rights = [self._cut(reference) for reference in references]
        if self._kind == "rougeL":
            return _best((_common_length(said, right), len(said), len(right)) for right in rights)
        n = int(self._kind[-1])
        counted = ngrams(said, n)
        return _best(_shared(counted, ngrams(right, n)) for right in rights)


def _shared(said: Counter, right: Counter) -> tuple[int, int, int]:
    """How many are in both, in the answer, in the reference."""
    both = sum(min(count, right[key]) for key, count in said.items() if key in right)
    return both, said.total(), right.total()


def _best(counts: Iterable[tuple[int, int, int]]) -> float:
    """The highest F1 of several references'."""
    return float(f_measure(np.array(list(counts))).max())


def _common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence of words."""
    from rapidfuzz.distance import LCSseq

    number = {word: i for i, word in enumerate({*one, *other})}  # as numbers, no two words can be taken for one
    return LCSseq.similarity([number[w] for w in one], [number[w] for w in other])


_rouges = {kind: Rouge(kind) for kind in ROUGE}


def rouge(answers: Sequence[str], references: References) -> dict[str, float]:
    """``rouge1``, ``rouge2`` and ``rougeL``: see :class:`Rouge`.

    Raises:
        UserError: as :func:`~luthier.evaluation.metrics.base.check_rows`.
    """
    rows: Rows = check_rows(answers, references)
    return {kind: metric.score(answers, rows) for kind, metric in _rouges.items()}


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """rougeL of one row."""
    return _rouges["rougeL"].row(answer, references)


def exact_match(answers: Sequence[str], references: References) -> float:
    """Share of answers equal to a reference, white space around both left out."""
    return ExactMatch().score(answers, references)


def is_exact(answer: str, references: Sequence[str]) -> bool:
    """Whether one answer equals one of its references, white space around both left out."""
    return answer.strip() in [reference.strip() for reference in references]
