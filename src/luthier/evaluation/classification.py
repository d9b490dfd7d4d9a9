"""Classifiers on held-out rows: accuracy and F1, beside the baseline of always giving the most frequent class."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from luthier.data.classes import ClassNames
from luthier.data.encode import EncodedExample
from luthier.evaluation.calibration import Calibration, calibration
from luthier.evaluation.measures import Measure, how_sure, result_json
from luthier.evaluation.state import by_length, measuring
from luthier.evaluation.statistics import Change, Interval, column, mean_value
from luthier.training.class_loss import ClassLoss

if TYPE_CHECKING:
    from rich.console import RenderableType

MAJORITY = "majority"
# The lines of the table, and which of them are shares. The negative log-likelihood is the loss.
_SHOWN = {
    "accuracy": ("accuracy", True),
    "macro_f1": ("macro F1", True),
    "micro_f1": ("micro F1", True),
    "loss": ("loss", False),
    "ece": ("calibration error", True),
    "brier": ("Brier score", False),
}


@dataclass(slots=True)
class ClassResult:
    """One model's part."""

    name: str
    metrics: dict[str, float]
    """``accuracy``, ``macro_f1``, ``micro_f1`` (:func:`class_metrics`); and where the model gives scores ``loss``, and
    ``ece``, ``brier`` and ``nll`` (:class:`~luthier.evaluation.calibration.Calibration`)"""
    by_class: dict[str, dict[str, float]]
    """``precision``, ``recall``, ``f1`` and ``support`` of each class"""
    given: np.ndarray
    """``[N, C] bool``: the classes given"""
    scores: np.ndarray | None
    """``[N, C]`` probabilities"""
    seconds: float
    calibration: Calibration | None = None
    """What the probabilities are worth"""
    measures: dict[str, Measure] = field(default_factory=dict)
    """accuracy and both F1, with what of each row they come from"""
    intervals: dict[str, Interval] = field(default_factory=dict)
    """Each measure's value and its 95% confidence interval"""
    changes: dict[str, Change] = field(default_factory=dict)
    """Against the majority; empty for the majority itself."""


@dataclass(slots=True)
class ClassComparison:
    """What :func:`compare_classifiers` found; the first is the majority's."""

    classes: ClassNames
    models: list[ClassResult]
    right: np.ndarray
    """``[N, C] bool``"""
    places: list[str]
    texts: list[str]
    samples: list[int]
    """Rows to show: those that the first model gives wrong classes most surely."""
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Everything, as what ``json.dumps`` takes: metrics by model, notes, each row with what it was given."""
        names = np.array(self.classes.names, dtype=object)
        rows = []
        for i, text in enumerate(self.texts):
            given = {m.name: names[m.given[i]].tolist() for m in self.models}
            rows.append({"where": self.places[i], "text": text, "right": names[self.right[i]].tolist(), "given": given})
        models = {}
        for model in self.models:
            sure = {} if model.calibration is None else {"calibration": model.calibration.to_json()}
            found = result_json(model.metrics, model.intervals, model.changes, model.seconds)
            models[model.name] = found | {"by_class": model.by_class} | sure
        return {
            "models": models,
            "measures": self._measures(),
            "confusion": {m.name: self._confusion(m) for m in self.models if not self.classes.multi_label},
            "classes": list(self.classes.names),
            "notes": self.notes,
            "samples": self.samples,
            "rows": rows,
        }

    def _measures(self) -> dict[str, dict[str, Any]]:
        """How each metric is shown; those without rows of their own have no intervals."""
        measures = self.models[0].measures
        return {
            name: measures[name].describe()
            if name in measures
            else {"label": label, "better": "lower", "share": share, "digits": 3}
            for name, (label, share) in _SHOWN.items()
        }

    def _confusion(self, model: ClassResult) -> list[list[int]]:
        """``[right][given]`` counts."""
        return (self.right.astype(int).T @ model.given.astype(int)).tolist()

    def render(self) -> RenderableType:
        """A table of the metrics, one of the classes, the notes, and some wrong rows."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[RenderableType] = []
        table = Table(title=f"{len(self.texts):,} held-out rows, {len(self.classes):,} classes", title_justify="left")
        table.add_column("")
        for model in self.models:
            table.add_column(model.name, justify="right")
        for key, (label, share) in _SHOWN.items():
            values = [m.metrics.get(key) for m in self.models]
            if any(v is not None for v in values):
                table.add_row(label, *["" if v is None else f"{v:.1%}" if share else f"{v:.3f}" for v in values])
        parts.append(table)
        parts += [Text(f"! {note}", style="yellow") for note in self.notes]
        last = self.models[-1]
        each = Table("class", "rows", "precision", "recall", "F1", title=last.name, title_justify="left")
        worst = sorted(last.by_class, key=lambda name: last.by_class[name]["f1"])[:20]
        for name in worst:
            found = last.by_class[name]
            shares = [f"{found[key]:.1%}" for key in ("precision", "recall", "f1")]
            each.add_row(Text(name), f"{int(found['support']):,}", *shares)
        parts.append(each)
        if self.samples:
            wrong = Table("right", "given", "text", title="surest mistakes", title_justify="left", show_lines=True)
            names = np.array(self.classes.names, dtype=object)
            for i in self.samples:
                right, given = (", ".join(names[which[i]]) or "(none)" for which in (self.right, self.models[1].given))
                text = self.texts[i].replace("\x1b", "␛")
                wrong.add_row(Text(right), Text(given), Text(text[:300] + ("…" if len(text) > 300 else "")))
            parts.append(wrong)
        return Group(*parts)


