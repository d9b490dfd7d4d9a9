"""What a reader wants to know first: did it help, and did it harm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from luthier.evaluation.statistics import smallest_difference
from luthier.report.evaluation_files import Evaluation

if TYPE_CHECKING:
    from luthier.report.gather import Report


@dataclass(frozen=True, slots=True)
class Verdict:
    """An answer in words."""

    kind: Literal["good", "bad", "open"]
    text: str
    hint: str = ""
    """What to run to know more."""


def shown_p(p: float | None) -> str:
    """A probability as tables have it."""
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def helped(report: Report) -> Verdict:
    """Whether the tuned model is better than what it is compared with, and how surely."""
    found = report.comparison
    if found is None:
        if error := report.manifest.get("evaluation_error"):
            return Verdict("open", f"Not known: the comparison failed: {error}")
        hint = f"luthier evaluate {report.folder} --data FILE compares it." if report.finished else ""
        return Verdict("open", "Not known: the run was never compared with its base.", hint)
    line = found[found.main]
    value, around = line.values[found.tuned], line.intervals.get(found.tuned)
    change = line.changes.get(found.tuned)
    if change is None or change["value"] is None or found.base is None:
        interval = f" (95% interval {line.between(*around)})" if around else ""
        return Verdict(
            "open",
            f"Not known: there is nothing to compare with. {found.tuned}: {line.label} {line.shown(value)}{interval} "
            f"on {_rows(found)}.",
        )
    p = shown_p(change["p"])
    told_p = f"p{p}" if p.startswith("<") else f"p={p}"
    told = (
        f"{line.label} went from {line.shown(line.values[found.base])} to {line.shown(value)} "
        f"({line.shown(change['value'], signed=True)}, 95% interval "
        f"{line.between(change['low'], change['high'], signed=True)}, {told_p})"
        f" on {_rows(found)}"
    )
    better, worse = found.moved.get(found.tuned, (0, 0))
    rows = f"{better:,} rows improved and {worse:,} got worse"
    against = "always giving the most frequent class" if found.kind == "classes" else "its base"
    good = line.good(change)
    if good is None:
        least = ""
        if line.share:
            points = smallest_difference(line.values[found.base] or 0.0, found.rows) * 100
            least = f" So many rows show a difference of about {points:.0f} points or more."
        return Verdict("open", f"No sure difference from {against}: {told}; {rows}.{least}")
    return Verdict("good" if good else "bad", f"{'Better' if good else 'Worse'} than {against}: {told}; {rows}.")


def _rows(found: Evaluation) -> str:
    rows = f"{found.rows:,} row{'s' * (found.rows != 1)}"
    return f"{rows} ({found.hidden_tokens:,} hidden tokens)" if found.hidden_tokens else rows


def harmed(report: Report) -> Verdict:
    """Whether tuning has cost anything, where that was measured."""
    checks = report.harm.get("checks", [])
    found = [check for check in checks if check.get("harm")]
    if found:
        return Verdict("bad", "; ".join(f"{check['label']}: {check['verdict']}" for check in found))
    if checks:
        return Verdict(
            "good", f"None of {len(checks)} checks found harm; the table says how much each could have seen."
        )
    if report.task in ("causal_lm", "instruction"):
        hint = f"luthier evaluate {report.folder} --harm measures it." if report.finished else ""
        return Verdict("open", "It was not measured.", hint)
    what = "write targets for sources" if report.task == "seq_to_seq" else "answer no prompts"
    return Verdict("open", f"It is not measured of task {report.task}, whose models {what}; the checks ask prompts.")
