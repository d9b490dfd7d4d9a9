"""What an example asks when it is used to evaluate, and the answers that are right."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.data.examples import Message, TrainingExample
from luthier.data.pairs import PairEncoder
from luthier.data.render import Renderer, RenderError, prompt_messages, prompt_text
from luthier.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Question:
    """One example, ready to be asked."""

    prompt: str
    """What the model reads: rendered through the chat template up to where it speaks, or a source's text."""
    asked: str
    """The last turn before the answer, for people to read."""
    references: list[str]
    """The right answers; the example's own comes first."""
    where: str
    """File and line, or the number of the row."""
    messages: list[Message] = field(default_factory=list)
    """The turns before the answer, for models with another template."""
    tools: list[dict[str, Any]] | None = None
    """The tools that the conversation offers."""


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
    if not any(turn["role"] not in ("system", "developer") for turn in turns):
        raise UserError("nobody asks before the answer", where=where, remedy="give it a prompt, or leave it out")
    try:
        prompt = prompt_text(tokenizer, turns, example.tools)
        own = str(answer.get("content") or "")
        if answer.get("tool_calls"):
            own = _written(tokenizer, [*turns, answer], example)
    except RenderError as error:
        raise UserError(str(error), where=where, remedy=error.remedy) from None
    asked = str(turns[-1].get("content") or "") if turns else ""
    return Question(prompt, asked, [own, *example.references], where, turns, example.tools)


def ask_source(pairs: PairEncoder, example: TrainingExample, number: int) -> Question:
    """An example as a question to an encoder-decoder: its source, with what the encoder puts before every one.

    Args:
        pairs: how the rows were encoded for training.
        example: has a target.
        number: as for :func:`ask`.

    Raises:
        UserError: the example is no pair, or has no target.
    """
    where = str(example.source) if example.source else f"row {number}"
    try:
        source, target = pairs.texts(example)
    except RenderError as error:
        raise UserError(str(error), where=where, remedy=error.remedy) from None
    if not (target or "").strip():
        raise UserError(
            "the example has no answer to compare with", where=where, remedy="give it an output, or leave it out"
        )
    turns: list[Message] = [{"role": "user", "content": source}]
    return Question(source, source, [str(target), *example.references], where, turns)


def _written(tokenizer: PreTrainedTokenizerBase, messages: list[Message], example: TrainingExample) -> str:
    """A turn that calls tools, as the template has the model write it: what training would teach."""
    renderer = Renderer(tokenizer, train_on="last_answer", allow_special_tokens=True)
    last = {**messages[-1], "train": True}
    rendered = renderer.render(TrainingExample(messages=[*messages[:-1], last], tools=example.tools))
    written = rendered.text[slice(*rendered.spans[-1])]
    for closing in renderer.ends_of_turn:
        written = written.removesuffix(closing)
    return written.strip()
