"""A tokenizer's chat template: compiled once, asked what it does with tool calls and reasoning, and given it so.

The template is the only authority on how a conversation reads. Families differ in the form they take turns in
(arguments as object or as text, reasoning as a field or inside ``<think>``); rather than keep a table of families,
each template is shown a few short conversations and judged by what it makes of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any

from luthier.data.conversations import MARKS, REASONING, reasoning_and_rest
from luthier.data.examples import Message
from luthier.data.skeleton import Skeleton, keeps_contents, skeleton

if TYPE_CHECKING:
    from jinja2 import Template
    from transformers import PreTrainedTokenizerBase

Tools = list[dict[str, Any]]

# For models without one of their own; saved with the tokenizer. Of filters it has those that every engine knows.
PLAIN_TEMPLATE = (
    "{%- if tools %}{{ '### Tools:\\n' + (tools | tojson) + '\\n\\n' }}{% endif %}"
    "{%- for message in messages %}"
    "{{- '### ' + ('System' if message['role'] == 'system' else 'User' if message['role'] == 'user' else 'Assistant' "
    "if message['role'] == 'assistant' else 'Tool' if message['role'] == 'tool' else message['role']) + ':\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- if message['content'] %}{{ message['content'] }}{% endif %}"
    "{%- if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}"
    "{{- eos_token + '\\n\\n' }}"
    "{%- else %}{{ message['content'] + '\\n\\n' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)

_PLAIN_ROLES = ("user", "assistant", "system")
_QUESTION = {"role": "user", "content": "LUTHIER-QUESTION"}
_ANSWER = "LUTHIER-ANSWER"
_REASON = "LUTHIER-REASON"
_TOOLS: Tools = [
    {
        "type": "function",
        "function": {
            "name": "luthier_probe",
            "description": "probes",
            "parameters": {"type": "object", "properties": {"LUTHIER_KEY": {"type": "string", "description": "key"}}},
        },
    }
]


THINKING = ("<think>", "</think>")
"""An assistant writes these itself, also where a vocabulary counts them as control tokens."""


class RenderError(ValueError):
    """An example that cannot be rendered: ``reason`` is a reject code, the message says why."""

    def __init__(self, reason: str, message: str, remedy: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Closing:
    """The control token that ends an assistant turn."""

    token: str
    written: bool
    """False where the template ends a turn with nothing, so that only the next turn's opening token ends it."""


