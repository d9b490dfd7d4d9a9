"""The row of a data set, once it has been understood: :class:`TrainingExample`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from luthier.errors import UserError, shorten

Message = dict[str, Any]
"""One turn: ``{"role": "user", "content": "…"}``; an assistant's turn may carry ``tool_calls`` instead."""

ROLES = ("system", "developer", "user", "assistant", "tool")


class TaskType(StrEnum):
    """What the model is to learn from an example."""

    CAUSAL_LM = "causal_lm"
    INSTRUCTION = "instruction"
    MASKED_LM = "masked_lm"
    SEQ_TO_SEQ = "seq_to_seq"
    CLASSIFICATION = "classification"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a row came from, so that any later complaint can name it."""

    file: str
    line: int
    """1-based. The line of a JSONL or CSV file (of the row's first character), the item's number otherwise."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that was refused. ``rejects.jsonl`` holds one of these a line."""

    file: str
    line: int
    reason: str
    """A short code that rows are counted by, for example ``empty_answer``."""
    message: str
    field: str | None = None
    value: str | None = None
    remedy: str | None = None


@dataclass(slots=True)
class TrainingExample:
    """One example: a prompt and its answer, a plain text, or a conversation.

    ``input`` with an ``output`` is a prompt and its answer; ``input`` alone is plain text, all of which is
    trained; ``messages`` is a whole conversation and then wins over both.

    Args:
        input: the prompt, or the plain text.
        output: the answer.
        label: the class of a classification example.
        metadata: anything else the row held; never trained on.
        task_type: what the model is to learn.
        messages: turns of ``{"role", "content"}``; roles are those of :data:`ROLES`.
        tools: JSON schemas of the tools the assistant may call, passed to the chat template.
        references: further right answers, used by evaluation alone.
        source: file and line the row was read from.
    """

    input: str = ""
    output: str | None = None
    label: str | int | list[str] | None = None
    metadata: dict[str, Any] | None = None
    task_type: TaskType = TaskType.CAUSAL_LM
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    references: list[str] = field(default_factory=list)
    source: Source | None = None

    def __post_init__(self) -> None:
        if self.metadata is None:
            self.metadata = {}
        self.task_type = TaskType(self.task_type)

    @property
    def is_plain_text(self) -> bool:
        """True where there is no answer to tell from a prompt: the whole text is trained."""
        return self.messages is None and self.output is None

    @property
    def answer(self) -> str | None:
        """The text a model should give back: the output, or the conversation's last assistant turn."""
        if self.messages is not None:
            for message in reversed(self.messages):
                if message["role"] == "assistant":
                    return str(message.get("content") or "")
            return None
        return self.output

    def to_causal_lm_format(self) -> str:
        """The example as one plain text. A sequence-to-sequence example reads ``input -> output``."""
        if self.messages is not None:
            return "\n".join(str(m.get("content") or "") for m in self.messages)
        if self.output is None:
            return self.input
        separator = " -> " if self.task_type is TaskType.SEQ_TO_SEQ else "\n"
        return f"{self.input}{separator}{self.output}"

    def to_instruction_format(self) -> dict[str, str]:
        """The example as ``{"instruction", "input", "output"}`` (Alpaca's fields).

        Raises:
            UserError: the example has more than one exchange, which these fields cannot hold.
        """
        if self.messages is None:
            return {"instruction": self.input, "input": "", "output": self.output or ""}
        turns = [m for m in self.messages if m["role"] not in ("system", "developer")]
        if [m["role"] for m in turns] != ["user", "assistant"]:
            raise UserError(
                f"a conversation of {len(turns)} turns does not fit instruction, input and output",
                where=str(self.source) if self.source else None,
                remedy="use to_chat_format(), which keeps every turn",
            )
        return {
            "instruction": str(turns[0].get("content") or ""),
            "input": "",
            "output": str(turns[1].get("content") or ""),
        }

    def to_chat_format(self, system: str | None = None) -> list[Message]:
        """The example as a list of turns, the form that a chat template takes.

        Args:
            system: a system turn to put first where the example has none.
        """
        if self.messages is not None:
            messages = [dict(m) for m in self.messages]
        else:
            messages = [{"role": "user", "content": self.input}]
            if self.output is not None:
                messages.append({"role": "assistant", "content": self.output})
        if system is not None and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": system})
        return messages

    @classmethod
    def from_any(cls, value: TrainingExample | Mapping[str, Any]) -> TrainingExample:
        """A :class:`TrainingExample` from one of its own kind or from a mapping of its fields.

        Raises:
            UserError: the value is neither, or the mapping has unknown fields.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            unknown = set(value) - set(cls.__dataclass_fields__)
            if unknown:
                raise UserError(
                    f"unknown field {sorted(unknown)[0]!r} in an example",
                    remedy=f"use {', '.join(cls.__dataclass_fields__)}, or read the rows with DatasetLoader",
                )
            return cls(**value)
        raise UserError(
            f"an example must be a TrainingExample or a mapping, not {type(value).__name__}: {shorten(value)}"
        )
