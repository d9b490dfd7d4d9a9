"""New files from a file's rows: converted, cleaned, augmented or split. The file itself is never changed."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.convert import convert
from luthier.data.examples import Reject, TrainingExample
from luthier.data.store import Chosen, ExampleStore, Joined
from luthier.data.writers import writable_kind, write_records
from luthier.data_options import Step
from luthier.errors import UserError
from luthier.judging import Subject

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(slots=True)
class Outcome:
    """What was written, and how it went."""

    files: dict[str, int] = field(default_factory=dict)
    """Rows by file."""
    notes: list[str] = field(default_factory=list)
    shown: RenderableType | None = None
    """The steps' own account, for a terminal."""
    details: Any = None
    """The same for JSON."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"files": self.files, "notes": self.notes, "details": self.details}


def steps_from(texts: Sequence[str]) -> list[Step]:
    """Steps as the command line names them: ``name``, or YAML as in a recipe: ``{name: {option: value}}``.

    Raises:
        UserError: one is neither.
    """
    import yaml
    from pydantic import ValidationError

    steps = []
    for text in texts:
        try:
            steps.append(Step.model_validate(yaml.safe_load(text)))
        except (yaml.YAMLError, ValidationError):
            raise UserError(
                f"{text!r} is no step", where="--step", remedy="write its name, or '{name: {option: value}}'"
            ) from None
    return steps


def output_beside(subject: Subject, word: str, folder: Path | None = None) -> Path:
    """Where a verb writes by default: beside what it read, with a word in the name, as JSONL."""
    path = subject.path
    if not path.exists():
        # A pattern: beside the first folder that it does not leave open. The files are its name without the signs.
        while glob.has_magic(str(path.parent)):
            path = path.parent
    name = re.sub(r"[*?\[\]]", "", path.name.removeprefix(".").partition(".")[0]) or "rows"
    # Beside a folder, not in it, where a later reading would take the file in.
    return (folder if folder is not None else path.parent) / f"{name}.{word}.jsonl"


def _ready(subject: Subject, *paths: Path, force: bool) -> None:
    """Whether these files can be written.

    Raises:
        UserError: one is of no known kind, exists, or is one of those that are read.
    """
    read = {Path(file).resolve() for file in subject.files}
    for path in paths:
        if path.resolve() in read:
            raise UserError(
                f"{str(path)!r} is one of the files that are read", where=str(path), remedy="name another to write"
            )
        writable_kind(path, force=force)


def convert_rows(subject: Subject, output: Path, to: str, *, force: bool = False, lossy: bool = False) -> Outcome:
    """Write a file's rows, or a recipe's training rows, in another format.

    Raises:
        UserError: a row cannot be held, or was refused on reading and would be lost.
    """
    train = subject.train
    if train.rejects and not lossy:
        first = train.rejects[0]
        raise UserError(
            f"{len(train.rejects):,} of {train.rows_in:,} rows cannot be read and would be lost: {first.message}",
            where=f"{first.file}:{first.line}",
            remedy="mend them, or leave them out with --lossy",
        )
    _ready(subject, output, force=force)
    done = convert(train.examples, output, to, force=force, lossy=lossy)
    outcome = Outcome({str(output): done.rows}, [f"format {done.format}, read back and compared row by row"])
    if done.changed:
        outcome.notes.append(f"metadata of {done.changed:,} rows changed; first: {done.first_change}")
    if train.rejects:
        outcome.notes.append(f"{len(train.rejects):,} rows could not be read and are left out")
    return outcome


def clean_rows(
    subject: Subject, output: Path | None = None, *, steps: Sequence[Step] = (), force: bool = False
) -> Outcome:
    """Clean a file's rows, or a recipe's training rows, and take copies out where data.deduplicate says so.

    Args:
        subject: the file or recipe.
        output: the file to write; refused rows go into a file beside it.
        steps: cleaners; none: the recipe's.
        force: replace existing files.

    Raises:
        UserError: there is nothing to do, a step is unknown, or no row is left.
    """
    from luthier.data.cleaning import Cleaning, render_cleaning
    from luthier.data.duplicates import deduplicated

    data = subject.recipe.data
    chosen = list(steps) or data.clean
    if not chosen and data.deduplicate == "none":
        raise UserError(
            "no cleaner is named",
            where="--step",
            remedy="for example --step fix_mojibake --step normalize_whitespace, or --deduplicate exact",
        )
    output = output or output_beside(subject, "cleaned")
    rejected = _beside(output, "rejects")
    _ready(subject, output, rejected, force=force)
    cleaning = Cleaning(chosen, tokenizer=subject.tokenizer if _count_tokens(chosen) else None)
    rejects, kept = list(subject.train.rejects), ExampleStore()
    for made in cleaning.apply(subject.train.examples):
        if isinstance(made, Reject):
            rejects.append(made)
        else:
            kept.append(made)
    indices, copies = deduplicated(kept, data.deduplicate, data.near_threshold)
    rejects += copies
    outcome = _written({output: Chosen(kept, indices)}, force)
    if rejects:
        _write_rejects(rejected, rejects, outcome, force)
    if copies:
        outcome.notes.append(f"{len(copies):,} rows repeat another one")
    outcome.details = [step.as_dict() for step in cleaning.report()]
    outcome.shown = render_cleaning(cleaning.report()) if chosen else None
    return outcome


def _count_tokens(steps: Sequence[Step]) -> bool:
    """Whether a step may ask the tokenizer, which takes seconds to load."""
    return any("truncate" in step.name or step.options.get("unit") == "tokens" for step in steps)


def augment_rows(
    subject: Subject,
    output: Path | None = None,
    *,
    steps: Sequence[Step] = (),
    ratio: float | None = None,
    seed: int | None = None,
    force: bool = False,
) -> Outcome:
    """Write a file's rows, or a recipe's training rows, followed by variants of them.

    Args:
        subject: the file or recipe.
        output: the file to write.
        steps: augmenters; none: the recipe's.
        ratio: variants, as a share of the rows; None: the recipe's.
        seed: of chance; None: the recipe's.
        force: replace an existing file.

    Raises:
        UserError: a step is unknown or fails.
    """
    from luthier.data.augmentation import Augmentation, render_augmentation
    from luthier.evaluation.answering import local_answerer

    recipe = subject.recipe
    output = output or output_beside(subject, "augmented")
    _ready(subject, output, force=force)
    augmentation = Augmentation(
        list(steps) or recipe.data.augment,
        recipe.data.augment_ratio if ratio is None else ratio,
        recipe.seed if seed is None else seed,
        local=local_answerer,
    )
    rows = subject.train.examples
    variants = ExampleStore(augmentation.apply(rows))
    outcome = _written({output: Joined(rows, variants)}, force)
    outcome.notes.append(f"{len(rows):,} rows and {len(variants):,} variants, which say so in their metadata")
    outcome.details = augmentation.report().to_dict()
    outcome.shown = render_augmentation(augmentation.report())
    return outcome


def generate_rows(
    subject: Subject,
    model: str,
    count: int,
    output: Path | None = None,
    *,
    base_url: str | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int | None = None,
    force: bool = False,
) -> Outcome:
    """Write new examples that a model makes after being shown some of a file's (self-instruct).

    Args:
        subject: the file or recipe; its rows are the seeds.
        model: the model's name at the endpoint; without one, a local model: embedded name, folder, GGUF file or hub id.
        count: how many examples to make.
        output: the file to write.
        base_url: the endpoint, up to and with ``/v1``.
        options: of :class:`luthier.endpoint.Endpoint`.
        seed: of chance; None: the recipe's.
        force: replace an existing file.

    Raises:
        UserError: no row can be a seed, the model cannot be asked, or nothing that it wrote can be kept.
    """
    from luthier.data.augmentation import self_instruct
    from luthier.endpoint import Endpoint
    from luthier.evaluation.answering import local_answerer

    output = output or output_beside(subject, "generated")
    _ready(subject, output, force=force)
    answerer = local_answerer(model) if base_url is None else Endpoint(base_url, model, **(options or {}))
    seed = subject.recipe.seed if seed is None else seed
    made = self_instruct(subject.train.examples, answerer, count, seed=seed)
    if not made.examples:
        reasons = ", ".join(f"{reason} {n}" for reason, n in made.refused.most_common()) or "; ".join(made.failed[:3])
        raise UserError(
            f"nothing that the model wrote can be kept: {reasons}", where=model, remedy="name a more able model"
        )
    outcome = _written({output: made.examples}, force)
    outcome.notes.append(f"{len(made.examples):,} new examples of {count:,} asked for, by {made.requests:,} requests")
    outcome.notes += [f"  {n:,} refused: {reason}" for reason, n in made.refused.most_common()]
    outcome.notes += [f"  a request failed: {why}" for why in made.failed[:3]]
    outcome.details = made.to_dict()
    return outcome


def split_rows(subject: Subject, folder: Path | None = None, *, force: bool = False) -> Outcome:
    """Deal a file's rows to three files, as data.split says.

    Raises:
        UserError: the split cannot be made, or a file exists.
    """
    from luthier.data.split import split_indices

    data, rows = subject.recipe.data, subject.train.examples
    split = data.split
    result = split_indices(
        rows,
        validation=split.validation,
        test=split.test,
        strategy=split.strategy,
        column=split.column,
        group_by=split.group_by,
        seed=subject.recipe.seed,
        near_threshold=data.near_threshold,
    )
    names = ("train", "validation", "test")
    parts: dict[Path, Sequence[TrainingExample]] = {
        output_beside(subject, name, folder): Chosen(rows, indices)
        for name, indices in zip(names, result.parts, strict=True)
        if len(indices)
    }
    outcome = _written(parts, force)
    outcome.notes += result.notes
    if subject.train.rejects:
        path = output_beside(subject, "rejects", folder)
        _write_rejects(path, subject.train.rejects, outcome, force)
    return outcome


def _beside(output: Path, word: str) -> Path:
    return output.with_name(f"{output.name.partition('.')[0]}.{word}.jsonl")


def _written(parts: dict[Path, Sequence[TrainingExample]], force: bool) -> Outcome:
    """Write each part in the simplest format that holds all of them; nothing is written if one cannot be."""
    from luthier.data.convert import simplest_format

    for path in parts:
        writable_kind(path, force=force)
    if not any(len(rows) for rows in parts.values()):
        raise UserError("no row is left to write", remedy="use gentler steps; each refused row says why")
    to = simplest_format(itertools.chain.from_iterable(parts.values()))
    outcome = Outcome()
    for path, rows in parts.items():
        convert(rows, path, to, force=force)
        outcome.files[str(path)] = len(rows)
    return outcome


def _write_rejects(path: Path, rejects: Sequence[Reject], outcome: Outcome, force: bool) -> None:
    write_records(path, [asdict(reject) for reject in rejects], force=force)
    outcome.files[str(path)] = len(rejects)
    outcome.notes.append(f"{len(rejects):,} rows are refused; {path} says why")
