"""A report on harm as a terminal and a report show it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.errors import shorten
from luthier.evaluation.harm import HarmReport
from luthier.evaluation.harm_checks import Check

if TYPE_CHECKING:
    from rich.console import RenderableType

# Rows of a harmful check that are shown; the JSON has them all.
_SHOWN = 2


def render_harm(report: HarmReport) -> RenderableType:
    """The table of checks, the rows behind those that found harm, and the notes, for a rich console."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title="what tuning has cost", title_justify="left")
    table.add_column("")
    for heading in ("base", "tuned", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", ratio=1, overflow="fold")
    for check in report.checks:
        style = "red" if check.harm else "dim" if check.name.startswith("control_") else ""
        table.add_row(
            Text(check.label),
            check.measure.shown(check.base.value),
            check.measure.shown(check.tuned.value),
            _changed(check),
            Text(check.verdict),
            style=style,
        )
    parts: list[RenderableType] = [table]
    for check in report.harmed:
        for row in check.examples[:_SHOWN]:
            said = f"{_short(row['asked'])} → base {_short(row['base'])}, tuned {_short(row['tuned'])}"
            parts.append(Text(f"{check.label}: {said}", style="dim"))
    parts += [Text(f"! {note}", style="yellow") for note in report.notes[:5]]
    return Group(*parts)


def _changed(check: Check) -> str:
    """The change, and its interval below."""
    low, high = (check.measure.shown(value, signed=True) for value in (check.change.low, check.change.high))
    return f"{check.measure.shown(check.change.value, signed=True)}\n{low} to {high}"


def _short(text: str) -> str:
    return shorten(text.replace("\x1b", "␛").strip(), 80)
