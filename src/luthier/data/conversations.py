"""Conversations as files hold them (OpenAI, ShareGPT) to the turns that chat templates take."""

from __future__ import annotations

import json
from typing import Any

from luthier.data.examples import ROLES, Message
from luthier.errors import shorten

_ROLES = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}

MARKS = ("train", "loss", "weight")
"""Keys by which files mark a turn as trained or not; ``weight`` is OpenAI's."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which files and servers hold what an assistant thought before it answered."""


class Unfit(ValueError):
    """A row that cannot be an example: ``reason`` is a reject code."""

    def __init__(
        self, reason: str, message: str, field: str | None = None, value: Any = None, remedy: str | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field
        self.value = None if value is None else shorten(value)
        self.remedy = remedy


def marked(turn: Message) -> bool | None:
    """Whether a turn is marked as trained; None where it has no mark.

    Raises:
        Unfit: a mark is neither true nor false.
    """
    for key in MARKS:
        value = turn.get(key)
        if value is not None:
            if value not in (0, 1) or not isinstance(value, (bool, int, float)):
                raise Unfit(
                    "bad_mark",
                    f"a turn's {key} is {shorten(value)}; it is trained or not",
                    key,
                    value,
                    "write true or false (weight: 1 or 0)",
                )
            return bool(value)
    return None


def reasoning_and_rest(content: str) -> tuple[str, str]:
    """What stands in ``<think>…</think>`` before an answer, and the answer; an empty text where nothing does.

    Models whose prompt opens ``<think>`` write its end alone, so the opening may be missing.
    """
    head, closed, rest = content.partition("</think>")
    head = head.lstrip().removeprefix("<think>")
    if not closed or "<think>" in head:
        return "", content
    return head.strip(), rest.lstrip("\n")


def checked_turns(value: Any, column: str) -> list[Message]:
    """The turns of a conversation, with OpenAI's names.

    Raises:
        Unfit: it is no list of turns, a turn has no known role or no text, or the assistant never speaks.
    """
    if isinstance(value, str):
        value = _parsed(value, column)
    if not isinstance(value, list) or not value:
        raise Unfit(
            "no_messages",
            f"column {column!r} holds no list of turns",
            column,
            value,
            'write [{"role": …, "content": …}]',
        )
    turns = [_turn(turn, number, column) for number, turn in enumerate(value, 1)]
    if not any(turn["role"] == "assistant" for turn in turns):
        raise Unfit(
            "no_assistant_turn",
            "the conversation has no assistant turn, so nothing of it would be trained",
            column,
            remedy="add the assistant's answer",
        )
    return turns


def _turn(turn: Any, number: int, column: str) -> Message:
    place = f"turn {number}"
    if not isinstance(turn, dict):
        raise Unfit("bad_turn", f"{place} is not an object with role and content", column, turn)
    named = turn.get("role", turn.get("from"))
    role = _ROLES.get(str(named).lower())
    if role is None:
        raise Unfit(
            "bad_role",
            f"{place} has the unknown role {shorten(named)}",
            column,
            turn,
            f"use one of {', '.join(ROLES)} (or human, gpt, function_call, observation)",
        )
    content = turn.get("content", turn.get("value"))
    # OpenAI's older form has one call under "function_call", ShareGPT's a turn of that name.
    calls = turn.get("tool_calls") or turn.get("function_call") or None
    if str(named).lower() == "function_call":
        content, calls = "", turn.get("value", turn.get("content"))
    if isinstance(content, list) and not (role == "tool" and not _are_parts(content)):
        content = _joined(content, place, column)
    if role == "tool" and content is not None and not isinstance(content, str):
        content = json.dumps(content, ensure_ascii=False)
    if content is not None and not isinstance(content, str):
        raise Unfit(
            "wrong_type", f"{place} ({role}) holds {shorten(content)} where text belongs", column, content, "write text"
        )
    # An empty system turn says that there is none, also where the template would write one of its own.
    if calls is None and role not in ("tool", "system", "developer") and not (content or "").strip():
        code = "empty_answer" if role == "assistant" else "empty_prompt"
        raise Unfit(code, f"{place} ({role}) is empty", column, remedy="give it a text or take the turn out")
    message: Message = {"role": role, "content": content or ""}
    message |= {k: turn[k] for k in ("name", "tool_call_id") if turn.get(k) is not None}
    if calls is not None:
        message["tool_calls"] = _calls(calls, place, column)
    return message | _reasoning(turn, place, column) | _mark(turn, role, place, column)


def _reasoning(turn: dict[str, Any], place: str, column: str) -> dict[str, str]:
    thought = next((turn[key] for key in REASONING if turn.get(key)), None)
    if thought is None:
        return {}
    if not isinstance(thought, str):
        raise Unfit("wrong_type", f"{place} holds reasoning that is no text: {shorten(thought)}", column, thought)
    return {"reasoning_content": thought}


def _mark(turn: dict[str, Any], role: str, place: str, column: str) -> dict[str, bool]:
    mark = marked(turn)
    if mark and role != "assistant":
        raise Unfit(
            "bad_mark",
            f"{place} ({role}) is marked as trained, but only an assistant's turns can be",
            column,
            turn,
            "take the mark out; data.train_on=all trains the whole text",
        )
    return {} if mark is None or role != "assistant" else {"train": mark}


def _are_parts(content: list[Any]) -> bool:
    """Whether a list is OpenAI's content parts, not a tool's result that happens to be a list."""
    return all(isinstance(part, dict) and "type" in part for part in content)


def _joined(parts: list[Any], place: str, column: str) -> str:
    """OpenAI's list of content parts, of which only text can be trained here."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Unfit(
                "not_text",
                f"{place} holds a part that is not text: {shorten(part)}",
                column,
                part,
                "keep text parts only",
            )
    return "".join(part["text"] for part in parts)


def _calls(value: Any, place: str, column: str) -> list[dict[str, Any]]:
    """One call or a list of calls, maybe as JSON text."""
    parsed = _parsed(value, column) if isinstance(value, str) else value
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls:
        raise Unfit("bad_tool_call", f"{place} calls no function", column, value)
    return [_call(call, place, column) for call in calls]


def _call(call: Any, place: str, column: str) -> dict[str, Any]:
    """One call in OpenAI's form, its arguments as an object, which is what most templates render."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise Unfit("bad_tool_call", f"{place} calls a function without a name", column, call)
    arguments = inner.get("arguments", inner.get("parameters"))
    if isinstance(arguments, str):
        arguments = _parsed(arguments, column) if arguments.strip() else {}
    if not isinstance(arguments, dict | None):
        raise Unfit(
            "bad_tool_call",
            f"{place} calls {inner['name']} with arguments that are no object: {shorten(arguments)}",
            column,
            call,
            'write them by name: {"city": "Oslo"}',
        )
    made: dict[str, Any] = {"type": "function", "function": {"name": inner["name"], "arguments": arguments or {}}}
    return made if call.get("id") is None else {**made, "id": call["id"]}


def parse_tools(value: Any, column: str | None) -> list[dict[str, Any]] | None:
    """JSON schemas of tools in OpenAI's form, from a list, one object or their JSON text; None where there are none.

    Raises:
        Unfit: it is none of these, or a tool has no name.
    """
    parsed = _parsed(value, column) if isinstance(value, str) and value.strip() else value
    if not parsed or (isinstance(parsed, str) and not parsed.strip()):
        return None
    listed = parsed if isinstance(parsed, list) else [parsed]
    return [_tool(_parsed(tool, column) if isinstance(tool, str) else tool, column) for tool in listed]


def _tool(tool: Any, column: str | None) -> dict[str, Any]:
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise Unfit(
            "bad_tools",
            f"the tools must be JSON schemas with a name each, not {shorten(tool)}",
            column,
            tool,
            'write [{"type": "function", "function": {"name": …, "parameters": …}}]',
        )
    if inner is tool:
        inner = {k: v for k, v in tool.items() if not (k == "type" and v == "function")}
        return {"type": "function", "function": inner}
    return tool


def _parsed(text: str, column: str | None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise Unfit(
            "bad_json", f"column {column!r} holds a text that is no JSON: {error.msg}", column, text, "mend the JSON"
        ) from None
