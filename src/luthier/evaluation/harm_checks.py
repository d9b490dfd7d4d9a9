"""The single checks of harm: from answers of base and tuned to a number of both and a verdict."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from luthier.data.encode import EncodedExample
from luthier.data.examples import TrainingExample
from luthier.evaluation import measures, memorisation
from luthier.evaluation.drift import drift, expected_language, language_of
from luthier.evaluation.generation import Answer
from luthier.evaluation.measures import Measure, changed
from luthier.evaluation.metrics import metric_of
from luthier.evaluation.metrics.words import words
from luthier.evaluation.question import Question
from luthier.evaluation.refusals import refuses
from luthier.evaluation.statistics import (
    Change,
    Interval,
    Resampling,
    change,
    column,
    interval,
    mean_value,
    smallest_difference,
    unpaired,
)

FEW = 30
"""Of so few rows a verdict says that they are few."""
# References of more words are no short answers that a sentence could hold.
_SHORT = 6
LEAKS_READ = 20_000  # training answers that runs are looked for in
_TRIALS = 2_000  # of the test of a topic or a language


@dataclass(slots=True)
class Check:
    """One number of both models, and what it means."""

    name: str
    label: str
    rows: int
    measure: Measure
    """Of the tuned model; says how values are shown."""
    base: Interval
    tuned: Interval
    change: Change
    verdict: str = ""
    harm: bool = False
    """Whether it is worse, and surely so."""
    groups: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """By ``topic`` and ``language``, and then by its name: ``rows``, ``base``, ``tuned`` and ``p``."""
    examples: list[dict[str, str]] = field(default_factory=list)
    """The rows that it is about: where, asked, and both answers."""

    def to_json(self) -> dict[str, Any]:
        """As what ``json.dumps`` takes."""
        found = {key: getattr(self, key) for key in ("name", "label", "rows", "verdict", "harm", "groups", "examples")}
        found["measure"] = self.measure.describe()
        for key in ("base", "tuned", "change"):
            found[key] = {k: v if math.isfinite(v) else None for k, v in asdict(getattr(self, key)).items()}
        return found


@dataclass(slots=True)
class Asked:
    """Questions of one kind with both models' answers."""

    name: str
    questions: list[Question]
    most: int
    """tokens of an answer"""
    examples: list[TrainingExample] = field(default_factory=list)
    """of the questions, where they are rows"""
    encoded: list[EncodedExample] = field(default_factory=list)
    """the right answers, to compute perplexity from"""
    answers: list[list[Answer]] = field(default_factory=list)
    """of each model"""
    losses: list[np.ndarray] = field(default_factory=list)
    """of each model ``[len(encoded), 3]``"""

    def texts(self, model: int) -> list[str]:
        return [answer.text for answer in self.answers[model]]


def _check(name: str, label: str, before: Measure, after: Measure, seed: int) -> Check:
    resampling = Resampling(len(after.statistics), seed=seed)
    return Check(
        name,
        label,
        len(after.statistics),
        after,
        interval(before.value, before.statistics, resampling, binary=before.binary),
        interval(after.value, after.statistics, resampling, binary=after.binary),
        changed(before, after, resampling),
    )


def _share(name: str, label: str, values: Sequence[Sequence[float]], seed: int, *, binary: bool = True) -> Check:
    """Of a share of rows, or a mean share, that had better be low, of base and tuned."""
    both = [column(of_model) for of_model in values]
    first, second = (Measure(name, label, "lower", True, binary, 1, mean_value, c, c[:, 0]) for c in both)
    return _check(name, label, first, second, seed)


def shown_p(p: float) -> str:
    """A probability as verdicts have it."""
    return "p<0.001" if p < 0.001 else f"p={p:.3f}"


def _from_to(check: Check) -> str:
    return f"from {check.measure.shown(check.base.value)} to {check.measure.shown(check.tuned.value)}"


def _unseen(check: Check, what: str) -> str:
    """That nothing was seen, and what would have been."""
    least = smallest_difference(check.base.value, check.rows)
    few = f"too few rows to tell: {check.rows}" if check.rows < FEW else f"no {what} seen"
    return f"{few}; {check.rows:,} rows show one of {least * 100:.0f} points or more"


# --- forgetting ---


