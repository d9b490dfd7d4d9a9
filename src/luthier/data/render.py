"""From an example to text, and to the spans of it that are trained.

The model's own chat template is the only authority. A conversation is rendered once; what the assistant must
produce is found in that text by character position.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.data.examples import Message, TrainingExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For models without a template of their own. The tokenizer is saved with it, so that serving renders the same.
PLAIN_TEMPLATE = (
    "{%- if tools %}{{ '### Tools:\\n' + (tools | tojson) + '\\n\\n' }}{% endif %}"
    "{%- for message in messages %}"
    "{{- '### ' + message['role'] | capitalize + ':\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- if message['content'] %}{{ message['content'] }}{% endif %}"
    "{%- if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}"
    "{{- eos_token + '\\n\\n' }}"
    "{%- else %}{{ message['content'] + '\\n\\n' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """An example as the model will read it."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Half-open character ranges of ``text`` that are trained, in order: answers with their end-of-turn."""
    prompts: tuple[str, ...]
    """For each span, what serving would render before the model speaks (empty for plain text)."""


class RenderError(ValueError):
    """An example that cannot be rendered: ``reason`` is a reject code, the message says why."""

    def __init__(self, reason: str, message: str, remedy: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.remedy = remedy


def template_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    *,
    add_generation_prompt: bool,
) -> str:
    """A conversation as text, by the tokenizer's chat template.

    Raises:
        RenderError: the template refuses these turns.
    """
    import jinja2

    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tools=tools or None,  # type: ignore[arg-type]
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
        raise RenderError("template_refuses", f"the chat template refuses these turns: {error}") from error


def prompt_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """The text that a model answers to: the turns so far and the opening of the assistant's turn.

    Tokenise it with ``add_special_tokens=False``: the template has written every control token.
    """
    return template_text(tokenizer, messages, tools, add_generation_prompt=True)


def prompt_messages(example: TrainingExample, system: str | None = None) -> list[Message]:
    """The turns before the example's last assistant turn: what is asked when the example is evaluated."""
    messages = example.to_chat_format(system)
    for index in range(len(messages) - 1, -1, -1):
        if messages[index]["role"] == "assistant":
            return messages[:index]
    return messages


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokenizer's control tokens as text: what no user text may hold."""
    added = tokenizer.added_tokens_decoder.values()
    return sorted({str(t) for t in added if t.special} | set(tokenizer.all_special_tokens), key=len, reverse=True)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The control token that closes an assistant turn in this template, or None where it closes with plain text.

    The template itself is asked: a conversation is rendered and the first token of the vocabulary's added ones
    after the answer is taken.
    """
    mark = "LUTHIER-ANSWER"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
    try:
        text = template_text(tokenizer, turns, add_generation_prompt=False)
    except RenderError:
        return tokenizer.eos_token
    tail = text[text.rfind(mark) + len(mark) :]
    candidates = {str(t) for t in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    found = [(tail.find(token), -len(token), token) for token in candidates if token and token in tail]
    return min(found)[2] if found else None


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids at which an answer ends: the template's end-of-turn and the tokenizer's end-of-sequence."""
    tokens = [end_of_turn(tokenizer), tokenizer.eos_token]
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens if token]
    return list(dict.fromkeys(int(i) for i in ids if isinstance(i, int)))


