"""The problems of a data set, ranked: each with its rows, their share, samples and the remedy."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.data.advice import FORMULA, Verdict, fitting_method, verdicts
from luthier.data.encode import Encoder
from luthier.data.examples import Reject, TrainingExample
from luthier.data.findings import PLACES, Finding, Severity, ranked
from luthier.data.labels import Classes, label_findings
from luthier.data.parallel import over_pieces
from luthier.data.render import special_tokens
from luthier.data.row_checks import CHECKS, Check, Look
from luthier.errors import shorten

if TYPE_CHECKING:
    from luthier.data.duplicates import Copies

# Rows that slow checks and the model's template are tried on, taken evenly.
_SLOW_ROWS, _RENDERED_ROWS = 10_000, 2_000
_CHUNK = 500
_TOOL_CHECKS: dict[str, tuple[Severity, str, str]] = {
    "tool_undeclared": (
        "error",
        "a tool is called that the row does not declare",
        "declare it in the tools column: the model would learn to make tools up",
    ),
    "tool_arguments": (
        "warning",
        "a tool is called with arguments that its schema does not allow",
        "mend the arguments, or the schema",
    ),
    "tool_answer_uncalled": (
        "warning",
        "a tool answers that nobody called",
        "write the assistant's call before it, as a turn with tool_calls",
    ),
}


@dataclass(slots=True)
class Hits:
    """The rows in which one thing was found."""

    count: int = 0
    looked: int = 0
    rows: list[str] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)

    def add(self, example: TrainingExample, sample: str, number: int | None = None) -> None:
        """Count a row; ``number``, from 0, names one that comes from no file."""
        self.count += 1
        if len(self.rows) < PLACES:
            self.rows.append(str(example.source or f"row {self.looked if number is None else number + 1}"))
            self.samples.append(sample)

    def join(self, later: Hits) -> None:
        """Add what was found in later rows."""
        self.count += later.count
        self.looked += later.looked
        self.rows = (self.rows + later.rows)[:PLACES]
        self.samples = (self.samples + later.samples)[:PLACES]

    def finding(self, code: str, severity: Severity, message: str, remedy: str) -> Finding:
        share = self.count / max(1, self.looked)
        counted = f"{self.count:,} of {self.looked:,} rows ({_percent(share)}): {message}"
        return Finding(code, severity, counted, remedy, self.count, tuple(self.rows), share, tuple(self.samples))


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else f"{share:.2g}" if not share else "under 0.1%"


@dataclass(slots=True)
class Lint:
    """What was found."""

    rows: int
    """Rows that could be read."""
    different: int
    """Of these, rows that do not repeat an earlier one word for word."""
    findings: list[Finding]

    @property
    def errors(self) -> list[Finding]:
        return [f for f in self.findings if f.severity == "error"]

    @property
    def verdicts(self) -> list[Verdict]:
        return verdicts(self.different)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "rows": self.rows,
            "different_rows": self.different,
            "passed": not self.errors,
            "findings": [asdict(f) for f in self.findings],
            "amounts": [
                {"method": v.amount.method, "goal": v.amount.goal, "rows": v.amount.rows, "verdict": v.word}
                for v in self.verdicts
            ],
            "method": fitting_method(self.different),
            "note": FORMULA,
        }


def lint(
    examples: Sequence[TrainingExample],
    *,
    rejects: Sequence[Reject] = (),
    encoder: Encoder | None = None,
    max_length: int | None = None,
    allowed_rejects: float = 0.01,
    near: float | None = 0.8,
    deduplicated: bool = False,
    held_out: Mapping[str, Sequence[TrainingExample]] | None = None,
) -> Lint:
    """Look for what makes training rows bad.

    Args:
        examples: the training rows that could be read.
        rejects: those that could not.
        encoder: without a limit of length; None: nothing that needs a tokenizer is looked for.
        max_length: in tokens.
        allowed_rejects: share of refused rows above which they are an error.
        near: similarity of near copies; None: not looked for.
        deduplicated: copies will be taken out by data.deduplicate and are no finding.
        held_out: validation, test and benchmark rows by name, which the training rows must not hold.
    """
    from luthier.data.duplicates import find_copies

    copies = find_copies(examples, near=near)
    findings = [*_refused(rejects, len(examples), allowed_rejects), *_each_row(examples)]
    if not deduplicated:
        findings += copy_findings(examples, copies)
    findings += contradiction_findings(examples)
    if encoder is not None:
        findings += _with_tokenizer(examples, encoder, max_length)
    findings += leaks(examples, held_out or {}, near)
    different = int((copies.exact_first == np.arange(len(examples))).sum())
    return Lint(len(examples), different, ranked(findings))


def _refused(rejects: Sequence[Reject], kept: int, allowed: float) -> Iterator[Finding]:
    """One finding for each reason that rows cannot be read."""
    total = kept + len(rejects)
    few = len(rejects) == 1 or len(rejects) <= allowed * total
    by_reason: dict[str, list[Reject]] = defaultdict(list)
    for reject in rejects:
        by_reason[reject.reason].append(reject)
    for reason, refused in by_reason.items():
        share = len(refused) / total
        yield Finding(
            f"refused_{reason}",
            "warning" if few else "error",
            f"{len(refused):,} of {total:,} rows ({_percent(share)}) cannot be read: {refused[0].message}",
            refused[0].remedy or "mend the rows",
            len(refused),
            tuple(f"{r.file}:{r.line}" for r in refused[:PLACES]),
            share,
            tuple(r.value or "" for r in refused[:PLACES]),
        )


def _each_row(examples: Sequence[TrainingExample]) -> Iterator[Finding]:
    """What single rows show, in one pass, with the classes and system messages of all."""
    look = partial(_look, step=-(-len(examples) // _SLOW_ROWS) or 1)
    hits, classes, systems = _Seen(), Classes(), Hits()
    for found, listed, spoken in over_pieces(look, examples):
        for code in found:
            hits[code].join(found[code])
        classes.join(listed)
        systems.join(spoken)
    for check in CHECKS:
        yield from _said(check, hits[check.code])
    for code, (severity, message, remedy) in _TOOL_CHECKS.items():
        if hits[code].count:
            yield hits[code].finding(code, severity, message, remedy)
    yield from label_findings(classes.counts)
    if 0 < systems.count < 0.05 * systems.looked:
        yield systems.finding(
            "system_in_few_rows",
            "info",
            "only these have a system message, so the model learns the same work under two kinds of prompts",
            "set data.system for the others, or take it out of these",
        )


class _Seen(defaultdict[str, Hits]):
    """What was found in rows, by code."""

    def __init__(self) -> None:
        super().__init__(Hits)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (), None, None, iter(self.items())


def _look(examples: Sequence[TrainingExample], first: int, *, step: int) -> tuple[_Seen, Classes, Hits]:
    """What a piece of the rows shows. Slow checks look at every ``step``-th row of all."""
    hits, classes, systems = _Seen(), Classes(), Hits()
    for number, example in enumerate(examples, first):
        look = Look(example)
        for check in CHECKS:
            if check.slow and number % step:
                continue
            hits[check.code].looked += 1
            if (sample := check.find(look)) is not None:
                hits[check.code].add(example, sample, number)
        _tools(example, hits, number)
        classes.add(example)
        _system(example, systems)
    return hits, classes, systems


def _said(check: Check, hits: Hits) -> Iterator[Finding]:
    if hits.count and hits.count <= max(1, check.usual * hits.looked):
        yield hits.finding(check.code, check.severity, check.message, check.remedy)


def _tools(example: TrainingExample, hits: dict[str, Hits], number: int) -> None:
    from luthier.data.tool_checks import tool_problems

    if example.messages is None or not any(m.get("tool_calls") or m["role"] == "tool" for m in example.messages):
        return
    for code in _TOOL_CHECKS:
        hits[code].looked += 1
    found: dict[str, str] = {}
    for code, problem in tool_problems(example):
        found.setdefault(code, problem)
    for code, problem in found.items():
        hits[code].add(example, problem, number)


def _system(example: TrainingExample, systems: Hits) -> None:
    systems.looked += 1
    first = example.messages[0] if example.messages else {"role": "user"}
    if first["role"] in ("system", "developer"):
        systems.add(example, shorten(first.get("content")))


def copy_findings(examples: Sequence[TrainingExample], copies: Copies) -> Iterator[Finding]:
    """Rows that repeat an earlier one, and further ones that nearly do."""
    own = np.arange(len(examples))
    near = (copies.near_first != own) & (copies.exact_first == own)
    kinds: tuple[tuple[str, Severity, np.ndarray, np.ndarray, str, str], ...] = (
        ("duplicates", "warning", copies.exact_first != own, copies.exact_first,
         "a row repeats an earlier one word for word", "set data.deduplicate: exact, unless the weight is meant"),
        ("near_duplicates", "info", near, copies.near_first,
         "a row is nearly the same as an earlier one", "look at them; data.deduplicate: near takes them out"),
    )  # fmt: skip
    for code, severity, which, first, message, remedy in kinds:
        rows = np.flatnonzero(which).tolist()
        hits = Hits(looked=len(examples))
        for row in rows[:PLACES]:
            hits.add(examples[row], f"as {_place(examples, int(first[row]))}: {shorten(_text(examples[row]))}")
        hits.count = len(rows)
        if rows:
            yield hits.finding(code, severity, message, remedy)


def contradiction_findings(examples: Sequence[TrainingExample]) -> Iterator[Finding]:
    """Rows that ask what an earlier one asks and answer differently."""
    from luthier.data.duplicates import contradictions

    hits = Hits(looked=len(examples))
    count = 0
    for group in contradictions(examples):
        first, second = int(group[0]), int(group[1])
        count += len(group) - 1
        answers = " / ".join(shorten(examples[row].answer, 40) for row in (first, second))
        if len(hits.rows) < PLACES:
            hits.add(examples[second], f"{shorten(_text(examples[second]), 60)}: {answers}")
    if count:
        hits.count = count
        yield hits.finding(
            "contradictions",
            "warning",
            "a row asks what an earlier one asks and answers differently",
            "keep one answer, or say in the prompt what makes the difference",
        )


def _place(examples: Sequence[TrainingExample], index: int) -> str:
    return str(examples[index].source or f"row {index + 1}")


def _text(example: TrainingExample) -> str:
    return next((str(m["content"]) for m in example.to_chat_format() if m["role"] == "user"), example.input)


# --- what needs a tokenizer ---


def _with_tokenizer(examples: Sequence[TrainingExample], encoder: Encoder, max_length: int | None) -> Iterator[Finding]:
    yield from _special_text(examples, encoder)
    long, unfit = Hits(looked=len(examples)), Counter[str]()
    shown: dict[str, Hits] = {}
    lost = trained = 0
    step = -(-len(examples) // _RENDERED_ROWS) or 1
    tried = 0
    for chunk in _chunks(_worth_encoding(examples, encoder, max_length, step)):
        encoded = encoder.encode([example for _, example in chunk])
        for row in encoded.examples:
            if max_length is not None and len(row) > max_length:
                long.add(chunk[row.index][1], f"{len(row):,} tokens")
                lost += int(row.trained[max_length:].sum())
                trained += int(row.trained.sum())
        tried += len(chunk)
        for reject in encoded.rejects:
            if reject.reason != "special_token_in_text":
                unfit[reject.reason] += 1
                hits = shown.setdefault(reject.reason, Hits())
                if len(hits.rows) < PLACES:
                    hits.rows.append(f"{reject.file}:{reject.line}")
                    hits.samples.append(reject.message)
    if long.count:
        yield long.finding(
            "too_long",
            "warning",
            f"a row has more than data.max_length={max_length:,} tokens; of {trained:,} answer tokens in such rows "
            f"{lost:,} stand beyond it",
            "raise data.max_length, shorten the rows, or set data.truncation: cut to lose their ends",
        )
    for reason, count in unfit.items():
        hits = shown[reason]
        hits.count, hits.looked = count, tried
        yield hits.finding(
            f"model_{reason}", "error", hits.samples[0], "name another model or template, or mend the rows"
        )


def _worth_encoding(
    examples: Sequence[TrainingExample], encoder: Encoder, max_length: int | None, step: int
) -> Iterator[tuple[int, TrainingExample]]:
    """Rows that could be longer than max_length, for a token is at least a byte; and an even sample of all."""
    turn = [{"role": "user", "content": ""}, {"role": "assistant", "content": "answer"}]
    frame = encoder.encode([TrainingExample(messages=turn)]).examples
    around = 64 + sum(len(row) for row in frame)
    for number, example in enumerate(examples):
        if number % step == 0 or (max_length is not None and _bytes(example, around) > max_length):
            yield number, example


def _bytes(example: TrainingExample, around: int) -> int:
    if example.is_plain_text:
        return len(example.input.encode("utf-8", "replace")) + 8
    messages = example.to_chat_format()
    said = json.dumps([messages, example.tools], ensure_ascii=False, default=str)
    # Templates write tools and calls with their own words around; twice their length has room for them.
    return around * (1 + len(messages)) + len(said.encode("utf-8", "replace")) * (2 if example.tools else 1)


def _chunks(rows: Iterable[tuple[int, TrainingExample]]) -> Iterator[list[tuple[int, TrainingExample]]]:
    chunk = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _special_text(examples: Sequence[TrainingExample], encoder: Encoder) -> Iterator[Finding]:
    specials = [token for token in special_tokens(encoder.tokenizer) if token]
    if not specials:
        return
    pattern = re.compile("|".join(map(re.escape, specials)))
    hits = Hits(looked=len(examples))
    for example in examples:
        for message in example.to_chat_format():
            if found := pattern.search(str(message.get("content") or "")):
                text = found.string
                hits.add(example, repr(text[max(0, found.start() - 20) : found.end() + 20]))
                break
    if hits.count:
        yield hits.finding(
            "special_token_in_text",
            "error",
            "a text holds a control token of the model, which it would read as control; such rows are refused",
            "take them out of the text, or set data.special_tokens_in_text: allow if they are meant",
        )


# --- two sides ---


def leaks(
    train: Sequence[TrainingExample], held_out: Mapping[str, Sequence[TrainingExample]], near: float | None = 0.8
) -> Iterator[Finding]:
    """Rows of held-out parts that are among the training rows, or nearly; the training rows are read once for all."""
    from luthier.data.leakage import overlap

    parts = {name: rows for name, rows in held_out.items() if len(rows)}
    if not parts or not len(train):
        return
    every = [example for rows in parts.values() for example in rows]
    found = overlap(every, train, threshold=near)
    kinds = (
        ("overlap", found.exact, "is in the training rows, word for word, so its score would measure memory",
         "take them out of the {} file, or of the training file"),
        ("overlap_prompt", found.prompt, "asks what a training row asks, and is answered differently there",
         "take them out of the {} file, or split with data.split.group_by: prompt"),
        ("overlap_near", found.near, "is nearly the same as a training row",
         "look at them: if they say the same, split with data.split.group_by: near_duplicates"),
    )  # fmt: skip
    begin = 0
    for name, rows in parts.items():
        for code, others, message, remedy in kinds:
            other = others[begin : begin + len(rows)]
            which = np.flatnonzero(other >= 0).tolist()
            hits = Hits(looked=len(rows))
            for row in which[:PLACES]:
                hits.add(rows[row], f"as {_place(train, int(other[row]))}: {shorten(_text(rows[row]))}")
            hits.count = len(which)
            if which:
                error = code == "overlap" and len(which) > 0.01 * len(rows)
                yield hits.finding(
                    code, "error" if error else "warning", f"{name}: a row {message}", remedy.format(name)
                )
        begin += len(rows)
