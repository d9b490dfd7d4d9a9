"""What a client sends: OpenAI's requests, read strictly."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from luthier.data.render import RenderError, prompt_text, special_tokens
from luthier.data.spans import strings
from luthier.deployment.serving.api_error import ApiError
from luthier.deployment.serving.engine import MOST_STOPS, Ask
from luthier.deployment.serving.forced_calls import forced_call
from luthier.errors import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_ANSWERS = 8
"""``n``, times prompts, of one request."""


class Strict(BaseModel):
    """No unknown fields, no other types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    include_usage: bool = False


class JsonSchema(Strict):
    name: str = "answer"
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    """``tool_choice`` that names the function to call."""

    type: Literal["function"]
    function: NamedFunction


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


Number = Annotated[float, Field(strict=False, allow_inf_nan=False)]


class _Common(Strict):
    """Fields of both kinds of requests. ``user``, ``metadata``, ``store`` and the like say nothing to a model: they
    are taken and have no effect."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, gt=0, le=1)
    n: int = Field(1, ge=1, le=MOST_ANSWERS)
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Number] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ChatRequest(_Common):
    """``POST /v1/chat/completions``"""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(_Common):
    """``POST /v1/completions``"""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=5)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server allows."""

    context: int
    """Longest prompt with its answer, in tokens."""
    max_tokens: int | None = None
    """Longest answer; None: what the context leaves."""
    temperature: float = 0.0
    """Of requests that name none."""


