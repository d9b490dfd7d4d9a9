"""Answers that should call tools: the calls in a text, in the forms that chat templates write."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.evaluation.metrics.base import Metric, Rows
from luthier.evaluation.metrics.records import parse_json

Call = tuple[str, str]
"""A function's name, and its arguments as JSON in one canonical form."""

# <tool_call>…</tool_call> of Hermes, Qwen and GLM, and tags that other templates have; the closing one can be missing.
_TAGGED = re.compile(
    r"<(tool_calls?|function_calls?|functioncall|call)>(.*?)(?:</\1>|(?=<\1>)|<\|im_end\|>|<\|endoftext\|>|\Z)",
    re.DOTALL,
)
# Inside: Qwen3-Coder's <function=name><parameter=key>value</parameter></function>, and GLM-4.5's name and <arg_key>.
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_ARGUMENT = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)
# What begins the calls of Mistral, DeepSeek and Llama 3, and all that stands around and between them.
_BEGIN = re.compile(r"\[TOOL_CALLS\]|<｜tool▁calls?▁begin｜>|<\|python_tag\|>")
_MARKS = re.compile(
    rf"{_BEGIN.pattern}|\[CALL_ID\]\w+|\[ARGS\]|<｜[^｜]+｜>|</s>|<\|(?:eot_id|eom_id|im_end|endoftext|observation)\|>"
)
_NAME = re.compile(r"([\w.-]+)\n?(?=\{)")
_BETWEEN = re.compile(r"[\s;,]*")
_DECODER = json.JSONDecoder()


class ToolCallMatch(Metric):
    """The calls of an answer are those of a reference, by name and arguments, in any order.

    Of the rows where the reference or the answer calls a tool it is the share whose calls are the same: who never calls
    gets 0, and a call that nobody asked for is counted. See :func:`tool_calls` for what is read as a call.
    """

    name, label, share = "tool_call_match", "right tool calls", True
    wants = "a reference that calls a tool"

    def applies(self, references: Rows) -> bool:
        return any(tool_calls(reference) for row in references for reference in row)

    def statistics(self, answers: Sequence[str], references: Rows) -> np.ndarray:
        """``[N, 2]``, whether the calls are right, and whether there are or should be any."""
        stats = np.zeros((len(answers), 2))
        for i, (answer, row) in enumerate(zip(answers, references, strict=True)):
            said, rights = tool_calls(answer), [tool_calls(reference) or [] for reference in row]
            stats[i, 1] = said != [] or any(rights)
            stats[i, 0] = stats[i, 1] and said in rights
        return stats

    def value(self, sums: np.ndarray, count: np.ndarray | int) -> np.ndarray:
        hits, rows = np.moveaxis(np.asarray(sums, dtype=np.float64), -1, 0)
        return np.where(rows > 0, hits / np.maximum(rows, 1), 1.0)

    def rows(self, answers: Sequence[str], references: Rows) -> np.ndarray:
        return self.value(self.statistics(answers, references), 1)


def tool_calls(text: str) -> list[Call] | None:
    """The calls in a text, sorted; ``[]`` where it calls nothing, None where it tries to and nothing could run it.

    Read are, with any text around, ``<tool_call>`` of Hermes and Qwen (JSON), Qwen3-Coder and GLM-4.5 (tags) and its
    like, and ``[TOOL_CALLS]`` of Mistral, ``<｜tool▁calls▁begin｜>`` of DeepSeek, ``<|python_tag|>`` of Llama 3 with
    what follows. Where it is the whole text, also Llama 3's ``{"name", "parameters"}``, GLM-4's name and JSON, and
    OpenAI's JSON, lists included. Arguments can be an object or its JSON text. Between tags a text has no quotes, so
    there "12345" and 12345 are the same.
    """
    calls = written_calls(text)
    return None if calls is None else sorted(calls)


