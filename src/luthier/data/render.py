"""From an example to text, and to the spans of it that are trained.

The model's own chat template is the only authority. A conversation is rendered once; what the assistant must
produce is found in that text by character position: it is whatever follows the prompt that serving would render.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from luthier.data.chat_template import (
    PLAIN_TEMPLATE,
    ChatTemplate,
    RenderError,
    Tools,
    chat_template,
    plain_json,
    special_tokens,
)
from luthier.data.conversations import REASONING, Unfit, marked
from luthier.data.examples import Message, TrainingExample
from luthier.data.spans import NOTES, REASONING_INLINE, Spans, strings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "NOTES",
    "PLAIN_TEMPLATE",
    "RenderError",
    "Rendered",
    "Renderer",
    "end_of_turn",
    "end_of_turn_ids",
    "prompt_messages",
    "prompt_text",
    "special_tokens",
    "template_text",
]


@dataclass(frozen=True, slots=True)
class Rendered:
    """An example as the model will read it."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Half-open character ranges of ``text`` that are trained, in order: answers with their end-of-turn."""
    prompts: tuple[str, ...]
    """For each span, what serving would render before the model speaks (empty for plain text)."""
    notes: tuple[str, ...] = ()
    """What the template does to this row that its owner may not expect, as codes."""


def template_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: Tools | None = None,
    *,
    add_generation_prompt: bool,
) -> str:
    """A conversation as text, by the tokenizer's chat template.

    Raises:
        RenderError: the template refuses these turns.
    """
    return chat_template(tokenizer).text(messages, tools, add_generation_prompt=add_generation_prompt)


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Tools | None = None) -> str:
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


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The control token that closes an assistant turn in this template, or None where it closes with plain text.

    The template itself is asked: a conversation is rendered and the first token of the vocabulary's added ones
    after the answer is taken. Where nothing follows an answer (GLM-4), it is the token that opens the next turn.
    """
    closing = chat_template(tokenizer).closing
    return closing.token if closing else None


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids at which an answer ends: the template's ends of turns and the tokenizer's end-of-sequence."""
    template = chat_template(tokenizer)
    tokens = [closing.token for closing in (template.closing, template.call_closing) if closing]
    ids = [tokenizer.convert_tokens_to_ids(token) for token in [*tokens, tokenizer.eos_token] if token]
    return list(dict.fromkeys(int(i) for i in ids if isinstance(i, int)))


