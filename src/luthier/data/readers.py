"""Files to rows: JSON, JSONL, CSV, TSV and Parquet, in the encodings they come in; a row keeps its line."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.data.examples import Reject, Source
from luthier.errors import UserError, shorten

FORMATS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file, not yet understood."""

    values: dict[str, Any]
    source: Source


def read_rows(path: str | Path) -> Iterator[Row | Reject]:
    """The rows of a file, in order. A row that cannot be read is a reject in its place.

    Raises:
        UserError: the file is missing, a folder, empty, of an unknown kind, or broken as a whole.
    """
    path = Path(path).expanduser()
    kind = _kind(path)
    if kind == ".parquet":
        yield from _parquet(path)
        return
    text, _ = read_text(path)
    if not text.strip():
        raise UserError(f"{str(path)!r} is empty", where=str(path), remedy="put rows into it")
    if kind in (".csv", ".tsv"):
        yield from _csv(text, path, "\t" if kind == ".tsv" else None)
    elif kind == ".json" and not _is_jsonl(text):
        yield from _json(text, path)
    elif kind == ".json" or text.lstrip()[0] != "[":
        yield from _jsonl(text, path)
    else:
        # A list under the name .jsonl; one list a line would be rejected line by line.
        yield from _json(text, path) if _parses(text) else _jsonl(text, path)


def encoding_of(path: str | Path) -> str:
    """The encoding a file is read in; ``binary`` for Parquet."""
    path = Path(path).expanduser()
    return "binary" if _kind(path) == ".parquet" else read_text(path)[1]


def _kind(path: Path) -> str:
    if not path.exists():
        near = [p.name for p in path.parent.glob("*") if p.suffix in FORMATS] if path.parent.is_dir() else []
        hint = f"; its folder has {', '.join(sorted(near)[:5])}" if near else ""
        raise UserError(f"the file {str(path)!r} does not exist", where=str(path), remedy=f"check the path{hint}")
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder", where=str(path), remedy="name the files in it, one by one")
    if path.suffix.lower() not in FORMATS:
        raise UserError(
            f"{path.name!r} is of no known kind", where=str(path), remedy=f"rename or convert it: {', '.join(FORMATS)}"
        )
    return path.suffix.lower()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{str(path)!r} cannot be read: {error.strerror}", where=str(path), remedy="check the file's permissions"
        ) from None


def read_text(path: Path) -> tuple[str, str]:
    """A file's text and its encoding.

    Decided in this order: a byte order mark; strict UTF-8; UTF-16 without a mark, told by its zero bytes; strict
    GB18030.

    Raises:
        UserError: it is in none of them.
    """
    content = _content(path)
    for mark, encoding in _BOMS:
        if content.startswith(mark):
            return _decoded(content.removeprefix(mark) if encoding == "utf-8" else content, encoding, path), encoding
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        refused = error
    else:
        if "\0" not in text:
            return text, "utf-8"
        refused = UnicodeDecodeError("utf-8", content, content.index(b"\0"), content.index(b"\0") + 1, "zero byte")
    for encoding, zeros in (("utf-16-le", content[1:2000:2]), ("utf-16-be", content[0:2000:2])):
        if len(zeros) > 1 and zeros.count(0) > 0.2 * len(zeros):
            return _decoded(content, encoding, path), encoding
    if b"\0" not in content:
        try:
            return content.decode("gb18030"), "gb18030"
        except UnicodeDecodeError:
            pass
    line = content[: refused.start].count(b"\n") + 1
    raise UserError(
        f"{path.name!r} is neither UTF-8, UTF-16 nor GB18030: byte {refused.start:,} is {content[refused.start]:#04x}",
        where=f"{path}:{line}",
        remedy="save it as UTF-8",
    )


def _decoded(content: bytes, encoding: str, path: Path) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path.name!r} begins like {encoding} and breaks at byte {error.start:,}: {error.reason}",
            where=str(path),
            remedy="save it as UTF-8",
        ) from None


# --- JSON ---


class _Doubled(dict[str, Any]):
    """An object in which a key stands twice, so that one of its values would be lost."""

    message = ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    doubled = _Doubled(made)
    doubled.message = f"the key {twice!r} stands twice in one object, so one of its values would be lost"
    return doubled


def _doubled(value: Any) -> str | None:
    """What is wrong with the first object inside ``value`` that has a key twice."""
    if isinstance(value, _Doubled):
        return value.message
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((message for item in inner if (message := _doubled(item)) is not None), None)


def _constant(name: str) -> Any:
    raise json.JSONDecodeError(f"{name} is no JSON value", name, 0)


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _is_jsonl(text: str) -> bool:
    """Whether a file called .json holds one object a line."""
    begin = text.lstrip()
    if begin[:1] != "{" or _parses(text):
        return False
    first = begin.split("\n", 1)[0]
    return _parses(first)


