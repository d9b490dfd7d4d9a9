"""What each cleaner did: counts, and a few places before and after."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

from luthier.data.examples import Reject, TrainingExample
from luthier.errors import shorten

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text as RichText

    from luthier.data.cleaning.registry import Cleaner

SAMPLES = 3
_CONTEXT = 20
_LONGEST = 60


@dataclass(frozen=True, slots=True)
class Sample:
    """One place that a cleaner changed, with a little of what stands around it."""

    place: str
    """File and line, or the example's number among those given."""
    field: str
    before: str
    after: str | None
    """None where the row was refused."""
    start: int
    """Where in ``before`` the change begins; ``before_end`` and ``after_end`` are where it ends in each."""
    before_end: int
    after_end: int


@dataclass(slots=True)
class StepReport:
    """What one step of cleaning did."""

    name: str
    options: dict[str, Any]
    on: str
    rows: int = 0
    """Rows that the step saw: those that no earlier step refused."""
    changed: int = 0
    """Rows with a text that the step changed."""
    refused: int = 0
    removed: int = 0
    """Characters taken out, those replaced included."""
    added: int = 0
    """Characters put in, replacements included."""
    counts: Counter[str] = field(default_factory=Counter)
    """Refused rows by reason, and masked data by kind."""
    samples: list[Sample] = field(default_factory=list)
    _random: random.Random = field(default_factory=lambda: random.Random(0), repr=False)
    _offered: int = field(default=0, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        names = ("name", "options", "on", "rows", "changed", "refused", "removed", "added")
        plain = {name: getattr(self, name) for name in names}
        return {**plain, "counts": dict(self.counts), "samples": [asdict(sample) for sample in self.samples]}

    def note_change(self, before: str, after: str) -> None:
        """Count the characters of one text that changed."""
        start, before_end, after_end = changed_span(before, after)
        if start in (before_end, after_end):
            self.removed += before_end - start
            self.added += after_end - start
        else:
            old, new = Counter(before[start:before_end]), Counter(after[start:after_end])
            stayed = sum(min(count, new.get(character, 0)) for character, count in old.items())
            self.removed += before_end - start - stayed
            self.added += after_end - start - stayed

    def offer(self, example: TrainingExample, index: int, place: str, before: str, after: str | None) -> None:
        """Keep this change as a sample, by chance: each has the same (reservoir sampling, seeded)."""
        self._offered += 1
        slot = len(self.samples) if len(self.samples) < SAMPLES else self._random.randrange(self._offered)
        if slot < SAMPLES:
            where = str(example.source) if example.source else f"example {index + 1}"
            self.samples[slot : slot + 1] = [_sample(where, place, before, after)]

    def note_refusal(self, example: TrainingExample, index: int, reject: Reject, text: str | None = None) -> None:
        self.refused += 1
        self.counts[reject.reason] += 1
        self.offer(example, index, reject.field or "", text if text is not None else reject.value or "", None)


def changed_span(before: str, after: str) -> tuple[int, int, int]:
    """Where two texts differ: the common beginning's length, and where the common end begins in each."""
    start = _common(before, after)
    end = _common(before[start:][::-1], after[start:][::-1])
    return start, len(before) - end, len(after) - end


def _common(one: str, other: str) -> int:
    """The length of the common beginning, by halving: comparing slices is far faster than comparing characters."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _sample(where: str, place: str, before: str, after: str | None) -> Sample:
    if after is None:
        cut = before if len(before) <= _LONGEST else before[: _LONGEST - 1] + "…"
        return Sample(where, place, cut, None, 0, len(cut), 0)
    start, before_end, after_end = changed_span(before, after)
    # Only the first of several changes; looked for near its beginning, for the search takes time.
    old, new = before[start : min(before_end, start + 300)], after[start : min(after_end, start + 300)]
    codes = [c for c in SequenceMatcher(None, old, new, autojunk=False).get_opcodes() if c[0] != "equal"]
    if len(codes) > 1:
        _, first_old, end_old, first_new, end_new = codes[0]
        if first_old == 0 and first_new == 0:
            before_end, after_end = start + end_old, start + end_new
    left = max(0, start - _CONTEXT)
    shown = [
        _excerpt(text, left, start, min(end, start + _LONGEST))
        for text, end in ((before, before_end), (after, after_end))
    ]
    lead = start - left + (1 if left else 0)
    ends = [min(end - start, _LONGEST) + lead for end in (before_end, after_end)]
    return Sample(where, place, shown[0], shown[1], lead, *ends)


def _excerpt(text: str, left: int, start: int, end: int) -> str:
    right = min(len(text), end + _CONTEXT)
    return ("…" if left else "") + text[left:right] + ("…" if right < len(text) else "")


def render_cleaning(reports: Sequence[StepReport]) -> Group:
    """The steps as a table, and under it what they changed, before and after."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("cleaner")
    for column in ("rows", "changed", "refused", "characters out", "in"):
        table.add_column(column, justify="right")
    table.add_column("")
    for report in reports:
        numbers = (report.rows, report.changed, report.refused, report.removed, report.added)
        counts = ", ".join(f"{name} {count:,}" for name, count in report.counts.most_common())
        table.add_row(Text(_called(report)), *(f"{n:,}" for n in numbers), Text(counts, style="dim"))
    lines: list[Table | Text] = [table]
    for report in reports:
        if report.samples:
            lines.append(Text(f"\n{report.name}", style="bold"))
            lines += _rendered(report.samples)
    return Group(*lines)


def render_cleaners(cleaners: Iterable[Cleaner]) -> Table:
    """The cleaners there are, with what they do and their options' defaults."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("cleaner", "does", "options"):
        table.add_column(column, no_wrap=column == "cleaner")
    for cleaner in cleaners:
        options = [
            f"{o.name} (needed)" if o.required else f"{o.name}={shorten(o.default, 30)}" for o in cleaner.options
        ]
        table.add_row(Text(cleaner.name, style="bold"), Text(cleaner.doc), Text("\n".join(options)))
    return table


def _called(report: StepReport) -> str:
    options = {**({} if report.on == "all" else {"on": report.on}), **report.options}
    said = ", ".join(f"{name}={shorten(value, 30)}" for name, value in options.items())
    return f"{report.name}({said})" if said else report.name


def _rendered(samples: Iterable[Sample]) -> Iterable[RichText]:
    from rich.text import Text

    for sample in samples:
        yield Text(f"  {sample.place} {sample.field}", style="dim")
        parts = [(sample.before, sample.before_end, "red")]
        if sample.after is not None:
            parts.append((sample.after, sample.after_end, "green"))
        for (text, end, colour), sign in zip(parts, "-+", strict=False):
            yield Text.assemble(
                (f"    {sign} ", colour),
                visible(text[: sample.start]),
                (visible(text[sample.start : end], changed=True), f"{colour} reverse"),
                visible(text[end:]),
            )


def visible(text: str, changed: bool = False) -> str:
    """A text on one line, with what nobody sees written out: ↵ → \\u200b, and where it changed · for a blank."""
    shown = {"\n": "↵", "\t": "→", "\r": "␍", " ": "·" if changed else " "}
    return "".join(shown.get(c) or (c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)
