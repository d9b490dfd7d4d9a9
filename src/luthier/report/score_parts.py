"""The parts of a report that show evaluations: tables with intervals, and rows side by side."""

from __future__ import annotations

from collections.abc import Iterator

from luthier.evaluation.differences import differences
from luthier.report.blocks import Block, Cell, Listing, Sample, Table, Text, cut
from luthier.report.calibration_parts import calibration_blocks
from luthier.report.evaluation_files import Evaluation, Example, Line
from luthier.report.judge_parts import judge_blocks, said_of_row
from luthier.report.verdict import shown_p

_CLASSES = 25
"""Of more classes, those that are confused most often are listed in the place of the matrix."""


def evaluation_blocks(found: Evaluation) -> Iterator[Block]:
    """Scores with their intervals, the changes, and what looks wrong."""
    if len(found.models) > 2 or found.base is None:
        yield all_scores(found)
    for model in found.models[1:]:
        yield against_first(found, model)
        if model in found.moved:
            better, worse = found.moved[model]
            label = found[found.main].label
            yield Text(
                f"{model}: {better:,} rows improved and {worse:,} got worse beside {found.models[0]}, by {label}."
            )
    if found.by_class:
        yield _by_class(found)
    if found.confusion:
        yield _confusion(found)
    yield from calibration_blocks(found)
    yield from judge_blocks(found)
    if found.notes:
        yield Listing(found.notes, "warning")
    told = [f"answers: {found.decoding}"] if found.decoding else []
    told += [f"{name}: {signature}" for name, signature in found.signatures.items()]
    told.append(
        "95% interval: where the score would lie with other rows of the same kind; p: how likely a change as large is "
        "between equal models, of each line alone"
    )
    yield Listing(told, "dim")


def all_scores(found: Evaluation) -> Table:
    """Every model's values with their intervals."""
    lines = [*found.lines, *found.judge_line(*found.models[1:])]
    rows = [[line.label, *(with_interval(line, model) for model in found.models)] for line in lines]
    return Table("Scores, with 95% intervals", ["", *found.models], rows)


def with_interval(line: Line, model: str) -> str:
    """A value with the interval around it."""
    around = line.intervals.get(model)
    return line.shown(line.values[model]) + (f" [{line.between(*around)}]" if around else "")


def against_first(found: Evaluation, model: str) -> Table:
    """One model beside the first: values with intervals, the change with its interval, and rows won and lost."""
    first = found.models[0]
    rows: list[list[str | Cell]] = []
    for line in [*found.lines, *found.judge_line(model)]:
        row: list[str | Cell] = [line.label, with_interval(line, first), with_interval(line, model)]
        change = line.changes.get(model)
        if change is None:
            rows.append([*row, "", "", "", ""])
            continue
        good = line.good(change)
        rows.append(
            [
                *row,
                Cell(line.shown(change["value"], signed=True), "" if good is None else "good" if good else "bad"),
                line.between(change["low"], change["high"], signed=True),
                shown_p(change["p"]),
                "" if line.better is None else f"{change['wins']:.0f}/{change['losses']:.0f}",
            ]
        )
    heads = ["", first, model, "change", "95% interval", "p", "won/lost"]
    return Table(f"{model} beside {first}", heads, rows)


def _by_class(found: Evaluation) -> Table:
    rows = [
        [name, f"{of['support']:,.0f}", *(f"{of[key]:.1%}" for key in ("precision", "recall", "f1"))]
        for name, of in sorted(found.by_class.items(), key=lambda item: item[1]["f1"])
    ]
    return Table(f"{found.tuned}, by class, the worst first", ["class", "rows", "precision", "recall", "F1"], rows)


def _confusion(found: Evaluation) -> Table:
    counts, names = found.confusion, found.classes
    if len(names) > _CLASSES:
        pairs = [
            (counts[i][j], names[i], names[j])
            for i in range(len(names))
            for j in range(len(names))
            if i != j and counts[i][j]
        ]
        rows: list[list[str | Cell]] = [
            [right, given, f"{n:,}"] for n, right, given in sorted(pairs, reverse=True)[:_CLASSES]
        ]
        return Table(f"{found.tuned}: classes that are taken for others", ["right", "given", "rows"], rows)
    rows = []
    for name, given in zip(names, counts, strict=True):
        most = sum(given) or 1
        rows.append([name, *(Cell(f"{count:,}", shade=0.6 * count / most) for count in given)])
    return Table(f"{found.tuned}: rows by right class (down) and given class (across)", ["", *names], rows)


# --- rows side by side ---


def sample_blocks(found: Evaluation) -> Iterator[Block]:
    """Rows that improved, that got worse, and that were sampled, marked against the right answer."""
    yield Text(
        "In what a model said, underlined (Markdown: {+…+}) is what the right answer does not have, and struck through "
        "([-…-]) what it has in that place.",
        "dim",
    )
    for example in found.examples:
        yield _sample(example, found.models)


def _sample(example: Example, models: list[str]) -> Sample:
    right = cut(example.right)
    said = []
    for model in models:
        text = cut(example.said[model])
        parts = differences(text, right) if text.strip() else []
        note = "(cut at the limit)" if model in example.cut else ""
        said.append((model, parts, note))
    judged = [said_of_row(models[0], model, told) for model, told in example.judged.items()]
    return Sample(f"{example.why}: {example.where}", cut(example.asked), right, said, judged)