def compare_classifiers(
    models: Sequence[tuple[str, Callable[[], AbstractContextManager[Any]]]],
    rows: Sequence[EncodedExample],
    classes: ClassNames,
    *,
    texts: Sequence[str],
    training: Sequence[tuple[int, ...]],
    samples: int = 3,
    pad_token_id: int = 0,
    seed: int = 42,
) -> ClassComparison:
    """Put the same rows to every model and score the classes that it gives.

    Args:
        models: names and context managers that give the model.
        rows: encoded as in training.
        classes: what the texts can be.
        texts: the rows' texts, to be shown.
        training: the classes of the training rows, from which the majority's baseline follows.
        samples: how many mistakes to choose for showing.
        pad_token_id: fills padded rows.
        seed: of the resamples that intervals and significance come from.
    """
    right = _table([row.extra for row in rows], len(classes))
    given = _majority(training, classes, len(rows))
    results = [ClassResult(MAJORITY, *class_metrics(right, given, classes.names), given, None, 0.0)]
    for name, opened in models:
        with opened() as model:
            begin = time.perf_counter()
            scores, loss = classify(model, rows, classes, pad_token_id=pad_token_id)
            seconds = time.perf_counter() - begin
        given = decide(scores, classes)
        metrics, by_class = class_metrics(right, given, classes.names)
        sure = calibration(scores, right, classes.names, multi_label=classes.multi_label)
        metrics |= {"loss": loss, "ece": sure.ece, "brier": sure.brier, "nll": sure.nll}
        results.append(ClassResult(name, metrics, by_class, given, scores, seconds, sure))
    for result in results:
        result.measures = _measures(right, result.given)
        before = None if result is results[0] else results[0].measures
        result.intervals, result.changes = how_sure(result.measures, before, seed)
    notes = []
    for result in results[1:]:
        if len(classes) > 1 and len(rows) > 1 and (result.given == result.given[0]).all():
            notes.append(f"{result.name} gives every text the same class: it has learnt nothing from the texts")
        elif result.metrics["macro_f1"] <= results[0].metrics["macro_f1"]:
            notes.append(f"{result.name} is no better than always giving the most frequent class")
        if result.calibration is not None and (note := result.calibration.note(result.name)) is not None:
            notes.append(note)
    chosen: list[int] = []
    if len(results) > 1 and results[1].scores is not None:
        wrong = (results[1].given != right).any(1)
        surest = np.argsort(-np.abs(results[1].scores - right).max(1), kind="stable")
        chosen = [int(i) for i in surest if wrong[i]][:samples]
    places = [str(row.source) if row.source else f"row {row.index + 1}" for row in rows]
    return ClassComparison(classes, results, right, places, list(texts), chosen, notes)


