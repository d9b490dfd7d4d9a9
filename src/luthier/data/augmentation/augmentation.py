"""Variants of training rows: which rows, by which augmenter, and what is kept of what comes back."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, Literal

from luthier.data.augmentation.report import AugmentationReport, StepReport
from luthier.data.augmentation.rewriting import Refused, Rewritten
from luthier.data.augmentation.ways import Augmenter, On, Way, way_of
from luthier.data.examples import TrainingExample
from luthier.data_options import Step
from luthier.endpoint import Answerer
from luthier.errors import UserError, shorten

# Variants that are made at one time: enough for an endpoint's threads, few enough for memory.
_WINDOW = 256
# How often a way may come back with what the row has already, before the row goes without.
_TRIES = 3


@dataclass(slots=True)
class _Part:
    """A text of an example that varies."""

    text: str
    keep: str
    """The text whose words must stay: the answer."""
    at: int | None
    """The turn of a conversation; None: the prompt; -1: the answer."""


@dataclass(slots=True)
class _Job:
    """One variant to be made of one row."""

    row: int
    number: int
    example: TrainingExample
    plan: list[int]
    """The ways still to be tried, in order."""
    attempt: int = 0
    variant: TrainingExample | None = None


@dataclass(slots=True)
class _Pass:
    """How many variants each row is to get on one way through the rows."""

    each: int
    chosen: set[int] = field(default_factory=set)

    def of(self, row: int) -> int:
        return self.each + (row in self.chosen)


class Augmentation:
    """Makes variants of examples, reproducibly.

    The number of variants is ``int(ratio * rows)``; above 1, every row gets as many as the ratio's whole part, and
    a seeded choice of rows one more. Where a row cannot be varied, another one takes its place. Each variant is made by
    one augmenter, drawn for it; where that one finds nothing to vary or makes nothing that can be kept, the others
    follow. Chance depends on the seed, the row's index and the variant's number alone: not on threads, and not on what
    became of other rows. Labels never change, and answers only where a step says ``on: answer`` or ``on: all``.

    Augment training rows alone, after the split: a variant of a held-out row is the held-out row.

    Args:
        steps: augmenters: a recipe's steps, names of built-in ones, or functions from text to text.
        ratio: variants, as a share of the rows; may exceed 1.
        seed: where chance comes from.
        on_error: what a failing augmenter does: raise, with its row; or report: it is counted and listed, and the row
            goes to the next augmenter.
        answerer: the model of steps that need one and name none.
        local: makes an answerer from a local model's folder, as ``luthier.evaluation.answering.local_answerer`` does.

    Raises:
        UserError: no step, no such augmenter or option, or a ratio below 0.
    """

    def __init__(
        self,
        steps: Sequence[Step | str | Augmenter],
        ratio: float = 0.1,
        seed: int = 42,
        *,
        on_error: Literal["raise", "report"] = "raise",
        answerer: Answerer | None = None,
        local: Callable[[str], Answerer] | None = None,
    ) -> None:
        if not steps:
            raise UserError("no augmenter was named", where="data.augment", remedy="for example noise_injection")
        if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 <= ratio < float("inf"):
            raise UserError(f"augment_ratio={ratio!r} is no number of at least 0", remedy="for example 0.1")
        if on_error not in ("raise", "report"):
            raise UserError(f"on_error={on_error!r} is not known", remedy="use raise or report")
        self.ratio, self.seed, self.on_error = ratio, seed, on_error
        self._ways: list[Way] = [way_of(s, f"data.augment[{i}]", answerer, local) for i, s in enumerate(steps)]
        self._report = AugmentationReport(0, 0, steps=[StepReport(way.name) for way in self._ways])
        self._seen: set[int] = set()

    def report(self) -> AugmentationReport:
        """What became of the variants of the last :meth:`apply`, as far as it was read."""
        return self._report

    def apply(self, examples: Sequence[TrainingExample]) -> Iterator[TrainingExample]:
        """The variants alone, of rows in their order.

        Args:
            examples: rows, in memory or on disk; they are read in order and stay as they are.

        Raises:
            UserError: an augmenter fails, with the row's place and the augmenter's name (with ``on_error="raise"``); a
                model cannot be asked at all (always).
        """
        rows = len(examples)
        wanted = int(rows * self.ratio + 1e-9)
        self._report = AugmentationReport(rows, wanted, steps=[StepReport(way.name) for way in self._ways])
        self._seen = set()
        if not wanted:
            return
        order = list(range(rows))
        random.Random(self.seed).shuffle(order)
        each, extra = divmod(wanted, rows)
        through = _Pass(each, set(order[:extra]))
        rest = order[extra:] if extra else []  # rows that may stand in for others
        while True:
            yield from self._through(examples, through)
            missing = wanted - self._report.made
            if missing <= 0 or not rest:
                return
            through, rest = _Pass(0, set(rest[:missing])), rest[missing:]

    def _through(self, examples: Sequence[TrainingExample], through: _Pass) -> Iterator[TrainingExample]:
        jobs: list[_Job] = []
        first = ceil(self.ratio) if through.each == 0 and self.ratio > 1 else 0  # numbers of earlier passes are taken
        for row, example in enumerate(examples):
            for number in range(through.of(row)):
                plan = list(range(len(self._ways)))
                self._rng(row, first + number, "plan").shuffle(plan)
                jobs.append(_Job(row, first + number, example, plan))
            if len(jobs) >= _WINDOW:
                yield from self._made(jobs)
                jobs = []
        yield from self._made(jobs)

    def _made(self, jobs: list[_Job]) -> Iterator[TrainingExample]:
        """The variants of some jobs, in the jobs' order."""
        pending = jobs
        while pending:
            for index, way in enumerate(self._ways):
                turn = [job for job in pending if job.variant is None and job.plan[:1] == [index]]
                if turn:
                    self._vary(turn, way, self._report.steps[index])
            pending = [job for job in pending if job.variant is None and job.plan]
        for job in jobs:
            if job.variant is not None:
                self._report.made += 1
                yield job.variant

    def _vary(self, jobs: list[_Job], way: Way, report: StepReport) -> None:
        """Let one way try its jobs, all at once; a job that it does not serve loses it from its plan."""
        parts = [_parts(job.example, way.on) for job in jobs]
        flat = [part for some in parts for part in some]
        rngs = [
            self._rng(job.row, job.number, f"{job.attempt}.{i}")
            for job, some in zip(jobs, parts, strict=True)
            for i in range(len(some))
        ]
        results = iter(way.vary([p.text for p in flat], rngs, [p.keep for p in flat]) if flat else [])
        for job, some in zip(jobs, parts, strict=True):
            again = self._take(job, some, [next(results) for _ in some], way, report)
            job.attempt += 1
            job.plan = [*job.plan[1:], *([job.plan[0]] if again else [])]

    def _take(self, job: _Job, parts: list[_Part], varied: list[Rewritten], way: Way, report: StepReport) -> bool:
        """Keep a job's variant or count why not; True where the same way may do better another time."""
        if not parts:
            self._report.without_text += job.attempt == 0
            return False
        for part, result in zip(parts, varied, strict=True):
            if isinstance(result, UserError):
                place = _place(job)
                if self.on_error == "raise":
                    where = f"{place}, {result.where}" if result.where else place
                    raise UserError(
                        result.what if way.name in result.what else f"the augmenter {way.name!r} failed: {result.what}",
                        where=where,
                        remedy=result.remedy or 'mend the augmenter, or leave such rows out with on_error="report"',
                    ) from result.__cause__
                report.fail(place, result.what)
                return False
            if isinstance(result, Refused):
                report.refuse(result.reason, part.text, result.text)
                return result.reason == "unchanged" and job.attempt + 1 < _TRIES
        texts = [str(result) for result in varied]
        changed = [(p, t) for p, t in zip(parts, texts, strict=True) if p.text != t]
        if not changed:
            report.unchanged += 1
            return False
        if any(p.text.strip() and not t.strip() for p, t in changed):
            report.refuse("empty", changed[0][0].text, changed[0][1])
            return False
        if self.ratio > 1:
            key = hash((job.row, *((p.at, t) for p, t in changed)))
            if key in self._seen:
                report.refuse("repeated", changed[0][0].text, changed[0][1])
                return job.attempt + 1 < _TRIES * len(self._ways)
            self._seen.add(key)
        report.keep(changed[0][0].text, changed[0][1])
        job.variant = _with(job, changed, way.name)
        return False

    def _rng(self, row: int, number: int, what: str) -> random.Random:
        return random.Random(f"{self.seed}:{row}:{number}:{what}")


