"""A comparison as a terminal and a report show it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.errors import counted
from luthier.evaluation.comparison import Comparison, ModelResult
from luthier.evaluation.differences import differences
from luthier.evaluation.generation import Answer
from luthier.evaluation.judged import Judging
from luthier.evaluation.statistics import Change, Interval

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

# The judge's line of the tables.
_JUDGE = "judge"
# Characters of a text that the side-by-side view shows.
_SHOWN = 700


def render_comparison(comparison: Comparison) -> RenderableType:
    """Tables of the scores, the notes, and the chosen rows side by side, for a rich console."""
    from rich.console import Group
    from rich.text import Text

    base, *others = comparison.models
    parts: list[RenderableType] = []
    if len(others) > 1:
        parts.append(_scores(comparison))
    parts += [_against(comparison, base, other) for other in others]
    parts.append(Text(_legend(comparison), style="dim"))
    parts += [Text(f"{name}: {text}", style="dim") for name, text in comparison.signatures.items()]
    if comparison.judging is not None:
        parts += _judging(comparison.judging)
    parts += [Text(f"! {note}", style="yellow") for note in comparison.notes]
    parts += [_sample(comparison, i) for i in comparison.samples]
    if comparison.samples:
        parts.append(Text("underlined: not in the right answer", style="dim"))
    return Group(*parts)


def _scores(comparison: Comparison) -> Table:
    """Every model's values with their intervals."""
    table = _plain_table(counted(len(comparison.questions), "row"))
    table.add_column("")
    for model in comparison.models:
        table.add_column(model.name, justify="right")
    for name, measure in comparison.models[0].measures.items():
        table.add_row(measure.label, *[_value(model, name, around=True) for model in comparison.models])
    rates = [_win_rate(comparison, model) for model in comparison.models]
    if any(rates):
        table.add_row(_JUDGE, *["–" if rate is None else _share_around(rate) for rate in rates])
    return table


def _win_rate(comparison: Comparison, model: ModelResult) -> Interval | None:
    judged = None if comparison.judging is None else comparison.judging.models.get(model.name)
    return None if judged is None else judged.win_rate


def _share_around(share: Interval) -> str:
    return f"{share.value:.1%} \\[{share.low:.1%}, {share.high:.1%}]"


def _judging(judging: Judging) -> list[RenderableType]:
    """Who has judged, what came of it, and what exactly was asked."""
    from rich.padding import Padding
    from rich.text import Text

    lines = [
        f"judge: {judging.model} at {judging.endpoint}; a row is won or lost where both orders of the answers say so, "
        "else tied; the tables have the share of rows won, ties as half",
        *[judged.describe(name) for name, judged in judging.models.items()],
        "it was asked:",
    ]
    prompt = Padding(Text(judging.prompt.rstrip(), style="dim"), (0, 0, 0, 4))
    return [Text("\n".join(lines), style="dim"), prompt]


def _plain_table(title: str) -> Table:
    from rich.table import Table

    return Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")


def _value(model: ModelResult, name: str, *, around: bool = False) -> str:
    if name not in model.intervals:
        return "–"
    measure, found = model.measures[name], model.intervals[name]
    shown = measure.shown(found.value)
    return f"{shown} \\[{measure.shown(found.low)}, {measure.shown(found.high)}]" if around else shown


def _against(comparison: Comparison, base: ModelResult, other: ModelResult) -> Table:
    """One model beside the first: values, the change with its interval, and rows won and lost."""
    table = _plain_table(f"{other.name} beside {base.name}, {counted(len(comparison.questions), 'row')}")
    table.add_column("")
    for heading in (base.name, other.name, "change", "95% interval", "p", "won/lost"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, measure in other.measures.items():
        found = other.changes.get(name)
        values = (measure.label, _value(base, name), _value(other, name))
        table.add_row(*values, *(("",) * 4 if found is None else _change(found, measure.shown, measure.better)))
    judged = None if comparison.judging is None else comparison.judging.models.get(other.name)
    if judged is not None and (rate := judged.win_rate) is not None and judged.change is not None:
        table.add_row(
            _JUDGE, f"{1 - rate.value:.1%}", f"{rate.value:.1%}", *_change(judged.change, _points, better="higher")
        )
    return table


def _change(found: Change, show: Callable[..., str], better: str | None) -> tuple[str, str, str, str]:
    """The change, its interval, its significance, and rows won and lost."""
    good = (found.value > 0) == (better == "higher")
    style = "" if better is None or not found.significant else "green" if good else "red"
    shown = show(found.value, signed=True)
    return (
        f"[{style}]{shown}[/]" if style else shown,
        f"{show(found.low, signed=True)} … {show(found.high, signed=True)}",
        "<0.001" if found.p < 0.001 else f"{found.p:.3f}",
        "" if better is None else f"{found.wins}/{found.losses}",
    )


def _points(share: float, *, signed: bool = True) -> str:
    return f"{share:{'+' if signed else ''}.1%}"


def _legend(comparison: Comparison) -> str:
    """How to read the tables, and how many rows improved."""
    lines = [
        "perplexity and bits per byte are those of the right answers; won/lost: rows on which it is better, or worse",
        "p: how likely a change as large is between equal models, of each line alone; coloured below 0.05",
    ]
    base = comparison.models[0]
    label = base.measures[comparison.judged_by].label
    for model in comparison.models[1:]:
        better, worse = len(comparison.improved(model)), len(comparison.worsened(model))
        rows = counted(better, "row")
        lines.append(f"{model.name}: {rows} improved and {worse:,} got worse beside {base.name}, by {label}")
    return "\n".join(lines)


def _nearer(where: str) -> str:
    """A place as one would type it here: relative where it lies under the working directory."""
    return where.removeprefix(str(Path.cwd()) + os.sep)


def _sample(comparison: Comparison, index: int) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    question = comparison.questions[index]
    reference = question.references[0]
    table = Table(show_header=False, title=_nearer(question.where), title_justify="left", show_lines=True, expand=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(ratio=1, overflow="fold")
    table.add_row("asked", Text(_visible(question.asked)))
    table.add_row("right", Text(_visible(reference)))
    answers = Table.grid(expand=True, padding=(0, 2))
    shown = comparison.models[:2]
    for _ in shown:
        answers.add_column(ratio=1, overflow="fold")
    answers.add_row(*[Text(m.name, style="bold") for m in shown])
    answers.add_row(*[_marked(m.answers[index], reference) for m in shown])
    table.add_row("said", answers)
    return table


def _marked(answer: Answer, reference: str) -> Text:
    """An answer with what is not in the reference underlined."""
    from rich.text import Text

    if not answer.text.strip():
        return Text("(empty)", style="dim")
    text = Text()
    for kind, part in differences(_visible(answer.text), reference):
        if kind != "missing":
            text.append(part, style="green" if kind == "same" else "underline red")
    if not answer.stopped:
        text.append(" (cut at the limit)", style="dim")
    return text


def _visible(text: str) -> str:
    """At most ``_SHOWN`` characters, without the escape character, which a terminal would obey."""
    text = text.replace("\x1b", "␛").strip()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text) - _SHOWN:,} more characters)"
