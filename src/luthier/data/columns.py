"""Rows to examples: which column holds what is recognised from the keys, or named in the recipe."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rapidfuzz import process

from luthier.data.conversations import Unfit, checked_turns, parse_tools
from luthier.data.examples import Reject, TaskType, TrainingExample
from luthier.data.readers import Row, open_reader
from luthier.data_options import Columns
from luthier.errors import UserError, shorten

# In order of preference: the first that a file has is taken.
PROMPTS = ("prompt", "question", "query", "instruction", "input", "user", "问题", "提问", "问", "指令", "输入")
RESPONSES = (
    "response",
    "completion",
    "answer",
    "answers",
    "output",
    "reply",
    "assistant",
    "target",
    "答案",
    "回答",
    "答",
    "输出",
    "回复",
)
TEXTS = ("text", "content", "review", "sentence", "文本", "正文", "内容", "评论")
LABELS = ("label", "labels", "category", "class", "标签", "类别", "分类")
INPUTS = ("input", "context", "输入", "上下文")
MESSAGES = ("messages", "conversations", "conversation", "dialog", "对话")
_PEEK = 1_000


@dataclass(frozen=True, slots=True)
class Format:
    """A known shape of rows."""

    name: str
    columns: Columns


@dataclass(frozen=True, slots=True)
class Proposal:
    """What `luthier init` says of a file."""

    format: str
    columns: Columns
    encoding: str
    rows: int
    """Rows looked at, at most a thousand."""
    notes: list[str] = field(default_factory=list)


def recognise(keys: Iterable[str], path: str | Path) -> Format | None:
    """The format of rows with these keys; None where there is nothing to recognise.

    Raises:
        UserError: the rows are preference pairs, which are no examples to imitate.
    """
    have = set(keys)
    if "chosen" in have and ("rejected" in have or not _first(RESPONSES, have)):
        raise UserError(
            "the rows are preference pairs (chosen, rejected), not examples to imitate",
            where=str(path),
            remedy="to imitate the chosen answers, set data.columns: {prompt: prompt, response: chosen}",
        )
    common: dict[str, Any] = {"system": "system" if "system" in have else None}
    common["tools"] = _first(("tools", "functions"), have)
    common["references"] = "references" if "references" in have else None
    messages = _first(MESSAGES, have)
    if messages:
        name = {"messages": "OpenAI messages", "conversations": "ShareGPT"}.get(messages, messages)
        return Format(name, Columns(messages=messages, label="label" if "label" in have else None, **common))
    label = _first(LABELS, have)
    if {"instruction", "output"} <= have:
        more = "input" if "input" in have else None
        columns = Columns(prompt="instruction", input=more, response="output", **common)
        columns.label = "label" if "label" in have else None
        return Format("Alpaca", columns)
    prompt, response = _first(PROMPTS, have), _first(RESPONSES, have)
    if prompt and response:
        more = _first(INPUTS, have - {prompt})
        name = f"{prompt}+{more}/{response}" if more else f"{prompt}/{response}"
        return Format(name, Columns(prompt=prompt, input=more, response=response, label=label, **common))
    text = _first(TEXTS, have)
    if (text or prompt) and label:
        return Format(f"{text or prompt} with {label}", Columns(prompt=text or prompt, label=label, **common))
    if text:
        return Format("plain text", Columns(text=text, **common))
    if prompt in ("input", "输入"):
        return Format("plain text", Columns(text=prompt, **common))
    return None


def _first(names: Sequence[str], have: set[str]) -> str | None:
    return next((name for name in names if name in have), None)


def settle(keys: Sequence[str], columns: Columns | None, path: str | Path) -> Format:
    """The format to read rows by: the columns that the user names win over what is recognised.

    Args:
        keys: those of all the file's rows: a system message or a further input may first appear late.
        columns: as named by the user; may be empty.
        path: named in errors.

    Raises:
        UserError: nothing is recognised, or a named column is in no row.
    """
    names = columns.label_names if columns is not None else None
    named = columns.model_dump(exclude_none=True, exclude={"label_names"}) if columns is not None else {}
    for part, column in named.items():
        if column not in keys:
            near = process.extractOne(column, keys, score_cutoff=50)
            raise UserError(
                f"there is no column {column!r} for data.columns.{part}; the columns are {', '.join(map(repr, keys))}",
                where=str(path),
                remedy=f"did you mean {near[0]!r}?" if near else "name one of these",
            )
    if {"messages", "text", "prompt"} & named.keys():
        if "prompt" in named and not {"response", "label"} & named.keys():
            raise UserError(
                f"data.columns names the prompt ({named['prompt']!r}) and no response",
                where=str(path),
                remedy="name data.columns.response, or data.columns.text for plain text that is trained whole",
            )
        return Format("columns named in the recipe", Columns(**named, label_names=names))
    found = recognise(keys, path)
    if found is None:
        raise UserError(
            f"the columns {', '.join(map(repr, keys))} are of no known format",
            where=str(path),
            remedy="say which holds what: data.columns: {prompt: …, response: …}, {messages: …} or {text: …}",
        )
    taken = found.columns.model_copy(update={**named, "label_names": names})
    if names and not taken.label:
        raise UserError(
            "data.columns.label_names names classes, but no column holds them",
            where=str(path),
            remedy="say which does: data.columns.label",
        )
    return Format(found.name, taken)


def propose(path: str | Path) -> Proposal:
    """Look at the first thousand rows of a file.

    Raises:
        UserError: the file cannot be read or its columns are of no known format.
    """
    reader = open_reader(path)
    head = list(itertools.islice(reader.rows(), _PEEK))
    rows = [row for row in head if isinstance(row, Row)]
    if not rows:
        first = next(r for r in head if isinstance(r, Reject))
        raise UserError(first.message, where=f"{first.file}:{first.line}", remedy=first.remedy)
    found = settle(list(dict.fromkeys(itertools.chain.from_iterable(row.values for row in rows))), None, path)
    used = _used(found.columns)
    unused = [key for key in rows[0].values if key not in used]
    notes = [f"kept as metadata, not trained: {', '.join(unused)}"] if unused else []
    if found.columns.label and not found.columns.response:
        notes.append(f"the label ({found.columns.label}) is the answer to be learnt")
    return Proposal(found.name, found.columns, reader.encoding, len(head), notes)


def _used(columns: Columns) -> set[str]:
    """The columns whose content goes into an example; all others stay in its metadata."""
    parts = {k: v for k, v in vars(columns).items() if isinstance(v, str)}
    if columns.text:
        return {parts[k] for k in ("text", "label") if k in parts}
    if columns.messages:
        return {parts[k] for k in ("messages", "system", "tools", "references", "label") if k in parts}
    return {parts[k] for k in parts if k not in ("text", "messages")} | {"history"}


def to_example(row: Row, columns: Columns, task_type: TaskType = TaskType.CAUSAL_LM) -> TrainingExample | Reject:
    """A row as an example, or as the reject that says why it cannot be one. No text is altered."""
    values = row.values
    used = _used(columns)
    try:
        if columns.text:
            label = _label(values, columns)
            kept = {k: v for k, v in values.items() if k not in used}
            text = _text(values, columns.text, "text")
            return TrainingExample(text, label=label, metadata=kept, task_type=task_type, source=row.source)
        system = _text(values, columns.system, "system", optional=True) if columns.system else None
        tools = parse_tools(values.get(columns.tools), columns.tools) if columns.tools else None
        common: dict[str, Any] = {
            "label": _label(values, columns),
            "metadata": {k: v for k, v in values.items() if k not in used},
            "task_type": task_type,
            "tools": tools,
            "source": row.source,
        }
        references = _references(values, columns)
        if columns.messages:
            turns = checked_turns(values.get(columns.messages), columns.messages)
            if system and turns[0]["role"] in ("system", "developer"):
                # The conversation has its own; the column's stays readable.
                common["metadata"][columns.system] = system
            elif system:
                turns.insert(0, {"role": "system", "content": system})
            return TrainingExample(messages=turns, references=references, **common)
        prompt = _text(values, columns.prompt, "prompt")
        more = _text(values, columns.input, "prompt", optional=True) if columns.input else None
        if more:
            prompt = f"{prompt}\n\n{more}"
        answer, others = _answer(values, columns)
        references = [*others, *references]
        history = values.get("history") or []
        if system or history:
            turns = [{"role": "system", "content": system}] if system else []
            turns += _past(history)
            turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            return TrainingExample(messages=turns, references=references, **common)
        return TrainingExample(input=prompt, output=answer, references=references, **common)
    except Unfit as error:
        return Reject(
            row.source.file, row.source.line, error.reason, str(error), error.field, error.value, error.remedy
        )


def _text(values: dict[str, Any], column: str | None, part: str, *, optional: bool = False) -> str:
    """The text of a column.

    Raises:
        Unfit: it is absent, empty or no text.
    """
    value = values.get(column or "")
    if value is None or (isinstance(value, str) and not value.strip()):
        if optional:
            return ""
        there = f"the row has {', '.join(map(repr, values))}" if column not in values else "it is empty"
        raise Unfit(f"empty_{part}", f"no {part} in column {column!r}: {there}", column, value, "give it a text")
    if not isinstance(value, str):
        raise Unfit(
            "wrong_type",
            f"column {column!r} holds {shorten(value)} ({type(value).__name__}) where the {part}'s text belongs",
            column,
            value,
            "write it as a text in quotes, or name another column in data.columns",
        )
    return value


def _answer(values: dict[str, Any], columns: Columns) -> tuple[str, list[str]]:
    """The answer, and further right ones where the column holds several."""
    if not columns.response:
        label = _label(values, columns)
        several = ", ".join(label) if isinstance(label, list) else label
        value: Any = json.dumps(several) if isinstance(several, int) else several
        return _text({**values, columns.label or "": value}, columns.label, "answer"), []
    column = columns.response
    value = values.get(column)
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        # SQuAD's answers: {"text": [...], "answer_start": [...]}.
        value = value["text"]
    if isinstance(value, list) and value and all(isinstance(v, str) and v.strip() for v in map(_written, value)):
        first, *others = dict.fromkeys(map(_written, value))
        return first, others
    return _text({**values, column: _written(value)}, column, "answer"), []


def _written(value: Any) -> Any:
    """Classes and results are often written as numbers; the model learns to write them."""
    return json.dumps(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _label(values: dict[str, Any], columns: Columns) -> str | int | list[str] | None:
    """The class of a row, or its classes, by name where data.columns.label_names has names."""
    value = values.get(columns.label) if columns.label else None
    if value is None:
        return None
    if isinstance(value, str):
        # A table's cell holds a list as JSON.
        value = listed if (listed := _json_list(value)) is not None else value
    if isinstance(value, list):
        return [str(_class(v, columns)) for v in value]
    return _class(value, columns)


def _class(value: Any, columns: Columns) -> str | int:
    if isinstance(value, bool):
        value = json.dumps(value)
    elif isinstance(value, float):
        # A table writes whole numbers as floats where some are missing.
        value = int(value) if value.is_integer() else json.dumps(value)
    if not isinstance(value, (str, int)):
        raise Unfit(
            "wrong_type", f"column {columns.label!r} holds {shorten(value)} where a class belongs", columns.label, value
        )
    names = columns.label_names
    if not names or (isinstance(value, str) and (not value.strip() or value in names.values())):
        return value
    key = str(value).strip()
    name = names.get(key, names.get(key.removesuffix(".0")))
    if name is None:
        known = ", ".join(f"{number} ({name})" for number, name in names.items())
        raise Unfit(
            "unknown_label",
            f"column {columns.label!r} holds the class {shorten(value)}; data.columns.label_names has {known}",
            columns.label,
            value,
            "name this class too, or mend the row",
        )
    return name


def _references(values: dict[str, Any], columns: Columns) -> list[str]:
    value = values.get(columns.references) if columns.references else None
    if value is None:
        return []
    if isinstance(value, str):
        # A table's cell holds a list as JSON.
        listed = _json_list(value)
        if listed is None:
            return [value]
        value = listed
    if not isinstance(value, list) or not all(isinstance(v, str) for v in map(_written, value)):
        raise Unfit("wrong_type", "the references must be a list of texts", columns.references, value)
    return [_written(v) for v in value]


def _json_list(text: str) -> list[Any] | None:
    if not text.lstrip().startswith("["):
        return None
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError:
        return None
    return parsed if isinstance(parsed, list) else None


def _past(history: Any) -> list[dict[str, Any]]:
    """Alpaca's ``history``: pairs of what was asked and answered before."""
    turns: list[dict[str, Any]] = []
    pairs = history if isinstance(history, list) else [None]
    for pair in pairs:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(t, str) and t for t in pair)):
            raise Unfit("bad_history", "history must be a list of [asked, answered] pairs of texts", "history", history)
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns
