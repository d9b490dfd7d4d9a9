"""A recipe's sources: files, folders, globs and hub data sets to one stream of examples and rejects."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from luthier.data.columns import Format, settle, to_example
from luthier.data.examples import Reject, TaskType, TrainingExample
from luthier.data.readers import FORMATS, Reader, Row, kind_of, open_reader
from luthier.data_options import Columns, Source
from luthier.errors import UserError

# What `datasets` writes beside the rows.
_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# Names that a file's or a folder's name tells a split by, as on the hub.
_SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


@dataclass(slots=True)
class FileCount:
    """What has been read of one file so far."""

    path: str
    format: str
    encoding: str
    rows_in: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Rows refused, by reason."""

    @property
    def kept(self) -> int:
        return self.rows_in - self.refused.total()


class Reading:
    """The rows of a source, one by one: each an example, or the reject that says why it is none.

    No more than a piece of a file is in memory. Looping again reads again. ``files`` counts what the last loop met.
    """

    def __init__(
        self,
        readers: Sequence[Reader],
        columns: Columns | None,
        task_type: TaskType,
        left_out: Sequence[str] = (),
    ) -> None:
        self._readers = readers
        self._columns = columns
        self._task_type = task_type
        self._formats: list[Format | None] | None = None
        self.files: list[FileCount] = []
        self.left_out = list(left_out)
        """Files of a folder that are not read: of other kinds, or of other splits."""

    @property
    def paths(self) -> list[str]:
        """The files, in the order in which they are read."""
        return [str(reader.path) for reader in self._readers]

    @property
    def formats(self) -> list[Format | None]:
        """The format of each file, by all of its rows; None where no row of it is readable.

        Raises:
            UserError: a file's columns are of no known format, or one cannot be read.
        """
        if self._formats is None:
            self._formats = [_settled(reader, self._columns) for reader in self._readers]
        return self._formats

    @property
    def format(self) -> str:
        """The formats' names."""
        return ", ".join(dict.fromkeys(found.name if found else "unreadable" for found in self.formats))

    @property
    def rows_in(self) -> int:
        """Rows met in the last loop: those given as examples and those refused."""
        return sum(file.rows_in for file in self.files)

    @property
    def refused(self) -> Counter[str]:
        """Rows refused in the last loop, by reason."""
        return sum((file.refused for file in self.files), Counter())

    def __iter__(self) -> Iterator[TrainingExample | Reject]:
        # All formats first: a file that cannot be used is told of before hours have gone into the others.
        formats = self.formats
        self.files = []
        for reader, found in zip(self._readers, formats, strict=True):
            count = FileCount(str(reader.path), found.name if found else "unreadable", reader.encoding)
            self.files.append(count)
            for row in _rows(reader):
                made: TrainingExample | Reject
                if isinstance(row, Reject):
                    made = row
                else:
                    if found is None:
                        raise _changed(reader)
                    made = to_example(row, found.columns, self._task_type)
                count.rows_in += 1
                if isinstance(made, Reject):
                    count.refused[made.reason] += 1
                yield made


def read_examples(
    source: Source | str, columns: Columns | None = None, task_type: TaskType = TaskType.CAUSAL_LM
) -> Reading:
    """The rows of a source as examples and rejects, in order, in constant memory.

    Args:
        source: as in the recipe; a path is short for it. Its own columns win over ``columns``.
        columns: which column holds what; None or empty: recognised, for each file on its own.
        task_type: given to every example.

    Raises:
        UserError: at once: the source names nothing that can be read; while looping: a file is broken, or its columns
            are of no known format.
    """
    source = Source(path=source) if isinstance(source, str) else source
    readers, left_out = open_source(source)
    return Reading(readers, source.columns or columns, task_type, left_out)


def read_file(reader: Reader, columns: Columns | None = None, task_type: TaskType = TaskType.CAUSAL_LM) -> Reading:
    """As :func:`read_examples`, of one file that has been opened."""
    return Reading([reader], columns, task_type)


