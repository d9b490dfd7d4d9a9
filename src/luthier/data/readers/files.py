"""Files as they lie on disk: their kind, by name, and their bytes, unpacked."""

from __future__ import annotations

import gzip
import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from luthier.errors import UserError

TEXTS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
FORMATS = (*TEXTS, ".parquet", ".arrow", ".xlsx")
PACKED = (".gz", ".zst")
_PIECE = 2**20


@dataclass(frozen=True, slots=True)
class Kind:
    """What a file's name says of it."""

    format: str
    """One of :data:`FORMATS`."""
    packing: str = ""
    """One of :data:`PACKED`, or nothing."""


def kind_of(path: Path) -> Kind | None:
    """A file's kind; None where its name is of none that can be read."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        return Kind(suffixes[-2], suffixes[-1]) if len(suffixes) > 1 and suffixes[-2] in TEXTS else None
    return Kind(suffixes[-1]) if suffixes and suffixes[-1] in FORMATS else None


def check_file(path: Path) -> Kind:
    """The kind of a file that is to be read.

    Raises:
        UserError: it does not exist, is a folder, or is of no known kind.
    """
    if not path.exists():
        near = [p.name for p in path.parent.glob("*") if kind_of(p)] if path.parent.is_dir() else []
        hint = f"; its folder has {', '.join(sorted(near)[:5])}" if near else ""
        raise UserError(f"the file {str(path)!r} does not exist", where=str(path), remedy=f"check the path{hint}")
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder", where=str(path), remedy="name the files in it, one by one")
    kind = kind_of(path)
    if kind is None:
        packed = path.suffix.lower() in PACKED
        known = ", ".join(TEXTS if packed else FORMATS)
        raise UserError(
            f"{path.name!r} is of no known kind",
            where=str(path),
            remedy=f"unpack it, or name what is packed: {known}" if packed else f"rename or convert it: {known}",
        )
    return kind


class _Checked(io.RawIOBase):
    """A file's content. A disk that fails, and an archive that is broken or cut short, are a :class:`UserError` where
    they are met."""

    def __init__(self, inner: Any, path: Path, packing: str) -> None:
        self._inner = inner
        self._path = path
        self._packing = packing

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        try:
            piece = self._inner.read(len(view))
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(
                f"{self._path.name!r} cannot be {'unpacked' if self._packing else 'read'}: {str(error).rstrip('.')}",
                where=str(self._path),
                remedy="copy or pack it again; it is broken or cut short" if self._packing else "check the disk",
            ) from None
        view[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self._inner.close()
        super().close()


def open_bytes(path: Path, packing: str = "") -> BinaryIO:
    """A file's bytes as a stream, unpacked.

    Raises:
        UserError: it cannot be read; while reading: the archive is broken.
    """
    try:
        inner: Any = path.open("rb", buffering=0 if not packing else _PIECE)
    except OSError as error:
        raise UserError(
            f"{str(path)!r} cannot be read: {error.strerror}", where=str(path), remedy="check the file's permissions"
        ) from None
    if packing == ".gz":
        inner = gzip.GzipFile(fileobj=inner)
    elif packing == ".zst":
        import pyarrow  # reads Zstandard, which Python does from 3.14 on

        inner = pyarrow.input_stream(inner, compression="zstd", buffer_size=_PIECE)
    return io.BufferedReader(_Checked(inner, path, packing), _PIECE)
