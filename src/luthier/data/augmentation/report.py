"""What became of every variant that was asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.data.augmentation.filters import REASONS

if TYPE_CHECKING:
    from rich.console import RenderableType

_SAMPLES = 3
# Failures that are listed with their place; beyond, they are counted.
_LISTED = 100


@dataclass(slots=True)
class StepReport:
    """One augmenter's part."""

    name: str
    made: int = 0
    unchanged: int = 0
    """Rows in which it found nothing to vary."""
    refused: Counter[str] = field(default_factory=Counter)
    """Variants that are none, by the reasons of :data:`luthier.data.augmentation.filters.REASONS`."""
    failed: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    """Place and error of the first hundred."""
    samples: list[tuple[str, str]] = field(default_factory=list)
    """A few texts before and after."""
    refused_samples: list[tuple[str, str, str]] = field(default_factory=list)
    """Reason, text before, text after, one for each reason."""

    def keep(self, before: str, after: str) -> None:
        self.made += 1
        if len(self.samples) < _SAMPLES:
            self.samples.append((before, after))

    def refuse(self, reason: str, before: str, after: str) -> None:
        if not self.refused[reason]:
            self.refused_samples.append((reason, before, after))
        self.refused[reason] += 1

    def fail(self, place: str, error: str) -> None:
        self.failed += 1
        if len(self.failures) < _LISTED:
            self.failures.append((place, error))


@dataclass(slots=True)
class AugmentationReport:
    """All augmenters' parts."""

    rows: int
    wanted: int
    """Variants that the ratio asks for."""
    made: int = 0
    without_text: int = 0
    """Rows that were asked for a variant and have no prompt of their own: all of them is trained."""
    steps: list[StepReport] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return {
            "rows": self.rows,
            "wanted": self.wanted,
            "made": self.made,
            "without_text": self.without_text,
            "steps": [
                {
                    "name": step.name,
                    "made": step.made,
                    "unchanged": step.unchanged,
                    "refused": dict(step.refused),
                    "failed": step.failed,
                    "failures": [{"where": where, "error": error} for where, error in step.failures],
                    "samples": [{"before": before, "after": after} for before, after in step.samples],
                }
                for step in self.steps
            ],
        }


def render_augmentation(report: AugmentationReport) -> RenderableType:
    """The report as a table, with samples of each augmenter and what went wrong below it."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{report.made:,} of {report.wanted:,} variants of {report.rows:,} rows")
    for name in ("augmenter", "made", "nothing to vary", "refused", "failed"):
        table.add_column(name, justify="left" if name == "augmenter" else "right")
    lines: list[str] = []
    for step in report.steps:
        refused = ", ".join(f"{reason} {count:,}" for reason, count in step.refused.most_common()) or "0"
        table.add_row(escape(step.name), f"{step.made:,}", f"{step.unchanged:,}", refused, f"{step.failed:,}")
        for before, after in step.samples:
            lines.append(f"[bold]{escape(step.name)}[/bold]\n  - {escape(_short(before))}\n  + {escape(_short(after))}")
        for reason, before, after in step.refused_samples:
            what = f"refused, {REASONS.get(reason, reason)}"
            lines.append(
                f"[yellow]{escape(step.name)}: {escape(what)}[/yellow]"
                f"\n  - {escape(_short(before))}\n  x {escape(_short(after))}"
            )
        for where, error in step.failures[:_SAMPLES]:
            lines.append(f"[red]{escape(step.name)} failed[/red] at {escape(where)}: {escape(error)}")
    if report.without_text:
        lines.append(f"{report.without_text:,} rows have no prompt that could vary: all of their text is trained")
    return Group(table, *lines)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:199] + "…"