def written_calls(text: str) -> list[Call] | None:
    """See :func:`tool_calls`; the calls in the order in which they are written."""
    try:
        if tagged := [match[1] for match in _TAGGED.findall(text)]:
            return [call for inside in tagged for call in _tagged_calls(inside)]
        if begin := _BEGIN.search(text):
            return _written_calls(_MARKS.sub("", text[begin.start() :]))
        return _bare_calls(_MARKS.sub("", text))
    except (ValueError, RecursionError):
        return None


def _tagged_calls(text: str) -> list[Call]:
    if functions := _FUNCTION.findall(text):
        found = [(name, _PARAMETER.findall(inside)) for name, inside in functions]
    elif re.fullmatch(r"[\w.-]+", name := _ARGUMENT.sub("", text).strip()):
        found = [(name, _ARGUMENT.findall(text))]
    else:
        return _written_calls(text)
    return [(name.strip(), _canonical({key.strip(): _lenient(value) for key, value in pairs})) for name, pairs in found]


def _written_calls(text: str) -> list[Call]:
    """Calls as JSON, or each as a name and its arguments as JSON."""
    found: list[Call] = []
    at = _skip(text, 0)
    while name := _NAME.match(text, at):
        value, at = _value(text, name.end())
        found.append((name[1], _arguments(value)))
        at = _skip(text, at)
    return found + _calls(_values(text, at)) if at < len(text) or not found else found


def _bare_calls(text: str) -> list[Call]:
    """Calls of a text that is calls and nothing else; other JSON, a record for example, calls nothing."""
    text = text.strip()
    if _NAME.match(text):
        try:
            return _written_calls(text)
        except (ValueError, RecursionError):
            return []
    try:
        values = _values(text, 0)
    except (ValueError, RecursionError):
        return []
    return _calls(values) if values and all(map(_looks_like_calls, values)) else []


def _looks_like_calls(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_looks_like_calls, value))
    if not isinstance(value, dict):
        return False
    if "tool_calls" in value:
        return isinstance(value["tool_calls"], list) and _looks_like_calls(value["tool_calls"])
    function = _function(value)
    return isinstance(function.get("name"), str) and ("arguments" in function or "parameters" in function)


def _calls(values: list[Any]) -> list[Call]:
    """Calls in JSON values.

    Raises:
        ValueError: one is no call.
    """
    found: list[Call] = []
    for value in values:
        if isinstance(value, list):
            found += _calls(value)
        elif isinstance(value, dict) and isinstance(value.get("tool_calls"), list):
            found += _calls(value["tool_calls"])
        else:
            function = _function(value) if isinstance(value, dict) else {}
            if not isinstance(function.get("name"), str):
                raise ValueError("no name")
            found.append((function["name"], _arguments(function.get("arguments", function.get("parameters")))))
    if not found:
        raise ValueError("no call")
    return found


def _function(value: dict[str, Any]) -> dict[str, Any]:
    """What holds name and arguments: OpenAI's form puts it a level deeper."""
    inner = value.get("function", value.get("function_call"))
    return inner if isinstance(inner, dict) else value


def _arguments(value: Any) -> str:
    if isinstance(value, str):
        value = parse_json(value) if value.strip() else {}
    if value is not None and not isinstance(value, dict):
        raise ValueError("arguments are an object")
    return _canonical(value or {})


def _canonical(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True)


def _lenient(value: str) -> Any:
    """A parameter between tags: JSON where it is, else the text itself."""
    try:
        return parse_json(value)
    except (ValueError, RecursionError):
        return value


def _values(text: str, at: int) -> list[Any]:
    """JSON values that follow each other from a place on, with white space, commas or semicolons between.

    Raises:
        ValueError: something else is between them.
    """
    found: list[Any] = []
    while (at := _skip(text, at)) < len(text):
        value, at = _value(text, at)
        found.append(value)
    return found


def _value(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at a place, and where it ends.

    Raises:
        ValueError: there is none.
    """
    _, end = _DECODER.raw_decode(text, at)
    return parse_json(text[at:end]), end


def _skip(text: str, at: int) -> int:
    """The place after what may stand between values."""
    match = _BETWEEN.match(text, at)
    return match.end() if match else at
