"""Bytes to text: which encoding a file is in, told from all of its bytes in one pass that keeps none of them."""

from __future__ import annotations

import codecs
import io
import itertools
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, TextIO

from luthier.data.readers.files import Kind, open_bytes
from luthier.data.readers.rows import Reader
from luthier.errors import UserError

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_PIECE = 2**20
_SAMPLE = 10_000


class TextReader(Reader):
    """A file of text, in whichever encoding it is."""

    def __init__(self, path: Path, kind: Kind, encoding: str | None = None) -> None:
        super().__init__(path)
        self.kind = kind
        self._encoding = encoding

    @property
    def encoding(self) -> str:
        if self._encoding is None:
            self._encoding = find_encoding(self.path, self.kind.packing)
        return self._encoding

    def open(self, newline: str | None = None) -> TextIO:
        """The text as a stream, with the ends of lines read as ``io.open`` does for ``newline``."""
        encoding = "utf-8-sig" if self.encoding == "utf-8" else self.encoding
        return io.TextIOWrapper(open_bytes(self.path, self.kind.packing), encoding=encoding, newline=newline)

    def first_line(self, limit: int = 2**24) -> tuple[str, bool]:
        """The first line that holds more than blanks (or so many characters of it), and whether another follows.

        Raises:
            UserError: there is none.
        """
        with self.open() as stream:
            lines = (line for line in iter(lambda: stream.readline(limit), "") if not line.isspace())
            first = next(lines, None)
            if first is None:
                raise UserError(f"{str(self.path)!r} is empty", where=str(self.path), remedy="put rows into it")
            return first, next(lines, None) is not None


def find_encoding(path: Path, packing: str = "") -> str:
    """The encoding of a file's text, all of which is checked.

    Decided in this order: a byte order mark; strict UTF-8; UTF-16 without a mark, told by its zero bytes; strict
    GB18030.

    Raises:
        UserError: it is in none of them.
    """
    with closing(open_bytes(path, packing)) as stream:
        head = stream.read(2000)
    for mark, encoding in _BOMS:
        if head.startswith(mark):
            return _checked(path, packing, encoding)
    with closing(open_bytes(path, packing)) as stream:
        refused = _first_not_utf8(stream)
    if refused is None:
        return "utf-8"
    for encoding, zeros in (("utf-16-le", head[1::2]), ("utf-16-be", head[0::2])):
        if len(zeros) > 1 and zeros.count(0) > 0.2 * len(zeros):
            return _checked(path, packing, encoding)
    with closing(open_bytes(path, packing)) as stream:
        if _is_gb18030(stream):
            return "gb18030"
    place, value, line = refused
    raise UserError(
        f"{path.name!r} is neither UTF-8, UTF-16 nor GB18030: byte {place:,} is {value:#04x}",
        where=f"{path}:{line}",
        remedy="save it as UTF-8",
    )


def _pieces(stream: BinaryIO) -> Iterator[bytes]:
    while piece := stream.read(_PIECE):
        yield piece


def _first_not_utf8(stream: BinaryIO) -> tuple[int, int, int] | None:
    """Position, value and line (from 1) of the first byte that is not UTF-8; else those of the first zero byte."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    before, lines = 0, 1
    zero: tuple[int, int, int] | None = None
    for piece in itertools.chain(_pieces(stream), (b"",)):
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            place = before - pending + error.start
            # The bytes that were pending are part of a character, so no line ends in them.
            return place, error.object[error.start], lines + piece.count(b"\n", 0, max(0, error.start - pending))
        if zero is None and (at := piece.find(b"\0")) >= 0:
            zero = before + at, 0, lines + piece.count(b"\n", 0, at)
        before += len(piece)
        lines += piece.count(b"\n")
    return zero


def _is_gb18030(stream: BinaryIO) -> bool:
    """Whether a text can be GB18030 and is likely to have been written in it.

    Nearly every pair of bytes is a character there, so Big5 and Shift-JIS decode too: the one to private-use
    characters, the other to characters that hardly any Chinese text has (those outside GB2312).
    """
    decoder = codecs.getincrementaldecoder("gb18030")()
    sample = ""
    for piece in itertools.chain(_pieces(stream), (b"",)):
        if b"\0" in piece:
            return False
        try:
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError:
            return False
        if len(sample) < _SAMPLE:
            sample = (sample + "".join(c for c in text if not c.isascii()))[:_SAMPLE]
    if any("\ue000" <= c <= "\uf8ff" for c in sample):
        return False
    return len(sample.encode("gb2312", "ignore")) / 2 >= 0.1 * len(sample)


def _checked(path: Path, packing: str, encoding: str) -> str:
    """The encoding, once all of the file has been read in it.

    Raises:
        UserError: the file breaks it somewhere.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    before, lines = 0, 1
    with closing(open_bytes(path, packing)) as stream:
        if encoding == "utf-8":
            before = len(stream.read(len(codecs.BOM_UTF8)))
        for piece in itertools.chain(_pieces(stream), (b"",)):
            pending = len(decoder.getstate()[0])
            try:
                lines += decoder.decode(piece, final=not piece).count("\n")
            except UnicodeDecodeError as error:
                whole = error.object[: error.start].decode(encoding, "ignore")
                raise UserError(
                    f"{path.name!r} begins like {encoding} and breaks at byte {before - pending + error.start:,}: "
                    f"{error.reason}",
                    where=f"{path}:{lines + whole.count(chr(10))}",
                    remedy="save it as UTF-8",
                ) from None
            before += len(piece)
    return encoding
