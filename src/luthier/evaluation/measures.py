"""One number of one model in a comparison: what is added up over rows, and how it is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from luthier.evaluation.generation import Answer
from luthier.evaluation.metrics import Metric, Rows
from luthier.evaluation.statistics import Change, Interval, Resampling, Value, change, column, interval, mean_value


@dataclass(frozen=True, slots=True)
class Measure:
    """A score with the statistics of its rows."""

    name: str
    label: str
    better: Literal["higher", "lower"] | None
    share: bool
    """whether it reads well as per cent"""
    binary: bool
    """whether a row is right or wrong and nothing between"""
    digits: int
    """after the point, where it is shown as a number"""
    value: Value
    statistics: np.ndarray
    """``[N, S] float64``"""
    rows: np.ndarray
    """``[N] float64``: each row's own score"""

    def shown(self, number: float, *, signed: bool = False) -> str:
        """A value of it as a table has it."""
        return shown(number, share=self.share, digits=self.digits, signed=signed)

    def describe(self) -> dict[str, Any]:
        """What a reader of the JSON needs to show its values."""
        return {"label": self.label, "better": self.better, "share": self.share, "digits": self.digits}


def shown(number: float, *, share: bool, digits: int, signed: bool = False) -> str:
    """A number as tables have it: per cent of a share, else so many digits after the point."""
    sign = "+" if signed else ""
    return f"{number * 100:{sign}.1f}%" if share else f"{number:{sign},.{digits}f}"


def how_sure(
    found: Mapping[str, Measure], before: Mapping[str, Measure] | None, seed: int
) -> tuple[dict[str, Interval], dict[str, Change]]:
    """The intervals of a model's measures, and their changes where another has the measure of the same rows too.

    Args:
        found: the model's measures.
        before: the other's; None: there is none.
        seed: of the resamples.
    """
    intervals, changes = {}, {}
    for name, measure in found.items():
        resampling = Resampling(len(measure.statistics), seed=seed)
        intervals[name] = interval(measure.value, measure.statistics, resampling, binary=measure.binary)
        other = None if before is None else before.get(name)
        if other is not None and len(other.rows) == len(measure.rows):
            changes[name] = changed(other, measure, resampling)
    return intervals, changes


def changed(before: Measure, after: Measure, resampling: Resampling) -> Change:
    """What one model's measure is beside another's of the same rows."""
    return change(
        after.value,
        before.statistics,
        after.statistics,
        (before.rows, after.rows),
        resampling,
        better=after.better,
        binary=before.binary and after.binary,
    )


def result_json(
    metrics: Mapping[str, float], intervals: Mapping[str, Interval], changes: Mapping[str, Change], seconds: float
) -> dict[str, Any]:
    """One model's part of a comparison, as what ``json.dumps`` takes."""
    return {
        "metrics": {name: finite(value) for name, value in metrics.items()},
        "intervals": {name: [finite(found.low), finite(found.high)] for name, found in intervals.items()},
        "changes": {
            name: {key: finite(value) for key, value in asdict(found).items()} for name, found in changes.items()
        },
        "seconds": round(seconds, 3),
    }


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def of_metric(metric: Metric, answers: Sequence[str], references: Rows) -> Measure:
    """What a metric says of the answers."""
    return Measure(
        metric.name,
        metric.label,
        metric.better,
        metric.share,
        metric.binary,
        metric.digits,
        metric.value,
        metric.statistics(answers, references),
        metric.rows(answers, references),
    )


def of_answers(answers: Sequence[Answer]) -> list[Measure]:
    """How answers end, and how long they are in tokens where that is known; neither is better as such."""
    ended = column([answer.stopped for answer in answers])
    found = [
        Measure("ended", "ended by itself", None, True, True, 1, mean_value, ended, ended[:, 0]),
    ]
    if any(answer.token_ids for answer in answers):
        length = column([len(answer.token_ids) for answer in answers])
        found.append(Measure("answer_tokens", "answer tokens", None, False, False, 1, mean_value, length, length[:, 0]))
    return found


def of_losses(losses: np.ndarray) -> list[Measure]:
    """How surprised a model is by the right answers.

    Args:
        losses: ``[N, 3]`` nats, tokens and bytes of each; rows without a token are left out.
    """
    losses = losses[losses[:, 1] > 0]
    nats, tokens, bytes_ = losses.T
    with np.errstate(over="ignore", invalid="ignore"):
        rows = np.exp(nats / tokens)
    found = [Measure("perplexity", "perplexity", "lower", False, False, 3, _perplexity, losses, rows)]
    if bytes_.all():
        bits = nats / bytes_ / np.log(2)
        found.append(Measure("bits_per_byte", "bits per byte", "lower", False, False, 3, _bits, losses, bits))
    return found


def _perplexity(sums: np.ndarray, count: int) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        found: np.ndarray = np.exp(sums[..., 0] / sums[..., 1])
    return found


def _bits(sums: np.ndarray, count: int) -> np.ndarray:
    found: np.ndarray = sums[..., 0] / sums[..., 2] / np.log(2)
    return found
