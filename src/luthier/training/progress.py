"""What a run says while it trains: a bar on a terminal, lines elsewhere, or nothing."""

from __future__ import annotations

import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)


class Reporter(Protocol):
    """Is told of a run's course."""

    def start(self, total: int, done: int) -> None: ...
    def step(self, record: dict[str, Any]) -> None: ...
    def evaluation(self, record: dict[str, Any]) -> None: ...
    def say(self, text: str) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """Says nothing."""

    def start(self, total: int, done: int) -> None: ...
    def step(self, record: dict[str, Any]) -> None: ...
    def evaluation(self, record: dict[str, Any]) -> None: ...
    def say(self, text: str) -> None: ...
    def stop(self) -> None: ...


class TerminalReporter:
    """A progress bar with loss, tokens a second and time left; where there is no terminal, a line now and then.

    Args:
        console: where to write.
        every: seconds between lines where there is no terminal.
    """

    def __init__(self, console: Console, *, every: float = 20.0) -> None:
        self.console = console
        self.every = every
        self._bar: Progress | None = None
        self._task: Any = None
        self._said = 0.0
        self._total = 0
        self._rate = 0.0
        self._loss = 0.0
        self._done = 0

    def start(self, total: int, done: int) -> None:
        self._total, self._done = total, done
        self._began = self._said = time.monotonic()
        if self.console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("training"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s  left"),
                TimeRemainingColumn(compact=True),
                console=self.console,
            )
            self._task = self._bar.add_task("training", total=total, completed=done, loss=0.0, rate=0.0)
            self._bar.start()

    def step(self, record: dict[str, Any]) -> None:
        rate = record["tokens"] / max(record["seconds"], 1e-9)
        first = self._rate == 0.0
        # Smoothed over some ten steps, so that the figures can be read.
        self._rate = rate if first else 0.9 * self._rate + 0.1 * rate
        self._loss = record["loss"] if first else 0.9 * self._loss + 0.1 * record["loss"]
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], loss=self._loss, rate=self._rate)
        elif time.monotonic() - self._said >= self.every or record["step"] == self._total:
            self._said = time.monotonic()
            passed = time.monotonic() - self._began
            left = passed / (record["step"] - self._done) * (self._total - record["step"])
            self.say(
                f"step {record['step']}/{self._total}  loss {self._loss:.3f}  {self._rate:,.0f} tokens/s  "
                f"about {left:,.0f} s left"
            )

    def evaluation(self, record: dict[str, Any]) -> None:
        mark = "  best so far" if record.get("best") and record["step"] else ""
        names = dict.fromkeys([record.get("best_by"), "rougeL", "exact_match"])
        told = "".join(f"  {name} {record[f'eval_{name}']:.4f}" for name in names if f"eval_{name}" in record)
        self.say(f"[dim]step {record['step']:>5}  validation loss {record['eval_loss']:.4f}{told}{mark}[/dim]")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
