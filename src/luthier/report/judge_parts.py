"""The parts of a report that show what a model as judge has said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from luthier.evaluation.statistics import Interval
from luthier.report.blocks import Block, Code, Heading, Mood, Table, Text, cut
from luthier.report.evaluation_files import Evaluation
from luthier.report.gather import Report
from luthier.report.verdict import shown_p


def judge_blocks(found: Evaluation) -> Iterator[Block]:
    """Who has judged, and what came of it."""
    judging = found.judging
    if judging is None:
        return
    yield Text(
        f"{judging.model} at {judging.endpoint}. A row is won or lost where both orders of the answers say so, else "
        "tied; in the tables, judge is the share of rows won, ties as half. What it was asked stands further down.",
        "",
        "Judge:",
    )
    yield from judge_table(found)


def judge_table(found: Evaluation) -> Iterator[Table]:
    """Rows won, tied and lost, how far the order of the answers decided, and what was left out."""
    judging = found.judging
    if judging is None or not judging.models:
        return
    facts = {
        "rows judged": lambda of: f"{of.rows:,}",
        "won": lambda of: f"{of.count('win'):,}",
        "tied": lambda of: f"{of.count('tie'):,}" + (f" ({of.identical:,} identical)" if of.identical else ""),
        "lost": lambda of: f"{of.count('loss'):,}",
        "share won, ties as half": lambda of: _share(of.win_rate),
        "share won, without ties": lambda of: _share(of.of_decided),
        "p": lambda of: shown_p(None if of.change is None else of.change.p),
        "rows that the order of the answers decided": lambda of: _share(of.order_decided),
        "the answer shown first was chosen": lambda of: _share(of.first_preferred),
        "left out: a reply without a verdict": lambda of: f"{of.count('unread'):,}",
        "left out: no reply": lambda of: f"{of.count('failed'):,}",
    }
    rows = [[label, *(tell(of) for of in judging.models.values())] for label, tell in facts.items()]
    yield Table(f"Judged by {judging.model}, beside {found.models[0]}", ["", *judging.models], rows)


def _share(interval: Interval | None) -> str:
    return "–" if interval is None else f"{interval.value:.1%} [{interval.low:.1%} … {interval.high:.1%}]"


def judge_verdict(found: Evaluation | None) -> Text | None:
    """What the judge said of the tuned model, in a line; None: there is no judge, or no row that it judged."""
    judged = None if found is None or found.judging is None else found.judging.models.get(found.tuned)
    if found is None or found.judging is None or judged is None or judged.change is None:
        return None
    change = judged.change
    mood: Mood = ("good" if change.value > 0 else "bad") if change.significant else ""
    told = "better" if mood == "good" else "worse" if mood == "bad" else "not surely different"
    return Text(
        f"{found.judging.model} finds it {told} (p {shown_p(change.p)}). {judged.describe(found.tuned)}.",
        mood,
        "What did the judge say?",
    )


def said_of_row(first: str, model: str, told: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """The outcome of a row in words, and the judge's replies under the order that each was shown."""
    if told.get("identical"):
        return f"judge: {model} tied; the answers are the same, and it was not asked", []
    chosen = ["no verdict" if choice is None else {"A": "the first", "B": "the second"}.get(choice, "neither")
              for choice in told["choices"]]  # fmt: skip
    words = {"win": "won", "loss": "lost", "tie": "tied"}
    if told["choices"] in (["A", "A"], ["B", "B"]):
        words["tie"] = "tied; the order decided"
    problem = f": {told['problem']}" if told.get("problem") else ""
    outcome = words.get(told["outcome"], f"left out, {told['outcome']}")
    orders = (f"{first} shown first, {model} second", f"{model} shown first, {first} second")
    replies = [
        (f"{order}: {choice}", cut(reply))
        for order, choice, reply in zip(orders, chosen, told["replies"], strict=True)
        if reply is not None
    ]
    return f"judge: {model} {outcome}{problem}", replies


def prompt_blocks(report: Report) -> Iterator[Block]:
    """What the judges were asked, word for word."""
    prompts: dict[str, list[str]] = {}
    for found in report.evaluations:
        if found.judging is not None:
            prompts.setdefault(found.judging.prompt, []).append(report.part_of(found))
    if prompts:
        yield Heading("What the judge was asked")
    for prompt, parts in prompts.items():
        yield Text(f"{', '.join(parts)}; the names in braces stand for the texts of a row:")
        yield Code(prompt.strip())
