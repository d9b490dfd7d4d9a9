"""Rows to files: JSON, JSONL, CSV, TSV (also packed), Parquet and Excel, whole or not at all."""

from __future__ import annotations

import csv
import io
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from luthier.data.readers.files import PACKED, Kind, kind_of
from luthier.errors import UserError, shorten

Record = dict[str, Any]
TABLES = (".csv", ".tsv", ".xlsx")
"""Kinds of file whose cells are texts and numbers."""
# The reader takes these as JSON text too, which holds turns and tools that are not all of one shape.
_PARSED = ("messages", "conversations", "tools")
_CHUNK = 1_000
_LONGEST_CELL = 32_767


def writable_kind(path: Path, *, force: bool = False) -> Kind:
    """The kind of file that a path's name says.

    Raises:
        UserError: it names none that can be written, or the file is there and ``force`` is not given.
    """
    kind = kind_of(path)
    if kind is None or kind.format not in _WRITERS:
        raise UserError(
            f"{path.name!r} names no kind of file that can be written",
            where=str(path),
            remedy=f"end it in {', '.join(_WRITERS)}; {' and '.join(PACKED)} may follow a text's",
        )
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder", where=str(path), remedy="name a file in it")
    if path.exists() and not force:
        raise UserError(f"{str(path)!r} exists", where=str(path), remedy="--force replaces it, or name another file")
    return kind


def write_records(
    path: Path, records: Iterable[Record], *, force: bool = False, verify: Callable[[Path], None] | None = None
) -> None:
    """Write records as the kind of file that the path's suffix names.

    They are written aside and renamed when whole, so that no half file ever stands there.

    Args:
        path: the file.
        records: JSON values by column; iterated more than once.
        force: replace an existing file.
        verify: called with the file written aside; what it raises keeps it from its place.

    Raises:
        UserError: the file exists, cannot be written, or cannot hold the values.
    """
    kind = writable_kind(path, force=force)
    with aside(path) as temporary:
        try:
            _WRITERS[kind.format](temporary, records)
        except UnicodeEncodeError as error:
            raise UserError(
                f"a text has half a character, {error.object[error.start : error.end]!r}", remedy="mend the text"
            ) from None
        if verify is not None:
            verify(temporary)
        writable_kind(path, force=force)
        temporary.replace(path)


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A path of the same name in a folder beside, which goes with all that is in it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written: {error.strerror}", where=str(path)) from None
    try:
        yield folder / path.name
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written: {error.strerror}", where=str(path)) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def as_json(value: Any) -> str:
    """A value as JSON on one line.

    Raises:
        UserError: it is no JSON value.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"{shorten(value)} is no JSON value: {error}", remedy="leave it out of the rows") from None


def _open(path: Path) -> TextIO:
    """A text file to write to, packed as its name says."""
    kind = kind_of(path)
    packing = kind.packing if kind is not None else ""
    if packing == ".gz":
        import gzip

        return io.TextIOWrapper(gzip.GzipFile(path, "wb", mtime=0), encoding="utf-8", newline="")
    if packing == ".zst":
        import pyarrow

        return io.TextIOWrapper(pyarrow.output_stream(str(path), compression="zstd"), encoding="utf-8", newline="")
    return path.open("w", encoding="utf-8", newline="")


def _jsonl(path: Path, records: Iterable[Record]) -> None:
    with _open(path) as stream:
        stream.writelines(as_json(record) + "\n" for record in records)


def _json(path: Path, records: Iterable[Record]) -> None:
    with _open(path) as stream:
        stream.write("[")
        for number, record in enumerate(records):
            stream.write(",\n" if number else "\n")
            stream.write(as_json(record))
        stream.write("\n]\n")


def _columns(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(itertools.chain.from_iterable(records)))


def _table(path: Path, records: Iterable[Record]) -> None:
    columns = _columns(records)
    kind = kind_of(path)
    separator = "\t" if kind is not None and kind.format == ".tsv" else ","
    with _open(path) as stream:
        writer = csv.writer(stream, delimiter=separator, lineterminator="\n")
        try:
            writer.writerow(columns)
            writer.writerows([_cell(record.get(column)) for column in columns] for record in records)
        except csv.Error as error:
            raise UserError(f"a table cannot hold a row: {error}", where=str(path), remedy="write .jsonl") from None


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else as_json(value)


def _excel(path: Path, records: Iterable[Record]) -> None:
    import openpyxl
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.utils.exceptions import IllegalCharacterError

    columns = _columns(records)
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("rows")
    try:
        for values in itertools.chain([columns], ([_cell(r.get(c)) for c in columns] for r in records)):
            cells = []
            for value in values:
                if len(value) > _LONGEST_CELL:
                    raise UserError(
                        f"a text of {len(value):,} characters is longer than an Excel cell, which holds "
                        f"{_LONGEST_CELL:,}",
                        where=str(path),
                        remedy="write .jsonl",
                    )
                cell = WriteOnlyCell(sheet, value)
                # A text that begins with = is no formula.
                cell.data_type = "s"
                cells.append(cell)
            sheet.append(cells)
    except IllegalCharacterError:
        raise UserError(
            "an Excel cell cannot hold a text with control characters", where=str(path), remedy="write .jsonl"
        ) from None
    finally:
        book.save(path)


def _parquet(path: Path, records: Iterable[Record]) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = _columns(records)
    as_text = {column for column in _PARSED if any(not _uniform(record.get(column)) for record in records)}

    def tables() -> Iterator[pyarrow.Table]:
        rows = iter(records)
        while chunk := list(itertools.islice(rows, _CHUNK)):
            yield pyarrow.table({c: _column([r.get(c) for r in chunk], c in as_text) for c in columns})

    def _column(values: Sequence[Any], text: bool) -> pyarrow.Array:
        return pyarrow.array([v if v is None or isinstance(v, str) else as_json(v) for v in values] if text else values)

    try:
        schema = pyarrow.unify_schemas([table.schema for table in tables()], promote_options="permissive")
        with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
            for table in tables():
                writer.write_table(table.cast(schema))
    except (pyarrow.ArrowException, OverflowError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"a column of a Parquet file has one type, and these rows' values do not: {first}",
            where=str(path),
            remedy="write .jsonl, which holds values of any type",
        ) from None


def _uniform(value: Any) -> bool:
    """Whether a list of objects is one that Arrow holds without filling gaps: texts under the same two keys."""
    keys = ({"role", "content"}, {"from", "value"})
    return not isinstance(value, list) or all(
        set(v) in keys and all(isinstance(t, str) for t in v.values()) for v in value
    )


_WRITERS: dict[str, Callable[[Path, Iterable[Record]], None]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".ndjson": _jsonl,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
    ".xlsx": _excel,
}