def _parts(example: TrainingExample, on: On) -> list[_Part]:
    """The texts of an example that vary; none where there is no prompt, or it is no text."""
    label = "" if example.label is None else json.dumps(example.label, ensure_ascii=False).strip('"')
    others = "\n".join([label, *example.references])
    if example.messages is None:
        if example.is_plain_text and example.label is None:
            return [] if on == "prompt" else [_Part(example.input, "", None)]
        prompt = [_Part(example.input, _joined(example.output, others), None)]
        answer = [] if example.output is None else [_Part(example.output, _joined(example.input, others), -1)]
    else:
        prompt = [_turn(example, i, others) for i in _last(example.messages, "user")]
        answer = [_turn(example, i, others) for i in _last(example.messages, "assistant")]
    parts = {"prompt": prompt, "answer": answer, "all": prompt + answer}[on]
    return [part for part in parts if part.text.strip()]


def _last(messages: list[dict[str, Any]], role: str) -> list[int]:
    """The index of a role's last turn of text, in a list that is empty where there is none."""
    for index in range(len(messages) - 1, -1, -1):
        message = messages[index]
        if message["role"] == role and isinstance(message.get("content"), str) and message["content"].strip():
            return [index]
    return []


def _turn(example: TrainingExample, index: int, others: str) -> _Part:
    """A turn of a conversation; its words that other turns take up stay, tool calls among them."""
    messages = example.messages or []
    said = [m.get("content") for i, m in enumerate(messages) if i != index and m["role"] not in ("system", "developer")]
    calls = [json.dumps(m["tool_calls"], ensure_ascii=False) for m in messages if m.get("tool_calls")]
    keep = _joined(*[s for s in said if isinstance(s, str)], *calls, others)
    return _Part(messages[index]["content"], keep, index)


def _joined(*texts: str | None) -> str:
    return "\n".join(text for text in texts if text and text.strip())


def _with(job: _Job, changed: list[tuple[_Part, str]], name: str) -> TrainingExample:
    """The job's example with some texts replaced, and where it comes from."""
    example = job.example
    metadata = {
        **(example.metadata or {}),
        "augmented_by": name,
        "augmented_from": str(example.source) if example.source else None,
        "augmented_index": job.row,
    }
    if example.messages is None:
        texts = {"output" if part.at == -1 else "input": text for part, text in changed}
        return replace(example, **texts, metadata=metadata)  # type: ignore[arg-type]
    messages = [dict(m) for m in example.messages]
    for part, text in changed:
        if part.at is not None:
            messages[part.at]["content"] = text
    return replace(example, messages=messages, metadata=metadata)


def _place(job: _Job) -> str:
    example = job.example
    if example.source:
        return str(example.source)
    text = example.input or next(
        (m["content"] for m in example.messages or [] if isinstance(m.get("content"), str)), ""
    )
    return f"example {job.row + 1}, {shorten(text)}"
