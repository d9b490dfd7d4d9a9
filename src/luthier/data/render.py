"""From an example to text, and to the spans of it that are trained.

The model's own chat template is the only authority. A conversation is rendered once; what the assistant must
produce is found in that text by character position: it is whatever follows the prompt that serving would render.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

from luthier.data.chat_template import (
    PLAIN_TEMPLATE,
    ChatTemplate,
    RenderError,
    Tools,
    chat_template,
    plain_json,
    special_tokens,
)
from luthier.data.conversations import REASONING, Unfit, marked, reasoning_and_rest
from luthier.data.examples import Message, TrainingExample

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

# What a row's notes say; the pre-flight counts them.
REASONING_DROPPED = "earlier_reasoning_dropped"
REASONING_INLINE = "reasoning_in_content"
PROMPT_WINS = "prompt_wins"
NOTES = {
    REASONING_DROPPED: "the chat template drops the reasoning of earlier answers, as when serving, so those are "
    "trained without it",
    REASONING_INLINE: "the chat template knows no reasoning, so a row's reasoning is put before its answer as "
    "<think>…</think>",
    PROMPT_WINS: "the chat template writes finished turns otherwise than the prompt that serving renders, so rows are "
    "that prompt and what the model must say after it",
}


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
        finder = _Spans(self.template, text, messages, tools, counts_own=self.allow_special_tokens)
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


class _Spans:
    """Where the assistant's turns stand in the text of one conversation."""

    def __init__(
        self, template: ChatTemplate, text: str, messages: list[Message], tools: Tools | None, *, counts_own: bool
    ) -> None:
        self.template = template
        self.text = text
        self.messages = messages
        self.tools = tools
        self.counts_own = counts_own
        self.spans: dict[int, tuple[int, int, str]] = {}
        """By turn: begin and end of what the model must say, and the prompt before it."""
        self.notes: list[str] = []

    def find(self, trained: set[int]) -> None:
        """Finds every assistant turn.

        Raises:
            RenderError: a turn is not in the text as the row has it.
        """
        turns = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        if turns[-1] + 1 == len(self.messages):
            # The next turn's opening would end the last one; there is none, so it is written here.
            calls = self.messages[-1].get("tool_calls")
            closing = self.template.call_closing if calls else self.template.closing
            self.text += closing.token if closing and not closing.written else ""
        prompts = {i: self._prompt(i) for i in turns}
        last = turns[-1]
        if not self.text.startswith(prompts[last] or "\0") or self._thought(last):
            self._settle(turns[:-1], last, prompts[last], must=last in trained)
        cursor = previous = 0
        for i in turns:
            start, exact = self._start(prompts[i], i, previous, cursor)
            self.spans[i] = (start, self._end(start, i, exact), prompts[i])
            thought = self._thought(i)
            if thought and thought not in self.text[start : self.spans[i][1]]:
                self.notes.append(REASONING_DROPPED)
            cursor, previous = self.spans[i][1], i + 1

    def _prompt(self, i: int) -> str:
        try:
            return self.template.write(self.messages[:i], self.tools, add_generation_prompt=True)
        except RenderError:
            return ""

    def _thought(self, i: int) -> str:
        """What the assistant thought before this turn."""
        message = self.messages[i]
        if len(message) == 2 and "</think>" not in message["content"]:
            return ""
        return str(message.get("reasoning_content") or reasoning_and_rest(message["content"])[0]).strip()

    def _settle(self, earlier: list[int], last: int, prompt: str, *, must: bool) -> None:
        """Makes the text go on from the prompt of the last turn, where the template writes finished turns otherwise.

        Two families need it: DeepSeek-R1's prompt opens the reasoning, which its template leaves out of every turn
        that was said; Mistral's third version shows the system text and the tools in an open question alone.
        """
        cursor = previous = 0
        if earlier and not self.text.startswith(prompt or "\0"):
            for i in earlier:
                start, exact = self._start(self._prompt(i), i, previous, cursor)
                cursor, previous = self._end(start, i, exact), i + 1
        start, exact = self._start(prompt, last, previous, cursor)
        end = self._end(start, last, exact)
        thought = self._thought(last)
        dropped = bool(thought) and thought not in self.text[start:end]
        opens = prompt.rstrip().endswith("<think>")
        if dropped and must and not (opens and not self.messages[last].get("tool_calls")):
            raise RenderError(
                "reasoning_dropped",
                f"the chat template drops the reasoning of the last answer (turn {last + 1}), so it would not be "
                "trained",
                "name a template in model.chat_template that keeps the last turn's <think>…</think>, "
                "or take the reasoning out of the rows",
            )
        if not prompt or (not dropped and (exact or opens)):
            return
        said = self.text[start:]
        if dropped and opens:
            said = f"{thought}\n</think>\n\n{said.lstrip()}"
        self.text = prompt + said
        self.notes.append(PROMPT_WINS)

    def _start(self, prompt: str, i: int, previous: int, cursor: int) -> tuple[int, bool]:
        """Where a turn begins, and whether the text up to there is its prompt."""
        if prompt and len(prompt) >= cursor and self.text.startswith(prompt):
            return len(prompt), True
        return self._aligned(prompt, i, previous, cursor), False

    def _aligned(self, prompt: str, i: int, previous: int, cursor: int) -> int:
        """Where a turn begins although the text does not begin with its prompt: the template rewrites what is before.

        The turns in between are passed over, and what the prompt has behind the last of them is passed as far as
        the text agrees.
        """
        place = cursor
        for message in self.messages[previous:i]:
            # A system text may stand anywhere: some templates move it into a question.
            content = message["content"].strip() if message["role"] not in ("system", "developer") else ""
            found = self.text.find(content, place) if content else -1
            place = found + len(content) if found >= 0 else place
        before = self.messages[i - 1]["content"].strip() if i else ""
        if i and previous < i and before and before in prompt:
            suffix = prompt[prompt.rfind(before) + len(before) :]
            # A prompt may open reasoning that finished turns do not have.
            for part in (suffix, suffix.partition("<think>")[0]):
                if self.text.startswith(part, place):
                    return place + len(part)
            return place + _shared(suffix, self.text[place : place + len(suffix)])
        opening = self.template.opening
        found = self.text.find(opening, place)
        return found + len(opening) if found >= 0 else place

    def _end(self, start: int, i: int, exact: bool) -> int:
        """The end of a turn that begins at ``start``, its end-of-turn included."""
        message = self.messages[i]
        calls = message.get("tool_calls") or []
        said, end = self._closed(start, i, bool(calls))
        segment = self.text[start:said].rstrip()
        answer = message["content"].strip()
        thought, rest = reasoning_and_rest(answer)
        if not (answer in segment if calls else segment.endswith(answer)):
            answer = rest.strip()
        if not (answer in segment if calls else segment.endswith(answer)):
            raise self._altered(i, "answer_altered", "changes the answer")
        if not exact and not calls:
            ahead = segment[: len(segment) - len(answer)].strip()
            if ahead and not ahead.startswith("<think>") and not (thought and thought in ahead):
                raise self._altered(i, "answer_altered", "changes what stands around the answer")
        for call in calls:
            inner = call.get("function", call)
            needed = [str(inner.get("name")), *strings(inner.get("arguments"))]
            lost = next((s for s in needed if not _holds(segment, s)), None)
            if lost is not None:
                raise self._altered(i, "tool_call_ignored", f"does not render {lost!r} of the tool call")
        return end

    def _closed(self, start: int, i: int, calls: bool) -> tuple[int, int]:
        """Where the end-of-turn of a turn that begins at ``start`` begins and ends."""
        text, last = self.text, i + 1 == len(self.messages)
        closing = self.template.call_closing if calls else self.template.closing
        whole = len(text.rstrip())
        if closing is None and not last:
            answer = self.messages[i]["content"].strip()
            found = text.find(answer, start)
            whole = found + len(answer) if found >= 0 and not text[start:found].strip() else start
        if closing is None:
            return whole, whole
        ends = re.compile(re.escape(closing.token)) if closing.written else self.template.controls
        own = sum(len(ends.findall(said)) for said in strings(self.messages[i])) if self.counts_own else 0
        found_end = next(islice(ends.finditer(text, start), own, None), None)
        return found_end.span() if found_end else (whole, whole)

    def _altered(self, i: int, reason: str, what: str) -> RenderError:
        return RenderError(
            reason,
            f"the chat template {what} of turn {i + 1}, so it cannot be found in the text",
            "check the model's chat template, or name another in model.chat_template",
        )


def strings(value: Any) -> Iterator[str]:
    """Every text in a value of plain JSON, the keys of objects but the turn's own among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def _shared(first: str, second: str) -> int:
    """How many characters two texts have in common at their beginning."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _holds(text: str, said: str) -> bool:
    """Whether a text holds another, as it stands or as JSON writes it."""
    return said in text or any(json.dumps(said, ensure_ascii=a)[1:-1] in text for a in (False, True))


def _without(span: tuple[int, int], gaps: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """A range less some ranges in it, which are in order."""
    begin, end = span
    for gap_begin, gap_end in gaps:
        if gap_begin > begin:
            yield begin, gap_begin
        begin = gap_end
    if end > begin:
        yield begin, end
