"""CSV and TSV."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator

from luthier.data.examples import Reject, Source
from luthier.data.readers.rows import Row, check_header
from luthier.data.readers.text import TextReader
from luthier.errors import UserError, shorten

# A quote that is never closed takes the rest of the file for one field.
_LONGEST_FIELD = 2**27


class TableReader(TextReader):
    """A table as text, whose first line names the columns."""

    same_columns = True

    def rows(self) -> Iterator[Row | Reject]:
        first, _ = self.first_line()
        delimiter = "\t" if self.kind.format == ".tsv" else _delimiter(first)
        path = str(self.path)
        csv.field_size_limit(_LONGEST_FIELD)
        with self.open(newline="") as stream:
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            try:
                header = [name.strip() for name in next(cells for cells in reader if cells)]
                check_header(header, self.path)
                rows = 0
                begin = reader.line_num + 1
                for cells in reader:
                    line, begin = begin, reader.line_num + 1
                    if not cells:
                        continue
                    rows += 1
                    if len(cells) == len(header):
                        yield Row(dict(zip(header, cells, strict=True)), Source(path, line))
                        continue
                    yield Reject(
                        path,
                        line,
                        "ragged_row",
                        f"the row has {len(cells)} fields, the header {len(header)}",
                        value=shorten(",".join(cells)),
                        remedy="put fields that hold the separator or a line's end into double quotes",
                    )
            except csv.Error as error:
                raise UserError(
                    f"not a valid table: {error}",
                    where=f"{path}:{reader.line_num}",
                    remedy='close the quotes there; a quote inside a field is written twice ("")',
                ) from None
        if not rows:
            raise UserError("the table has a header and no row", where=path, remedy="put rows into it")


def _delimiter(first: str) -> str:
    """Comma, unless the header has none and has another separator."""
    header = re.sub(r'"[^"]*"', "", first.lstrip())
    counts = {d: header.count(d) for d in ",;\t|"}
    best = max(counts, key=lambda d: counts[d])
    return best if counts[best] and not counts[","] else ","
