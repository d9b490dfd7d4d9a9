"""What a reader gives: rows, and the checks that every kind of file shares."""

from __future__ import annotations

import base64
import datetime
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from luthier.data.examples import Reject, Source
from luthier.errors import UserError


@dataclass(slots=True)
class Row:
    """One row of a file, not yet understood."""

    values: dict[str, Any]
    source: Source


class Reader(ABC):
    """One file of rows. It is opened anew for each pass, and no pass holds more of it than a piece."""

    same_columns = False
    """Whether every row has the same keys, as in a table."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def encoding(self) -> str:
        """The encoding that the text is in; ``binary`` where it is none."""
        return "binary"

    @abstractmethod
    def rows(self) -> Iterator[Row | Reject]:
        """The rows in order; one that cannot be read is a reject in its place.

        Raises:
            UserError: the file is broken as a whole.
        """

    def columns(self, enough: Collection[str] = ()) -> list[str] | None:
        """The keys of all readable rows, in the order in which they first appear; None where no row is readable.

        Args:
            enough: keys after which there is no need to look further; empty: look at every row.
        """
        seen: dict[str, None] | None = None
        for row in self.rows():
            if isinstance(row, Row):
                seen = {**(seen or {}), **dict.fromkeys(row.values)} if not seen or row.values.keys() - seen else seen
                if self.same_columns or (enough and seen.keys() >= set(enough)):
                    break
        return None if seen is None else list(seen)


def check_header(header: list[str], path: Path) -> None:
    """Whether a table's columns can be told apart.

    Raises:
        UserError: one has no name, or two have the same.
    """
    if any(not name for name in header):
        raise UserError(
            f"column {header.index('') + 1} has no name",
            where=f"{path}:1",
            remedy="name every column in the first line",
        )
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise UserError(f"two columns are called {twice!r}", where=f"{path}:1", remedy="give each its own name")


def plain(value: Any) -> Any:
    """A table's value as JSON could have written it: dates as ISO texts, NaN (a table's missing value) as None.

    Bytes that are no UTF-8 become ``{"base64": …}``, which nothing takes for a text.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (datetime.date, datetime.time)):  # A datetime is a date.
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value.is_finite() and value == value.to_integral_value() else str(value)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(value).decode("ascii")}
    return str(value)
