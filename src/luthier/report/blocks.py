"""What a report is made of, whatever it is shown in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from luthier.evaluation.differences import Kind

_SHOWN = 1200
"""Characters of a text of a row."""

Mood = Literal["", "good", "bad", "warning", "dim"]


@dataclass(frozen=True, slots=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True, slots=True)
class Text:
    text: str
    mood: Mood = ""
    lead: str = ""
    """Words before it that stand out."""


@dataclass(frozen=True, slots=True)
class Listing:
    items: Sequence[str]
    mood: Mood = ""


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    mood: Mood = ""
    shade: float = 0.0
    """How dark its ground is, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Table:
    """The first column names its rows."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    words: bool = False
    """Cells are words, not numbers: they stand left and may be long."""


@dataclass(frozen=True, slots=True)
class Code:
    text: str
    language: str = "text"


@dataclass(frozen=True, slots=True)
class Sample:
    """One row: what was asked, what is right, and what each model said, marked against that."""

    title: str
    asked: str
    right: str
    said: Sequence[tuple[str, Sequence[tuple[Kind, str]], str]]
    """Name of the model, its text in parts, and what else is to be said of it."""
    judged: Sequence[tuple[str, Sequence[tuple[str, str]]]] = ()
    """What a judge made of a model's answer, with its replies and what each was shown."""


@dataclass(frozen=True, slots=True)
class Series:
    name: str
    points: Sequence[tuple[float, float]]
    """From left to right; all are finite."""


@dataclass(frozen=True, slots=True)
class Plot:
    title: str
    series: Sequence[Series]
    unit: str = ""
    lost: int = 0
    """Values that are no finite numbers, and not drawn."""
    along: str = "step"
    """What runs from left to right."""
    diagonal: str = ""
    """Name of a line from (0, 0) to (1, 1), between which all points lie; empty: there is none."""

    def told(self) -> list[str]:
        """The plot in words, a line a series."""
        lines = []
        for one in self.series:
            first, last = one.points[0], one.points[-1]
            low, high = (pick(one.points, key=lambda p: p[1]) for pick in (min, max))
            line = f"{one.name}: {self.shown(first[1])} at {self.along} {first[0]:,g}"
            if len(one.points) > 1:
                line += (
                    f", {self.shown(last[1])} at {self.along} {last[0]:,g}; "
                    f"lowest {self.shown(low[1])} ({self.along} {low[0]:,g}), "
                    f"highest {self.shown(high[1])} ({self.along} {high[0]:,g})"
                )
            lines.append(line)
        if self.lost:
            lines.append(f"{self.lost:,} values are no finite numbers and are left out")
        return lines

    def shown(self, value: float) -> str:
        """A value with its unit, in about four digits."""
        unit = f" {self.unit}" if self.unit else ""
        if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
            return f"{value:.3g}{unit}"
        digits = 0 if abs(value) >= 1000 else max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
        text = f"{value:,.{digits}f}"
        return (text.rstrip("0").rstrip(".") if "." in text else text) + unit


Block = Heading | Text | Listing | Table | Code | Sample | Plot


def cut(text: str) -> str:
    """A text of a row, not too long of it."""
    text = text.strip()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text) - _SHOWN:,} more characters)"
