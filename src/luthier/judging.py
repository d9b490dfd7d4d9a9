"""A file, or the files of a recipe, opened to be judged: numbers, problems, and rows as the model reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from luthier.data.encode import EncodedExample, Encoder
from luthier.data.encoders import encoder_for
from luthier.data.examples import Reject, TrainingExample
from luthier.data.sources import read_examples
from luthier.data.stats import SAMPLE, Stats, measure
from luthier.data.store import ExampleStore
from luthier.data_options import Source
from luthier.errors import UserError
from luthier.recipe import Recipe, apply_overrides
from luthier.tasks import Task, get_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.data.lint import Lint

RECIPES = (".yaml", ".yml")


@dataclass(slots=True)
class Rows:
    """The rows of one part, before any of them is encoded."""

    examples: Sequence[TrainingExample] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    rows_in: int = 0
    filtered: int = 0
    """Rows that the recipe's own filters refuse."""
    formats: list[str] = field(default_factory=list)


class Subject:
    """A file, or the files of a recipe, opened for judging.

    Args:
        path: a data file, or a recipe (.yaml).
        overrides: ``key=value`` pairs laid over the recipe, or over the defaults for a file.
        columns: which column holds what, for a file.
        model: whose tokenizer and template measure; None: the recipe's.
        clean: look at the rows as data.clean leaves them.

    Raises:
        UserError: the file cannot be read, or the recipe is wrong.
    """

    def __init__(
        self,
        path: Path,
        overrides: Iterable[str] = (),
        *,
        columns: Mapping[str, str] | None = None,
        model: str | None = None,
        clean: bool = False,
    ) -> None:
        self.path = path
        self.is_recipe = path.suffix.lower() in RECIPES
        if self.is_recipe:
            if columns:
                raise UserError(
                    "--column is for files; a recipe names its columns itself", remedy="set data.columns in the recipe"
                )
            self.recipe = Recipe.load(path, overrides)
        else:
            content = {"data": {"train": str(path), "columns": dict(columns or {})}}
            self.recipe = Recipe.from_dict(apply_overrides(content, overrides))
        if model is not None:
            self.recipe.model.name = model
        data = self.recipe.data
        if not data.train:
            raise UserError("the recipe names no training data", where="data.train", remedy="name a file there")
        self.files: list[str] = []
        """Every file that is read."""
        named = {"train": data.train, "validation": data.validation, "test": data.test, "benchmarks": data.benchmarks}
        self.parts = {name: self._read(sources, clean) for name, sources in named.items() if sources}

    def _read(self, sources: Iterable[Source], clean: bool) -> Rows:
        from luthier.data.cleaning import Cleaning

        data = self.recipe.data
        store, rows = ExampleStore(), Rows()
        cleaning = Cleaning(data.clean, tokenizer=self.tokenizer) if clean and data.clean else None
        for source in sources:
            reading = read_examples(source, data.columns)
            self.files += reading.paths
            for row in reading:
                rows.rows_in += 1
                if isinstance(row, Reject):
                    rows.rejects.append(row)
                    continue
                for made in [row] if cleaning is None else cleaning.apply([row]):
                    if isinstance(made, Reject):
                        rows.filtered += 1
                    else:
                        store.append(made)
            rows.formats.append(reading.format)
        rows.examples = store
        return rows

    @property
    def train(self) -> Rows:
        return self.parts["train"]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        from luthier.models.loading import load_tokenizer

        spec = self.recipe.model
        return load_tokenizer(
            spec.name, revision=spec.revision, chat_template=spec.chat_template, chats=self.task.writes
        )

    @property
    def task(self) -> Task:
        return get_task(self.recipe.task.name)

    def encoder(self, *, allow_special_tokens: bool, limited: bool = False) -> Encoder:
        """Encodes as training would; without a limit of length unless ``limited``."""
        return encoder_for(
            self.recipe,
            self.tokenizer,
            self.train.examples,
            limited=limited,
            allow_special_tokens=allow_special_tokens,
        )


def stats_of(subject: Subject, *, sample: int | None = SAMPLE, seed: int = 0) -> dict[str, Stats]:
    """The numbers of each part.

    Args:
        subject: the file or recipe.
        sample: rows to tokenise at the most, and up to how many near copies are looked for; None: all.
        seed: of the sample.
    """
    from luthier.data.duplicates import find_copies

    encoder = subject.encoder(allow_special_tokens=True)
    found = {}
    for name, part in subject.parts.items():
        if not len(part.examples) or name == "benchmarks":
            continue
        stats = measure(part.examples, encoder, sample=sample, seed=seed)
        near = subject.recipe.data.near_threshold if sample is None or len(part.examples) <= sample else None
        copies = find_copies(part.examples, near=near)
        own = np.arange(len(part.examples))
        stats.exact_copies = int((copies.exact_first != own).sum())
        if near is not None:
            stats.near_copies = int((copies.near_first != own).sum()) - stats.exact_copies
        found[name] = stats
    return found


def rows_to_show(
    subject: Subject, *, count: int = 5, places: Sequence[str] = ()
) -> tuple[list[EncodedExample], list[Reject], Encoder]:
    """The first training rows, or those at the places named, encoded as training would; those it would refuse; and
    their encoder.

    Args:
        subject: the file or recipe.
        count: how many, where no place is named.
        places: ``FILE:LINE``; the file may be named by its last part, or left out where there is one file.

    Raises:
        UserError: there is no row at a place.
    """
    chosen: list[TrainingExample] = []
    refused: list[Reject] = []
    if not places:
        chosen = list(subject.train.examples[:count])
    for place in places:
        example, reject = _row_at(subject, place)
        chosen += [example] if example is not None else []
        refused += [reject] if reject is not None else []
    encoder = subject.encoder(allow_special_tokens=False, limited=True)
    encoded = encoder.encode(chosen)
    return encoded.examples, refused + encoded.rejects, encoder


def _row_at(subject: Subject, place: str) -> tuple[TrainingExample | None, Reject | None]:
    file, _, line = place.rpartition(":")
    if not line.isdigit():
        raise UserError(f"{place!r} is no place of a row", where="--row", remedy="write FILE:LINE, or the line alone")

    def matches(named: str, number: int) -> bool:
        return number == int(line) and (not file or named == file or Path(named).name == Path(file).name)

    for part in subject.parts.values():
        for example in part.examples:
            if example.source is not None and matches(example.source.file, example.source.line):
                return example, None
        for reject in part.rejects:
            if matches(reject.file, reject.line):
                return None, reject
    raise UserError(
        f"there is no row at {place!r}",
        where="--row",
        remedy="name the line of its first character; in .json and .parquet files, its number",
    )


def lint_of(subject: Subject, *, near: bool = True) -> Lint:
    """The problems of a file, or of a recipe's training rows and what they share with its held-out ones.

    Args:
        subject: the file or recipe.
        near: look for near copies too.
    """
    from luthier.data.lint import lint

    data = subject.recipe.data
    return lint(
        subject.train.examples,
        rejects=subject.train.rejects,
        encoder=subject.encoder(allow_special_tokens=True),
        max_length=data.max_length,
        allowed_rejects=data.max_rejected_share,
        near=data.near_threshold if near else None,
        deduplicated=data.deduplicate != "none",
        held_out={name: part.examples for name, part in subject.parts.items() if name != "train"},
    )
