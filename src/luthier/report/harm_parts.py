"""The part of a report that shows what tuning has cost."""

from __future__ import annotations

from collections.abc import Iterator

from luthier.evaluation.measures import shown
from luthier.report.blocks import Block, Cell, Heading, Listing, Table
from luthier.report.gather import Report
from luthier.report.verdict import shown_p


def harm_blocks(report: Report) -> Iterator[Block]:
    """What tuning has cost, where that was measured."""
    if not report.harm:
        return
    yield Heading("What tuning has cost")
    rows: list[list[str | Cell]] = []
    for check in report.harm["checks"]:
        how = {"share": False, "digits": 3} | check.get("measure", {})

        def number(value: float | None, signed: bool = False, how: dict[str, object] = how) -> str:
            if value is None:
                return "–"
            return shown(value, share=bool(how["share"]), digits=int(str(how["digits"])), signed=signed)

        change = check["change"]
        between = f"{number(change['low'], True)} … {number(change['high'], True)}"
        rows.append(
            [
                check["label"],
                f"{check['rows']:,}",
                number(check["base"]["value"]),
                number(check["tuned"]["value"]),
                number(change["value"], True),
                between,
                shown_p(change["p"]),
                Cell(check["verdict"], "bad" if check["harm"] else ""),
            ]
        )
    yield Table("", ["", "rows", "base", "tuned", "change", "95% interval", "p", "verdict"], rows, words=True)
    asked = [
        f"{check['label']}: {_short(row['asked'])} → base {_short(row['base'])}, tuned {_short(row['tuned'])}"
        for check in report.harm["checks"]
        if check["harm"]
        for row in check["examples"][:2]
    ]
    if asked:
        yield Listing(asked, "dim")
    if report.harm.get("notes"):
        yield Listing(report.harm["notes"], "warning")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else f"{line[:160]}…"
