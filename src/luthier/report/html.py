"""A report as one HTML file."""

from __future__ import annotations

import re
from collections.abc import Sequence

from luthier.page import page, text
from luthier.report import blocks
from luthier.report.blocks import Block
from luthier.report.svg import chart

_STYLE = """
nav ul { columns: 3; list-style: none; padding: 0; } a { color: var(--bar); }
.lead { font-weight: 600; } p.good, td.good { color: var(--good); } p.bad, td.bad { color: var(--error); }
p.warning, ul.warning { color: var(--warning); }
p.good, p.bad, p.warning { border-left: 4px solid; padding-left: .8rem; }
p.good > span, p.bad > span, p.warning > span { color: var(--ink); } p { overflow-wrap: anywhere; }
.wide { overflow-x: auto; } caption { text-align: left; font-weight: 600; padding: .6rem 0 .2rem; }
th[scope=row] { text-align: left; color: var(--ink); border: 0; overflow-wrap: anywhere; min-width: 8rem; }
tbody tr { border-bottom: 1px solid var(--line); } td { font-variant-numeric: tabular-nums; white-space: nowrap; }
table.words td { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top; }
table.words td { min-width: 5rem; }
table.words th[scope=row] { vertical-align: top; white-space: nowrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); padding: .6rem; margin: .4rem 0; }
section.sample { border: 1px solid var(--line); padding: 0 1rem .6rem; margin: 1rem 0; }
.said { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: .2rem 1rem; }
.judged { margin: .6rem 0 0; font-size: .9rem; overflow-wrap: anywhere; } summary { cursor: pointer; }
.said h4, section.sample h4 { margin: .6rem 0 0; font-size: .85rem; color: var(--dim); }
ins { color: var(--error); text-decoration: underline; } del { color: var(--good); text-decoration: line-through; }
svg .curve, svg .dot { stroke-width: 1.5; } svg .c1 { stroke: var(--warning); } svg .c2 { stroke: var(--good); }
svg .curve.c1 { stroke-dasharray: 6 3; } svg .curve.c2 { stroke-dasharray: 2 3; }
svg .dot { fill: var(--paper); stroke: var(--bar); }
svg .dot.c1 { stroke: var(--warning); } svg .dot.c2 { stroke: var(--good); }
@media print { details::details-content { content-visibility: visible; block-size: auto; }
  nav { display: none; } body { max-width: none; margin: 0; } h2, h3, caption { break-after: avoid; }
  svg, tr, section.sample { break-inside: avoid; } }
"""


def render_html(title: str, content: Sequence[Block]) -> str:
    """The page; every text is escaped."""
    heads = [(number, block) for number, block in enumerate(content) if isinstance(block, blocks.Heading)]
    links = "".join(
        f'<li><a href="#{_anchor(number, head)}">{text(head.text)}</a></li>'
        for number, head in heads
        if head.level == 2
    )
    body = [f"<header><h1>{text(title)}</h1></header>", f'<nav aria-label="Contents"><ul>{links}</ul></nav>', "<main>"]
    body += [_block(block, number) for number, block in enumerate(content)]
    return page(title, "\n".join([*body, "</main>"]), _STYLE)


def _anchor(number: int, heading: blocks.Heading) -> str:
    return f"{number}-{re.sub(r'[^a-z0-9]+', '-', heading.text.lower()).strip('-')}"


def _block(block: Block, number: int) -> str:
    match block:
        case blocks.Heading():
            return f'<h{block.level} id="{_anchor(number, block)}">{text(block.text)}</h{block.level}>'
        case blocks.Text():
            lead = f'<span class="lead">{text(block.lead)}</span> ' if block.lead else ""
            return f"<p{_class(block.mood)}>{lead}<span>{text(block.text)}</span></p>"
        case blocks.Listing():
            items = "".join(f"<li>{text(item)}</li>" for item in block.items)
            return f"<ul{_class(block.mood)}>{items}</ul>"
        case blocks.Table():
            return _table(block)
        case blocks.Code():
            return f"<pre><code>{text(block.text)}</code></pre>"
        case blocks.Sample():
            return _sample(block)
        case blocks.Plot():
            return f"<figure>{chart(block, number)}<figcaption>{text(block.title)}</figcaption></figure>"


def _class(mood: str) -> str:
    return f' class="{mood}"' if mood else ""


def _table(table: blocks.Table) -> str:
    heads = "".join(f'<th scope="col" class="{"left" if i == 0 or table.words else "right"}">{text(head)}</th>'
                    for i, head in enumerate(table.heads))  # fmt: skip
    rows = "".join(f"<tr>{''.join(_cell(cell, i) for i, cell in enumerate(row))}</tr>" for row in table.rows)
    caption = f"<caption>{text(table.title)}</caption>" if table.title else ""
    kind = ' class="words"' if table.words else ""
    return f'<div class="wide"><table{kind}>{caption}<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(cell: str | blocks.Cell, place: int) -> str:
    found = cell if isinstance(cell, blocks.Cell) else blocks.Cell(cell)
    if place == 0:
        return f'<th scope="row">{text(found.text)}</th>'
    shade = f' style="background: rgb(59 120 196 / {found.shade:.2f})"' if found.shade else ""
    return f"<td{_class(found.mood)}{shade}>{text(found.text)}</td>"


def _sample(sample: blocks.Sample) -> str:
    said = ""
    for name, parts, note in sample.said:
        marked = "".join(_MARKS[kind].format(text(part)) for kind, part in parts) or '<span class="dim">(empty)</span>'
        more = f' <span class="dim">{text(note)}</span>' if note else ""
        said += f"<div><h4>{text(name)}</h4><pre>{marked}{more}</pre></div>"
    return (
        f'<section class="sample"><h4>{text(sample.title)}</h4><pre>{text(sample.asked)}</pre>'
        f"<h4>right answer</h4><pre>{text(sample.right)}</pre>"
        f'<div class="said">{said}</div>{"".join(_judged(*one) for one in sample.judged)}</section>'
    )


def _judged(told: str, replies: Sequence[tuple[str, str]]) -> str:
    if not replies:
        return f'<p class="judged">{text(told)}</p>'
    shown = "".join(f"<div><h4>{text(order)}</h4><pre>{text(reply)}</pre></div>" for order, reply in replies)
    return f'<details class="judged"><summary>{text(told)}</summary><div class="said">{shown}</div></details>'


_MARKS = {"same": "{}", "added": "<ins>{}</ins>", "missing": "<del>{}</del>"}
