"""The parts of a report that show whether a classifier is as sure as it is right."""

from __future__ import annotations

from collections.abc import Iterator

from luthier.report.blocks import Block, Plot, Series, Table, Text
from luthier.report.evaluation_files import Evaluation


def calibration_blocks(found: Evaluation) -> Iterator[Block]:
    """The numbers, the reliability table and its picture."""
    told = found.calibration
    if not told:
        return
    yield Text(
        f"{found.tuned} is {told['confidence']:.1%} sure on average, and right in {told['accuracy']:.1%}: calibration "
        f"error {told['ece']:.1%}, Brier score {told['brier']:.3f}.",
        "",
        "Is it as sure as it is right?",
    )
    several = bool(told["by_label"])
    bins = told["reliability"]
    yield Plot(
        "Reliability: share that is right, by the probability given",
        [Series(found.tuned, [(round(b["confidence"], 4), b["accuracy"]) for b in bins])],
        along="probability",
        diagonal="as sure as right",
    )
    heads = ["probability", "labels" if several else "rows", "mean", "right"]
    rows = [
        [f"{b['from']:.1%} … {b['to']:.1%}", f"{b['count']:,}", f"{b['confidence']:.1%}", f"{b['accuracy']:.1%}"]
        for b in bins
    ]
    what = "of each label" if several else "of the class given"
    yield Table(f"Reliability of {found.tuned}, by the probability {what}", heads, rows)
    if several:
        each = [
            [name, f"{of['ece']:.1%}", f"{of['brier']:.3f}", f"{of['nll']:.3f}"]
            for name, of in told["by_label"].items()
        ]
        heads = ["label", "calibration error", "Brier score", "negative log-likelihood"]
        yield Table(f"Calibration of {found.tuned}, by label", heads, each)
