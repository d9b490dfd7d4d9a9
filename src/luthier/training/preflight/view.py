"""The pre-flight on a terminal: a table of findings, and real rows with their trained tokens coloured."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from luthier.training.preflight.findings import Preflight

_MARKS = {"error": ("✗ error", "bold red"), "warning": ("! warning", "yellow"), "info": ("i note", "cyan")}


def render_preflight(report: Preflight) -> Group:
    """The findings as a table, under what is trained and the counts of rows and tokens."""
    counts = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("rows", "read", "kept", "refused", "set aside", "tokens", "trained tokens"):
        counts.add_column(column, justify="left" if column == "rows" else "right")
    for name, part in report.facts["rows"].items():
        keys = ("rows_in", "kept", "refused", "set_aside", "tokens", "trained_tokens")
        counts.add_row(name, *(f"{part[key]:,}" for key in keys))
    lines: list[Text | Table] = [Text(_trained(report.facts)), counts]
    if report.findings:
        table = Table(show_lines=True, expand=True)
        table.add_column("", width=9)
        table.add_column("code", no_wrap=True)
        table.add_column("what and where", ratio=3)
        table.add_column("what to do", ratio=2)
        for finding in report.findings:
            label, style = _MARKS[finding.severity]
            what = Text(finding.message)
            if finding.rows:
                more = f" … {finding.count:,} in all" if finding.count > len(finding.rows) else ""
                what.append(f"\n{', '.join(finding.rows)}{more}", style="dim")
            table.add_row(Text(label, style=style), finding.code, what, Text(finding.remedy))
        lines.append(table)
    errors, warnings = len(report.errors), sum(f.severity == "warning" for f in report.findings)
    verdict = Text("pre-flight: ", style="bold")
    if errors:
        verdict.append(f"{errors} error{'s' * (errors > 1)}, the run is refused", style="bold red")
    elif warnings:
        verdict.append(f"passed with {warnings} warning{'s' * (warnings > 1)}", style="yellow")
    else:
        verdict.append("passed", style="green")
    verdict.append(f"  ({report.seconds:.1f} s)", style="dim")
    return Group(*lines, verdict)


def _trained(facts: dict[str, Any]) -> str:
    """What the method trains, its share of the parameters, and what that needs beside the loaded weights."""
    method, counts = facts["method"], facts["parameters"]
    share = counts["trained"] / max(counts["all"], 1)
    text = f"{method['name']}: {method['trains']}; {counts['trained']:,} of {counts['all']:,} parameters ({share:.2%})"
    if needs := facts.get("predicted_bytes"):
        weights, work = needs["weights"], needs["optimiser"] + needs["activations"]
        text += f"; about {weights / 1e9:.1f} GB of weights and {work / 1e9:.1f} GB to train them"
    return text + ("; can be merged into the base" if method["merges"] else "")
