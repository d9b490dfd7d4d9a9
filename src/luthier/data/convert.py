"""Examples to rows of a known format, so that reading them back gives the same examples.

Nothing is taken on trust: what was written is read again and compared, row by row, before the file gets its name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.data.examples import Message, Reject, TrainingExample
from luthier.data.sources import read_examples
from luthier.data.writers import TABLES, Record, as_json, writable_kind, write_records
from luthier.data_options import Source
from luthier.errors import UserError, shorten

_SHAREGPT = {"user": "human", "assistant": "gpt", "tool": "observation"}
_ABSENT = object()


class CannotHold(ValueError):
    """A format has no place for something of an example."""


@dataclass(frozen=True, slots=True)
class Written:
    """What was written."""

    rows: int
    format: str
    changed: int = 0
    """Rows whose metadata reads back differently; only where that was allowed."""
    first_change: str | None = None


def convert(
    examples: Sequence[TrainingExample], path: Path, to: str, *, force: bool = False, lossy: bool = False
) -> Written:
    """Write examples in a format; the kind of file follows from the path's suffix.

    Args:
        examples: rows, iterated several times.
        path: the file to write.
        to: a name in :data:`FORMATS`, or ``auto`` for the simplest that holds all rows.
        force: replace an existing file.
        lossy: metadata may change where the file cannot hold it (numbers in a table become texts); what is trained
            or evaluated never does.

    Raises:
        UserError: the format or the kind of file cannot hold a row; then nothing is written.
    """
    path = path.expanduser()
    kind = writable_kind(path, force=force)
    if not len(examples):
        raise UserError("there is no row to write", remedy="see why the rows were refused: `luthier data lint`")
    if to == "auto":
        to = simplest_format(examples)
    if to not in FORMATS:
        raise UserError(f"unknown format {to!r}", where="--to", remedy=f"known: {', '.join(FORMATS)}")
    for number, example in enumerate(examples, 1):
        try:
            FORMATS[to](example)
        except CannotHold as error:
            others = ", ".join(_formats_for(example)) or "none"
            raise UserError(
                f"the format {to} cannot hold the row: {error}",
                where=_place(example, number),
                remedy=f"formats that can: {others}",
            ) from None
    records = _Records(examples, to)
    changes: list[str] = []

    def verify(written: Path) -> None:
        changes.extend(_changes(examples, written, table=kind.format in TABLES, lossy=lossy))

    write_records(path, records, force=force, verify=verify)
    return Written(len(examples), to, len(changes), changes[0] if changes else None)


@dataclass(frozen=True, slots=True)
class _Records:
    """The rows of a file, made anew each time they are iterated."""

    examples: Sequence[TrainingExample]
    to: str

    def __iter__(self) -> Iterator[Record]:
        return (FORMATS[self.to](example) for example in self.examples)


def simplest_format(examples: Iterable[TrainingExample]) -> str:
    """The first format of text, prompt-completion and openai that holds every row.

    Raises:
        UserError: plain texts and answers are mixed, so that none does.
    """
    left = ["text", "prompt-completion", "openai"]
    for example in examples:
        left = [name for name in left if _holds(name, example)]
    if not left:
        raise UserError(
            "some rows are plain text and others have answers; no format holds both", remedy="write them as two files"
        )
    return left[0]


def _holds(name: str, example: TrainingExample) -> bool:
    try:
        FORMATS[name](example)
    except CannotHold:
        return False
    return True


def _formats_for(example: TrainingExample) -> list[str]:
    return [name for name in FORMATS if _holds(name, example)]


def _place(example: TrainingExample, number: int) -> str:
    return str(example.source) if example.source else f"row {number}"


# --- reading back ---


def _changes(examples: Sequence[TrainingExample], written: Path, *, table: bool, lossy: bool) -> Iterator[str]:
    """What reading the file back changes in metadata, where that is allowed.

    Raises:
        UserError: it changes anything else, or that is not allowed.
    """
    try:
        pairs = itertools.zip_longest(examples, read_examples(Source(path=str(written))))
        yield from _compared(pairs, written, table=table, lossy=lossy)
    except UserError as error:
        if error.where is not None and error.where.startswith(str(written)):
            raise UserError(f"the file could not be read back: {error.what}", remedy="write .jsonl") from None
        raise


def _compared(
    pairs: Iterable[tuple[TrainingExample | None, TrainingExample | Reject | None]],
    written: Path,
    *,
    table: bool,
    lossy: bool,
) -> Iterator[str]:
    for number, (before, after) in enumerate(pairs, 1):
        if before is None or after is None:
            raise UserError(f"not as many rows read back as were written: {number:,} differ", remedy="write .jsonl")
        where = _place(before, number)
        if isinstance(after, Reject):
            rejected = f"the row would be refused when read back: {after.message}"
            raise UserError(rejected, where=where, remedy="use --to openai and .jsonl")
        found = difference(before, after, table=table)
        if found is None:
            continue
        part, change = found
        if part != "metadata":
            raise UserError(
                f"the row would not read back the same: {change}",
                where=where,
                remedy="use --to openai and .jsonl, which hold the most",
            )
        if not lossy:
            raise UserError(
                f"the row would not read back the same: {change}",
                where=where,
                remedy="write .jsonl, or allow changes of what is never trained on with --lossy",
            )
        yield f"{where}: {change}"


def difference(before: TrainingExample, after: TrainingExample, *, table: bool = False) -> tuple[str, str] | None:
    """The first difference between two examples that should be the same: ``(part, what changed)``, or None.

    A prompt and its answer are the same as the conversation of these two turns.

    Args:
        before: as it was.
        after: as it was read back.
        table: a class written as a number may read back as its digits, which train the same.
    """
    pairs: list[tuple[str, str, Any, Any]] = []
    if before.is_plain_text or after.is_plain_text:
        pairs.append(("text", "the text", _plain(before), _plain(after)))
    else:
        turns = itertools.zip_longest(before.to_chat_format(), after.to_chat_format(), fillvalue=_ABSENT)
        pairs += [("turn", f"turn {number}", *pair) for number, pair in enumerate(turns, 1)]
    label, read = before.label, after.label
    if table and isinstance(label, int) and not isinstance(label, bool):
        label, read = as_json(label), None if read is None else str(read)
    pairs += [
        ("tools", "the list of tools", before.tools or None, after.tools or None),
        ("references", "the list of references", before.references, after.references),
        ("label", "the label", label, read),
    ]
    was, now = before.metadata or {}, after.metadata or {}
    pairs += [
        ("metadata", f"the metadata {key!r}", was.get(key, _ABSENT), now.get(key, _ABSENT)) for key in {**was, **now}
    ]
    for part, name, old, new in pairs:
        if old != new:
            return part, f"{name}, {_shown(old)}, would become {_shown(new)}"
    return None


def _plain(example: TrainingExample) -> Any:
    return example.input if example.is_plain_text else _ABSENT


def _shown(value: Any) -> str:
    return "absent" if value is _ABSENT else shorten(value)


# --- the formats ---


def _openai(example: TrainingExample) -> Record:
    if example.is_plain_text:
        raise CannotHold("it is plain text, without turns")
    return _with_rest({"messages": openai_turns(example.to_chat_format())}, example)


def openai_turns(messages: Sequence[Message]) -> list[Message]:
    """Turns as OpenAI's interface takes them: the arguments of calls are JSON text there."""
    return [
        {**turn, "tool_calls": [_call_as_text(call) for call in turn["tool_calls"]]}
        if turn.get("tool_calls")
        else dict(turn)
        for turn in messages
    ]


