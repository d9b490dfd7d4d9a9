"""Answers that should call tools: the calls in a text, in the forms that chat templates write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from luthier.evaluation.metrics.base import Metric, Rows
from luthier.evaluation.metrics.records import parse_json

Call = tuple[str, str]
"""A function's name, and its arguments as JSON in one canonical form."""

# <tool_call>…</tool_call> of Hermes and Qwen, and tags that other templates have; the closing one can be missing.
_TAGGED = re.compile(
    r"<(tool_calls?|function_calls?|functioncall|call)>(.*?)(?:</\1>|(?=<\1>)|<\|im_end\|>|<\|endoftext\|>|\Z)",
    re.DOTALL,
)
# <function=name><parameter=key>value</parameter></function> of Qwen3-Coder
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
# [TOOL_CALLS][…] of Mistral, and its later [TOOL_CALLS]name[ARGS]{…}
_MISTRAL = "[TOOL_CALLS]"
_NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(\{.*)", re.DOTALL)
# What Llama 3 puts around a call.
_AROUND = re.compile(r"\s*(?:<\|python_tag\|>)?(.*?)(?:<\|eot_id\|>|<\|eom_id\|>)?\s*", re.DOTALL)
_BETWEEN = re.compile(r"[\s;,]*")


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

    Read are ``<tool_call>`` of Hermes and Qwen (JSON, or Qwen3-Coder's tags) and its like with any text around,
    Mistral's ``[TOOL_CALLS]``, and where it is the whole text: Llama 3's ``{"name", "parameters"}``, OpenAI's JSON and
    lists of either. Arguments can be an object or its JSON text.
    """
    try:
        if tagged := [match[1] for match in _TAGGED.findall(text)]:
            return sorted(call for inside in tagged for call in _tagged_calls(inside))
        if _MISTRAL in text:
            parts = [part for part in text.split(_MISTRAL)[1:] if part.strip()]
            return sorted(call for part in parts for call in _mistral_calls(part.strip().removesuffix("</s>"))) or None
        whole = _AROUND.fullmatch(text)
        return sorted(_bare_calls(whole[1] if whole else text))
    except (ValueError, RecursionError):
        return None


def _tagged_calls(text: str) -> list[Call]:
    if not (functions := _FUNCTION.findall(text)):
        return _calls(_values(text))
    return [
        (name.strip(), _canonical({key.strip(): _lenient(value) for key, value in _PARAMETER.findall(inside)}))
        for name, inside in functions
    ]


def _mistral_calls(text: str) -> list[Call]:
    if named := _NAMED.fullmatch(text):
        return [(named[1], _arguments(named[2]))]
    return _calls(_values(text))


def _bare_calls(text: str) -> list[Call]:
    """Calls of a text that is JSON and nothing else; other JSON, a record for example, calls nothing."""
    if not text.lstrip().startswith(("{", "[")):
        return []
    try:
        values = _values(text)
    except (ValueError, RecursionError):
        return []
    if not all(map(_looks_like_calls, values)):
        return []
    return _calls(values)


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


def _values(text: str) -> list[Any]:
    """JSON values that follow each other, with white space, commas or semicolons between.

    Raises:
        ValueError: something else is between them.
    """
    return list(_decoded(text))


def _decoded(text: str) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    at = 0
    while (at := _BETWEEN.match(text, at).end()) < len(text):  # type: ignore[union-attr]
        _, end = decoder.raw_decode(text, at)
        yield parse_json(text[at:end])
        at = end
