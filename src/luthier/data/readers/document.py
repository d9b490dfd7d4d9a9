"""One JSON value over a whole file: a list of rows, or an object with such a list in it, read item by item."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from luthier.data.examples import Reject
from luthier.data.readers.rows import Row
from luthier.data.readers.text import TextReader
from luthier.data.readers.values import Flaw, Parser, as_row, duplicate, named
from luthier.errors import UserError

_PIECE = 2**20
_MARGIN = 16
_BLANKS = re.compile(r"[ \t\n\r]*")


class Broken(ValueError):
    """The file is no JSON; ``line`` and ``column`` count from 1."""

    def __init__(self, message: str, line: int, column: int) -> None:
        super().__init__(message)
        self.line = line
        self.column = column


class Document:
    """The text of one JSON value, taken in order; only the piece that is being read is held.

    Each part goes through Python's parser, which wants all of it. Where it fails near the end of the piece, or the end
    of a text or number isn't sure, more is read and it's tried again.
    """

    def __init__(self, stream: TextIO) -> None:
        self.parser = Parser()
        self._stream = stream
        self._text = ""
        self._at = 0
        self._ended = False
        self._line, self._column = 1, 1  # of the piece's first character
        self._value_begin = 0

    def peek(self) -> str:
        """The next character that is no blank; nothing at the end."""
        while True:
            found = _BLANKS.match(self._text, self._at)
            assert found
            self._at = found.end()
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self, characters: str, wanted: str) -> str:
        """Go past the next character, which must be one of these.

        Raises:
            Broken: it is another one.
        """
        found = self.peek()
        if not found or found not in characters:
            raise self.broken(f"Expecting {wanted}" if found else "the file ends too early")
        self._at += 1
        return found

    def value(self) -> Any:
        """The next value, whole.

        Raises:
            Broken: there is none. RecursionError: it is nested too deeply.
        """
        self.peek()
        while True:
            try:
                value, end = self.parser.scan(self._text, self._at)
            except json.JSONDecodeError as error:
                unsure = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _MARGIN
                if not (unsure and self._more()):
                    raise self.broken(error.msg, error.pos) from None
            else:
                unsure = self._text[end - 1] not in '}]"' and end >= len(self._text) - _MARGIN
                if not (unsure and self._more()):
                    self._value_begin, self._at = self._at, end
                    return value

    def items(self) -> Iterator[Any]:
        """The values of the list that begins here."""
        self.take("[", "a list")
        if self.peek() == "]":
            self._at += 1
            return
        while True:
            yield self.value()
            if self.take(",]", "',' delimiter") == "]":
                return

    def members(self) -> Iterator[str]:
        """The keys of the object that begins here; whoever asks for the next one has taken the value before."""
        self.take("{", "an object")
        if self.peek() == "}":
            self._at += 1
            return
        while True:
            if self.peek() != '"':
                raise self.broken("Expecting property name enclosed in double quotes")
            key = self.value()
            self.take(":", "':' delimiter")
            yield key
            if self.take(",}", "',' delimiter") == "}":
                return

    def flaw(self, value: Any) -> Flaw | None:
        """The first flaw inside the value taken last."""
        return self.parser.flaw(value, self._text, self._value_begin, self._at)

    def taken(self) -> str:
        """The text of the value taken last."""
        return self._text[self._value_begin : self._at]

    def end(self) -> None:
        """Raises Broken where the file goes on."""
        if self.peek():
            raise self.broken("Extra data")

    def broken(self, message: str, at: int | None = None) -> Broken:
        """An error at a place of the piece; here, where none is given."""
        at = self._at if at is None else at
        lines = self._text.count("\n", 0, at)
        column = at - self._text.rfind("\n", 0, at) if lines else self._column + at
        return Broken(message, self._line + lines, column)

    def _more(self) -> bool:
        """Drop what has been taken and read on; False at the file's end."""
        if self._ended:
            return False
        # At least as much as is held: a long item is tried a few times, not once a piece.
        piece = self._stream.read(max(_PIECE, len(self._text) - self._at))
        if not piece:
            self._ended = True
            return False
        here = self.broken("")
        self._line, self._column = here.line, here.column
        self._text, self._at = self._text[self._at :] + piece, 0
        return True


@dataclass(frozen=True, slots=True)
class Outline:
    """Where a document's rows are."""

    kind: str
    """``list``, ``object``, or what else the document is, in words."""
    under: str | None = None
    """The key of an object's rows; None: the object itself is the row."""
    flaw: Flaw | None = None
    """Why the document cannot be used although it is JSON."""


class DocumentReader(TextReader):
    """A file that is one JSON value: a list of rows, an object with the list in it, or one row."""

    def rows(self) -> Iterator[Row | Reject]:
        try:
            with self.open() as stream:
                begin = Document(stream).peek()
            found = Outline("list") if begin == "[" else self.outline()
            if found.flaw is not None:
                raise UserError(found.flaw.message, where=str(self.path), remedy="mend this value")
            if found.kind not in ("list", "object"):
                raise UserError(
                    f"the JSON holds {found.kind}, not rows",
                    where=str(self.path),
                    remedy='put a list of objects there, or {"data": [...]}',
                )
            with self.open() as stream:
                yield from self._items(Document(stream), found)
        except Broken as error:
            raise UserError(
                f"not valid JSON: {error} (column {error.column})",
                where=f"{self.path}:{error.line}",
                remedy="mend this line; a file with one object a line is called .jsonl",
            ) from None
        except RecursionError:
            raise UserError("the JSON is nested too deeply", where=str(self.path), remedy="flatten it") from None

    def _items(self, document: Document, found: Outline) -> Iterator[Row | Reject]:
        number = 0
        if found.kind == "object":
            if found.under is None:
                yield self._row(document, document.value(), 1)
                return
            for key in document.members():
                if key == found.under:
                    break
                document.value()
        for number, value in enumerate(document.items(), 1):
            yield self._row(document, value, number)
        if found.kind == "list":
            document.end()
        if not number:
            raise UserError("the file holds an empty list", where=str(self.path), remedy="put rows into it")

    def _row(self, document: Document, value: Any, number: int) -> Row | Reject:
        flaw = document.flaw(value)
        return as_row(value, flaw, str(self.path), number, document.taken() if flaw is not None else "")

    def outline(self) -> Outline:
        """Read the file to its end and say where its rows are.

        Raises:
            Broken: it is no JSON. RecursionError: it is nested too deeply.
        """
        with self.open() as stream:
            document = Document(stream)
            begin = document.peek()
            if begin == "[":
                _pass_over(document)
                found = Outline("list")
            elif begin == "{":
                found = self._outline_of_object(document)
            else:
                value = document.value()
                found = Outline(named(value), flaw=value if isinstance(value, Flaw) else None)
            document.end()
            return found

    def _outline_of_object(self, document: Document) -> Outline:
        seen: set[str] = set()
        lists: list[str] = []
        data_is_list, flaw = False, None
        for key in document.members():
            if key in seen and flaw is None:
                flaw = duplicate(key)
            seen.add(key)
            if document.peek() != "[":
                document.value()
                continue
            if _pass_over(document):
                lists.append(key)
            data_is_list |= key == "data"
        under = "data" if data_is_list else lists[0] if len(lists) == 1 else None
        # A single conversation is a row, not a list of rows under "messages".
        return Outline("object", None if under in ("messages", "conversations") else under, flaw)


def _pass_over(document: Document) -> bool:
    """Go past a list; whether its first item is an object."""
    first = False
    for number, value in enumerate(document.items()):
        first |= number == 0 and isinstance(value, dict)
    return first
