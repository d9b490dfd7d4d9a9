"""A recipe's data section, done: files read, split, encoded, and every row accounted for."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.data.encode import EncodedExample, Encoder
from luthier.data.examples import Reject, TrainingExample
from luthier.data.loader import load_file
from luthier.data.render import Renderer
from luthier.data.split import split_examples
from luthier.errors import UserError
from luthier.recipe import Recipe, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTS = ("train", "validation", "test")


@dataclass(slots=True)
class Part:
    """The training, validation or test rows. ``rows_in`` counts rows met: those kept, refused and set aside."""

    name: str
    examples: list[TrainingExample] = field(default_factory=list)
    encoded: list[EncodedExample] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    rows_in: int = 0
    set_aside: int = 0
    """Rows left out because of data.max_examples."""

    @property
    def tokens(self) -> int:
        return sum(len(e) for e in self.encoded)

    @property
    def trained_tokens(self) -> int:
        return int(sum(e.trained.sum() for e in self.encoded))

    def summary(self) -> dict[str, Any]:
        """Counts for the manifest."""
        return {
            "rows_in": self.rows_in,
            "kept": len(self.examples),
            "refused": len(self.rejects),
            "refused_by_reason": dict(Counter(r.reason for r in self.rejects)),
            "set_aside": self.set_aside,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
        }


@dataclass(slots=True)
class Dataset:
    """All the rows of a run."""

    train: Part
    validation: Part
    test: Part
    renderer: Renderer
    files: list[str]

    @property
    def parts(self) -> tuple[Part, Part, Part]:
        return self.train, self.validation, self.test

    @property
    def rejects(self) -> list[Reject]:
        return [reject for part in self.parts for reject in part.rejects]


def prepare(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int | None = None,
    given: Mapping[str, Sequence[TrainingExample]] | None = None,
) -> Dataset:
    """Read, split and encode the rows of a recipe.

    Args:
        recipe: its data section and seed.
        tokenizer: with the chat template to render by.
        context: longest input the model takes, in tokens; the smaller of it and data.max_length holds.
        given: rows by part ("train", "validation", "test") that come from Python instead of files; they are not
            split further.

    Returns:
        rows by part, where ``rows_in == kept + refused + set_aside`` for each.

    Raises:
        UserError: no data is named, a file cannot be read, or a row is bad and data.on_error is ``raise``.
    """
    data = recipe.data
    parts = {name: Part(name) for name in PARTS}
    if given is not None:
        for name, examples in given.items():
            parts[name].examples = [TrainingExample.from_any(e) for e in examples]
            parts[name].rows_in = len(examples)
        files: list[str] = []
    else:
        files = _read(recipe, parts)
    if data.max_examples is not None and len(parts["train"].examples) > data.max_examples:
        train = parts["train"]
        order = list(range(len(train.examples)))
        random.Random(recipe.seed).shuffle(order)
        train.set_aside = len(train.examples) - data.max_examples
        train.examples = [train.examples[i] for i in order[: data.max_examples]]
    renderer = Renderer(
        tokenizer,
        system=data.system,
        train_on=data.train_on,
        allow_special_tokens=data.special_tokens_in_text == "allow",
    )
    limits = [n for n in (data.max_length, context) if n is not None]
    encoder = Encoder(renderer, max_length=min(limits, default=None), truncation=data.truncation)
    for part in parts.values():
        _encode(part, encoder)
        if part.rejects and data.on_error == "raise":
            first = part.rejects[0]
            raise UserError(first.message, where=f"{first.file}:{first.line}", remedy=first.remedy)
        assert part.rows_in == len(part.examples) + len(part.rejects) + part.set_aside, part.name
    return Dataset(parts["train"], parts["validation"], parts["test"], renderer, files)


def _read(recipe: Recipe, parts: dict[str, Part]) -> list[str]:
    """Fill the parts from their files; parts without a file get their share of the training rows."""
    data = recipe.data
    if not data.train:
        raise UserError(
            "the recipe names no training data", where="data.train", remedy="name a file, or run `luthier init DATA`"
        )
    sources: dict[str, list[Source]] = {"train": data.train, "validation": data.validation, "test": data.test}
    for name, part in parts.items():
        for source in sources[name]:
            loaded = load_file(source.path, source.columns or data.columns)
            part.examples += loaded.examples
            part.rejects += loaded.rejects
            part.rows_in += loaded.rows_in
    shares = {
        "validation": 0.0 if data.validation else data.split.validation,
        "test": 0.0 if data.test else data.split.test,
    }
    train = parts["train"]
    if any(shares.values()) and train.examples:
        kept, validation, test = split_examples(
            train.examples, 1 - shares["validation"] - shares["test"], shares["validation"], seed=recipe.seed
        )
        if not shares["test"] and test:
            # The shares add up to one; what rounding leaves over belongs to training.
            kept, test = kept + test, []
        for name, rows in (("validation", validation), ("test", test)):
            if shares[name]:
                parts[name].examples = rows
                parts[name].rows_in = len(rows)
                train.rows_in -= len(rows)
        train.examples = kept
    return [source.path for name in PARTS for source in sources[name]]


def _encode(part: Part, encoder: Encoder) -> None:
    encoded = encoder.encode(part.examples)
    kept = sorted({e.index for e in encoded.examples})
    renumbered = {old: new for new, old in enumerate(kept)}
    for row in encoded.examples:
        row.index = renumbered[row.index]
    part.examples = [part.examples[i] for i in kept]
    part.encoded = encoded.examples
    part.rejects += encoded.rejects
