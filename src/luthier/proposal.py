"""What ``luthier init`` writes: a commented recipe that fits a file of examples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml

from luthier.data.chats import ChatEncoder
from luthier.data.columns import Proposal, propose
from luthier.data.examples import Reject, TrainingExample
from luthier.data.render import Renderer
from luthier.data.sources import open_source, read_examples
from luthier.data.store import Chosen, ExampleStore
from luthier.data_options import Columns, Source
from luthier.errors import UserError
from luthier.methods import METHODS, get_method
from luthier.models.loading import load_tokenizer

_MEASURED = 2_000
# Rows to validate on, and to test on, are about so many at most.
_HELD_OUT = 300


@dataclass(frozen=True, slots=True)
class RecipeProposal:
    """A recipe as text, and what was seen in the file, line by line."""

    text: str
    seen: list[str]


def propose_recipe(data: Path, *, model: str, method: str, recipe_dir: Path) -> RecipeProposal:
    """Look at a file and propose its column mapping, lengths and amount of training.

    Args:
        data: the file of examples.
        model: embedded name, folder, GGUF file or hub id; its tokenizer measures the rows.
        method: name of a tuning method.
        recipe_dir: the folder the recipe will stand in; the data's path is written relative to it.

    Raises:
        UserError: the file cannot be read, no row of it can be understood, or model or method are unknown.
    """
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}", where="--method", remedy=f"known: {', '.join(METHODS)}")
    files = open_source(Source(path=str(data)))[0]
    found = propose(files[0].path)
    if len(files) > 1:
        # Each file is recognised on its own.
        found = replace(found, columns=Columns(), notes=[f"{len(files):,} files; the first is {files[0].path}"])
    examples, rejects = ExampleStore(), []
    for row in read_examples(str(data), found.columns):
        if isinstance(row, Reject):
            rejects.append(row)
        else:
            examples.append(row)
    rows = len(examples)
    if not rows:
        first = rejects[0] if rejects else None
        raise UserError(
            f"no row of {str(data)!r} can be trained on ({len(rejects):,} read)",
            where=f"{first.file}:{first.line}" if first else None,
            remedy=f"{first.message}; {first.remedy or 'mend the rows'}" if first else "put rows into it",
        )
    lengths, longest = _lengths(examples, model)
    max_length = max(64, -(-longest // 64) * 64)
    seen = [
        f"{data}: {rows + len(rejects):,} rows, format {found.format}, {found.encoding}",
        f"  {rows:,} rows understood, {len(rejects):,} refused",
        *(f"  {reject.file}:{reject.line}: {reject.message}" for reject in rejects[:5]),
        *(f"  {note}" for note in found.notes),
    ]
    if len(lengths):
        middle, most = np.percentile(lengths, [50, 99]).astype(int)
        seen.append(f"  tokens a row: {middle} in the middle, {most} at 99%, {longest} the longest")
    return RecipeProposal(_text(data, found, model, method, recipe_dir, rows, max_length), seen)


def _lengths(examples: Sequence[TrainingExample], model: str) -> tuple[np.ndarray, int]:
    """Tokens of rows taken evenly over all sizes, and of the longest row."""
    encoder = ChatEncoder(Renderer(load_tokenizer(model), allow_special_tokens=True))
    by_size = np.argsort([len(e.to_causal_lm_format()) for e in examples], kind="stable")
    # Up to some thousands every row is measured; of more, an even sample, and those with the most characters.
    even = by_size[:: max(1, -(-2 * len(by_size) // _MEASURED))] if len(by_size) > _MEASURED else by_size
    largest = by_size[-_MEASURED // 2 :] if len(by_size) > _MEASURED else by_size[:0]
    lengths, extreme = (
        np.array([len(e) for e in encoder.encode(Chosen(examples, rows)).examples]) for rows in (even, largest)
    )
    return lengths, int(max([*lengths, *extreme], default=2048))


def _text(data: Path, found: Proposal, model: str, method: str, recipe_dir: Path, rows: int, max_length: int) -> str:
    chosen = get_method(method)
    # Many rows teach in one pass; a few hundred want three (the field's rule of 1 to 3 epochs).
    epochs = 3 if rows < 5_000 else 2 if rows < 20_000 else 1
    # A tenth of a small file; of a large one no more than a loss needs, for every validation reads them all.
    share = float(f"{min(0.1, _HELD_OUT / max(rows, 1)):.1g}")
    columns = {k: v for k, v in found.columns.model_dump().items() if v is not None}
    path = os.path.relpath(data.absolute(), recipe_dir.absolute())
    lines = [
        f"# Written by `luthier init {data}`. Every key and its default: docs/recipe.md.",
        "model:",
        f"  name: {_scalar(model)}  # embedded name (`luthier models`), local folder, GGUF file or hub id",
        "",
        *(
            ["# task: classification  # a class for each text, in the place of an answer in words", ""]
            if found.columns.label and not found.columns.response
            else []
        ),
        "data:",
        f"  train: {_scalar(path)}  # {rows:,} rows, format {found.format}",
        *(
            ["  columns:  # which column holds what", *(f"    {k}: {_scalar(str(v))}" for k, v in columns.items())]
            if columns
            else ["  # columns: {prompt: …, response: …} where the format is not recognised"]
        ),
        f"  split: {{validation: {share:g}, test: {share:g}}}  # kept from training; or data.validation, data.test",
        f"  max_length: {max_length}  # tokens; no row of this file is longer",
        "  # truncation: reject  # longer rows are refused and listed; cut loses an answer's end",
        "  # system: You are …  # a system message for rows without one",
        "",
        "method:",
        f"  name: {method}",
    ]
    if method == "lora":
        lines += ["  r: 8  # rank: more for harder tasks, 4 to 16", "  lora_alpha: 32", "  lora_dropout: 0.05"]
    low, high = chosen.advice.learning_rate
    lines += [
        "",
        "training:",
        f"  num_train_epochs: {epochs}",
        "  per_device_train_batch_size: 8",
        f"  learning_rate: {_number(chosen.learning_rate)}  # {_number(low)} to {_number(high)} usually works",
        "  # early_stopping_patience: 3  # stop after so many validations without a better loss",
        "",
        "evaluation:",
        "  max_examples: 100  # held-out rows that base and tuned answer after training",
        "",
        f"output_dir: runs/{data.stem}-{method}  # starts at the folder where luthier runs",
        "seed: 42",
    ]
    return "\n".join(lines) + "\n"


def _scalar(value: str) -> str:
    """A text as YAML writes it."""
    return yaml.safe_dump(value, allow_unicode=True, width=10_000).strip().removesuffix("...").strip()


def _number(value: float) -> str:
    """A number that YAML 1.1 reads as one (`2e-4` would be text)."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"