def _call_as_text(call: dict[str, Any]) -> dict[str, Any]:
    """OpenAI writes a call's arguments as JSON text."""
    inner = call.get("function", call)
    return {**call, "function": {**inner, "arguments": as_json(inner.get("arguments", {}))}}


def _sharegpt(example: TrainingExample) -> Record:
    if example.is_plain_text:
        raise CannotHold("it is plain text, without turns")
    row = _with_rest({"conversations": [_sharegpt_turn(m) for m in example.to_chat_format()]}, example)
    if example.tools:
        # The format's habit: the bare schemas, as JSON text.
        bare = [t["function"] if _is_wrapped(t) else t for t in example.tools]
        row["tools"] = as_json(example.tools if any("function" in tool for tool in bare) else bare)
    return row


def _is_wrapped(tool: dict[str, Any]) -> bool:
    return set(tool) == {"type", "function"} and tool["type"] == "function"


def _sharegpt_turn(message: Message) -> dict[str, Any]:
    role, content = message["role"], message.get("content")
    more = {k: v for k, v in message.items() if k not in ("role", "content", "tool_calls")}
    calls = message.get("tool_calls")
    if calls and not content and not more and role == "assistant":
        bare = [{**call.get("function", call), **({"id": call["id"]} if "id" in call else {})} for call in calls]
        return {"from": "function_call", "value": as_json(bare[0] if len(bare) == 1 else bare)}
    turn = {"from": _SHAREGPT.get(role, role), "value": content, **more}
    return {**turn, "tool_calls": [_call_as_text(call) for call in calls]} if calls is not None else turn


