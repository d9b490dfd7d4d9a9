"""A benchmark as the terminal shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.evaluation.harness.benchmark import Benchmark, Key, ModelScores, Score

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def render_benchmark(found: Benchmark) -> RenderableType:
    """Scores with their standard errors, changes beside the first model, what was asked, and notes."""
    from rich.console import Group
    from rich.text import Text

    base, *others = found.models
    parts: list[RenderableType] = [_scores(found)]
    parts += [_against(base, other) for other in others]
    legend = "±: the harness's standard error"
    if others:
        legend += (
            "; p: how likely a change as large is between equal models; won/lost: rows on which it is better, or worse"
        )
    parts.append(Text(legend, style="dim"))
    for name, task in found.tasks.items():
        asked = f"{task.rows:,} of {task.of:,} rows" if task.rows != task.of else f"{task.rows:,} rows"
        parts.append(
            Text(
                f"{name}: version {task.version}, {task.num_fewshot} examples, {asked}, "
                f"definition {task.config_hash[:12]}, rows {task.rows_hash[:12]}",
                style="dim",
            )
        )
    parts.append(Text(", ".join(f"{name} {number}" for name, number in found.versions.items()), style="dim"))
    parts += [Text(f"! {note}", style="yellow") for note in found.notes]
    return Group(*parts)


def _table(title: str) -> Table:
    from rich.table import Table

    return Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")


def _label(key: Key) -> tuple[str, str]:
    task, metric, chosen = key
    return task, metric if chosen == "none" else f"{metric}, {chosen}"


def _value(score: Score | None) -> str:
    if score is None:
        return "–"
    error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
    return f"{score.value:.4f}{error}"


def _scores(found: Benchmark) -> Table:
    table = _table("")
    table.add_column("task")
    table.add_column("metric")
    for model in found.models:
        table.add_column(model.name, justify="right", no_wrap=True)
    for key in found.models[0].scores:
        table.add_row(*_label(key), *[_value(model.scores.get(key)) for model in found.models])
    return table


def _against(base: ModelScores, other: ModelScores) -> Table:
    """One model beside the first: the change with its interval, and rows won and lost."""
    table = _table(f"{other.name} beside {base.name}")
    for heading in ("task", "metric"):
        table.add_column(heading)
    for heading in ("change", "95% interval", "p", "won/lost"):
        table.add_column(heading, justify="right", no_wrap=True)
    for key, score in other.scores.items():
        found = other.changes.get(key)
        if found is None:
            table.add_row(*_label(key), "–", "", "", "")
            continue
        better = score.measure.better
        good = (found.value > 0) == (better == "higher")
        style = "" if better is None or not found.significant else "green" if good else "red"
        shown = f"{found.value:+.4f}"
        table.add_row(
            *_label(key),
            f"[{style}]{shown}[/]" if style else shown,
            f"{found.low:+.4f} … {found.high:+.4f}",
            "<0.001" if found.p < 0.001 else f"{found.p:.3f}",
            "" if better is None else f"{found.wins}/{found.losses}",
        )
    return table