def forgotten(asked: Asked, seed: int) -> list[Check]:
    references = [question.references for question in asked.questions]
    short = all(len(words(right)) <= _SHORT for row in references for right in row)
    metric = metric_of("contains_answer" if short else "rougeL")
    before, after = (measures.of_metric(metric, asked.texts(i), references) for i in (0, 1))
    label = f"{asked.name}: {'right answers' if short else metric.label}"
    known = _check(f"forgetting_{asked.name}", label, before, after, seed)
    known.groups = _groups(asked.examples, before, after, seed)
    moved = known.change
    if moved.significant and moved.value < 0:
        known.harm = True
        what = "right answers" if short else metric.label
        known.verdict = f"forgot: {what} fell {_from_to(known)}, {shown_p(moved.p)}{_most(known.groups)}"
    elif moved.significant:
        known.verdict = f"better: rose {_from_to(known)}, {shown_p(moved.p)}"
    elif short:
        known.verdict = _unseen(known, "drop")
    else:
        known.verdict = f"too few rows to tell: {known.rows}" if known.rows < FEW else "no drop seen"
    lost = (after.rows - before.rows).argsort(kind="stable")
    known.examples = [_row(asked, int(i)) for i in lost if after.rows[i] < before.rows[i]]
    checks = [known]
    if asked.losses and len(asked.losses[0]):
        surprise = [measures.of_losses(losses)[0] for losses in asked.losses]
        likely = _check(f"perplexity_{asked.name}", f"{asked.name}: perplexity", surprise[0], surprise[1], seed)
        moved = likely.change
        if moved.significant and moved.value > 0:
            likely.harm = True
            likely.verdict = f"right answers surprise it more, {shown_p(moved.p)}"
        elif moved.significant:
            likely.verdict = f"right answers surprise it less, {shown_p(moved.p)}"
        else:
            likely.verdict = f"too few rows to tell: {likely.rows}" if likely.rows < FEW else "no change seen"
        checks.append(likely)
    return checks


