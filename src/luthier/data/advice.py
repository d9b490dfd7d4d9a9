"""How much data a method wants: the field's rules of thumb, in one place.

They are starting points for a message to the user, never a reason to refuse a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Amount:
    """Rows that a goal usually wants."""

    method: Literal["instruction", "lora", "full"]
    goal: str
    rows: tuple[int, int]
    """The fewest that are likely to do, and where more brings little."""


AMOUNTS = (
    Amount("instruction", "a simple task", (100, 1_000)),
    Amount("instruction", "a task of medium difficulty", (1_000, 10_000)),
    Amount("instruction", "a complex task", (10_000, 100_000)),
    Amount("lora", "a light adaptation", (100, 1_000)),
    Amount("lora", "a domain", (1_000, 10_000)),
    Amount("lora", "a style", (10_000, 50_000)),
    Amount("full", "full tuning", (10_000, 100_000)),
)
FULL_IS_BETTER_FROM = 50_000

FORMULA = (
    "The rule that rows should be at least 1% of the model's parameters is wrong by orders of magnitude: it would ask "
    "for 1.35 million rows to tune 135 million parameters, and for 70 million to tune 7 billion. What counts is the "
    "number of parameters that are trained, a small part of them for LoRA, and how varied and right the rows are."
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether there are rows enough for a goal."""

    amount: Amount
    rows: int

    @property
    def word(self) -> Literal["too few", "enough", "plenty"]:
        fewest, most = self.amount.rows
        return "too few" if self.rows < fewest else "enough" if self.rows <= most else "plenty"

    @property
    def text(self) -> str:
        fewest, most = self.amount.rows
        return f"{self.amount.method}, {self.amount.goal}: {fewest:,} to {most:,} rows; {self.word}"


def rows_for(method: str, goal: str) -> tuple[int, int]:
    """The rows that a goal wants of a method."""
    return next(a.rows for a in AMOUNTS if a.method == method and a.goal == goal)


def verdicts(rows: int) -> list[Verdict]:
    """A verdict for each goal."""
    return [Verdict(amount, rows) for amount in AMOUNTS]


def fitting_method(rows: int) -> str:
    """Which method so many rows are for, in a sentence."""
    fewest, full = rows_for("lora", "a light adaptation")[0], rows_for("full", "full tuning")[0]
    if rows < fewest:
        return (
            f"{rows:,} different rows are few for any tuning, which wants {fewest:,} at the least: add rows, or put "
            "the best of them into the prompt as examples"
        )
    if rows < full:
        return f"{rows:,} different rows are for LoRA (method: lora); full tuning wants {full:,} good ones at the least"
    if rows < FULL_IS_BETTER_FROM:
        return (
            f"{rows:,} different rows are enough for LoRA (method: lora), and just enough for full tuning, which is "
            f"better off with {FULL_IS_BETTER_FROM:,}"
        )
    return f"{rows:,} different rows are enough for LoRA and for full tuning: memory decides; try LoRA first"
