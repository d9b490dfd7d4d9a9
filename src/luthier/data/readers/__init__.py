"""Files to rows, in constant memory: JSON, JSONL, CSV, TSV, Parquet, Arrow and Excel, in the encodings they come in.

A row keeps its line. ``.gz`` and ``.zst`` archives of the text formats are read as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from luthier.data.examples import Reject
from luthier.data.readers.arrow import ArrowReader
from luthier.data.readers.document import Broken, DocumentReader
from luthier.data.readers.excel import ExcelReader
from luthier.data.readers.files import FORMATS, Kind, check_file, kind_of
from luthier.data.readers.lines import LinesReader
from luthier.data.readers.rows import Reader, Row
from luthier.data.readers.tables import TableReader
from luthier.data.readers.values import Parser

__all__ = ["FORMATS", "Reader", "Row", "encoding_of", "kind_of", "open_reader", "read_rows"]


def read_rows(path: str | Path) -> Iterator[Row | Reject]:
    """The rows of a file, in order. A row that cannot be read is a reject in its place.

    Raises:
        UserError: the file is missing, a folder, empty, of an unknown kind, or broken as a whole.
    """
    yield from open_reader(path).rows()


def encoding_of(path: str | Path) -> str:
    """The encoding a file is read in; ``binary`` for what is no text."""
    return open_reader(path).encoding


def open_reader(path: str | Path, sheet: str | None = None) -> Reader:
    """The reader of a file, told by its name and, for JSON, by how it begins.

    Args:
        path: the file.
        sheet: of an Excel file; None: the first.

    Raises:
        UserError: see :func:`read_rows`.
    """
    path = Path(path).expanduser()
    kind = check_file(path)
    if kind.format in (".parquet", ".arrow"):
        return ArrowReader(path)
    if kind.format == ".xlsx":
        return ExcelReader(path, sheet)
    if kind.format in (".csv", ".tsv"):
        return TableReader(path, kind)
    return _json_reader(path, kind)


def _json_reader(path: Path, kind: Kind) -> Reader:
    """JSON under either name may be one value, or one a line."""
    lines = LinesReader(path, kind)
    first, more = lines.first_line()
    document = DocumentReader(path, kind, lines.encoding)
    begin, parses = first.lstrip()[:1], _parses(first)
    if kind.format == ".json":
        return lines if begin == "{" and parses and more else document
    if begin not in ("[", "{") or (parses and (more or begin == "{")):
        return lines
    if not parses:
        # One list or object over several lines; otherwise the lines are refused one by one.
        try:
            document.outline()
        except (Broken, RecursionError):
            return lines
    return document


def _parses(text: str) -> bool:
    try:
        Parser().whole(text)
    except (json.JSONDecodeError, RecursionError):
        return False
    return True
