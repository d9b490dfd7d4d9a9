"""Where the assistant's turns stand in the text of a conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from luthier.data.chat_template import ChatTemplate, RenderError, Tools
from luthier.data.conversations import reasoning_and_rest
from luthier.data.examples import Message

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


class Spans:
    """Where the assistant's turns stand in the text of one conversation, which may have to be written anew.

    Args:
        template: wrote the text.
        text: the conversation as the template writes it when it is over.
        messages: the turns, prepared.
        tools: as the template was given them.
        counts_own: the turns may hold control tokens of their own, which end no turn.
    """

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
