"""The pre-flight on a terminal: a table of findings, and real rows with their trained tokens coloured."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from luthier.data.dataset import Dataset
from luthier.data.encode import EncodedExample
from luthier.training.preflight.findings import Preflight

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = {"error": ("✗ error", "bold red"), "warning": ("! warning", "yellow"), "info": ("i note", "cyan")}
_CHARACTERS = 1200


def render_preflight(report: Preflight) -> Group:
    """The findings as a table, under the counts of rows and tokens."""
    counts = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("rows", "read", "kept", "refused", "set aside", "tokens", "trained tokens"):
        counts.add_column(column, justify="left" if column == "rows" else "right")
    for name, part in report.facts["rows"].items():
        keys = ("rows_in", "kept", "refused", "set_aside", "tokens", "trained_tokens")
        counts.add_row(name, *(f"{part[key]:,}" for key in keys))
    lines: list[Text | Table] = [counts]
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


def render_rows(dataset: Dataset, count: int = 3) -> Group:
    """A few training rows as the model reads them: trained tokens on green, context dim, a long middle left out."""
    tokenizer = dataset.renderer.tokenizer
    shown = [
        Text.assemble(("  trained  ", "black on green"), ("  context, not trained  ", "dim"), "  ↵ is a line's end")
    ]
    for row in dataset.train.encoded[:count]:
        head = f"{row.source}: {len(row):,} tokens, {int(row.trained.sum()):,} trained"
        shown.append(Text.assemble("\n", (head, "bold")))
        shown.append(_coloured(row, tokenizer))
    return Group(*shown)


def _coloured(row: EncodedExample, tokenizer: PreTrainedTokenizerBase) -> Text:
    text = Text()
    edges = np.flatnonzero(np.diff(row.trained.astype(np.int8))) + 1
    borders = [0, *edges.tolist(), len(row)]
    # Whole runs are decoded, for one token may be a part of a character.
    for a, b in itertools.pairwise(borders):
        piece = str(tokenizer.decode(row.input_ids[a:b], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if len(piece) > _CHARACTERS:
            piece = (
                piece[: _CHARACTERS // 2]
                + f" … {len(piece) - _CHARACTERS:,} characters … "
                + piece[-_CHARACTERS // 2 :]
            )
        text.append(piece.replace("\n", "↵\n"), style="black on green" if row.trained[a] else "dim")
    return text