def _json(text: str, path: Path) -> Iterator[Row | Reject]:
    try:
        content = _loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"not valid JSON: {error.msg} (column {error.colno})",
            where=f"{path}:{error.lineno}",
            remedy="mend this line; a file with one object a line is called .jsonl",
        ) from None
    except RecursionError:
        raise UserError("the JSON is nested too deeply", where=str(path), remedy="flatten it") from None
    rows = content
    if isinstance(content, dict):
        lists = [k for k, v in content.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
        key = "data" if isinstance(content.get("data"), list) else lists[0] if len(lists) == 1 else None
        # A single conversation is a row, not a list of rows under "messages".
        rows = [content] if key in (None, "messages", "conversations") else content[key]
    if not isinstance(rows, list):
        raise UserError(
            f"the JSON holds {_named(rows)}, not rows",
            where=str(path),
            remedy='put a list of objects there, or {"data": [...]}',
        )
    if not rows:
        raise UserError("the file holds an empty list", where=str(path), remedy="put rows into it")
    for number, row in enumerate(rows, 1):
        yield _row(row, path, number)


def _jsonl(text: str, path: Path) -> Iterator[Row | Reject]:
    # Not splitlines(): a U+2028 inside a JSON string is no line's end.
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if not line.strip():
            continue
        try:
            yield _row(_loads(line), path, number)
        except json.JSONDecodeError as error:
            near = line[max(0, error.pos - 20) : error.pos + 20].strip()
            yield Reject(
                str(path),
                number,
                "bad_json",
                f"not valid JSON: {error.msg} at column {error.colno}, near {shorten(near)}",
                value=shorten(line.strip()),
                remedy="mend this line: each line is one whole JSON object",
            )
        except RecursionError:
            yield Reject(str(path), number, "bad_json", "the JSON is nested too deeply", remedy="flatten it")


def _named(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _row(value: Any, path: Path, line: int) -> Row | Reject:
    if not isinstance(value, dict):
        return Reject(
            str(path),
            line,
            "not_an_object",
            f"the row is {_named(value)}, not an object with keys",
            value=shorten(value),
            remedy='write {"prompt": …, "response": …}',
        )
    message = _doubled(value)
    if message is not None:
        return Reject(str(path), line, "duplicate_key", message, value=shorten(value), remedy="name the key once")
    return Row(value, Source(str(path), line))


# --- tables ---


def _csv(text: str, path: Path, delimiter: str | None) -> Iterator[Row | Reject]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter or _delimiter(text), strict=True)
    try:
        header = [name.strip() for name in next(reader)]
        _check_header(header, path)
        begin = reader.line_num + 1
        for cells in reader:
            line, begin = begin, reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(header):
                yield Reject(
                    str(path),
                    line,
                    "ragged_row",
                    f"the row has {len(cells)} fields, the header {len(header)}",
                    value=shorten(",".join(cells)),
                    remedy="put fields that hold the separator or a line's end into double quotes",
                )
            else:
                yield Row(dict(zip(header, cells, strict=True)), Source(str(path), line))
    except csv.Error as error:
        raise UserError(
            f"not a valid table: {error}",
            where=f"{path}:{reader.line_num}",
            remedy='close the quotes there; a quote inside a field is written twice ("")',
        ) from None


def _delimiter(text: str) -> str:
    """Comma, unless the header has none and has another separator."""
    header = text.lstrip().split("\n", 1)[0]
    counts = {d: header.count(d) for d in ",;\t|"}
    best = max(counts, key=lambda d: counts[d])
    return best if counts[best] and not counts[","] else ","


def _check_header(header: list[str], path: Path) -> None:
    if any(not name for name in header):
        raise UserError(
            f"column {header.index('') + 1} has no name",
            where=f"{path}:1",
            remedy="name every column in the first line",
        )
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise UserError(f"two columns are called {twice!r}", where=f"{path}:1", remedy="give each its own name")


def _parquet(path: Path) -> Iterator[Row | Reject]:
    import pyarrow
    import pyarrow.parquet

    if path.stat().st_size == 0:
        raise UserError(f"{str(path)!r} is empty", where=str(path), remedy="put rows into it")
    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1000):
            for values in batch.to_pylist():
                number += 1
                # NaN in a table stands for a missing value.
                clean = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}
                yield Row(clean, Source(str(path), number))
    except (pyarrow.ArrowException, OSError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"not a readable Parquet file: {first}", where=str(path), remedy="write it again") from None
    if not number:
        raise UserError("the file holds no row", where=str(path), remedy="put rows into it")
