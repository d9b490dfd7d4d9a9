"""An evaluation as a report reads it: the JSON of each kind of task brought into one form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from luthier.evaluation.judged import Judging
from luthier.evaluation.measures import shown

Change = Mapping[str, float | None]
"""``value``, ``low``, ``high``, ``p``, ``wins``, ``ties`` and ``losses``"""

_EACH = 3
"""Rows shown of those that improved, and of those that got worse."""


@dataclass(frozen=True, slots=True)
class Line:
    """One measure of all models."""

    name: str
    label: str
    better: str | None
    share: bool
    digits: int
    values: dict[str, float | None]
    intervals: dict[str, tuple[float, float]]
    changes: dict[str, Change]
    """Of each model that differs from the first."""

    def shown(self, value: float | None, *, signed: bool = False) -> str:
        """A value as the terminal has it."""
        if value is None:
            return "–"
        return shown(value, share=self.share, digits=self.digits, signed=signed)

    def between(self, low: float | None, high: float | None, *, signed: bool = False) -> str:
        """An interval as the terminal has it."""
        return (
            ""
            if low is None or high is None
            else f"{self.shown(low, signed=signed)} … {self.shown(high, signed=signed)}"
        )

    def good(self, change: Change) -> bool | None:
        """Whether a change is one to the better; None where it is not sure, or neither way is better."""
        value, p = change.get("value"), change.get("p")
        if self.better is None or value is None or p is None or p >= 0.05 or value == 0:
            return None
        return (value > 0) == (self.better == "higher")


@dataclass(frozen=True, slots=True)
class Example:
    """One row with what each model said to it."""

    why: str
    """``improved``, ``got worse`` or ``sampled``"""
    where: str
    asked: str
    right: str
    said: dict[str, str]
    cut: frozenset[str] = frozenset()
    """Models whose answer was cut at the limit."""
    judged: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What a judge said of each model beside the first: ``outcome``, ``choices``, ``replies`` (or ``identical``)."""


@dataclass(slots=True)
class Evaluation:
    """How models do on the same rows. The first one is the one to beat."""

    name: str
    """The file's: ``comparison`` is the run's own."""
    kind: Literal["answers", "classes", "words"]
    rows: int
    models: list[str]
    lines: list[Line]
    main: str
    """The measure that says whether tuning helped."""
    examples: list[Example]
    moved: dict[str, tuple[int, int]]
    """Of each model but the first: how many rows improved, and how many got worse."""
    notes: list[str] = field(default_factory=list)
    """What looks wrong, in words."""
    signatures: dict[str, str] = field(default_factory=dict)
    decoding: str = ""
    """How answers were made; empty where none were."""
    by_class: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of the tuned model: ``precision``, ``recall``, ``f1`` and ``support`` of each class."""
    classes: list[str] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)
    """Of the tuned model: ``[right][given]``"""
    hidden_tokens: int = 0
    calibration: dict[str, Any] = field(default_factory=dict)
    """Of the tuned model, what :meth:`~luthier.evaluation.calibration.Calibration.to_json` gave."""
    judging: Judging | None = None
    """What a judge has said; None: nobody was asked."""

    @property
    def tuned(self) -> str:
        """The model that the run has made."""
        return "tuned" if "tuned" in self.models else self.models[-1]

    @property
    def base(self) -> str | None:
        """What it is compared with."""
        return self.models[0] if self.models[0] != self.tuned else None

    def __getitem__(self, name: str) -> Line:
        return next(line for line in self.lines if line.name == name)

    def judge_line(self, *models: str) -> list[Line]:
        """The judge's line of a table of these models beside the first: share of rows won, ties as half."""
        judged = {} if self.judging is None else self.judging.models
        rates = {m: judged[m].win_rate for m in models if m in judged}
        found = {m: rate for m, rate in rates.items() if rate is not None}
        if not found:
            return []
        values: dict[str, float | None] = dict.fromkeys(self.models) | {m: rate.value for m, rate in found.items()}
        if len(models) == 1:
            values[self.models[0]] = 1 - found[models[0]].value
        changes = {m: change for m in found if (change := judged[m].change) is not None}
        return [
            Line(
                "judge",
                "judge",
                "higher",
                True,
                3,
                values,
                {m: (rate.low, rate.high) for m, rate in found.items()},
                {m: asdict(change) for m, change in changes.items()},
            )
        ]

    def to_json(self) -> dict[str, Any]:
        """For JSON; of the judge, what it said of the rows that are shown."""
        told = asdict(replace(self, judging=None))
        del told["judging"]
        return told | ({} if self.judging is None else {"judge": self.judging.to_json()})


def read_evaluation(name: str, content: Mapping[str, Any]) -> Evaluation | None:
    """An evaluation from its JSON; None where it is none of those that a run makes.

    Raises:
        KeyError, TypeError, ValueError, IndexError, AttributeError: it is damaged.
    """
    if "judged_by" in content:
        return _answers(name, content)
    if "classes" in content:
        return _classes(name, content)
    return _words(name, content) if "hidden_tokens" in content else None