class Renderer:
    """Renders examples through one tokenizer's template.

    Args:
        tokenizer: a tokenizer with a chat template.
        system: a system message for conversations that have none.
        train_on: which spans are trained: every ``answers`` turn, the ``last_answer`` or ``all`` of the text. A turn
            marked ``train: false`` never is, one marked ``train: true`` always.
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
        self.template = ChatTemplate(tokenizer)
        self.system = system
        self.train_on = train_on
        self.end_of_turn = self.template.closing.token if self.template.closing else None
        self.ends_of_turn = frozenset(c.token for c in (self.template.closing, self.template.call_closing) if c)
        """:attr:`end_of_turn` and what ends a turn that calls tools, where that is another token."""
        specials = special_tokens(tokenizer)
        self._special = re.compile("|".join(map(re.escape, specials)) or "(?!)")
        self._special_in_answer = self.template.controls
        self.allow_special_tokens = allow_special_tokens
        # A tokenizer that opens plain text with BOM or closes it with EOS says so by what it adds.
        opening = tokenizer("text").input_ids[:1] if tokenizer.bos_token_id is not None else []
        self._bos = tokenizer.bos_token if opening == [tokenizer.bos_token_id] else ""

    def render_many(self, examples: Iterable[TrainingExample]) -> list[Rendered | RenderError]:
        """Each example rendered, or the error that says why it cannot be."""
        results: list[Rendered | RenderError] = []
        for example in examples:
            try:
                results.append(self.render(example))
            except RenderError as error:
                results.append(error)
        return results

    def render(self, example: TrainingExample) -> Rendered:
        """The example's text, its trained spans and the prompt that serving would render before each.

        Raises:
            RenderError: the row cannot be rendered without losing or changing something of it.
        """
        if example.is_plain_text:
            return self._plain(example.input)
        given = example.to_chat_format(self.system)
        trained = self.trained_turns(given)
        messages = self.template.prepare(given)
        tools = plain_json(example.tools) if example.tools else None
        self._check(messages, tools)
        text = self._whole(messages, tools)
        finder = Spans(self.template, text, messages, tools, counts_own=self.allow_special_tokens)
        finder.find(set(trained))
        spans = finder.spans
        text = finder.text
        self._refuse_missing(text, messages)
        if any(m.get(k) for m in given if len(m) > 2 for k in REASONING) and self.template.reasoning_in_content:
            finder.notes.append(REASONING_INLINE)
        notes = tuple(dict.fromkeys(finder.notes))
        if self.train_on == "all":
            untrained = [spans[i][:2] for i in spans if i not in trained]
            kept = tuple(_without((0, len(text)), untrained))
            return Rendered(text, kept, ("",) * len(kept), notes)
        return Rendered(text, tuple(spans[i][:2] for i in trained), tuple(spans[i][2] for i in trained), notes)

    def trained_turns(self, messages: list[Message]) -> list[int]:
        """Which turns are trained: positions in ``messages`` of assistant turns.

        Raises:
            RenderError: there is none.
        """
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if not turns:
            raise RenderError("no_assistant_turn", "the conversation has no assistant turn, so nothing is trained")
        try:
            marks = [marked(messages[i]) if len(messages[i]) > 2 else None for i in turns]
        except Unfit as error:
            raise RenderError(error.reason, str(error), error.remedy) from None
        usual = turns[-1:] if self.train_on == "last_answer" else turns
        trained = [i for i, mark in zip(turns, marks, strict=True) if mark or (mark is None and i in usual)]
        if not trained:
            raise RenderError(
                "nothing_trained",
                "every answer that would be trained is marked train: false",
                "mark an answer train: true, or leave the row out",
            )
        return trained

    def _plain(self, text: str) -> Rendered:
        if not text.strip():
            raise RenderError("empty_text", "the text is empty", "give it a text")
        if not self.allow_special_tokens:
            self._refuse_special(self._special, text, "the text")
        whole = f"{self._bos}{text}{self.tokenizer.eos_token or ''}"
        return Rendered(whole, ((len(self._bos or ""), len(whole)),), (self._bos or "",))

    def _check(self, messages: list[Message], tools: Tools | None) -> None:
        """Refuses empty answers and control tokens in the row's own text."""
        for number, message in enumerate(messages, 1):
            role, content = message["role"], message["content"]
            if not isinstance(content, str):
                raise RenderError("not_text", f"turn {number} ({role}) is no text", "write its content as one text")
            if role == "assistant" and not (content.strip() or message.get("tool_calls")):
                raise RenderError("empty_answer", f"the answer (turn {number}) is empty", "give it a text")
            if self.allow_special_tokens:
                continue
            pattern = self._special_in_answer if role == "assistant" else self._special
            for said in (content,) if len(message) == 2 else strings(message):
                self._refuse_special(pattern, said, f"turn {number} ({role})")
        if tools and not self.allow_special_tokens:
            for said in strings(tools):
                self._refuse_special(self._special, said, "a tool")

    def _refuse_special(self, pattern: re.Pattern[str], text: str, place: str) -> None:
        found = pattern.search(text)
        if found:
            raise RenderError(
                "special_token_in_text",
                f"{place} holds the control token {found.group()!r}, which the model would read as control",
                "remove it from the text, or set data.special_tokens_in_text=allow if it is meant",
            )

    def _whole(self, messages: list[Message], tools: Tools | None) -> str:
        """The conversation as text."""
        template = self.template
        try:
            text = template.write(messages, tools, add_generation_prompt=False)
        except RenderError as error:
            raise RenderError(error.reason, str(error), self._remedy(messages, tools)) from error
        if tools and text == template.write(messages, None, add_generation_prompt=False):
            raise RenderError(
                "tools_ignored",
                "the model's chat template does not render tools, so the model would never see them",
                "name a template that does in model.chat_template, or leave the tools column out",
            )
        return text

    @staticmethod
    def _refuse_missing(text: str, messages: list[Message]) -> None:
        for number, message in enumerate(messages, 1):
            if message["role"] in ("system", "developer", "user") and message["content"].strip() not in text:
                raise RenderError(
                    "turn_ignored",
                    f"the chat template leaves out or changes the text of turn {number} ({message['role']})",
                    "name another template in model.chat_template, or put the text into a user's turn",
                )

    def _remedy(self, messages: list[Message], tools: Tools | None) -> str:
        rest = [m for m in messages if m["role"] not in ("system", "developer")]
        if len(rest) < len(messages) and self.template.try_text(rest, tools) is not None:
            return "this model takes no system turn: put its text before the first question, and leave data.system out"
        if any(a["role"] == b["role"] for a, b in pairwise(rest)) or rest[0]["role"] != "user":
            return "begin with a user turn and join neighbouring turns of one role, or name another model.chat_template"
        return "change the turns, or name another template in model.chat_template"


def _without(span: tuple[int, int], gaps: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """A range less some ranges in it, which are in order."""
    begin, end = span
    for gap_begin, gap_end in gaps:
        if gap_begin > begin:
            yield begin, gap_begin
        begin = gap_end
    if end > begin:
        yield begin, end
