"""A report as Markdown (GitHub's kind), in which no text is read as markup."""

from __future__ import annotations

import re
from collections.abc import Iterable

from luthier.page import harmless
from luthier.report import blocks
from luthier.report.blocks import Block

_LEADS = {"good": "✓ ", "bad": "✗ ", "warning": "! ", "": "", "dim": ""}
_MARKS = {"same": "{}", "added": "{{+{}+}}", "missing": "[-{}-]"}


def render_markdown(title: str, content: Iterable[Block]) -> str:
    """The document."""
    return "\n\n".join([f"# {inline(title)}", *(block for b in content if (block := render_block(b)))]) + "\n"


def inline(value: object) -> str:
    """A text on one line, with all that Markdown would read as markup, or HTML, escaped."""
    line = " ".join(harmless(value).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*\[\]|~$])", r"\\\1", line)
    line = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)  # within a word it means nothing
    # What begins a list, a heading or a rule.
    line = re.sub(r"^([#+=-])(?=[#+=-]*(?:\s|$))", r"\\\1", line)
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)


def fenced(value: str, language: str = "text") -> str:
    """A text as it is, between fences longer than any run of backticks in it."""
    shown = harmless(value)
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", shown)), 3)
    return f"{fence}{language}\n{shown}\n{fence}"


def render_block(block: Block) -> str:
    """One part of a document."""
    match block:
        case blocks.Heading():
            return f"{'#' * block.level} {inline(block.text)}"
        case blocks.Text():
            lead = f"**{inline(block.lead)}** " if block.lead else ""
            return f"{lead}{_LEADS[block.mood]}{inline(block.text)}"
        case blocks.Listing():
            return "\n".join(f"- {_LEADS[block.mood]}{inline(item)}" for item in block.items)
        case blocks.Table():
            return _table(block)
        case blocks.Code():
            return fenced(block.text, block.language)
        case blocks.Sample():
            return _sample(block)
        case blocks.Plot():
            return "\n".join([f"**{inline(block.title)}**", "", *(f"- {inline(line)}" for line in block.told())])


def _table(table: blocks.Table) -> str:
    align = [":--" if i == 0 or table.words else "--:" for i in range(len(table.heads))]
    rows = [[inline(head) for head in table.heads], align]
    rows += [[inline(cell if isinstance(cell, str) else cell.text) for cell in row] for row in table.rows]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*([f"**{inline(table.title)}**", ""] if table.title else []), *lines])


def _sample(sample: blocks.Sample) -> str:
    parts = [f"**{inline(sample.title)}**", fenced(sample.asked), "right answer", fenced(sample.right)]
    for name, said, note in sample.said:
        marked = "".join(_MARKS[kind].format(part) for kind, part in said) or "(empty)"
        parts += [f"{inline(name)}{f' {inline(note)}' if note else ''}", fenced(marked)]
    for told, replies in sample.judged:
        parts.append(inline(told))
        for order, reply in replies:
            parts += [inline(order), fenced(reply)]
    return "\n\n".join(parts)