def _lines(content: Mapping[str, Any]) -> list[Line]:
    models, known = content["models"], content.get("measures", {})
    names = dict.fromkeys(name for model in models.values() for name in model["metrics"])
    lines = []
    for name in names:
        told = known.get(name, {})
        intervals = {m: told_by.get("intervals", {}).get(name) for m, told_by in models.items()}
        lines.append(
            Line(
                name,
                told.get("label", name.replace("_", " ")),
                told.get("better"),
                told.get("share", False),
                told.get("digits", 3),
                {m: finite(told_by["metrics"].get(name)) for m, told_by in models.items()},
                {m: (low, high) for m, (low, high) in _whole(intervals)},
                {m: t["changes"][name] for m, t in models.items() if name in t.get("changes", {})},
            )
        )
    return lines


def _whole(intervals: Mapping[str, Sequence[float | None] | None]) -> list[tuple[str, tuple[float, float]]]:
    return [(m, (i[0], i[1])) for m, i in intervals.items() if i and i[0] is not None and i[1] is not None]


def finite(value: Any) -> float | None:
    """A number, or None where it is none that can be shown."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _answers(name: str, content: Mapping[str, Any]) -> Evaluation:
    models, rows = list(content["models"]), content["rows"]
    apart = {m: (told.get("improved", []), told.get("worsened", [])) for m, told in content["models"].items()}

    def example(number: int, why: str) -> Example:
        row = rows[number]
        answers = row["answers"]
        return Example(
            why,
            row["where"],
            row["asked"],
            row["references"][0],
            {m: answers[m]["text"] for m in models},
            frozenset(m for m in models if not answers[m]["stopped"]),
            {m: answers[m]["judge"] for m in models if "judge" in answers[m]},
        )

    found = Evaluation(
        name,
        "answers",
        len(rows),
        models,
        _lines(content),
        content["judged_by"],
        [],
        {m: (len(better), len(worse)) for m, (better, worse) in apart.items() if m != models[0]},
        list(content["notes"]),
        dict(content["signatures"]),
        _decoding(content.get("decoding", {})),
    )
    found.judging = Judging.from_json(content["judge"], rows) if "judge" in content else None
    found.examples = _chosen(content["samples"], *apart[found.tuned], example)
    return found


def _decoding(told: Mapping[str, Any]) -> str:
    """How answers were made, in words."""
    if told == {"do_sample": False, "num_beams": 1}:
        return "greedy"
    return ", ".join(f"{key} {value}" for key, value in told.items())


def _classes(name: str, content: Mapping[str, Any]) -> Evaluation:
    models, rows = list(content["models"]), content["rows"]
    found = Evaluation(name, "classes", len(rows), models, _lines(content), "accuracy", [], {}, list(content["notes"]))

    def example(number: int, why: str) -> Example:
        row = rows[number]
        return Example(
            why,
            row["where"],
            row["text"],
            ", ".join(row["right"]) or "(none)",
            {m: ", ".join(row["given"][m]) or "(none)" for m in models},
        )

    better, worse = _apart(rows, models[0], found.tuned, lambda row, m: row["given"][m] == row["right"])
    found.moved[found.tuned] = (len(better), len(worse))
    found.examples = _chosen(content.get("samples", []), better, worse, example)
    found.lines = [line for line in found.lines if line.name != "nll"]  # which is the loss
    found.by_class = content["models"][found.tuned]["by_class"]
    found.classes = list(content["classes"])
    found.confusion = content["confusion"].get(found.tuned, [])
    found.calibration = content["models"][found.tuned].get("calibration", {})
    return found


def _words(name: str, content: Mapping[str, Any]) -> Evaluation:
    models, rows = list(content["models"]), content["rows"]
    found = Evaluation(name, "words", len(rows), models, _lines(content), "accuracy", [], {}, list(content["notes"]))
    found.hidden_tokens = content["hidden_tokens"]

    def example(number: int, why: str) -> Example:
        row = rows[number]
        return Example(
            why,
            row["where"],
            row["read"],
            "\n".join(row["right"]),
            {m: "\n".join(row["given"][m]) for m in models},
        )

    def hits(row: Mapping[str, Any], model: str) -> int:
        return sum(given == right for given, right in zip(row["given"][model], row["right"], strict=True))

    better, worse = _apart(rows, models[0], found.tuned, hits) if found.base else ([], [])
    if found.base:
        found.moved[found.tuned] = (len(better), len(worse))
    found.examples = _chosen(content.get("samples", []), better, worse, example)
    return found


def _apart(
    rows: Sequence[Mapping[str, Any]], first: str, second: str, score: Callable[[Mapping[str, Any], str], float]
) -> tuple[list[int], list[int]]:
    """Rows on which the second model is better than the first, and those on which it is worse."""
    gains = [score(row, second) - score(row, first) for row in rows]
    return [i for i, gain in enumerate(gains) if gain > 0], [i for i, gain in enumerate(gains) if gain < 0]


def _chosen(
    sampled: Sequence[int], better: Sequence[int], worse: Sequence[int], example: Callable[[int, str], Example]
) -> list[Example]:
    """The first rows that improved, those that got worse, and what the evaluation has sampled; each row once."""
    why = dict.fromkeys(better[:_EACH], "improved") | dict.fromkeys(worse[:_EACH], "got worse")
    return [
        example(i, word) for i, word in (why | dict.fromkeys((s for s in sampled if s not in why), "sampled")).items()
    ]
