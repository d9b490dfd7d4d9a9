"""The texts of a row, one by one, and the row put together again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from luthier.data.examples import Reject, Source, TrainingExample

Side = Literal["prompt", "answer"]


@dataclass(slots=True)
class Text:
    """One text of a row.

    ``side`` is ``answer`` for what the model is to say (assistant turns, the output, references, plain text) and
    ``prompt`` for what it is told.
    """

    place: str
    """``input``, ``output``, ``references[0]``, ``messages[2].content``."""
    side: Side
    text: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a filter lets a row go; becomes a :class:`~luthier.data.examples.Reject` with the row's place."""

    reason: str
    message: str
    place: str
    value: str
    remedy: str

    def at(self, example: TrainingExample) -> Reject:
        source = example.source or Source("examples given in Python", 0)
        return Reject(source.file, source.line, self.reason, self.message, self.place, self.value, self.remedy)


def texts_of(example: TrainingExample) -> list[Text]:
    """Every text of a row that cleaners see.

    Not tool calls and metadata, nor the output of a classification row, which is the class's name.
    """
    plain = example.output is None and example.messages is None and example.label is None
    texts = [Text("input", "answer" if plain else "prompt", example.input)] if example.input else []
    if example.output is not None and example.label is None:
        texts.append(Text("output", "answer", example.output))
    for index, message in enumerate(example.messages or ()):
        content = message.get("content")
        if isinstance(content, str):
            side: Side = "answer" if message.get("role") == "assistant" else "prompt"
            texts.append(Text(f"messages[{index}].content", side, content))
    texts += [Text(f"references[{index}]", "answer", text) for index, text in enumerate(example.references)]
    return texts


def with_texts(example: TrainingExample, texts: Iterable[Text]) -> TrainingExample:
    """A copy of the row with these texts in their places; the row itself stays as it is."""
    made = replace(
        example,
        messages=None if example.messages is None else [dict(message) for message in example.messages],
        references=list(example.references),
    )
    for text in texts:
        if text.place == "input":
            made.input = text.text
        elif text.place == "output":
            made.output = text.text
        elif text.place.startswith("references"):
            made.references[int(text.place[11:-1])] = text.text
        else:
            assert made.messages is not None
            made.messages[int(text.place[9 : text.place.index("]")])]["content"] = text.text
    return made