def _rows(reader: Reader) -> Iterator[Row | Reject]:
    try:
        yield from reader.rows()
    except UnicodeDecodeError:  # All of it has been decoded before.
        raise _changed(reader) from None


def _changed(reader: Reader) -> UserError:
    return UserError(
        f"{str(reader.path)!r} has changed while it was read",
        where=str(reader.path),
        remedy="start again when whatever writes it is done",
    )


def _settled(reader: Reader, columns: Columns | None) -> Format | None:
    named = columns.model_dump(exclude_none=True, exclude={"label_names"}) if columns is not None else {}
    # Where the user says what holds the rows' content, the file need only have those columns.
    enough = set(named.values()) if {"messages", "text", "prompt"} & named.keys() else ()
    keys = reader.columns(enough)
    return None if keys is None else settle(keys, columns, reader.path)


# --- what a source's path names ---


def open_source(source: Source) -> tuple[list[Reader], list[str]]:
    """The readers of a source's files, and the files of its folder that are left out.

    A path names a file; a glob; ``hub:OWNER/NAME``; or a folder: every file of a known kind in it, at any depth, in the
    order of their paths. Where a folder's files are called after splits, as on the hub (train-00000-of-00002.parquet,
    test.jsonl) and in what ``datasets`` saves, those of ``source.split`` are read.

    Raises:
        UserError: it names nothing, or a file in it is of no known kind.
    """
    if source.path.startswith("hub:"):
        from luthier.data.hub import HubReader

        return [HubReader(source.path.removeprefix("hub:"), source.subset, source.split)], []
    path = Path(source.path).expanduser()
    left_out: list[Path] = []
    if path.is_dir():
        files, left_out = _folder(path, source.split)
    elif not path.exists() and glob.has_magic(source.path):
        # Not Path.glob: it takes no absolute pattern.
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207
        files = [file for file in found if file.is_file()]
        if not files:
            raise UserError(f"no file matches {source.path!r}", where=source.path, remedy="check the pattern")
    else:
        files = [path]
    kinds = {kind.format for file in files if (kind := kind_of(file))}
    if source.subset is not None and kinds and ".xlsx" not in kinds:
        raise UserError(
            f"the subset {source.subset!r} is named, and {source.path!r} has none",
            where=source.path,
            remedy="leave subset out; it is a hub data set's configuration or an Excel file's sheet",
        )
    return [open_reader(file, source.subset) for file in files], [str(file) for file in left_out]


def _folder(folder: Path, split: str) -> tuple[list[Path], list[Path]]:
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    # cache-….arrow is what `datasets` leaves beside saved rows when it maps them.
    no_rows = [p for p in files if p.name in _NO_ROWS or (p.suffix == ".arrow" and p.name.startswith("cache-"))]
    usable = [path for path in files if kind_of(path) and path not in no_rows]
    if not usable:
        raise UserError(
            f"the folder {str(folder)!r} holds no file that can be read",
            where=str(folder),
            remedy=f"put files there: {', '.join(FORMATS)}",
        )
    splits = {path: _split_of(path.relative_to(folder)) for path in usable}
    if split in splits.values():
        usable = [path for path in usable if splits[path] == split]
    elif set(splits.values()) - {None} and split != "train":
        known = sorted({name for name in splits.values() if name})
        raise UserError(
            f"the folder {str(folder)!r} has no split {split!r}",
            where=str(folder),
            remedy=f"name one of its splits: {', '.join(known)}",
        )
    read = {*usable, *no_rows}
    return usable, [path for path in files if path not in read]


def _split_of(path: Path) -> str | None:
    """The split that a file's name, else the nearest folder's, tells: the words between its dots, dashes and digits."""
    for name in reversed(path.parts):
        words = set(re.split(r"[^a-z]+", name.lower()))
        for split, names in _SPLITS.items():
            if words & set(names):
                return split
    return None
