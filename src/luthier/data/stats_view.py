"""The numbers of a data set on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from luthier.data.stats import Lengths, Stats

_BAR = 40
_SHOWN = 10


def render_stats(stats: Stats, name: str) -> Group:
    """A data set's numbers under a headline."""
    shown: list[RenderableType] = [Text(headline(stats, name), style="bold")]
    shown += [Text(f"  {line}") for line in facts(stats)]
    if stats.tokens is not None:
        shown += ["", _lengths(stats), "", Text("rows by tokens", style="bold")]
        shown.append(_bars((f"{a:,} to {b - 1:,}", n) for a, b, n in stats.histogram))
        shown += ["", _cut(stats)]
    for title, counts in groups(stats):
        shown += ["", Text(title, style="bold"), _bars(top(counts))]
    if stats.longest:
        shown += ["", _extremes(stats)]
    return Group(*shown)


def headline(stats: Stats, name: str) -> str:
    tokens = "" if stats.tokens is None else f", {_about(stats)}{estimate(stats, stats.tokens.total):,} tokens"
    return f"{name}: {stats.rows:,} rows{tokens}, {stats.characters:,} characters"


def _about(stats: Stats) -> str:
    return "about " if stats.estimated else ""


def estimate(stats: Stats, total: int) -> int:
    """A total of the measured rows, for all rows."""
    return round(total * stats.rows / max(1, stats.measured + sum(stats.refused.values())))


def facts(stats: Stats) -> list[str]:
    """What is worth a line each."""
    lines = []
    if stats.estimated:
        lines.append(
            f"tokens and languages are an estimate from a seeded sample of {stats.measured:,} rows (--all measures all)"
        )
    if stats.refused:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in stats.refused.items())
        lines.append(f"the model cannot take {sum(stats.refused.values()):,} of the rows looked at: {reasons}")
    if stats.exact_copies is not None:
        near = "near copies not looked for" if stats.near_copies is None else f"{stats.near_copies:,} nearly"
        lines.append(f"copies of an earlier row: {stats.exact_copies:,} word for word, {near}")
    if stats.plain_text:
        lines.append(f"plain text, trained whole: {stats.plain_text:,} rows")
    if stats.system_rows:
        more = f"{stats.systems:,}" if stats.systems < 1_000 else "1,000 or more"
        lines.append(f"system messages: in {stats.system_rows:,} rows, {more} different")
    if stats.tool_rows or stats.tool_calls:
        lines.append(f"tools: declared in {stats.tool_rows:,} rows, called {sum(stats.tool_calls.values()):,} times")
    if stats.tokens is not None and stats.prompt_tokens is not None and stats.answer_tokens is not None:
        ratio = stats.prompt_tokens.total / max(1, stats.answer_tokens.total)
        lines.append(f"trained: {stats.answer_share:.1%} of the tokens; {ratio:.2f} of prompt for each of answer")
        used = stats.vocabulary_used / max(1, stats.vocabulary)
        lines.append(
            f"vocabulary: {stats.vocabulary_used:,} different tokens, {used:.1%} of the model's; "
            f"{stats.characters_per_token:.2f} characters a token"
        )
        lines.append(
            f"shared beginnings: all rows begin with the same {stats.shared_beginning:,} tokens; "
            f"{stats.shared_share:.1%} of the tokens repeat the beginning of another row"
        )
    return lines


def groups(stats: Stats) -> list[tuple[str, Mapping[str, int]]]:
    """Counts that are worth a picture."""
    found: list[tuple[str, Mapping[str, int]]] = [
        ("rows by language", stats.languages),
        ("rows by number of turns", {str(turns): count for turns, count in stats.turns.items()}),
        ("turns by role", stats.roles),
        ("rows by class", stats.labels or {}),
        ("calls by tool", stats.tool_calls),
    ]
    return [(title, counts) for title, counts in found if counts]


def top(counts: Mapping[str, int], shown: int = _SHOWN) -> list[tuple[str, int]]:
    """The first few counts, and the rest together."""
    pairs = list(counts.items())
    rest = pairs[shown:]
    return pairs if len(rest) < 2 else [*pairs[:shown], (f"{len(rest):,} others", sum(n for _, n in rest))]


def length_rows(stats: Stats) -> Iterable[tuple[str, Lengths]]:
    named = (("whole row", stats.tokens), ("prompt", stats.prompt_tokens), ("answer", stats.answer_tokens))
    return ((name, lengths) for name, lengths in named if lengths is not None)


def _lengths(stats: Stats) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("tokens")
    assert stats.tokens is not None
    for percent in stats.tokens.percentiles:
        table.add_column({0: "shortest", 50: "median", 100: "longest"}.get(percent, f"{percent}%"), justify="right")
    table.add_column("mean", justify="right")
    for name, lengths in length_rows(stats):
        table.add_row(name, *(f"{n:,}" for n in lengths.percentiles.values()), f"{lengths.mean:,.1f}")
    return table


def _cut(stats: Stats) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("max_length", "rows longer", "answer tokens lost: rejected", "cut"):
        table.add_column(column, justify="right")
    for at in stats.cut:
        table.add_row(f"{at.max_length:,}", f"{at.rows:.2%}", f"{at.answers_refused:.2%}", f"{at.answers_cut:.2%}")
        if not at.rows:
            break
    return table


def _bars(pairs: Iterable[tuple[str, int]]) -> Table:
    listed = list(pairs)
    most, total = max((n for _, n in listed), default=1) or 1, sum(n for _, n in listed) or 1
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right", max_width=40, overflow="ellipsis", no_wrap=True)
    table.add_column(width=_BAR)
    table.add_column(justify="right")
    table.add_column(justify="right", style="dim")
    for name, count in listed:
        table.add_row(Text(name), Text("█" * round(_BAR * count / most), "cyan"), f"{count:,}", f"{count / total:.1%}")
    return table


def _extremes(stats: Stats) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("tokens", "longest rows", "tokens", "shortest rows"):
        table.add_column(column, justify="right" if column == "tokens" else "left", overflow="fold")
    for (long, where), (short, place) in zip(stats.longest, stats.shortest, strict=True):
        table.add_row(f"{long:,}", Text(where), f"{short:,}", Text(place))
    return table