def _alpaca(example: TrainingExample) -> Record:
    system, history, prompt, answer = _exchanges(example)
    return _with_rest({"instruction": prompt, "input": "", "output": answer, **_past(system, history)}, example)


def _prompt_completion(example: TrainingExample) -> Record:
    system, history, prompt, answer = _exchanges(example)
    return _with_rest({"prompt": prompt, "completion": answer, **_past(system, history)}, example)


def _past(system: str | None, history: list[list[str]]) -> Record:
    return {**({"system": system} if system else {}), **({"history": history} if history else {})}


def _exchanges(example: TrainingExample) -> tuple[str | None, list[list[str]], str, str]:
    """``(system message, earlier exchanges, prompt, answer)``

    Raises:
        CannotHold: the turns are not questions and answers in turn.
    """
    if example.is_plain_text:
        raise CannotHold("it is plain text, which has no answer")
    messages = example.to_chat_format()
    for number, message in enumerate(messages, 1):
        more = sorted(set(message) - {"role", "content"})
        if more:
            raise CannotHold(f"turn {number} has {', '.join(more)}")
        if not message.get("content"):
            raise CannotHold(f"turn {number} has no text")
    system = str(messages.pop(0)["content"]) if messages[0]["role"] == "system" else None
    roles = [message["role"] for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise CannotHold(f"its turns are not a user's and an assistant's in turn: {', '.join(roles)}")
    said = [str(message["content"]) for message in messages]
    pairs = [[asked, answered] for asked, answered in zip(said[::2], said[1::2], strict=True)]
    return system, pairs[:-1], said[-2], said[-1]


def _classification(example: TrainingExample) -> Record:
    system, history, prompt, answer = _exchanges(example)
    if system or history:
        raise CannotHold("it has more than a text and its class")
    if example.label is None:
        raise CannotHold("it has no label")
    if answer != (example.label if isinstance(example.label, str) else as_json(example.label)):
        raise CannotHold(f"its answer {shorten(answer)} is not its label {shorten(example.label)}")
    return _with_rest({"text": prompt}, example)


def _text(example: TrainingExample) -> Record:
    if not example.is_plain_text:
        raise CannotHold("it has an answer apart from its prompt")
    return _with_rest({"text": example.input}, example)


def _with_rest(row: Record, example: TrainingExample) -> Record:
    """A row with the label, tools, references and metadata of its example."""
    if example.label is not None:
        row["label"] = example.label
    if example.tools:
        row["tools"] = example.tools
    if example.references:
        row["references"] = example.references
    for key, value in (example.metadata or {}).items():
        if key in row:
            raise CannotHold(f"it has metadata called {key!r}, a name that the format uses")
        row[key] = value
    return row


FORMATS: dict[str, Callable[[TrainingExample], Record]] = {
    "openai": _openai,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "classification": _classification,
    "text": _text,
}
"""How an example is written in each format; raises :class:`CannotHold`."""
