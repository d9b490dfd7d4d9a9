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
    if str(named).lower() == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(content, place, column)}
    # OpenAI's older form has one call under "function_call".
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else None)
    if calls is not None and not isinstance(calls, list):
        raise Unfit("bad_tool_call", f"{place} has tool_calls that are no list", column, calls, "write a list of calls")
    if role == "assistant" and any(turn.get(key, 1) in (0, False) for key in ("weight", "loss", "train")):
        raise Unfit(
            "untrained_turn",
            f"{place} is marked as not to be trained (weight, loss or train), which is not supported",
            column,
            turn,
            "take the mark out, or the row; data.train_on=last_answer trains the last answer alone",
        )
    if isinstance(content, list):
        content = _joined(content, place, column)
    if isinstance(content, dict) and role == "tool":
        content = json.dumps(content, ensure_ascii=False)
    if content is not None and not isinstance(content, str):
        raise Unfit(
            "wrong_type", f"{place} ({role}) holds {shorten(content)} where text belongs", column, content, "write text"
        )
    if calls is None and role != "tool" and not (content or "").strip():
        code = "empty_answer" if role == "assistant" else "empty_prompt"
        raise Unfit(code, f"{place} ({role}) is empty", column, remedy="give it a text or take the turn out")
    kept = {k: v for k, v in turn.items() if k in ("name", "tool_call_id", "reasoning_content", "thinking")}
    message: Message = {"role": role, "content": content or "", **kept}
    if calls is not None:
        message["tool_calls"] = [_call(c, place, column) for c in calls]
    return message


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


def _calls(content: Any, place: str, column: str) -> list[dict[str, Any]]:
    """ShareGPT's ``function_call``: one call or a list of calls, as JSON text."""
    parsed = _parsed(content, column) if isinstance(content, str) else content
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls:
        raise Unfit("bad_tool_call", f"{place} calls no function", column, content)
    return [_call(call, place, column) for call in calls]


def _call(call: Any, place: str, column: str) -> dict[str, Any]:
    """One call in OpenAI's form, its arguments as an object, which is what templates render."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise Unfit("bad_tool_call", f"{place} calls a function without a name", column, call)
    arguments = inner.get("arguments", inner.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _parsed(arguments, column) if arguments.strip() else {}
    made: dict[str, Any] = {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}
    return {**made, "id": call["id"]} if "id" in call else made


def parse_tools(value: Any, column: str | None) -> list[dict[str, Any]] | None:
    """JSON schemas of tools, as a list or as JSON text; None where there are none.

    Raises:
        Unfit: it is neither.
    """
    if value is None or value == "" or value == []:
        return None
    parsed = _parsed(value, column) if isinstance(value, str) else value
    if isinstance(parsed, dict):
        parsed = [parsed]
    if not isinstance(parsed, list) or not all(isinstance(tool, dict) for tool in parsed):
        raise Unfit("bad_tools", "the tools must be a list of JSON schemas", column, value)
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in parsed] or None


def _parsed(text: str, column: str | None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise Unfit(
            "bad_json", f"column {column!r} holds a text that is no JSON: {error.msg}", column, text, "mend the JSON"
        ) from None
