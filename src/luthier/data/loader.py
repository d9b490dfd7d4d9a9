"""Files to examples: `load_file` for recipes, `DatasetLoader` for Python."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from luthier.data.examples import Message, Reject, TaskType, TrainingExample
from luthier.data.readers import kind_of, open_reader
from luthier.data.sources import Reading, read_examples, read_file
from luthier.data.split import split_examples
from luthier.data_options import Columns, Source
from luthier.errors import UserError


@dataclass(slots=True)
class Loaded:
    """A file's rows: ``rows_in == len(examples) + len(rejects)``."""

    examples: list[TrainingExample]
    rejects: list[Reject]
    rows_in: int
    format: str


def load_file(path: str | Path, columns: Columns | None = None, task_type: TaskType = TaskType.CAUSAL_LM) -> Loaded:
    """Every row of a file as an example or as a reject, in memory; :func:`luthier.data.sources.read_examples` gives
    them one by one.

    Args:
        path: a file of one of :data:`luthier.data.readers.FORMATS`.
        columns: which column holds what; None or empty: recognised.
        task_type: given to every example.

    Raises:
        UserError: the file cannot be read, or its columns are of no known format.
    """
    return _loaded(read_file(open_reader(path), columns, task_type))


def load_source(
    source: Source | str, columns: Columns | None = None, task_type: TaskType = TaskType.CAUSAL_LM
) -> Loaded:
    """As :func:`load_file`, of a recipe's source: a file, a folder, a glob or a hub data set.

    Raises:
        UserError: see :func:`luthier.data.sources.read_examples`.
    """
    return _loaded(read_examples(source, columns, task_type))


def _loaded(reading: Reading) -> Loaded:
    loaded = Loaded([], [], 0, "")
    for row in reading:
        if isinstance(row, Reject):
            loaded.rejects.append(row)
        else:
            loaded.examples.append(row)
    loaded.rows_in, loaded.format = reading.rows_in, reading.format
    assert loaded.rows_in == len(loaded.examples) + len(loaded.rejects)
    return loaded


