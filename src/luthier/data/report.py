"""The report of `luthier data stats` and `lint` as one HTML file: no script, nothing from elsewhere, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from luthier.data.advice import FORMULA, fitting_method
from luthier.data.findings import Finding
from luthier.data.lint import Lint
from luthier.data.stats import Stats
from luthier.data.stats_view import facts, groups, headline, length_rows, top
from luthier.data.writers import aside
from luthier.errors import UserError
from luthier.page import page as page_of
from luthier.page import text as _text


def write_report(
    path: Path,
    title: str,
    *,
    stats: Mapping[str, Stats] | None = None,
    lint: Lint | None = None,
    force: bool = False,
) -> None:
    """Write the report.

    Args:
        path: the file.
        title: what was looked at.
        stats: the numbers of each part.
        lint: what was found.
        force: replace an existing file.

    Raises:
        UserError: the file exists or cannot be written.
    """
    if path.exists() and not force:
        raise UserError(f"{str(path)!r} exists", where=str(path), remedy="--force replaces it, or name another file")
    with aside(path) as temporary:
        temporary.write_text(page(title, stats=stats, lint=lint), encoding="utf-8")
        temporary.replace(path)


def page(title: str, *, stats: Mapping[str, Stats] | None = None, lint: Lint | None = None) -> str:
    """The report as HTML; every text of the data is escaped."""
    body = [f"<h1>{_text(title)}</h1>"]
    for name, part in (stats or {}).items():
        body += _stats(part, name)
    if lint is not None:
        body += _lint(lint)
    return page_of(title, "\n".join(body))


# --- numbers ---


def _stats(stats: Stats, name: str) -> list[str]:
    parts = [f"<h2>{_text(headline(stats, name))}</h2>", "<ul>"]
    parts += [f"<li>{_text(line)}</li>" for line in facts(stats)]
    parts.append("</ul>")
    if stats.tokens is not None:
        heads = ["tokens", *(_percent_name(p) for p in stats.tokens.percentiles), "mean"]
        rows = [
            [kind, *(f"{n:,}" for n in lengths.percentiles.values()), f"{lengths.mean:,.1f}"]
            for kind, lengths in length_rows(stats)
        ]
        parts += ["<h3>Lengths</h3>", table(heads, rows), columns([(f"{a:,}", n) for a, _, n in stats.histogram])]
        parts += ["<h3>What each max_length costs</h3>", curve(stats)]
        cut = [
            [f"{at.max_length:,}", f"{at.rows:.2%}", f"{at.answers_refused:.2%}", f"{at.answers_cut:.2%}"]
            for at in stats.cut
        ]
        heads = ["max_length", "rows longer", "answer tokens lost: rejected", "answer tokens lost: cut"]
        parts.append(table(heads, cut))
    for title, counts in groups(stats):
        parts += [f"<h3>{_text(title.capitalize())}</h3>", bars(top(counts, 15), title)]
    if stats.longest:
        rows = [
            [f"{long:,}", where, f"{short:,}", place]
            for (long, where), (short, place) in zip(stats.longest, stats.shortest, strict=True)
        ]
        parts += ["<h3>Longest and shortest rows</h3>", table(["tokens", "longest", "tokens", "shortest"], rows)]
    return parts


def _percent_name(percent: int) -> str:
    return {0: "shortest", 50: "median", 100: "longest"}.get(percent, f"{percent}%")


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; its first column and texts stand left."""
    head = "".join(f'<th class="{"left" if i == 0 else "right"}">{_text(h)}</th>' for i, h in enumerate(heads))
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{"left" if i == 0 else "right"}">{_text(cell)}</td>' for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def columns(counts: Sequence[tuple[str, int]], title: str = "rows by tokens") -> str:
    """A histogram as upright bars; the label of each stands at its left edge."""
    width, height, base = 720, 200, 170
    most, step = max((n for _, n in counts), default=1) or 1, width / max(1, len(counts))
    shown = []
    for i, (label, count) in enumerate(counts):
        tall = round(150 * count / most, 1)
        shown.append(
            f'<rect class="bar" x="{i * step + 1:.1f}" y="{base - tall:.1f}" width="{step - 2:.1f}" height="{tall}">'
            f"<title>{_text(label)}: {count:,}</title></rect>"
        )
        if i % max(1, len(counts) // 10) == 0:
            shown.append(f'<text class="dim" x="{i * step:.1f}" y="{base + 16}">{_text(label)}</text>')
    return _svg(width, height, title, [*shown, f'<path class="axis" d="M0 {base}H{width}"/>'])


def curve(stats: Stats) -> str:
    """Share of rows longer than each max_length, as a line over powers of two."""
    width, height, left, base = 720, 200, 44, 170
    step = (width - left - 40) / max(1, len(stats.cut) - 1)
    points = [(left + i * step, base - 150 * at.rows) for i, at in enumerate(stats.cut)]
    shown = []
    for share in (0, 0.5, 1):
        y = base - 150 * share
        shown.append(
            f'<path class="axis" d="M{left} {y}H{width}"/><text class="dim" x="0" y="{y + 4}">{share:.0%}</text>'
        )
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    shown.append(f'<polyline class="curve" points="{drawn}"/>')
    for (x, y), at in zip(points, stats.cut, strict=True):
        shown.append(
            f'<circle class="bar" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{at.max_length:,}: {at.rows:.2%}</title>'
            "</circle>"
            f'<text class="dim" x="{x - 14:.1f}" y="{base + 18}">{at.max_length:,}</text>'
        )
    return _svg(width, height, "share of rows longer than max_length", shown)


def bars(counts: Sequence[tuple[str, int]], title: str) -> str:
    """Lying bars, one a line."""
    width, row, left = 720, 24, 200
    most, total = max((n for _, n in counts), default=1) or 1, sum(n for _, n in counts) or 1
    shown = []
    for i, (label, count) in enumerate(counts):
        long, y = round(360 * count / most, 1), i * row
        name = label if len(label) <= 26 else label[:25] + "…"
        shown.append(
            f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{_text(name)}</text>'
            f'<rect class="bar" x="{left}" y="{y + 4}" width="{long}" height="16"><title>{_text(label)}</title></rect>'
            f'<text class="dim" x="{left + long + 8}" y="{y + 16}">{count:,} ({count / total:.1%})</text>'
        )
    return _svg(width, max(row, row * len(counts)), title, shown)


def _svg(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{_text(title)}">'
        + "".join(parts)
        + "</svg>"
    )


# --- findings ---


def _lint(lint: Lint) -> list[str]:
    copies = lint.rows - lint.different
    parts = [f"<h2>{lint.rows:,} rows, {copies:,} of them copies of an earlier one</h2>"]
    parts += [_finding(finding) for finding in lint.findings] or ["<p>Nothing was found.</p>"]
    parts.append("<h2>How much data the method wants</h2>")
    rows = [
        [f"{v.amount.method}, {v.amount.goal}", f"{v.amount.rows[0]:,} to {v.amount.rows[1]:,}", v.word]
        for v in lint.verdicts
    ]
    parts += [table(["goal", "rows", "here"], rows), f"<p>{_text(fitting_method(lint.different))}.</p>"]
    parts.append(f'<p class="dim">{_text(FORMULA)}</p>')
    return parts


def _finding(finding: Finding) -> str:
    samples = finding.samples or ("",) * len(finding.rows)
    rows = "".join(
        f'<li><span class="dim">{_text(place)}</span> <code>{_text(sample)}</code></li>'
        for place, sample in zip(finding.rows, samples, strict=False)
    )
    more = finding.count - len(finding.rows)
    rest = f'<li class="dim">… {more:,} more</li>' if finding.rows and more > 0 else ""
    remedy = f"<p>To do: {_text(finding.remedy)}</p>" if finding.remedy else ""
    listed = f"<ul>{rows}{rest}</ul>" if rows else ""
    return (
        f'<article class="{finding.severity}"><p><b>{finding.severity}</b> <code>{_text(finding.code)}</code> '
        f"{_text(finding.message)}</p>{listed}{remedy}</article>"
    )
