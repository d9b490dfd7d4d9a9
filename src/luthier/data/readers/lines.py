"""JSONL: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

from luthier.data.examples import Reject
from luthier.data.readers.rows import Row
from luthier.data.readers.text import TextReader
from luthier.data.readers.values import Parser, as_row
from luthier.errors import shorten


class LinesReader(TextReader):
    """A file of JSON objects, one a line."""

    def rows(self) -> Iterator[Row | Reject]:
        parser, path = Parser(), str(self.path)
        for number, line in self._lines():
            yield _row(parser, line, path, number)

    def columns(self, enough: Collection[str] = ()) -> list[str] | None:
        import msgspec

        # Far faster than reading the rows: values are skipped. A line with no key that is new adds nothing, whether or
        # not it is a row; any other is read in full.
        keys = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
        parser, wanted = Parser(), set(enough)
        seen: dict[str, None] | None = None
        for number, line in self._lines():
            if seen is not None:
                try:
                    if keys(line).keys() <= seen.keys():
                        continue
                except (msgspec.DecodeError, RecursionError):
                    pass  # Reading it in full decides.
            row = _row(parser, line, "", number)
            if isinstance(row, Row):
                seen = {**(seen or {}), **dict.fromkeys(row.values)}
                if wanted and wanted <= seen.keys():
                    break
        return None if seen is None else list(seen)

    def _lines(self) -> Iterator[tuple[int, str]]:
        # Not splitlines(): a U+2028 inside a JSON string is no line's end.
        with self.open() as stream:
            for number, line in enumerate(stream, 1):
                if not line.isspace():
                    yield number, line


def _row(parser: Parser, line: str, path: str, number: int) -> Row | Reject:
    try:
        value = parser.whole(line)
        return as_row(value, parser.flaw(value, line), path, number, line)
    except json.JSONDecodeError as error:
        near = line[max(0, error.pos - 20) : error.pos + 20].strip()
        return Reject(
            path,
            number,
            "bad_json",
            f"not valid JSON: {error.msg} at column {error.colno}, near {shorten(near)}",
            value=shorten(line.strip()),
            remedy="mend this line: each line is one whole JSON object",
        )
    except RecursionError:
        return Reject(path, number, "bad_json", "the JSON is nested too deeply", remedy="flatten it")
