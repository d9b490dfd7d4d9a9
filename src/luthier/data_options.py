"""The recipe's section of examples: where they lie, what their columns hold, and what becomes of them."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from luthier.section import Section, as_list


class Columns(Section):
    """Which column of the file holds what. Leave all empty to have the format recognised."""

    prompt: str | None = None
    """Column of the prompt or question."""
    input: str | None = None
    """Column of further input that follows the prompt (Alpaca's `input`)."""
    response: str | None = None
    """Column of the answer."""
    system: str | None = None
    """Column of the system message."""
    messages: str | None = None
    """Column of a list of turns (OpenAI's `messages`, ShareGPT's `conversations`)."""
    tools: str | None = None
    """Column of the tools' JSON schemas."""
    text: str | None = None
    """Column of plain text, all of which is trained."""
    label: str | None = None
    """Column of the class."""
    label_names: dict[str, str] | None = None
    """Names to learn in place of the classes as the column has them, for example {0: negative, 1: positive}; a list
    names 0, 1, 2 and so on."""
    references: str | None = None
    """Column of further right answers (a list), used by evaluation alone."""

    @field_validator("label_names", mode="before")
    @classmethod
    def _by_text(cls, value: Any) -> Any:
        if isinstance(value, list):
            value = dict(enumerate(value))
        if not isinstance(value, dict):
            return value
        return {json.dumps(k) if isinstance(k, bool) else str(k): v for k, v in value.items()}


class Source(Section):
    path: str
    """A file (.json, .jsonl, .ndjson, .csv, .tsv, also .gz and .zst; .parquet, .arrow, .xlsx), a folder, a glob
    (data/*.jsonl), or hub:OWNER/NAME for a Hugging Face data set."""
    columns: Columns | None = None
    """This file's own column mapping, where it differs from data.columns."""
    weight: float | None = Field(None, gt=0)
    """Share of this source among the training rows, relative to the other sources' weights; all of them have one, or
    none."""
    subset: str | None = None
    """Configuration of a hub data set, or sheet of an Excel file."""
    split: str = "train"
    """Split of a hub data set."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class Split(Section):
    """Shares taken from the training file for the parts that have no file of their own."""

    validation: float = Field(0.1, ge=0, lt=1)
    """Share of rows kept for validation where data.validation names no file."""
    test: float = Field(0.1, ge=0, lt=1)
    """Share of rows kept for the final evaluation where data.test names no file."""
    strategy: Literal["random", "stratified", "time"] = "random"
    """How rows are dealt: shuffled with the seed; shuffled so that each label keeps its share in every part; or by
    time, the oldest rows for training and the newest for the test."""
    column: str | None = None
    """The column that holds the time, or the class where it's not the label."""
    group_by: str | None = None
    """A column whose equal values stay in one part; prompt for rows that ask the same, near_duplicates for those that
    nearly say the same. Exact copies always stay in one part."""

    @model_validator(mode="after")
    def _leaves_training_rows(self) -> Split:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together leave no row to train on")
        return self


class Step(Section):
    """A cleaner or an augmenter with its options; ``name`` and ``{name: {option: value}}`` are short for it."""

    name: str
    """A built-in one's name; or your own as MODULE:FUNCTION, or FILE.py:FUNCTION from the recipe's folder."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Its arguments."""

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and len(value) == 1 and not {"name", "options"} & set(value):
            ((name, options),) = value.items()
            value = {"name": name, "options": options or {}}
        if isinstance(value, dict) and isinstance(value.get("options"), dict):
            # YAML 1.1 reads the key `on` as true.
            options = {
                "on" if key is True or key == "true" else key: option for key, option in value["options"].items()
            }
            value = {**value, "options": options}
        return value


class DataSection(Section):
    train: list[Source] = Field(default_factory=list)
    """Files to train on."""
    validation: list[Source] = Field(default_factory=list)
    """Files to validate on during training."""
    test: list[Source] = Field(default_factory=list)
    """Files for the final evaluation, never seen in training."""
    benchmarks: list[Source] = Field(default_factory=list)
    """Files that must not be trained on: training rows that are, nearly are or hold one of their rows are refused."""
    columns: Columns = Field(default_factory=Columns)
    """Which column holds what; empty: recognised."""
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """Where sources have weights: no row is taken twice and the surplus of some is set aside, or every row is taken and
    those of some are repeated."""
    clean: list[Step] = Field(default_factory=list)
    """Cleaners, in their order (docs/steps.md lists them)."""
    deduplicate: Literal["none", "exact", "near"] = "none"
    """Refuse rows that repeat an earlier one word for word, or nearly."""
    near_threshold: float = Field(0.8, gt=0, le=1)
    """From which similarity (Jaccard, of word n-grams) two rows are nearly the same."""
    augment: list[Step] = Field(default_factory=list)
    """Augmenters; each variant is made by one of them, of training rows alone, after the split."""
    augment_ratio: float = Field(0.1, ge=0)
    """Variants to make, as a share of the training rows."""
    split: Split = Field(default_factory=Split)
    """Shares for the parts without a file of their own."""
    system: str | None = None
    """A system message for every row that has none."""
    train_on: Literal["answers", "last_answer", "all"] = "answers"
    """Which tokens are trained: every assistant turn, the last one alone, or the whole text."""
    max_length: int | None = Field(2048, ge=8)
    """Longest example, in tokens."""
    truncation: Literal["reject", "cut", "split"] = "reject"
    """What happens to longer ones: refused and listed; cut at max_length (the answer's end is lost); or, for plain
    text alone, split into pieces of max_length."""
    special_tokens_in_text: Literal["reject", "allow"] = "reject"
    """What happens to rows whose text holds the model's control tokens (such as <|im_end|>), which would be read as
    control."""
    on_error: Literal["reject", "raise"] = "reject"
    """A bad row is refused, counted and listed in rejects.jsonl; or stops the run."""
    max_rejected_share: float = Field(0.01, ge=0, le=1)
    """A larger share of refused rows stops the run (one row is always allowed)."""
    shuffle: bool = True
    """Train in a new seeded order each epoch; false: in the file's order."""
    max_examples: int | None = Field(None, ge=1)
    """Train on the first so many rows after shuffling: to try a small slice before the whole."""

    cache: bool = True
    """Keep the encoded rows on disk, where the next run with the same rows, tokenizer and template finds them."""
    num_proc: int | None = Field(None, ge=1)
    """Processes that encode; empty: one a core, where there are rows enough."""

    _listed = field_validator("train", "validation", "test", "benchmarks", "clean", "augment", mode="before")(as_list)
