"""The classes of a data set: its labels, or short answers that repeat."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator

from luthier.data.examples import TrainingExample
from luthier.data.findings import Finding

# A longer answer is a text, not the name of a class.
_LONGEST = 40
# More different answers than this are no classes, however many rows there are.
_MOST = 10_000
# Fewer rows say nothing about balance.
_FEWEST_ROWS = 20


class Classes:
    """Counts classes, one row after another. Labels count where any row has one, else short answers that repeat."""

    def __init__(self) -> None:
        self._rows = 0
        self._labels: Counter[str] = Counter()
        self._short = 0
        self._answers: Counter[str] = Counter()

    def add(self, example: TrainingExample) -> None:
        self._rows += 1
        if example.label is not None:
            self._labels.update(map(str, example.label) if isinstance(example.label, list) else [str(example.label)])
        answer = example.answer
        if answer is not None and len(answer) <= _LONGEST and len(self._answers) <= _MOST:
            self._short += 1
            self._answers[answer] += 1

    def join(self, others: Classes) -> None:
        """Add what was counted in other rows."""
        self._rows += others._rows
        self._labels += others._labels
        self._short += others._short
        self._answers += others._answers

    @property
    def counts(self) -> Counter[str] | None:
        """Rows of each class; None where the rows have no classes."""
        if self._labels:
            return self._labels
        few = len(self._answers) <= max(2, self._short // 20)
        return self._answers if self._short and self._short >= 0.95 * self._rows and few else None


def label_findings(counts: Counter[str] | None) -> Iterator[Finding]:
    """What is wrong with the balance and the spelling of classes."""
    if counts is None or counts.total() < _FEWEST_ROWS:
        return
    yield from _spellings(counts)
    (most, top), (least, bottom) = counts.most_common()[0], counts.most_common()[-1]
    if len(counts) == 1:
        yield Finding(
            "one_label",
            "warning",
            f"every row has the same answer, {most!r}",
            "add rows of the other classes, or check the column mapping",
        )
    elif top >= 10 * bottom:
        yield Finding(
            "label_imbalance",
            "warning",
            f"class {most!r} has {top:,} rows, class {least!r} has {bottom:,}",
            "add rows of the rare classes, or judge by a score that weighs classes alike; data.split.strategy: "
            "stratified keeps each class's share in every part",
        )


def _spellings(counts: Counter[str]) -> Iterator[Finding]:
    """Classes that differ in case, width, white space or a closing mark alone: the rarer spelling is a slip."""
    alike: dict[str, list[str]] = defaultdict(list)
    for label, _ in counts.most_common():
        alike[_plain(label)].append(label)
    mixed = [labels for labels in alike.values() if len(labels) > 1]
    if mixed:
        count = sum(counts[label] for labels in mixed for label in labels[1:])
        yield Finding(
            "label_spelling",
            "warning",
            "classes are spelt in several ways: "
            + "; ".join(", ".join(f"{label!r} ({counts[label]:,})" for label in labels) for labels in mixed[:5]),
            "write each class in one way: the model learns every spelling as a class of its own",
            count,
            share=count / counts.total(),
        )


def _plain(label: str) -> str:
    folded = unicodedata.normalize("NFKC", label).casefold()
    return re.sub(r"\s+", " ", folded).strip(" .。!?,;:'\"") or folded
