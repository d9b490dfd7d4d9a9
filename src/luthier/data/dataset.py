"""A recipe's data section, done: sources read, cleaned, split, augmented and encoded, and every row accounted for."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.data.chats import ChatEncoder
from luthier.data.classes import ClassEncoder, ClassNames
from luthier.data.cleaning import Cleaning
from luthier.data.duplicates import deduplicated
from luthier.data.encode import EncodedExample, Encoder
from luthier.data.encoded import encode_rows, lengths_of, trained_of
from luthier.data.encoders import encoder_for
from luthier.data.examples import Reject, TrainingExample
from luthier.data.leakage import decontaminated
from luthier.data.masked import MaskEncoder, Masking
from luthier.data.mixing import mix
from luthier.data.pairs import PairEncoder
from luthier.data.render import Renderer
from luthier.data.sources import read_examples
from luthier.data.split import split_indices
from luthier.data.store import Chosen, ExampleStore, Joined
from luthier.data_options import Source
from luthier.errors import UserError
from luthier.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.endpoint import Answerer

PARTS = ("train", "validation", "test")


@dataclass(slots=True)
class Part:
    """The training, validation or test rows.

    Of the rows met, and those made, each is kept, refused or set aside:
    ``rows_in + repeated + augmented == len(examples) + len(rejects) + len(sifted) + set_aside``.
    """

    name: str
    examples: Sequence[TrainingExample] = ()
    encoded: Sequence[EncodedExample] = ()
    rejects: list[Reject] = field(default_factory=list)
    sifted: list[Reject] = field(default_factory=list)
    """Refused because the recipe asks for it: copies, rows of benchmarks, what filters find. Listed with the others,
    and no loss that a run is stopped for."""
    rows_in: int = 0
    repeated: int = 0
    """Further times that rows are taken, for their source's weight."""
    augmented: int = 0
    """Variants made of rows."""
    set_aside: int = 0
    """Rows left out for the sake of the sources' weights, or because of data.max_examples."""

    @property
    def tokens(self) -> int:
        return int(lengths_of(self.encoded).sum())

    @property
    def trained_tokens(self) -> int:
        return trained_of(self.encoded)

    def summary(self) -> dict[str, Any]:
        """Counts for the manifest."""
        return {
            "rows_in": self.rows_in,
            "repeated": self.repeated,
            "augmented": self.augmented,
            "kept": len(self.examples),
            "refused": len(self.rejects) + len(self.sifted),
            "refused_by_reason": dict(Counter(r.reason for r in [*self.rejects, *self.sifted])),
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
    tokenizer: PreTrainedTokenizerBase
    system: str | None
    """The system message of conversations that have none."""
    encoder: Encoder
    """What turned the rows into token ids."""
    files: list[str]
    notes: list[str] = field(default_factory=list)
    """What was done to the rows, a line each."""

    @property
    def renderer(self) -> Renderer | None:
        """None where no chat template renders the rows."""
        return self.encoder.renderer if isinstance(self.encoder, ChatEncoder) else None

    @property
    def classes(self) -> ClassNames | None:
        """What texts are classified as; None where they aren't."""
        return self.encoder.classes if isinstance(self.encoder, ClassEncoder) else None

    @property
    def masking(self) -> Masking | None:
        """How words are hidden; None where none are."""
        return self.encoder.masking if isinstance(self.encoder, MaskEncoder) else None

    @property
    def pairs(self) -> PairEncoder | None:
        """How sources and targets are encoded; None where rows are no pairs."""
        return self.encoder if isinstance(self.encoder, PairEncoder) else None

    @property
    def parts(self) -> tuple[Part, Part, Part]:
        return self.train, self.validation, self.test

    @property
    def rejects(self) -> list[Reject]:
        return [reject for part in self.parts for reject in [*part.rejects, *part.sifted]]


def prepare(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int | None = None,
    given: Mapping[str, Sequence[TrainingExample]] | None = None,
    local: Callable[[str], Answerer] | None = None,
    classes: ClassNames | None = None,
) -> Dataset:
    """Read, clean, split, augment and encode the rows of a recipe.

    Args:
        recipe: its data section and seed.
        tokenizer: with the chat template to render by.
        context: longest input the model takes, in tokens; the smaller of it and data.max_length holds.
        given: rows by part ("train", "validation", "test") that come from Python instead of files; they are not
            split further.
        local: makes a model of augmenters that name a local folder.
        classes: those of a model that has been trained; None: the training rows'.

    Returns:
        rows by part; see :class:`Part` for how they add up.

    Raises:
        UserError: no data is named, a file cannot be read, or a row is bad and data.on_error is ``raise``.
    """
    data = recipe.data
    parts = {name: Part(name) for name in PARTS}
    notes: list[str] = []
    files: list[str] = []
    cleaning = Cleaning(data.clean, tokenizer=tokenizer) if data.clean else None
    if given is not None:
        for name, examples in given.items():
            made = (TrainingExample.from_any(e) for e in examples)
            parts[name].rows_in = len(examples)
            _take(parts[name], made if cleaning is None else cleaning.apply(made), recipe)
    else:
        files = _read(recipe, parts, cleaning, notes)
    if cleaning is not None:
        for step in cleaning.report():
            notes.append(f"{step.name}: {step.changed:,} of {step.rows:,} rows changed, {step.refused:,} refused")
    _augment(recipe, parts["train"], notes, local)
    encoder = encoder_for(recipe, tokenizer, parts["train"].examples, context=context, classes=classes)
    for part in parts.values():
        _encode(part, encoder, recipe)
    return Dataset(
        **parts,
        tokenizer=tokenizer,
        system=data.system,
        encoder=encoder,
        files=files,
        notes=notes,
    )


def _read(recipe: Recipe, parts: dict[str, Part], cleaning: Cleaning | None, notes: list[str]) -> list[str]:
    """Fill the parts from their sources; parts without any get their share of the training rows."""
    data = recipe.data
    if not data.train:
        raise UserError(
            "the recipe names no training data", where="data.train", remedy="name a file, or run `luthier init DATA`"
        )
    sources: dict[str, list[Source]] = {"train": data.train, "validation": data.validation, "test": data.test}
    origins: list[int] = []  # how many rows of training come from each source
    files: list[str] = []
    for name, part in parts.items():
        part.examples = ExampleStore()
        for source in sources[name]:
            before = len(part.examples)
            reading = read_examples(source, data.columns)
            rows = _counted(reading, part)
            _take(part, rows if cleaning is None else cleaning.apply(rows), recipe)
            files += reading.paths
            if name == "train":
                origins.append(len(part.examples) - before)
            if reading.left_out:
                notes.append(f"{source.path}: not read: {_few(reading.left_out)}")
    train = parts["train"]
    origin = np.repeat(np.arange(len(origins)), origins)
    origin = origin[_sieve(recipe, train, notes)]
    if train.examples:
        origin = origin[_split(recipe, parts, notes)]
    _mix(recipe, train, origin, notes)
    return files


def _counted(rows: Iterable[TrainingExample | Reject], part: Part) -> Iterator[TrainingExample]:
    """The examples of a source; its rejects go to the part."""
    for row in rows:
        part.rows_in += 1
        if isinstance(row, Reject):
            part.rejects.append(row)
        else:
            yield row


def _take(part: Part, rows: Iterable[TrainingExample | Reject], recipe: Recipe) -> None:
    """Put rows into the part's store."""
    store = part.examples if isinstance(part.examples, ExampleStore) else ExampleStore()
    for row in rows:
        if isinstance(row, Reject):
            # A filter does what it is there for; a cleaner that leaves nothing of a text does not.
            (part.rejects if row.reason == "emptied" else part.sifted).append(row)
        else:
            store.append(row)
        _stop_at_reject(part, recipe)
    _stop_at_reject(part, recipe)
    part.examples = store


def _stop_at_reject(part: Part, recipe: Recipe) -> None:
    if part.rejects and recipe.data.on_error == "raise":
        first = part.rejects[0]
        raise UserError(first.message, where=f"{first.file}:{first.line}", remedy=first.remedy)


def _sieve(recipe: Recipe, train: Part, notes: list[str]) -> np.ndarray:
    """Refuse rows of benchmarks and copies; returns the numbers of those that stay."""
    data = recipe.data
    stay = np.arange(len(train.examples))
    if data.benchmarks:
        benchmark = ExampleStore()
        for source in data.benchmarks:
            for row in read_examples(source):
                if isinstance(row, TrainingExample):
                    benchmark.append(row)
        kept, rejects = decontaminated(train.examples, benchmark, data.near_threshold)
        train.examples, train.sifted = Chosen(train.examples, kept), train.sifted + rejects
        stay = stay[kept]
        notes.append(f"{len(rejects):,} training rows hold a row of data.benchmarks and are refused")
    if data.deduplicate != "none":
        kept, rejects = deduplicated(train.examples, data.deduplicate, data.near_threshold)
        train.examples, train.sifted = Chosen(train.examples, kept), train.sifted + rejects
        stay = stay[kept]
        notes.append(f"{len(rejects):,} training rows repeat an earlier one and are refused ({data.deduplicate})")
    return stay


def _split(recipe: Recipe, parts: dict[str, Part], notes: list[str]) -> np.ndarray:
    """Give the parts without a file their share; returns the numbers of the rows that stay with training."""
    data, train = recipe.data, parts["train"]
    shares = {
        "validation": 0.0 if data.validation else data.split.validation,
        "test": 0.0 if data.test else data.split.test,
    }
    if not any(shares.values()):
        return np.arange(len(train.examples))
    made = split_indices(
        train.examples,
        **shares,
        strategy=data.split.strategy,
        column=data.split.column,
        group_by=data.split.group_by,
        seed=recipe.seed,
        near_threshold=data.near_threshold,
    )
    notes += made.notes
    for name, numbers in (("validation", made.validation), ("test", made.test)):
        if shares[name]:
            parts[name].examples = Chosen(train.examples, numbers)
            parts[name].rows_in = len(numbers)
            train.rows_in -= len(numbers)
    train.examples = Chosen(train.examples, made.train)
    return made.train


def _mix(recipe: Recipe, train: Part, origin: np.ndarray, notes: list[str]) -> None:
    """Take of each source what its weight says, and no more than data.max_examples in all."""
    data = recipe.data
    weights = [source.weight for source in data.train]
    if any(weight is not None for weight in weights):
        counts = [int((origin == number).sum()) for number in range(len(weights))]
        taken = mix(counts, weights, data.stopping_strategy, recipe.seed)
        rows = [np.flatnonzero(origin == number)[chosen] for number, chosen in enumerate(taken)]
        for source, chosen, count in zip(data.train, rows, counts, strict=True):
            notes.append(f"{source.path}: {len(chosen):,} rows taken of {count:,}, for its weight {source.weight:g}")
        numbers = np.sort(np.concatenate(rows))
        train.set_aside += len(train.examples) - len(np.unique(numbers))
        train.repeated += len(numbers) - len(np.unique(numbers))
        train.examples = Chosen(train.examples, numbers)
    if data.max_examples is not None and len(train.examples) > data.max_examples:
        order = list(range(len(train.examples)))
        random.Random(recipe.seed).shuffle(order)
        train.set_aside += len(train.examples) - data.max_examples
        train.examples = Chosen(train.examples, np.array(order[: data.max_examples]))


def _augment(recipe: Recipe, train: Part, notes: list[str], local: Callable[[str], Answerer] | None = None) -> None:
    """Add variants of training rows: of none that is held out."""
    data = recipe.data
    if not data.augment or not data.augment_ratio:
        return
    from luthier.data.augmentation import Augmentation

    augmentation = Augmentation(data.augment, data.augment_ratio, seed=recipe.seed, local=local)
    variants = ExampleStore(augmentation.apply(train.examples))
    train.examples = Joined(train.examples, variants)
    train.augmented = len(variants)
    report = augmentation.report()
    notes.append(f"{train.augmented:,} variants of training rows made of {report.wanted:,} asked for")
    for step in report.steps:
        refused = f", {step.refused.total():,} refused" if step.refused else ""
        notes.append(f"  {step.name}: {step.made:,} made, {step.unchanged:,} rows without anything to vary{refused}")


def _encode(part: Part, encoder: Encoder, recipe: Recipe) -> None:
    rows = encode_rows(encoder, part.examples, cache=recipe.data.cache, processes=recipe.data.num_proc)
    part.examples, part.rejects = Chosen(part.examples, rows.kept), part.rejects + rows.rejects
    _stop_at_reject(part, recipe)
    part.encoded = rows
    made = part.rows_in + part.repeated + part.augmented
    assert made == len(part.examples) + len(part.rejects) + len(part.sifted) + part.set_aside, part.name


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