def read(kind: type[Strict], body: bytes) -> Any:
    """A request's body.

    Raises:
        ApiError: it is no JSON, or a field is missing, unknown or wrong.
    """
    try:
        content = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {str(error) or 'too deep'}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise ApiError(400, f"the body is {shorten(content)}; send a JSON object", code="invalid_json")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"] if not str(part).endswith("]"))
        if first["type"] == "extra_forbidden":
            known = [field.alias or name for name, field in kind.model_fields.items()]
            near = difflib.get_close_matches(where, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ApiError(400, f"unknown field {shorten(where)}{hint}", code="unknown_field", param=where) from None
        if first["type"] == "missing":
            raise ApiError(400, f"{where!r} is missing", code="missing_field", param=where) from None
        raise ApiError(
            400, f"{where}: {first['msg']}, got {shorten(first['input'])}", code="invalid_value", param=where
        ) from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def chat_asks(request: ChatRequest, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> list[Ask]:
    """The answers that a chat request wants, one for each of its ``n``.

    Raises:
        ApiError: the turns cannot be rendered, hold control tokens, or leave no room.
    """
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens and max_completion_tokens are one setting: send one", param="max_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
    tools = None if request.tool_choice == "none" else request.tools
    forced = request.tool_choice is not None and request.tool_choice not in ("none", "auto")
    if forced and not tools:
        raise ApiError(400, "tool_choice asks for a call, and there are no tools", param="tool_choice")
    if forced and request.response_format is not None and request.response_format.type != "text":
        raise ApiError(400, "response_format is of answers, and tool_choice asks for a call", param="response_format")
    messages = [_message(turn, f"messages.{k}") for k, turn in enumerate(request.messages)]
    _require_plain(messages, tokenizer, "messages")
    _require_plain(tools, tokenizer, "tools")
    try:
        text = prompt_text(tokenizer, messages, tools)
        if tools and text == prompt_text(tokenizer, messages, None):
            raise ApiError(400, "this model's chat template does not render tools", param="tools")
        name = request.tool_choice.function.name if isinstance(request.tool_choice, NamedTool) else None
        call = forced_call(tokenizer, messages, tools, name) if forced and tools else None
    except RenderError as error:
        raise ApiError(400, str(error), code="template_refuses", param="messages") from None
    schema = call.schema if call else _schema(request.response_format)
    if schema is not None:
        _require_holdable(schema, "tools" if call else "response_format.json_schema")
    ids = tuple(tokenizer(text + (call.said if call else ""), add_special_tokens=False).input_ids)
    ask = _ask(request, ids, request.max_completion_tokens or request.max_tokens, limits, "messages")
    ask = replace(
        ask,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        schema=schema,
        said=call.said if call else "",
        closing=call.closing if call else "",
    )
    return _each(ask, request.n)


def completion_asks(request: CompletionRequest, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> list[Ask]:
    """The answers that a completion request wants: for each prompt in order, ``n``. Control tokens in a text prompt
    are read as such: the text is the caller's to render.

    Raises:
        ApiError: a prompt is empty, has ids that are no tokens, or leaves no room.
    """
    given = request.prompt
    prompts: list[Any] = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    if len(prompts) * request.n > MOST_ANSWERS:
        raise ApiError(400, f"prompts times n are {len(prompts) * request.n}, at most {MOST_ANSWERS}", param="prompt")
    asks = []
    for prompt in prompts:
        ids = tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        if not ids:
            raise ApiError(400, "the prompt is empty", param="prompt")
        if wrong := [i for i in ids if not 0 <= i < len(tokenizer)]:
            raise ApiError(400, f"{wrong[0]} is no token: there are {len(tokenizer):,}", param="prompt")
        ask = _ask(request, tuple(ids), request.max_tokens or 16, limits, "prompt")
        asks += _each(replace(ask, logprobs=request.logprobs), request.n)
    return asks


def _ask(request: _Common, ids: tuple[int, ...], wanted: int | None, limits: Limits, param: str) -> Ask:
    room = limits.context - len(ids)
    if room < 1:
        raise ApiError(
            400,
            f"the prompt has {len(ids):,} tokens; this server takes {limits.context:,} with the answer",
            code="context_length_exceeded",
            param=param,
        )
    if wanted is not None and wanted > room:
        raise ApiError(
            400,
            f"the prompt has {len(ids):,} tokens and max_tokens is {wanted:,}; this server takes {limits.context:,} "
            "together",
            code="context_length_exceeded",
            param="max_tokens",
        )
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream=true", param="stream_options")
    temperature = limits.temperature if request.temperature is None else request.temperature
    return Ask(
        ids,
        max_tokens=min(wanted or room, limits.max_tokens or room),
        temperature=temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        stop=_stops(request.stop),
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        logit_bias=_biases(request.logit_bias),
    )


def _each(ask: Ask, n: int) -> list[Ask]:
    """``n`` of them; with a seed, each draws by one of its own, the first by the seed itself."""
    return [ask if ask.seed is None else replace(ask, seed=(ask.seed + k) % 2**32) for k in range(n)]


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MOST_STOPS or "" in stops:
        raise ApiError(400, f"stop is up to {MOST_STOPS} texts, none of them empty", param="stop")
    return stops


def _biases(given: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    found = []
    for token, bias in (given or {}).items():
        if not re.fullmatch(r"\d{1,9}", token) or not -100 <= bias <= 100:
            raise ApiError(400, "logit_bias maps token ids to numbers from -100 to 100", param="logit_bias")
        found.append((int(token), bias))
    return tuple(found)


def _schema(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None:
        raise ApiError(400, "response_format json_schema needs the schema", param="response_format.json_schema")
    return wanted.json_schema.schema_


def _require_holdable(schema: dict[str, Any], param: str) -> None:
    """Refuse a schema that is none, or that llguidance cannot keep: llama.cpp, where it is built with it, then writes
    freely and says nothing.

    Raises:
        ApiError: it is such.
    """
    from llguidance import LLMatcher

    wrong = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    if wrong:
        raise ApiError(400, f"no answer can be held to this schema: {' '.join(wrong.split())}", param=param)


_ROLES = ("system", "developer", "user", "assistant", "tool")


def _message(turn: dict[str, Any], where: str) -> dict[str, Any]:
    """A turn with its content as one text."""
    role, content = turn.get("role"), turn.get("content")
    if role not in _ROLES:
        raise ApiError(400, f"{where}.role is {shorten(role)}, not one of {', '.join(_ROLES)}", param=f"{where}.role")
    unknown = set(turn) - {"role", "content", "name", "tool_calls", "tool_call_id", "refusal"}
    if unknown:
        raise ApiError(400, f"unknown field {where}.{shorten(min(unknown))}", code="unknown_field", param=where)
    calls = turn.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise ApiError(400, f"{where}.tool_calls is no list of calls", param=f"{where}.tool_calls")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if len(parts) < len(content) or any(part.get("type") != "text" for part in parts):
            raise ApiError(400, f"{where}.content has parts that are no text", param=f"{where}.content")
        content = "".join(part["text"] for part in parts)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise ApiError(400, f"{where}.content is {shorten(content)}, not a text", param=f"{where}.content")
    kept = {"role": role, "content": content}
    if calls:
        kept["tool_calls"] = [_call(call, f"{where}.tool_calls.{k}") for k, call in enumerate(calls)]
    return kept | {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """A call with its arguments as an object, as templates take them."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"{where} names no function", param=where)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise ApiError(400, f"{where}.function.arguments is no JSON", param=where) from None
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _require_plain(value: Any, tokenizer: PreTrainedTokenizerBase, param: str) -> None:
    """No text of a client's may be read as control: that would let it write turns of others."""
    specials = special_tokens(tokenizer)
    for text in strings(value):
        found = next((token for token in specials if token in text), None)
        if found is not None:
            raise ApiError(
                400,
                f"{param} hold the control token {found!r}, which the model would read as control; leave it out",
                code="control_token",
                param=param,
            )
