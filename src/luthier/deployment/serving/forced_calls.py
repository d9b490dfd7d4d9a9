"""``tool_choice`` ``required`` or a function's name: an answer that calls a tool, in the form of the model's template.

The template is asked how it writes a call. What stands before the call's JSON becomes part of the prompt, the JSON is
held to the tools' schemas while it is written, and what stands behind it is added.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.data.render import end_of_turn, prompt_text, template_text
from luthier.deployment.serving.api_error import ApiError
from luthier.errors import shorten

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

_DEFINITIONS = ("$defs", "definitions")
_REFERENCE = re.compile(r'"\$ref": "(#[^"]*)"')
_DEFINITION = re.compile(r"#/(?:\$defs|definitions)/([^/]+)")
_ARGUMENTS = {"⟦key⟧": "⟦value⟧"}
# Without it a model may write white space on and on: a setting of llguidance, which llama.cpp's builds and vLLM can
# have, and others leave alone.
_AS_TEMPLATES_WRITE = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}


@dataclass(frozen=True, slots=True)
class ForcedCall:
    """How an answer that must call a tool is written."""

    said: str
    """What it begins with."""
    schema: dict[str, Any]
    """What follows, a JSON value that fits this JSON schema."""
    closing: str
    """What follows that, before the turn ends."""


def forced_call(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], tools: Sequence[dict[str, Any]], name: str | None
) -> ForcedCall:
    """How a call of one of the tools is written after a conversation.

    Args:
        tokenizer: with the chat template.
        messages: the conversation.
        tools: all that the request names.
        name: of the function that is called; None: one of all.

    Raises:
        ApiError: there is no such function, or the template writes calls otherwise than as JSON.
    """
    functions = {str(tool["function"]["name"]): tool["function"] for tool in tools if _is_function(tool)}
    if len(functions) < len(tools):
        raise ApiError(
            400,
            "each tool must be a function with a name of its own and a JSON schema as parameters",
            param="tools",
        )
    if name is not None:
        if name not in functions:
            raise ApiError(400, f"tool_choice names {shorten(name)}, which is none of tools", param="tool_choice")
        functions = {name: functions[name]}
    parameters = {n: _closed(f.get("parameters") or {}) for n, f in functions.items()}
    first = next(iter(functions))
    text = _call_text(tokenizer, messages, tools, first)
    arguments = json.dumps(_ARGUMENTS, ensure_ascii=False)
    # A call is one object, or its arguments are.
    for at in (at for at, letter in enumerate(text) if letter == "{"):
        try:
            written, length = json.JSONDecoder().raw_decode(text[at:])
        except ValueError:
            continue
        said, closing = text[:at], text[at + length :]
        keys = [key for key, value in written.items() if value == _ARGUMENTS]
        if written.get("name") == first and keys:
            definitions: dict[str, Any] = {}
            calls = [
                _call_schema(n, keys[0], _apart(number, schema, definitions))
                for number, (n, schema) in enumerate(parameters.items())
            ]
            choice = calls[0] if len(calls) == 1 else {"anyOf": calls}
            return ForcedCall(said, _AS_TEMPLATES_WRITE | choice | {"$defs": definitions}, closing)
        if text[at : at + length] == arguments and len(functions) == 1:
            return ForcedCall(said, _AS_TEMPLATES_WRITE | parameters[first], closing)
    remedy = "tool_choice can be 'auto'" if arguments not in text else "name one function in tool_choice"
    raise ApiError(400, f"this model's chat template writes calls in a form of its own; {remedy}", param="tool_choice")


def _is_function(tool: dict[str, Any]) -> bool:
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    return isinstance(function.get("parameters", {}), dict)


def _call_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], tools: Sequence[Any], name: str) -> str:
    """What a template writes for a turn that calls a function, from where an answer begins to its end of turn."""
    call = {"type": "function", "id": "call00001", "function": {"name": name, "arguments": _ARGUMENTS}}
    turn: Any = {"role": "assistant", "content": "", "tool_calls": [call]}
    opened = prompt_text(tokenizer, list(messages), list(tools))
    whole = template_text(tokenizer, [*messages, turn], list(tools), add_generation_prompt=False)
    if not whole.startswith(opened):
        raise ApiError(400, "this model's chat template writes no calls of tools", param="tool_choice")
    ending = end_of_turn(tokenizer)
    text = whole[len(opened) :].rstrip()
    return text.removesuffix(ending) if ending else text


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A function's parameters, and no others unless it says so: a model that is made to call would go on and on."""
    if {"$ref", "allOf", "anyOf", "oneOf"} & schema.keys():
        return schema
    return {"type": "object", "properties": {}, "additionalProperties": False} | schema


def _apart(number: int, schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """A function's parameters where they are part of a schema: what they refer to goes to that one's definitions, by
    names that begin with the function's number."""

    def moved(part: Any) -> Any:
        if isinstance(part, list):
            return [moved(each) for each in part]
        if not isinstance(part, dict):
            return part
        reference = part.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            found = _DEFINITION.fullmatch(reference)
            part = part | {"$ref": f"#/$defs/{number}.{found[1]}" if found else f"#/$defs/{number}{reference[1:]}"}
        return {key: moved(value) for key, value in part.items()}

    whole = json.dumps(schema)
    own: dict[str, Any] = moved({key: value for key, value in schema.items() if key not in _DEFINITIONS})
    for kind in _DEFINITIONS:
        definitions |= {f"{number}.{key}": moved(value) for key, value in (schema.get(kind) or {}).items()}
    if any(not _DEFINITION.fullmatch(reference) for reference in _REFERENCE.findall(whole)):
        definitions[str(number)] = own
    return own


def _call_schema(name: str, key: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, key: arguments},
        "required": ["name", key],
        "additionalProperties": False,
    }
