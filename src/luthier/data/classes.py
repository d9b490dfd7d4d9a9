"""The classes of a classification task: their names, their numbers, and texts encoded with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from luthier.data.encode import EncodedExample, EncodedRow, Encoder, reject
from luthier.data.examples import Reject, TrainingExample
from luthier.errors import UserError, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# More classes than this are texts in the label's column.
_MOST = 10_000


@dataclass(frozen=True, slots=True)
class ClassNames:
    """What a text can be."""

    names: tuple[str, ...]
    """by number, from 0"""
    multi_label: bool = False
    """Whether a text can be several of them at once, or none."""

    @classmethod
    def of(
        cls, examples: Iterable[TrainingExample], *, labels: Sequence[str] = (), multi_label: bool | None = None
    ) -> ClassNames:
        """The classes that rows have.

        Args:
            examples: training rows; those without a class are passed over.
            labels: the classes in their order, where the user names them; empty: those of the rows, sorted.
            multi_label: whether a row has several classes; None: where any row has a list of them.

        Raises:
            UserError: there are fewer than two classes, or far too many.
        """
        found: set[str] = set()
        lists = False
        for example in examples:
            lists = lists or isinstance(example.label, list)
            if not labels:
                found.update(classes_of(example))
                if len(found) > _MOST:
                    raise UserError(
                        f"the rows have more than {_MOST:,} classes, for example {shorten(next(iter(found)))}",
                        where="data.columns.label",
                        remedy="name the column of the class",
                    )
        several = lists if multi_label is None else multi_label
        names = tuple(labels) or tuple(sorted(found, key=_in_order))
        if len(names) < (1 if several else 2):
            raise UserError(
                f"the training rows have one class, {names[0]!r}" if names else "no training row has a class",
                where="data.columns.label",
                remedy="name the column of the class, and give rows of two classes at the least",
            )
        return cls(names, several)

    def __len__(self) -> int:
        return len(self.names)


def classes_of(example: TrainingExample) -> list[str]:
    """The names of an example's classes; empty where it has none."""
    label = example.label
    if label is None or (isinstance(label, str) and not label.strip()):
        return []
    return list(map(str, label)) if isinstance(label, list) else [str(label)]


def _in_order(name: str) -> tuple[int, float, str]:
    """Numbers by size, before other names."""
    return (0, float(name), name) if re.fullmatch(r"-?\d+(\.\d+)?", name) else (1, 0.0, name)


class ClassEncoder(Encoder):
    """Texts as a classifier reads them: the tokens of the text, and those that the tokenizer puts around every text.

    ``trained`` marks the last token of a row, which stands for its one target; ``extra`` are its classes' numbers.

    Args:
        tokenizer: any; one of a classifier needs no chat template.
        classes: what the texts can be.
        max_length: longest text in tokens; None: no limit.
        truncation: ``reject`` or ``cut`` longer ones; what the tokenizer puts at the end stays there.
        allow_special_tokens: take texts that hold control tokens, instead of refusing them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        classes: ClassNames,
        *,
        max_length: int | None = None,
        truncation: str = "reject",
        allow_special_tokens: bool = False,
    ) -> None:
        super().__init__(
            tokenizer, max_length=max_length, truncation=truncation, allow_special_tokens=allow_special_tokens
        )
        self.classes = classes

    @property
    def settings(self) -> dict[str, Any]:
        """See :attr:`Encoder.settings`."""
        return super().settings | {"names": list(self.classes.names), "multi_label": self.classes.multi_label}

    @classmethod
    def made(cls, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], *, by_words: bool) -> Self:
        """See :meth:`Encoder.made`."""
        rest = {k: v for k, v in settings.items() if k not in ("names", "multi_label")}
        return cls(tokenizer, ClassNames(tuple(settings["names"]), settings["multi_label"]), **rest)

    @cached_property
    def _numbers(self) -> Mapping[str, int]:
        return {name: number for number, name in enumerate(self.classes.names)}

    def told(self, row: EncodedExample) -> dict[str, Any]:
        """See :meth:`Encoder.told`: the names of its classes."""
        return {"classes": [self.classes.names[number] for number in row.extra]}

    def _encode(self, examples: Sequence[TrainingExample], first: int) -> Iterator[EncodedRow | Reject]:
        wrong = [self._wrong(example) for example in examples]
        texts = [example.input for example, problem in zip(examples, wrong, strict=True) if problem is None]
        found = iter(self.tokenizer(texts, truncation=False, verbose=False).input_ids if texts else [])
        for number, (example, problem) in enumerate(zip(examples, wrong, strict=True), first):
            if problem is not None:
                yield problem
                continue
            yield self._row(example, next(found), number)

    def _row(self, example: TrainingExample, ids: list[int], number: int) -> EncodedRow | Reject:
        import numpy as np

        limit, cut = self.max_length, 0
        if limit is not None and len(ids) > limit:
            if self.truncation != "cut":
                return reject(
                    example,
                    "too_long",
                    f"the text has {len(ids):,} tokens, more than the model or data.max_length={limit:,} takes",
                    "raise data.max_length if the model takes more, or set data.truncation=cut to read the beginning",
                )
            cut = len(ids) - limit
            ids = self.tokenizer(example.input, truncation=True, max_length=limit).input_ids
        classes = tuple(sorted({self._numbers[name] for name in classes_of(example)}))
        end = len(ids)
        return EncodedRow(np.array(ids, dtype=np.int32), [(end - 1, end)], example.source, number, cut, classes)

    def _wrong(self, example: TrainingExample) -> Reject | None:
        if example.messages is not None:
            return reject(
                example, "conversation", "a conversation has no one text to classify", "name the text's column"
            )
        if (unreadable := self._unreadable(example, example.input)) is not None:
            return unreadable
        names = classes_of(example)
        several = self.classes.multi_label
        if not names and not (several and isinstance(example.label, list)):
            return reject(example, "no_class", "the row has no class", "give it one, or name its column: columns.label")
        if len(names) > 1 and not several:
            return reject(
                example,
                "several_classes",
                f"the row has {len(names)} classes, where each has one",
                "give it one class, or set task.problem_type=multi_label_classification",
            )
        unknown = [name for name in names if name not in self._numbers]
        if unknown:
            shown = ", ".join(map(repr, self.classes.names[:5])) + (" …" if len(self.classes) > 5 else "")
            return reject(
                example,
                "unknown_class",
                f"the class {unknown[0]!r} is not among those to learn: {shown}",
                "mend its spelling, add training rows of it, name it in task.labels where those are named, or take "
                "the row out",
            )
        return None
