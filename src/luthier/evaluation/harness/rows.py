"""Where a task's rows come from: files beside its own, or files that are named for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.errors import UserError

# How `datasets` reads a file, by the end of its name.
_READERS: dict[str, tuple[str, dict[str, str]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"delimiter": "\t"}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
FROM_FILES = {*(reader for reader, _ in _READERS.values()), "arrow"}


@dataclass(frozen=True, slots=True)
class Choice:
    """What is asked of each task: see :func:`load_tasks`."""

    data: str | None
    shots: str | None
    num_fewshot: int | None
    unsafe_code: bool


@dataclass(frozen=True, slots=True)
class TaskFile:
    """A task file and what it says, includes among it; functions are their names."""

    path: Path
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.config["task"])


def local_rows(file: TaskFile) -> dict[str, Any]:
    """``dataset_kwargs`` with the paths of a task's own files seen from its folder."""
    reader, kwargs = file.config.get("dataset_path"), file.config.get("dataset_kwargs") or {}
    if reader not in FROM_FILES or "data_dir" in kwargs:
        return {}
    if "data_files" not in kwargs:
        raise UserError(
            f"task {file.name!r} comes without rows", where=str(file.path), remedy="name a file of them with --data"
        )
    places = kwargs["data_files"]
    if isinstance(places, dict):
        made: Any = {split: _absolute(place, file) for split, place in places.items()}
    else:
        made = _absolute(places, file)
    return {"dataset_kwargs": {**kwargs, "data_files": made}}


def _absolute(place: Any, file: TaskFile) -> Any:
    if isinstance(place, list):
        return [_absolute(each, file) for each in place]
    if not isinstance(place, str):
        raise UserError(
            f"{place!r} names no file", where=f"{file.path}, dataset_kwargs.data_files", remedy="name a file"
        )
    if "://" in place:
        return place
    path = file.path.parent / Path(place).expanduser()
    if not (path.exists() or any(path.parent.glob(path.name))):
        raise UserError(
            f"the task's rows are not there: {place}",
            where=f"{file.path}, dataset_kwargs.data_files",
            remedy=f"paths are seen from the task file's folder; put it at {path}, or name rows with --data",
        )
    return str(path)


def given_rows(file: TaskFile, choice: Choice) -> dict[str, Any]:
    """What makes a task take its rows from files."""
    config, data, shots = file.config, choice.data, choice.shots
    if data is None:
        raise UserError("--shots is of no use alone", where="--shots", remedy="name the rows to ask with --data")
    asked = config.get("test_split") or config.get("validation_split") or "test"
    examples = (config.get("fewshot_config") or {}).get("split") or config.get("fewshot_split")
    splits = {config.get("training_split"), config.get("validation_split"), examples} - {None, asked}
    count = config.get("num_fewshot") if choice.num_fewshot is None else choice.num_fewshot
    if count and not shots and "samples" not in (config.get("fewshot_config") or {}):
        raise UserError(
            f"{file.name} shows {count} examples before each question, and no file of them is named",
            where="--shots",
            remedy="name their file with --shots (rows that are not asked), or ask without: --num-fewshot 0",
        )
    reader, options = _reader(data)
    if shots and _reader(shots)[0] != reader:
        raise UserError(
            "the rows to ask and the examples are files of two kinds",
            where=f"{data}, {shots}",
            remedy="`luthier data convert` makes one kind of them",
        )
    files = {asked: _existing(data, "--data")}
    more: dict[str, Any] = {}
    if shots:
        more["fewshot_split"] = examples if examples not in (None, asked) else "shots"
        splits.add(more["fewshot_split"])
    # Without examples no other split is read, and a task only looks whether it is there.
    files |= {split: _existing(shots, "--shots") if shots else files[asked] for split in splits}
    return {
        "dataset_path": reader,
        "dataset_name": None,
        "custom_dataset": None,
        "dataset_kwargs": {**options, "data_files": files},
        **more,
    }


def _reader(path: str) -> tuple[str, dict[str, str]]:
    end = Path(path).suffix.lower()
    if end not in _READERS:
        raise UserError(
            f"rows are not read from {end or 'a file without an end to its name'}",
            where=path,
            remedy=f"name a file of {', '.join(_READERS)}; `luthier data convert` makes one",
        )
    return _READERS[end]


def _existing(path: str, option: str) -> str:
    place = Path(path).expanduser()
    if not place.is_file():
        raise UserError(f"there is no file {path!r}", where=option, remedy="check the path")
    return str(place.resolve())


def shown_files(files: Any) -> str:
    return ", ".join(dict.fromkeys(_flat(files)))


def _flat(files: Any) -> Iterator[str]:
    if isinstance(files, str):
        yield files
    else:
        for each in files.values() if isinstance(files, dict) else files:
            yield from _flat(each)
