"""The plain way to read a text file: all of it in memory at once. The readers must give what this gives."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.data.examples import Reject, Source
from luthier.data.readers import Row
from luthier.errors import UserError, shorten

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_rows(path: Path) -> Iterator[Row | Reject]:
    """The rows of a file of text."""
    text, _ = read_text(path)
    if not text.strip():
        raise UserError(f"{str(path)!r} is empty", where=str(path), remedy="put rows into it")
    if path.suffix in (".csv", ".tsv"):
        yield from _csv(text, path, "\t" if path.suffix == ".tsv" else None)
    elif not _is_jsonl(text) if path.suffix == ".json" else _is_one_json(text):
        yield from _json(text, path)
    else:
        yield from _jsonl(text, path)


def read_text(path: Path) -> tuple[str, str]:
    """A file's text and its encoding.

    Decided in this order: a byte order mark; strict UTF-8; UTF-16 without a mark, told by its zero bytes; strict
    GB18030.

    Raises:
        UserError: it is in none of them.
    """
    content = path.read_bytes()
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
            text = content.decode("gb18030")
        except UnicodeDecodeError:
            pass
        else:
            if _reads_as_chinese(text):
                return text, "gb18030"
    line = content[: refused.start].count(b"\n") + 1
    raise UserError(
        f"{path.name!r} is neither UTF-8, UTF-16 nor GB18030: byte {refused.start:,} is {content[refused.start]:#04x}",
        where=f"{path}:{line}",
        remedy="save it as UTF-8",
    )


def _reads_as_chinese(text: str) -> bool:
    """Whether a text decoded as GB18030 is likely to have been written in it.

    Nearly every pair of bytes is a character there, so Big5 and Shift-JIS decode too: the one to private-use
    characters, the other to characters that hardly any Chinese text has (those outside GB2312).
    """
    sample = "".join(c for c in text if not c.isascii())[:10_000]
    if any("\ue000" <= c <= "\uf8ff" for c in sample):
        return False
    return len(sample.encode("gb2312", "ignore")) / 2 >= 0.1 * len(sample)


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


class _Flaw(dict[str, Any]):
    """What stands in a parsed row for a value that Python's parser accepts (or breaks on) and a row must not hold."""

    reason = "bad_json"
    message = ""


def _flaw(reason: str, message: str, content: dict[str, Any] | None = None) -> _Flaw:
    flaw = _Flaw(content or {})
    flaw.reason, flaw.message = reason, message
    return flaw


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    message = f"the key {twice!r} stands twice in one object, so one of its values would be lost"
    return _flaw("duplicate_key", message, made)


def _first_flaw(value: Any) -> _Flaw | None:
    """The first flaw inside a parsed value."""
    if isinstance(value, _Flaw):
        return value
    if isinstance(value, str):
        return None if value.isascii() else _half_character(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((flaw for item in inner if (flaw := _first_flaw(item)) is not None), None)


def _half_character(text: str) -> _Flaw | None:
    """JSON can write half a surrogate pair (a lone \\ud83d), which no tokenizer takes and no file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return _flaw("half_character", f"the text has half a character, {text[error.start]!r}, at {error.start:,}")
    return None


def _constant(name: str) -> Any:
    return _flaw("bad_json", f"not valid JSON: {name} is no JSON value")


def _integer(digits: str) -> Any:
    try:
        return int(digits)
    except ValueError:  # Python reads no more than 4,300 digits
        return _flaw("bad_json", f"a number of {len(digits):,} digits cannot be read")


def _float(digits: str) -> Any:
    value = float(digits)
    return value if math.isfinite(value) else _flaw("bad_json", f"the number {shorten(digits)} is too large")


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_float)


def _parses(text: str) -> bool:
    try:
        _loads(text)
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


def _is_one_json(text: str) -> bool:
    """Whether a file called .jsonl holds one list, or one object over several lines, instead."""
    begin = text.lstrip()
    if begin[:1] == "[":
        return _parses(text)  # One list a line would be rejected line by line.
    return begin[:1] == "{" and not _parses(begin.split("\n", 1)[0]) and _parses(text)


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
    if isinstance(content, _Flaw):
        raise UserError(content.message, where=str(path), remedy="name the key once")
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
    flaw = _first_flaw(value)
    if flaw is not None:
        remedy = "name the key once" if flaw.reason == "duplicate_key" else "mend this value"
        return Reject(str(path), line, flaw.reason, flaw.message, value=shorten(value), remedy=remedy)
    return Row(value, Source(str(path), line))


# --- tables ---


def _csv(text: str, path: Path, delimiter: str | None) -> Iterator[Row | Reject]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter or _delimiter(text), strict=True)
    try:
        header = [name.strip() for name in next(cells for cells in reader if cells)]
        _check_header(header, path)
        rows = 0
        begin = reader.line_num + 1
        for cells in reader:
            line, begin = begin, reader.line_num + 1
            if not cells:
                continue
            rows += 1
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
        if not rows:
            raise UserError("the table has a header and no row", where=str(path), remedy="put rows into it")
    except csv.Error as error:
        raise UserError(
            f"not a valid table: {error}",
            where=f"{path}:{reader.line_num}",
            remedy='close the quotes there; a quote inside a field is written twice ("")',
        ) from None


def _delimiter(text: str) -> str:
    """Comma, unless the header has none and has another separator."""
    header = re.sub(r'"[^"]*"', "", re.split(r"[\r\n]", text.lstrip(), maxsplit=1)[0])
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
