"""What a judge has said of models' answers: counts with their intervals, and how far the order of answers decided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from luthier.errors import UserError, counted, shorten
from luthier.evaluation.judge_prompt import Choice
from luthier.evaluation.statistics import Change, Interval, preference, wilson

Outcome = Literal["win", "tie", "loss", "unread", "failed"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one row, what a model's answer is beside that of the first model."""

    choices: tuple[Choice | None, Choice | None] | None = None
    """What was chosen with the first model's answer as A, and with it as B; None: not asked, for the answers are equal.
    In a place None: that reply holds no verdict."""
    replies: tuple[str | None, str | None] | None = None
    """Word for word."""
    problem: str | None = None
    """Why a reply is not there."""

    @property
    def outcome(self) -> Outcome:
        """A win or a loss where both orders agree on it, else a tie; ``failed``: a reply is not there; ``unread``: one
        holds no verdict."""
        if self.choices is None:
            return "tie"
        if self.problem is not None:
            return "failed"
        if None in self.choices:
            return "unread"
        return "win" if self.choices == ("B", "A") else "loss" if self.choices == ("A", "B") else "tie"

    @property
    def in_both_orders(self) -> bool:
        """Whether both orders were asked and could be read."""
        return self.choices is not None and None not in self.choices and self.problem is None

    @property
    def consistent(self) -> bool:
        """Whether both orders say the same."""
        return self.choices in (("A", "B"), ("B", "A"), ("C", "C"))

    def to_json(self) -> dict[str, Any]:
        """For JSON."""
        if self.choices is None:
            return {"outcome": self.outcome, "identical": True}
        found = {"outcome": self.outcome, "choices": list(self.choices), "replies": list(self.replies or ())}
        return found | ({"problem": self.problem} if self.problem else {})

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Verdict:
        """What :meth:`to_json` gave."""
        if told.get("identical"):
            return cls()
        (first, swapped), (reply, other) = told["choices"], told["replies"]
        return cls((first, swapped), (reply, other), told.get("problem"))