class ChatTemplate:
    """One tokenizer's chat template, in the form that it took turns in when it was first asked."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._specials = plain_json(dict(tokenizer.special_tokens_map))
        self._variables: dict[str, Any] = {}
        self._compiled: dict[str, Template | None] = {}
        self._keeps_contents: dict[Template, bool] = {}
        self._skeletons: dict[tuple[Template, bool, tuple[str, ...]], Skeleton | None] = {}

    def text(self, messages: list[Message], tools: Tools | None = None, *, add_generation_prompt: bool) -> str:
        """A conversation as text.

        Raises:
            RenderError: the template refuses these turns.
        """
        return self.write(self.prepare(messages), plain_json(tools), add_generation_prompt=add_generation_prompt)

    def write(self, messages: list[Message], tools: Tools | None, *, add_generation_prompt: bool) -> str:
        """As :meth:`text`, of turns that :meth:`prepare` made and tools of plain JSON.

        Raises:
            RenderError: the template refuses these turns.
        """
        import jinja2

        try:
            template = self._template(bool(tools))
            if template is None:
                return str(
                    self.tokenizer.apply_chat_template(
                        messages,
                        tools=tools or None,  # type: ignore[arg-type]
                        tokenize=False,
                        add_generation_prompt=add_generation_prompt,
                    )
                )
            values = {**self._variables, "add_generation_prompt": add_generation_prompt}
            if not tools and (text := self._filled(template, values, messages)) is not None:
                return text
            # Template.render, less its merging of globals at each call.
            values |= {"messages": messages, "tools": tools or None}
            return "".join(template.root_render_func(template.new_context(values, shared=True)))
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
            raise RenderError("template_refuses", f"the chat template refuses these turns: {error}") from error

    def _template(self, tools: bool) -> Template | None:
        """The template as transformers compiles it; None where this release no longer gives it out.

        ``apply_chat_template`` copies and checks every value before each rendering, which costs three times the
        rendering; here :meth:`prepare` has made the turns plain once.
        """
        source = self.tokenizer.get_chat_template(None, _TOOLS if tools else None)
        if source not in self._compiled:
            try:
                from transformers.utils.chat_template_utils import _compile_jinja_template

                compiled = self._compiled[source] = _compile_jinja_template(source)
                self._variables = {**compiled.globals, "documents": None, **self._specials}
            except ImportError:
                self._compiled[source] = None
        return self._compiled[source]

    def _filled(self, template: Template, values: dict[str, Any], messages: list[Message]) -> str | None:
        """The text by its skeleton, where the template has one for turns of these roles."""
        roles = tuple([m["role"] for m in messages if len(m) == 2 and type(m.get("content")) is str])
        if len(roles) != len(messages):
            return None
        key = (template, values["add_generation_prompt"], roles)
        if key not in self._skeletons:
            if template not in self._keeps_contents:
                source = self.tokenizer.get_chat_template()
                self._keeps_contents[template] = keeps_contents(source, template.environment)
            if len(self._skeletons) >= 1_000:
                self._skeletons.clear()
            found = skeleton(template, values, roles) if self._keeps_contents[template] else None
            self._skeletons[key] = found
        parts = self._skeletons[key]
        return None if parts is None else parts.filled([m["content"] for m in messages])

    # -- the form this template takes turns in

    def prepare(self, messages: list[Message]) -> list[Message]:
        """Turns of plain JSON in the form that this template takes, without marks of what is trained."""
        prepared: list[Message] = []
        ids = _Ids(self)
        for message in messages:
            role, content = message.get("role"), message.get("content")
            simple = len(message) == 2 and role in _PLAIN_ROLES and type(content) is str
            if simple and not (role == "assistant" and "</think>" in str(content)):
                prepared.append(message)
            else:
                prepared.append(self._prepared(message, ids))
        return prepared

    def _prepared(self, message: Message, ids: _Ids) -> Message:
        made = {k: plain_json(v) for k, v in message.items() if v is not None and k not in MARKS}
        # Templates join contents as text: an assistant turn that only calls tools has an empty one, not None.
        made.setdefault("content", "")
        if made.get("role") == "developer" and self._developer_is_system:
            made["role"] = "system"
        if made.get("role") == "assistant":
            self._place_reasoning(made)
        if made.get("tool_calls"):
            made["tool_calls"] = [ids.call(self._call(call)) for call in made["tool_calls"]]
        elif made.get("role") == "tool":
            made = ids.result(made)
        return made

    def _place_reasoning(self, message: Message) -> None:
        reasoning = next((message[k] for k in REASONING if message.get(k)), "")
        for key in REASONING:
            message.pop(key, None)
        if not reasoning and not self.reasoning_in_content and not self._parses_reasoning:
            reasoning, message["content"] = reasoning_and_rest(message["content"])
        if reasoning and self.reasoning_in_content:
            message["content"] = f"<think>\n{reasoning.strip()}\n</think>\n\n{message['content']}"
        elif reasoning:
            # Both names, as transformers gives templates.
            message["reasoning_content"] = message["thinking"] = reasoning

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        inner = call.get("function", call)
        arguments = inner.get("arguments")
        if self._string_arguments and not isinstance(arguments, str):
            arguments = json.dumps(arguments if arguments is not None else {}, ensure_ascii=False)
            call = {**call, "function": {**inner, "arguments": arguments}}
        return call

    # -- what the template does, by trying

    def try_text(self, messages: list[Message], tools: Tools | None = None) -> str | None:
        """A conversation as text, None where the template refuses it; nothing is put into another form."""
        try:
            return self.write(messages, tools, add_generation_prompt=False)
        except RenderError:
            return None

    @cached_property
    def reasoning_in_content(self) -> bool:
        """Whether reasoning is text like any other here: the template neither reads it as a field of its own nor
        takes ``<think>`` out of an answer."""
        return _REASON not in (self._reasoned or "") and _REASON in (self._thought_aloud or "")

    @cached_property
    def _parses_reasoning(self) -> bool:
        """Whether ``<think>`` in the content is the same to it as a field."""
        return _REASON in (self._reasoned or "") and self._reasoned == self._thought_aloud

    @cached_property
    def _reasoned(self) -> str | None:
        turn = {"role": "assistant", "content": _ANSWER, "reasoning_content": _REASON, "thinking": _REASON}
        return self.try_text([_QUESTION, turn])

    @cached_property
    def _thought_aloud(self) -> str | None:
        return self.try_text(
            [_QUESTION, {"role": "assistant", "content": f"<think>\n{_REASON}\n</think>\n\n{_ANSWER}"}]
        )

    @cached_property
    def _string_arguments(self) -> bool:
        """Whether a call's arguments must be JSON text, since the template joins them as text."""
        text = self.try_text([_QUESTION, _calling({"LUTHIER_KEY": "LUTHIER-VALUE"})], _TOOLS)
        if text is not None and "'LUTHIER_KEY'" not in text:
            return False
        text = self.try_text([_QUESTION, _calling('{"LUTHIER_KEY": "LUTHIER-VALUE"}')], _TOOLS)
        return text is not None

    def _call_text(self, id: str | None = None, *after: Message) -> str | None:
        arguments = {"LUTHIER_KEY": "LUTHIER-VALUE"}
        turn = _calling(json.dumps(arguments) if self._string_arguments else arguments, id)
        return self.try_text([_QUESTION, turn, *after], _TOOLS)

    @cached_property
    def needs_ids(self) -> bool:
        """Whether calls without an id are refused (Mistral's third version)."""
        return self._call_text() is None and self._call_text("call00001") is not None

    @cached_property
    def needs_short_ids(self) -> bool:
        """Whether ids other than nine letters or digits are refused."""
        return self._call_text("call_1234567890abc") is None and self._call_text("call00001") is not None

    @cached_property
    def _developer_is_system(self) -> bool:
        """OpenAI's newer name for the system turn: many templates drop or refuse it."""
        said = self.try_text([{"role": "developer", "content": _REASON}, _QUESTION, _answering()])
        if said is not None and _REASON in said:
            return False
        return self.try_text([{"role": "system", "content": _REASON}, _QUESTION, _answering()]) is not None

    @cached_property
    def _tokens(self) -> re.Pattern[str]:
        """Any added token of the vocabulary."""
        added = {str(t) for t in self.tokenizer.added_tokens_decoder.values()} | set(self.tokenizer.all_special_tokens)
        return re.compile("|".join(map(re.escape, sorted(filter(None, added), key=len, reverse=True))) or "(?!)")

    @cached_property
    def controls(self) -> re.Pattern[str]:
        """Any control token, those around reasoning left out."""
        found = [s for s in special_tokens(self.tokenizer) if s and s not in THINKING]
        return re.compile("|".join(map(re.escape, found)) or "(?!)")

    @cached_property
    def opening(self) -> str:
        """What the template writes before an answer, as far as it is the same for every answer."""
        asked = self.try_text([_QUESTION])
        try:
            prompt = self.write([_QUESTION], None, add_generation_prompt=True)
        except RenderError:
            return ""
        opened = prompt[len(asked) :] if asked and prompt.startswith(asked) else ""
        return opened.partition("<think>")[0]

    @cached_property
    def closing(self) -> Closing | None:
        """What ends an answer; None where that is plain text."""
        text = self.try_text([_QUESTION, _answering()])
        if text is None:
            eos = self.tokenizer.eos_token
            return Closing(str(eos), True) if eos else None
        found = self._tokens.search(text, text.rfind(_ANSWER))
        if found:
            return Closing(found.group(), True)
        text = self.try_text([_QUESTION, _answering(), {"role": "user", "content": _REASON}, _answering()]) or ""
        begin = text.find(_ANSWER) + len(_ANSWER)
        found = self._tokens.search(text, begin, max(begin, text.find(_REASON)))
        return Closing(found.group(), False) if found else None

    @cached_property
    def call_closing(self) -> Closing | None:
        """What ends a turn that calls tools: for some families another token than what ends an answer."""
        id = "call00001" if self.needs_ids or self.needs_short_ids else None
        text = self._call_text(id)
        if text is None or "LUTHIER-VALUE" not in text:
            return self.closing
        found = [m.group() for m in self._tokens.finditer(text, text.rfind("LUTHIER-VALUE"))]
        if self.closing and (self.closing.written or not found):
            if self.closing.token in found:
                return self.closing
            if self.closing.written and found:
                return Closing(found[-1], True)
        result = {"role": "tool", "content": _REASON, **({"tool_call_id": id} if id else {})}
        followed = self._call_text(id, result) or ""
        begin = followed.find("LUTHIER-VALUE")
        tail = [m.group() for m in self._tokens.finditer(followed, begin, max(begin, followed.find(_REASON)))]
        opening = [token for token in tail[len(found) :] if token not in found]
        return Closing(opening[0], False) if opening else self.closing


