"""Whether the tools that conversations call are declared, and called as their schemas say."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

from luthier.data.examples import TrainingExample
from luthier.errors import shorten


def tool_problems(example: TrainingExample) -> Iterator[tuple[str, str]]:
    """``(code, what is wrong)`` of a conversation's tools and calls."""
    if example.messages is None:
        return
    declared = {}
    for tool in example.tools or ():
        function = tool.get("function", tool)
        declared[str(function.get("name"))] = function.get("parameters")
    called = False
    for number, message in enumerate(example.messages, 1):
        if message["role"] == "tool" and not called:
            yield "tool_answer_uncalled", f"turn {number} is a tool's answer, and no tool was called"
        calls = message.get("tool_calls") or ()
        called = called or bool(calls)
        for call in calls:
            function = call.get("function", call)
            name, arguments = str(function.get("name")), function.get("arguments")
            if name not in declared:
                known = ", ".join(declared) or "none"
                yield "tool_undeclared", f"turn {number} calls {name!r}; declared: {shorten(known)}"
            elif (problem := _misfit(declared[name], arguments)) is not None:
                yield "tool_arguments", f"turn {number} calls {name!r} with {problem}"


def _misfit(schema: Any, arguments: Any) -> str | None:
    """What of a call's arguments does not fit the tool's schema."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            return f"arguments that are no JSON: {shorten(arguments)}"
    if not isinstance(schema, dict):
        return None
    validator = _validator(json.dumps(schema, sort_keys=True))
    if isinstance(validator, str):
        return f"a schema that is none: {validator}"
    error = next(iter(validator.iter_errors(arguments)), None)
    if error is None:
        return None
    place = "".join(f".{part}" for part in error.absolute_path)
    return f"arguments{place} that do not fit: {error.message[:120]}"


@functools.lru_cache(maxsize=1_024)
def _validator(schema: str) -> Any:
    """A validator (JSON Schema, draft 2020-12), or what is wrong with the schema."""
    from jsonschema import Draft202012Validator, SchemaError

    parsed = json.loads(schema)
    try:
        Draft202012Validator.check_schema(parsed)
    except SchemaError as error:
        return error.message[:120]
    return Draft202012Validator(parsed)