class DatasetLoader:
    """Loads examples from files; behaves as the list of them.

    ``load_from_*`` return the loader itself, so that ``examples = loader.load_from_jsonl(path)`` can be looped over,
    counted and indexed. Loading twice adds. Refused rows are in ``rejects``, and a warning counts them.

    Args:
        task_type: given to every example.
        on_error: ``reject`` lists bad rows; ``raise`` stops at the first.

    Raises:
        UserError: either is unknown.
    """

    def __init__(self, task_type: TaskType | str = TaskType.CAUSAL_LM, *, on_error: str = "reject") -> None:
        if on_error not in ("reject", "raise"):
            raise UserError(f"unknown on_error {on_error!r}", remedy="known: reject, raise")
        self.on_error = on_error
        try:
            self.task_type = TaskType(task_type)
        except ValueError:
            raise UserError(
                f"unknown task type {task_type!r}", remedy=f"known: {', '.join(t.value for t in TaskType)}"
            ) from None
        self.examples: list[TrainingExample] = []
        self.rejects: list[Reject] = []

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[TrainingExample]:
        return iter(self.examples)

    @overload
    def __getitem__(self, index: int) -> TrainingExample: ...

    @overload
    def __getitem__(self, index: slice) -> list[TrainingExample]: ...

    def __getitem__(self, index: int | slice) -> TrainingExample | list[TrainingExample]:
        return self.examples[index]

    def load_from_json(self, path: str | Path, **columns: str) -> DatasetLoader:
        """Add the rows of a JSON file: a list, or an object with the list under ``data``.

        Args:
            path: the file.
            **columns: which column holds what, by the names of the recipe's ``data.columns``: prompt, response, …

        Raises:
            UserError: see :func:`load_file`.
        """
        return self._load(path, (".json",), columns)

    def load_from_jsonl(self, path: str | Path, **columns: str) -> DatasetLoader:
        """Add the rows of a file with one JSON object a line; see :meth:`load_from_json`."""
        return self._load(path, (".jsonl", ".ndjson", ".json"), columns)

    def load_from_csv(self, path: str | Path, **columns: str) -> DatasetLoader:
        """Add the rows of a table whose first line names the columns; see :meth:`load_from_json`."""
        return self._load(path, (".csv", ".tsv"), columns)

    def load_from_parquet(self, path: str | Path, **columns: str) -> DatasetLoader:
        """Add the rows of a Parquet file; see :meth:`load_from_json`."""
        return self._load(path, (".parquet",), columns)

    def load_from_excel(self, path: str | Path, sheet: str | None = None, **columns: str) -> DatasetLoader:
        """Add the rows of an Excel sheet whose first row names the columns; see :meth:`load_from_json`.

        Args:
            path: the workbook.
            sheet: the sheet's name; None: the first.
            **columns: as for the other formats.
        """
        return self._load(path, (".xlsx",), columns, subset=sheet)

    def load(
        self, path: str | Path, *, subset: str | None = None, split: str = "train", **columns: str
    ) -> DatasetLoader:
        """Add the rows of whatever a recipe's ``data.train`` may name: a file, a folder, a glob or ``hub:OWNER/NAME``.

        Args:
            path: where the rows are.
            subset: configuration of a hub data set, or sheet of an Excel file.
            split: of a data set that has several.
            **columns: as for :meth:`load_from_json`.

        Raises:
            UserError: see :func:`luthier.data.sources.read_examples`.
        """
        return self._load(path, (), columns, subset=subset, split=split)

    def _load(self, path: str | Path, kinds: tuple[str, ...], columns: dict[str, str], **chosen: Any) -> DatasetLoader:
        kind = kind_of(Path(path))
        if kinds and kind is not None and kind.format not in kinds:
            raise UserError(
                f"{Path(path).name!r} is no {kinds[0]} file",
                where=str(path),
                remedy=f"use load_from_{_verb(kind.format)}",
            )
        unknown = sorted(set(columns) - set(Columns.model_fields))
        if unknown:
            raise UserError(f"unknown column role {unknown[0]!r}", remedy=f"known: {', '.join(Columns.model_fields)}")
        found = Columns(**columns)
        if kinds:
            loaded = _loaded(read_file(open_reader(path, chosen.get("subset")), found, self.task_type))
        else:
            loaded = load_source(Source(path=str(path), **chosen), found, self.task_type)
        if loaded.rejects and self.on_error == "raise":
            bad = loaded.rejects[0]
            raise UserError(bad.message, where=f"{bad.file}:{bad.line}", remedy=bad.remedy)
        self.examples += loaded.examples
        self.rejects += loaded.rejects
        if loaded.rejects:
            reasons = ", ".join(f"{r} {n}" for r, n in Counter(r.reason for r in loaded.rejects).most_common())
            first = loaded.rejects[0]
            warnings.warn(
                f"{path}: {len(loaded.rejects)} of {loaded.rows_in} rows refused ({reasons}); first: "
                f"{first.file}:{first.line}: {first.message}; all are in .rejects",
                stacklevel=3,
            )
        return self

    def get_training_data(self, format: str = "causal") -> list[str] | list[dict[str, str]] | list[list[Message]]:
        """Every example as plain text (``causal``), as Alpaca's fields (``instruction``) or as turns (``chat``).

        Raises:
            UserError: another format is asked for, or an example does not fit it.
        """
        forms: dict[str, Any] = {
            "causal": TrainingExample.to_causal_lm_format,
            "instruction": TrainingExample.to_instruction_format,
            "chat": TrainingExample.to_chat_format,
        }
        if format not in forms:
            raise UserError(f"unknown format {format!r}", remedy=f"known: {', '.join(forms)}")
        return [forms[format](example) for example in self.examples]

    def split(
        self, train_ratio: float = 0.8, val_ratio: float = 0.1, seed: int = 42
    ) -> tuple[list[TrainingExample], list[TrainingExample], list[TrainingExample]]:
        """Training, validation and test rows; see :func:`luthier.data.split.split_examples`."""
        if not self.examples:
            raise UserError("there are no examples to split", remedy="load a file first")
        return split_examples(self.examples, train_ratio, val_ratio, seed)


def _verb(suffix: str) -> str:
    return {".tsv": "csv", ".ndjson": "jsonl", ".xlsx": "excel"}.get(suffix, suffix.removeprefix("."))