class _Ids:
    """Ids of tool calls and of their results, made up in order where the template wants them and the row has none."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._numbers: Iterator[int] = count(1)
        self._renamed: dict[str, str] = {}
        self._waiting: list[str] = []

    def call(self, call: dict[str, Any]) -> dict[str, Any]:
        given = call.get("id")
        short = self._template.needs_short_ids and not re.fullmatch(r"[A-Za-z0-9]{9}", str(given or ""))
        if not (short or (given is None and self._template.needs_ids)):
            return call
        made = f"call{next(self._numbers):05}"
        if given is not None:
            self._renamed[given] = made
        self._waiting.append(made)
        return {**call, "id": made}

    def result(self, message: Message) -> Message:
        given = message.get("tool_call_id")
        if given is not None:
            return {**message, "tool_call_id": self._renamed.get(given, given)}
        return {**message, "tool_call_id": self._waiting.pop(0)} if self._waiting else message


def _calling(arguments: Any, id: str | None = None) -> Message:
    call = {"type": "function", "function": {"name": "luthier_probe", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [{**call, "id": id} if id else call]}


def _answering() -> Message:
    return {"role": "assistant", "content": _ANSWER}


def plain_json(value: Any) -> Any:
    """A copy of plain JSON types, the only ones that templates are given.

    Raises:
        RenderError: there is something else in it.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, dict):
        return {str(k): plain_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(v) for v in value]
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    raise RenderError("wrong_type", f"a turn holds a {type(value).__name__}, which is no JSON", "write text")


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokenizer's control tokens as text: what no user text may hold."""
    added = tokenizer.added_tokens_decoder.values()
    return sorted({str(t) for t in added if t.special} | set(tokenizer.all_special_tokens), key=len, reverse=True)


@lru_cache(maxsize=4)
def _kept(tokenizer: PreTrainedTokenizerBase, source: str, specials: str) -> ChatTemplate:
    return ChatTemplate(tokenizer)


def chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The tokenizer's chat template, kept until its text or the tokenizer's special tokens change."""
    return _kept(tokenizer, str(tokenizer.chat_template), str(tokenizer.special_tokens_map))