class Renderer:
    """Renders examples through one tokenizer's template.

    Args:
        tokenizer: a tokenizer with a chat template.
        system: a system message for conversations that have none.
        train_on: which spans are trained: every ``answers`` turn, the ``last_answer`` or ``all`` of the text.
        allow_special_tokens: render rows whose text holds control tokens, instead of refusing them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        train_on: str = "answers",
        allow_special_tokens: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.system = system
        self.train_on = train_on
        self.end_of_turn = end_of_turn(tokenizer)
        specials = special_tokens(tokenizer)
        self._special = re.compile("|".join(map(re.escape, specials))) if specials else None
        self.allow_special_tokens = allow_special_tokens
        # A tokenizer that opens plain text with BOM or closes it with EOS says so by what it adds.
        opening = tokenizer("text").input_ids[:1] if tokenizer.bos_token_id is not None else []
        self._bos = tokenizer.bos_token if opening == [tokenizer.bos_token_id] else ""

    def render(self, example: TrainingExample) -> Rendered:
        """The example's text, its trained spans and the prompt that serving would render before each.

        Raises:
            RenderError: the row cannot be rendered without losing or changing something of it.
        """
        if example.is_plain_text:
            return self._plain(example.input)
        messages = [self._speakable(m) for m in example.to_chat_format(self.system)]
        for number, message in enumerate(messages, 1):
            if message["role"] == "assistant" and not str(message["content"]).strip() and not message.get("tool_calls"):
                raise RenderError("empty_answer", f"the answer (turn {number}) is empty", "give it a text")
        if not self.allow_special_tokens:
            for number, message in enumerate(messages, 1):
                self._refuse_special(json.dumps(message, ensure_ascii=False), f"turn {number} ({message['role']})")
        text = template_text(self.tokenizer, messages, example.tools, add_generation_prompt=False)
        if example.tools and text == template_text(self.tokenizer, messages, None, add_generation_prompt=False):
            raise RenderError(
                "tools_ignored",
                "the model's chat template does not render tools, so the model would never see them",
                "name a template that does in model.chat_template, or leave the tools column out",
            )
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if not turns:
            raise RenderError("no_assistant_turn", "the conversation has no assistant turn, so nothing is trained")
        if self.train_on == "all":
            return Rendered(text, ((0, len(text)),), ("",))
        spans: list[tuple[int, int]] = []
        prompts: list[str] = []
        cursor = 0
        for i in turns:
            start, end, prompt = self._span(text, messages, i, example.tools, cursor)
            spans.append((start, end))
            prompts.append(prompt)
            cursor = end
        if self.train_on == "last_answer":
            spans, prompts = spans[-1:], prompts[-1:]
        return Rendered(text, tuple(spans), tuple(prompts))

    def _plain(self, text: str) -> Rendered:
        if not text.strip():
            raise RenderError("empty_text", "the text is empty", "give it a text")
        if not self.allow_special_tokens:
            self._refuse_special(text, "the text")
        whole = f"{self._bos}{text}{self.tokenizer.eos_token or ''}"
        return Rendered(whole, ((len(self._bos or ""), len(whole)),), (self._bos or "",))

    def _refuse_special(self, text: str, place: str) -> None:
        found = self._special.search(text) if self._special else None
        if found:
            raise RenderError(
                "special_token_in_text",
                f"{place} holds the control token {found.group()!r}, which the model would read as control",
                "remove it from the text, or set data.special_tokens_in_text=allow if it is meant",
            )

    @staticmethod
    def _speakable(message: Message) -> Message:
        """Templates join contents as text: an assistant turn that only calls tools has an empty one, not None."""
        return {**message, "content": ""} if message.get("content") is None else message

    def _span(
        self,
        text: str,
        messages: list[Message],
        index: int,
        tools: list[dict[str, Any]] | None,
        cursor: int,
    ) -> tuple[int, int, str]:
        """Where the assistant turn ``messages[index]`` stands in ``text``, and the prompt that leads to it."""
        message = messages[index]
        answer = str(message["content"]).strip()
        try:
            prompt = template_text(self.tokenizer, messages[:index], tools, add_generation_prompt=True)
        except RenderError:
            prompt = ""
        # What the model must produce is whatever follows the prompt that serving renders. Templates that rewrite
        # earlier turns (dropping their reasoning, say) break that prefix; the answer is then searched.
        start = len(prompt) if prompt and len(prompt) >= cursor and text.startswith(prompt) else -1
        said = text.find(answer, max(start, cursor))
        if said < 0 and "</think>" in answer:
            answer = answer.rpartition("</think>")[2].strip()
            said = text.find(answer, max(start, cursor))
        if said < 0:
            raise RenderError(
                "answer_altered",
                f"the chat template changes the answer of turn {index + 1}, so it cannot be found in the text",
                "check the model's chat template, or name another in model.chat_template",
            )
        if start < 0:
            start = said
        for call in message.get("tool_calls") or []:
            name = str(call.get("function", call).get("name"))
            said_call = text.find(name, said)
            if said_call < 0:
                raise RenderError(
                    "tool_call_ignored",
                    f"the chat template does not render the call of {name!r} in turn {index + 1}",
                    "name a template that does in model.chat_template",
                )
            said = max(said, said_call)
        end = said + len(answer) if not message.get("tool_calls") else said
        if self.end_of_turn is not None:
            closing = text.find(self.end_of_turn, end)
            if closing >= 0 and (message.get("tool_calls") or not text[end:closing].strip()):
                end = closing + len(self.end_of_turn)
        return start, end, prompt