@torch.no_grad()
def classify(
    model: torch.nn.Module, rows: Sequence[EncodedExample], classes: ClassNames, *, pad_token_id: int = 0
) -> tuple[np.ndarray, float]:
    """``[N, C]`` probabilities of the classes of encoded texts, and the mean loss against those the rows hold.

    Args:
        model: a classifier.
        rows: encoded texts, at least one.
        classes: what they can be.
        pad_token_id: fills padded rows.
    """
    found = np.zeros((len(rows), len(classes)))
    total = 0.0
    with measuring(model):
        device = next(model.parameters()).device
        loss = ClassLoss(
            model, classes=len(classes), multi_label=classes.multi_label, batching="padded", pad_token_id=pad_token_id
        )
        for numbers in by_length(rows):
            batch = loss.batch([rows[number] for number in numbers]).to(device)
            scores = loss.logits(batch).double()
            total += float(loss(batch))
            found[numbers] = (scores.sigmoid() if classes.multi_label else scores.softmax(-1)).cpu().numpy()
    return found, total / len(rows)


def decide(scores: np.ndarray, classes: ClassNames) -> np.ndarray:
    """``[N, C] bool``: the likeliest class, or all that are likelier than not where a text can be of several."""
    if classes.multi_label:
        return scores > 0.5
    return np.arange(len(classes)) == scores.argmax(1)[:, None]


def class_metrics(
    right: np.ndarray, given: np.ndarray, names: Sequence[str]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Scores of given classes, from 0 to 1, as scikit-learn defines them (where nothing is divided by, 0).

    Args:
        right: ``[N, C] bool``.
        given: ``[N, C] bool``.
        names: of the classes.

    Returns:
        ``accuracy``, the share of rows whose classes are all right and no others given; ``macro_f1``, the mean of the
        F1 of classes that any row has or is given; ``micro_f1``, of all decisions together. And of each class
        ``precision``, ``recall``, ``f1`` and ``support``.
    """
    both = (right & given).sum(0)
    had, gave = right.sum(0), given.sum(0)
    f1 = _ratio(2 * both, had + gave)
    seen = (had + gave) > 0
    metrics = {
        "accuracy": float((right == given).all(1).mean()),
        "macro_f1": float(f1[seen].mean()) if seen.any() else 0.0,
        "micro_f1": float(_ratio(2 * both.sum(keepdims=True), (had + gave).sum(keepdims=True))[0]),
    }
    precision, recall = _ratio(both, gave), _ratio(both, had)
    by_class = {
        name: {
            "precision": float(precision[i]),
            "recall": float(recall[i]),
            "f1": float(f1[i]),
            "support": float(had[i]),
        }
        for i, name in enumerate(names)
    }
    return metrics, by_class


def _measures(right: np.ndarray, given: np.ndarray) -> dict[str, Measure]:
    """Accuracy and both F1 as sums over rows; a row is won or lost as a whole."""
    rows = (right == given).all(1).astype(np.float64)
    sums = np.concatenate([right & given, right, given], 1).astype(np.float64)  # [N, 3C]
    found = [Measure("accuracy", "accuracy", "higher", True, True, 3, mean_value, column(rows), rows)]
    for name, value in (("macro_f1", _macro_f1), ("micro_f1", _micro_f1)):
        found.append(Measure(name, name.replace("_f1", " F1"), "higher", True, False, 3, value, sums, rows))
    return {measure.name: measure for measure in found}


def _macro_f1(sums: np.ndarray, count: int) -> np.ndarray:
    both, had, gave = np.split(sums, 3, -1)
    seen = had + gave
    f1 = np.divide(2 * both, seen, out=np.zeros_like(both), where=seen > 0)
    found: np.ndarray = f1.sum(-1) / np.maximum((seen > 0).sum(-1), 1)
    return found


def _micro_f1(sums: np.ndarray, count: int) -> np.ndarray:
    both, had, gave = (part.sum(-1) for part in np.split(sums, 3, -1))
    found: np.ndarray = np.divide(2 * both, had + gave, out=np.zeros_like(both), where=had + gave > 0)
    return found


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)


def _table(rows: Sequence[tuple[int, ...]], count: int) -> np.ndarray:
    table = np.zeros((len(rows), count), dtype=bool)
    for number, of in enumerate(rows):
        table[number, list(of)] = True
    return table


def _majority(training: Sequence[tuple[int, ...]], classes: ClassNames, rows: int) -> np.ndarray:
    """The class, or the very set of classes, that most training rows have, for every row."""
    most = Counter(training).most_common(1)
    return _table([most[0][0] if most else ()] * rows, len(classes))
