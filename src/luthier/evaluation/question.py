"""What an example asks when it is used to evaluate, and the answers that are right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.data.examples import Message, TrainingExample
from luthier.data.render import RenderError, end_of_turn, prompt_messages, prompt_text, template_text
from luthier.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Question:
    """One example, ready to be asked."""

    prompt: str
    """Rendered through the chat template, up to where the model speaks."""
    asked: str
    """The last turn before the answer, for people to read."""
    references: list[str]
    """The right answers; the example's own comes first."""
    where: str
    """File and line, or the number of the row."""


def ask(
    tokenizer: PreTrainedTokenizerBase, example: TrainingExample, number: int, system: str | None = None
) -> Question:
    """An example as a question.

    Args:
        tokenizer: holds the chat template.
        example: has an answer; its last assistant turn is what is asked for.
        number: 1-based, names the row where it has no source.
        system: a system message for examples that have none.

    Raises:
        UserError: the example has no answer, or the template refuses it.
    """
    where = str(example.source) if example.source else f"row {number}"
    messages = example.to_chat_format(system)
    turns = prompt_messages(example, system)
    answer = messages[len(turns)] if len(messages) > len(turns) else {}
    if not answer.get("tool_calls") and not str(answer.get("content") or "").strip():
        raise UserError(
            "the example has no answer to compare with", where=where, remedy="give it an output, or leave it out"
        )
    try:
        prompt = prompt_text(tokenizer, turns, example.tools)
        own = str(answer.get("content") or "")
        if answer.get("tool_calls"):
            own = _written(tokenizer, [*turns, answer], example, prompt)
    except RenderError as error:
        raise UserError(str(error), where=where, remedy=error.remedy) from None
    asked = str(turns[-1].get("content") or "") if turns else ""
    return Question(prompt, asked, [own, *example.references], where)


def _written(tokenizer: PreTrainedTokenizerBase, messages: list[Message], example: TrainingExample, prompt: str) -> str:
    """A turn that calls tools, as the template has the model write it: what follows the prompt."""
    turns = [{**m, "content": "" if m.get("content") is None else m["content"]} for m in messages]
    text = template_text(tokenizer, turns, example.tools, add_generation_prompt=False)
    if not text.startswith(prompt):
        raise RenderError("answer_altered", "the chat template rewrites the turns before a tool call")
    closing = end_of_turn(tokenizer)
    written = text[len(prompt) :]
    return (written.partition(closing)[0] if closing else written).strip()
