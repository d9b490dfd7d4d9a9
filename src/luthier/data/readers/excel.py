"""Excel workbooks (.xlsx), a row at a time."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.data.examples import Reject, Source
from luthier.data.readers.files import open_bytes
from luthier.data.readers.rows import Reader, Row, check_header, plain
from luthier.errors import UserError


class ExcelReader(Reader):
    """A sheet of a workbook, whose first row names the columns.

    Args:
        path: the workbook.
        sheet: the sheet's name; None: the first.
    """

    same_columns = True

    def __init__(self, path: Path, sheet: str | None = None) -> None:
        super().__init__(path)
        self.sheet = sheet

    def rows(self) -> Iterator[Row | Reject]:
        rows = self._lines()
        header: list[str] | None = None
        count = 0
        for line, cells in rows:
            if header is None:
                header = [str(cell).strip() if cell is not None else "" for cell in cells]
                while header and not header[-1]:
                    header.pop()
                check_header(header, self.path)
                continue
            count += 1
            yield self._row(header, cells, line)
        if header is None:
            raise UserError(f"{str(self.path)!r} is empty", where=str(self.path), remedy="put rows into it")
        if not count:
            remedy = "put rows into it, or name another sheet as the source's subset"
            raise UserError("the sheet has a header and no row", where=str(self.path), remedy=remedy)

    def _row(self, header: list[str], cells: list[Any], line: int) -> Row | Reject:
        path = str(self.path)
        if any(cell is not None for cell in cells[len(header) :]):
            message = f"the row has {len(cells)} fields, the header {len(header)}"
            return Reject(path, line, "ragged_row", message, remedy="name every column in the first row")
        cells = cells[: len(header)] + [None] * (len(header) - len(cells))
        for name, cell in zip(header, cells, strict=True):
            if isinstance(cell, _Fault):
                message = f"the cell of column {name!r} holds the error {cell.text}"
                return Reject(path, line, "cell_error", message, name, cell.text, "mend the formula, or empty the cell")
        return Row(dict(zip(header, cells, strict=True)), Source(path, line))

    def _lines(self) -> Iterator[tuple[int, list[Any]]]:
        """Rows of the sheet that hold anything, with their numbers in it."""
        import openpyxl

        with open_bytes(self.path):
            pass  # One that may not be read says so in our words.
        if self.path.stat().st_size == 0:
            raise UserError(f"{str(self.path)!r} is empty", where=str(self.path), remedy="put rows into it")
        book = None
        try:
            with warnings.catch_warnings():  # of styles and extensions that it leaves out
                warnings.simplefilter("ignore")
                book = openpyxl.load_workbook(self.path, read_only=True, data_only=True, keep_links=False)
                sheet = self._chosen(book)
                sheet.reset_dimensions()  # Some programs write wrong ones, and rows beyond them would be lost.
            for line, cells in enumerate(sheet.iter_rows(), 1):
                values = [_value(cell) for cell in cells]
                while values and values[-1] is None:
                    values.pop()
                if values:
                    yield line, values
        except (UserError, MemoryError):
            raise
        except Exception as error:  # A broken workbook ends in whatever its XML or its archive broke.
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"not a readable Excel file: {first}", where=str(self.path), remedy="save it again as .xlsx"
            ) from None
        finally:
            if book is not None:
                book.close()

    def _chosen(self, book: Any) -> Any:
        if self.sheet is None:
            if not book.worksheets:
                raise UserError("the workbook has no sheet of cells", where=str(self.path), remedy="save it again")
            return book.worksheets[0]
        names = [sheet.title for sheet in book.worksheets]
        if self.sheet not in names:
            raise UserError(
                f"there is no sheet {self.sheet!r}; the sheets are {', '.join(map(repr, names))}",
                where=str(self.path),
                remedy="name one of them as the source's subset",
            )
        return book[self.sheet]


class _Fault:
    """A cell that holds an error such as #N/A in place of a value."""

    def __init__(self, text: str) -> None:
        self.text = text


def _value(cell: Any) -> Any:
    value = cell.value
    if value is None or isinstance(value, bool):
        return value
    if cell.data_type == "e":
        return _Fault(str(value))
    if isinstance(value, str):
        # A workbook writes characters that XML cannot hold as _x000D_.
        return (_unescaped(value) if "_x" in value else value) or None
    if isinstance(value, float):
        # A sheet has one kind of number.
        return int(value) if value.is_integer() else plain(value)
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    return plain(value)


def _unescaped(text: str) -> str:
    from openpyxl.utils.escape import unescape

    return unescape(text)