def _groups(
    examples: Sequence[TrainingExample], before: Measure, after: Measure, seed: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Both models' values by topic and by language."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for key in ("topic", "language"):
        names = [str(value) if (value := (e.metadata or {}).get(key)) else None for e in examples]
        for name in dict.fromkeys(n for n in names if n is not None):
            chosen = np.array([n == name for n in names])
            first, second = before.rows[chosen], after.rows[chosen]
            resampling = Resampling(len(first), resamples=1, trials=_TRIALS, seed=seed)
            moved = change(mean_value, first[:, None], second[:, None], (first, second), resampling, better="higher")
            found.setdefault(key, {})[name] = {
                "rows": len(first),
                "base": float(first.mean()),
                "tuned": float(second.mean()),
                "p": moved.p,
            }
    return found


def _most(groups: dict[str, dict[str, dict[str, float]]]) -> str:
    """Where most was lost: the topics and languages whose own drop is sure, or else the largest drops."""
    parts = []
    for found in groups.values():
        lost = {name: g for name, g in found.items() if g["tuned"] < g["base"]}
        sure = {name: g for name, g in lost.items() if g["p"] < 0.05} or lost
        ranked = sorted(sure, key=lambda name: (sure[name]["tuned"] - sure[name]["base"]) * sure[name]["rows"])
        parts += [f"{n} ({sure[n]['base']:.0%} to {sure[n]['tuned']:.0%})" for n in ranked[:3]]
    return f", most in: {', '.join(parts)}" if parts else ""


def _row(asked: Asked, index: int) -> dict[str, str]:
    question = asked.questions[index]
    return {
        "where": question.where,
        "asked": question.asked,
        "right": question.references[0],
        "base": asked.answers[0][index].text,
        "tuned": asked.answers[1][index].text,
    }


# --- memorisation ---


def memorised(trained: Asked, unseen: Asked, begun: Mapping[str, Asked], seed: int) -> list[Check]:
    """Each way of asking: of training rows, of held-out rows, and how the two differ."""
    ways: tuple[tuple[str, str, Asked, Asked, Callable[[str, str], float]], ...] = (
        ("longest_run", "of the answer in one run", trained, unseen, memorisation.longest_run),
        ("reproduced", "answers word for word", trained, unseen, memorisation.is_reproduced),
        ("continued", "answers continued verbatim", begun["training"], begun["held-out"], memorisation.continues),
    )
    checks = []
    for name, label, seen, control, compare in ways:
        if not seen.questions:
            continue
        found = [
            [
                [float(compare(s, q.references[0])) for s, q in zip(part.texts(i), part.questions, strict=True)]
                for i in (0, 1)
            ]
            for part in (seen, control)
            if part.questions
        ]
        binary = name != "longest_run"
        check = _share(f"memorised_{name}", f"training rows: {label}", found[0], seed, binary=binary)
        checks.append(check)
        # What the base says already, of either kind of rows, is no memory of this training.
        gains = [np.subtract(after, before) for before, after in found]
        if len(found) == 1:
            moved = check.change
            beside = "; there are no held-out rows to hold it against"
        else:
            other = _share(f"control_{name}", f"held-out rows: {label}", found[1], seed, binary=binary)
            other.verdict = "what comes back of rows it never saw"
            moved = unpaired(gains[0], gains[1], seed=seed)
            beside = f", {other.measure.shown(other.tuned.value)} of rows it never saw"
            checks.append(other)
        fewest = min(map(len, gains))
        if moved.significant and moved.value > 0:
            check.harm = True
            check.verdict = f"memorised: {check.measure.shown(check.tuned.value)}{beside}, {shown_p(moved.p)}"
        elif fewest < FEW:
            check.verdict = f"too few rows to tell: {fewest}{beside if len(found) == 1 else ''}"
        else:
            least = smallest_difference(check.tuned.value, fewest)
            check.verdict = (
                f"no more than of other rows; {fewest} show a difference of {least * 100:.0f} points or more"
            )
        ranked = (-gains[0]).argsort(kind="stable")
        check.examples = [_row(seen, int(i)) for i in ranked if gains[0][i] > 0][:20]
    return checks


def leaking(parts: Sequence[Asked], training: Sequence[TrainingExample], seed: int) -> Check:
    """Whether training answers stand in the answers to other questions."""
    own = [[q.asked, *q.references] for part in parts for q in part.questions]
    read = [e.answer or "" for e in itertools.islice(training, LEAKS_READ)]
    found = [memorisation.leaks([t for part in parts for t in part.texts(i)], own, read) for i in (0, 1)]
    size = memorisation.LEAK_WORDS
    check = _share(
        "leaked",
        "answers that hold another row's",
        [[float(f is not None) for f in each] for each in found],
        seed,
    )
    places = [(part, i) for part in parts for i in range(len(part.questions))]
    for place, leak in zip(places, found[1], strict=True):
        if leak is not None:
            source = training[leak[0]].source
            check.examples.append(_row(*place) | {"training": str(source) if source else f"row {leak[0] + 1}"})
    count = len(check.examples)
    if check.change.significant and check.change.value > 0:
        check.harm = True
        check.verdict = (
            f"{count} of {check.rows} answers give {size} words of a training row's answer, {shown_p(check.change.p)}"
        )
    elif count:
        check.verdict = f"{count} of {check.rows} answers give {size} words of a training row's answer; see where"
    else:
        check.verdict = f"none has {size} words of a training row's answer"
    return check


# --- refusals and drift ---


def refusing(parts: Sequence[Asked], seed: int) -> Check:
    places = [
        (part, i)
        for part in parts
        for i, q in enumerate(part.questions)
        if not any(map(refuses, q.references))  # to refuse is right there
    ]
    refused = [[refuses(part.answers[model][i].text) for part, i in places] for model in (0, 1)]
    check = _share("refusals", "answers that refuse", [list(map(float, r)) for r in refused], seed)
    check.examples = [
        _row(part, i) for (part, i), before, after in zip(places, *refused, strict=True) if after and not before
    ]
    _told(check, "refuses more", "refuses less", "more refusals")
    return check


def drifting(parts: Sequence[Asked], seed: int, notes: list[str]) -> list[Check]:
    places, found = [], []
    for part in parts:
        for i, q in enumerate(part.questions):
            texts = [part.answers[model][i].text for model in (0, 1)]
            if expected_language(q.asked, q.references) is not None and any(map(language_of, texts)):
                places.append((part, i))
                found.append([drift(q.asked, text, q.references) for text in texts])
    if not places:
        notes.append("no answer is long enough to tell its language, so drift was not measured")
        return []
    check = _share(
        "drift", "answers in another language", [[float(f[i] is not None) for f in found] for i in (0, 1)], seed
    )
    pairs = Counter(pair for _, pair in found if pair is not None)
    check.examples = [
        _row(part, i) | {"languages": " to ".join(after)}
        for (part, i), (before, after) in zip(places, found, strict=True)
        if after is not None and after != before
    ]
    _told(check, "drifts", "drifts less", "drift")
    if pairs:
        told = ", ".join(f"{a} answered in {b}: {n}" for (a, b), n in pairs.most_common(3))
        check.verdict += f" ({told})"
    return [check]


def _told(check: Check, worse: str, better: str, what: str) -> None:
    moved = check.change
    if moved.significant and moved.value > 0:
        check.harm = True
        check.verdict = f"{worse}: {_from_to(check)}, {shown_p(moved.p)}"
    elif moved.significant:
        check.verdict = f"{better}: {_from_to(check)}, {shown_p(moved.p)}"
    else:
        check.verdict = _unseen(check, what)
