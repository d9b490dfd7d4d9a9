"""What lint found, on a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from luthier.data.advice import FORMULA, fitting_method
from luthier.data.findings import Finding
from luthier.data.lint import Lint

_MARKS = {"error": ("✗ error", "bold red"), "warning": ("! warning", "yellow"), "info": ("i note", "cyan")}


def render_lint(lint: Lint, name: str) -> Group:
    """The findings, worst first, with samples and remedies, and how much data the methods want."""
    copies = lint.rows - lint.different
    shown: list[RenderableType] = [
        Text(f"{name}: {lint.rows:,} rows, {copies:,} of them copies of an earlier one", style="bold")
    ]
    for finding in lint.findings:
        shown += ["", _finding(finding)]
    if not lint.findings:
        shown.append(Text("nothing was found", style="green"))
    shown += ["", Text("how much data the method wants (rules of thumb)", style="bold")]
    styles = {"too few": "yellow", "enough": "green", "plenty": "green"}
    for verdict in lint.verdicts:
        shown.append(Text.assemble(f"  {verdict.text.rpartition('; ')[0]}: ", (verdict.word, styles[verdict.word])))
    shown += [Text(fitting_method(lint.different)), Text(FORMULA, style="dim"), ""]
    errors, warnings = len(lint.errors), sum(f.severity == "warning" for f in lint.findings)
    style = "bold red" if errors else "yellow" if warnings else "green"
    shown.append(Text(f"lint: {errors} errors, {warnings} warnings", style=style))
    return Group(*shown)


def _finding(finding: Finding) -> Text:
    label, style = _MARKS[finding.severity]
    text = Text.assemble((label, style), " ", (finding.code, "bold"), f"  {finding.message}")
    samples = finding.samples or ("",) * len(finding.rows)
    for place, sample in zip(finding.rows, samples, strict=False):
        text.append(f"\n    {place}", style="dim")
        if sample:
            text.append(f"  {sample}")
    if finding.count > len(finding.rows) > 0:
        text.append(f"\n    … {finding.count - len(finding.rows):,} more", style="dim")
    if finding.remedy:
        text.append("\n    to do: ", style="bold")
        text.append(finding.remedy)
    return text