@dataclass(slots=True)
class Judged:
    """What a judge has said of one model beside the first, row by row."""

    verdicts: list[Verdict]

    def count(self, *outcomes: Outcome) -> int:
        """Rows of such outcomes."""
        return sum(verdict.outcome in outcomes for verdict in self.verdicts)

    @property
    def rows(self) -> int:
        """Rows that have an outcome."""
        return self.count("win", "tie", "loss")

    @property
    def identical(self) -> int:
        """Ties of answers that are the same."""
        return sum(verdict.choices is None for verdict in self.verdicts)

    @property
    def change(self) -> Change | None:
        """Share of rows won less that of rows lost (:func:`preference`); None: no row has an outcome."""
        return preference(self.count("win"), self.count("tie"), self.count("loss")) if self.rows else None

    @property
    def win_rate(self) -> Interval | None:
        """Share of rows won, ties as half."""
        moved = self.change
        return None if moved is None else Interval(*((1 + n) / 2 for n in (moved.value, moved.low, moved.high)))

    @property
    def of_decided(self) -> Interval | None:
        """Share of rows won among those won or lost, with Wilson's interval."""
        decided = self.count("win", "loss")
        return wilson(self.count("win") / decided, decided) if decided else None

    @property
    def order_decided(self) -> Interval | None:
        """Of rows read in both orders, the share on which they disagree: no verdict, and a tie here."""
        asked = [verdict for verdict in self.verdicts if verdict.in_both_orders]
        return wilson(sum(not v.consistent for v in asked) / len(asked), len(asked)) if asked else None

    @property
    def first_preferred(self) -> Interval | None:
        """Share of the choices on those rows that fall on the answer shown first; a half where the order is nothing."""
        chosen = [c for v in self.verdicts if v.in_both_orders for c in v.choices or () if c != "C"]
        return wilson(chosen.count("A") / len(chosen), len(chosen)) if chosen else None

    def twice(self, choice: Choice) -> int:
        """Rows on which the same place was chosen in both orders."""
        return sum(verdict.in_both_orders and verdict.choices == (choice, choice) for verdict in self.verdicts)

    def to_json(self) -> dict[str, Any]:
        """The counts, for JSON."""
        change = self.change
        return {
            "rows": self.rows,
            "wins": self.count("win"),
            "ties": self.count("tie"),
            "losses": self.count("loss"),
            "identical": self.identical,
            "unread": self.count("unread"),
            "failed": self.count("failed"),
            "win_rate": _listed(self.win_rate),
            "of_decided": _listed(self.of_decided),
            "p": None if change is None else change.p,
            "order": {
                "decided": _listed(self.order_decided),
                "first_twice": self.twice("A"),
                "second_twice": self.twice("B"),
                "first_preferred": _listed(self.first_preferred),
            },
        }

    def describe(self, name: str) -> str:
        """One line: the outcome, and what the order did."""
        win_rate, order, first = self.win_rate, self.order_decided, self.first_preferred
        if win_rate is None:
            return f"{name}: no row was judged"
        same = f" ({self.identical:,} identical)" if self.identical else ""
        text = (
            f"{name}: {self.count('win'):,} won, {self.count('tie'):,} tied{same}, {self.count('loss'):,} lost; "
            f"ties as half {_shown(win_rate)}"
        )
        if self.of_decided is not None:
            text += f", without ties {_shown(self.of_decided)}"
        if order is not None:
            text += f"; the order of the answers decided {_shown(order)} of the rows"
        return text + (f", the first was chosen {first.value:.0%} of the time" if first is not None else "")

    def notes(self, name: str) -> list[str]:
        """What a reader must know before believing it."""
        found = []
        unread = [v for v in self.verdicts if v.outcome == "unread"]
        if unread:
            choices, replies = unread[0].choices or (), unread[0].replies or ()
            reply = next((r for c, r in zip(choices, replies, strict=True) if c is None), None) or ""
            found.append(
                f"judge: of {name}, {counted(len(unread), 'row')} left out, for a reply does not end with a verdict: "
                f"…{shorten(reply.strip()[-80:])}"
            )
        reasons = Counter(v.problem for v in self.verdicts if v.outcome == "failed")
        for reason, count in reasons.most_common(3):
            found.append(f"judge: of {name}, {counted(count, 'row')} left out, for there was no reply: {reason}")
        if (order := self.order_decided) is not None and order.value > 0.5:
            found.append(
                f"judge: of {name}, {order.value:.0%} of the verdicts changed with the order of the answers; these are "
                "ties, and a more able judge would decide more of them"
            )
        return found


@dataclass(slots=True)
class Judging:
    """A judge's part of a comparison."""

    model: str
    endpoint: str
    prompt: str
    """As it was asked, with the names of what is put in."""
    parameters: dict[str, Any]
    """Of the requests, the temperature among them."""
    models: dict[str, Judged] = field(default_factory=dict)
    """By name, of all but the first model."""
    requests: int = 0
    """Sent, tries after a failure included."""
    kept_replies: int = 0
    """Found on disk, or asked for twice at one time."""
    error: UserError | None = None
    """Why the judge gave up."""

    def notes(self) -> list[str]:
        """Of all models."""
        found = [note for name, judged in self.models.items() for note in judged.notes(name)]
        return found if self.error is None else [*found, f"judge: it gave up: {self.error.what}"]

    def to_json(self) -> dict[str, Any]:
        """Everything but what it said of each row."""
        return {
            "model": self.model,
            "endpoint": self.endpoint,
            "parameters": self.parameters,
            "prompt": self.prompt,
            "requests": self.requests,
            "kept_replies": self.kept_replies,
            "models": {name: judged.to_json() for name, judged in self.models.items()},
            "error": None if self.error is None else str(self.error),
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Judging:
        """What a comparison's JSON has under ``judge``, and of each model in its ``rows``."""
        models = {}
        for name in told["models"]:
            answers = [row["answers"][name] for row in rows]
            models[name] = Judged([Verdict.from_json(answer["judge"]) for answer in answers if "judge" in answer])
        return cls(
            told["model"],
            told["endpoint"],
            told["prompt"],
            dict(told["parameters"]),
            models,
            told["requests"],
            told["kept_replies"],
            UserError(told["error"]) if told["error"] else None,
        )


def _shown(share: Interval) -> str:
    return f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}]"


def _listed(share: Interval | None) -> list[float] | None:
    return None if share is None else [share.value, share.low, share.high]
