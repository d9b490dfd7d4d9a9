"""Rows of a Hugging Face data set, streamed through the ``datasets`` library where it's installed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from luthier.data.examples import Reject, Source
from luthier.data.readers import Reader, Row
from luthier.data.readers.rows import plain
from luthier.errors import UserError

_PEEK = 1_000


class HubReader(Reader):
    """A split of a data set on the hub. Rows are numbered from 1.

    Args:
        name: OWNER/NAME, or whatever else ``datasets.load_dataset`` takes.
        subset: its configuration; None: the only one.
        split: train, test, …
    """

    def __init__(self, name: str, subset: str | None = None, split: str = "train") -> None:
        super().__init__(Path(f"hub:{name}"))
        self.name = name
        self.subset = subset
        self.split = split

    def rows(self) -> Iterator[Row | Reject]:
        number = 0
        rows = iter(self._open())
        while True:
            try:
                values = next(rows)
            except StopIteration:
                break
            except Exception as error:  # Whatever a network, a server or a file there may break.
                raise self._failed(error, f"{self.path}:{number + 1}") from None
            number += 1
            yield Row({key: plain(value) for key, value in values.items()}, Source(str(self.path), number))
        if not number:
            raise UserError("the split holds no row", where=str(self.path), remedy="name another data.train.split")

    def columns(self, enough: Collection[str] = ()) -> list[str] | None:
        """As told by the data set, else those of its first thousand rows: to read all of it twice would be to
        download it twice."""
        told = self._open().column_names
        if told is not None:
            return list(told)
        seen: dict[str, None] = {}
        for number, row in enumerate(self.rows(), 1):
            if isinstance(row, Row):
                seen.update(dict.fromkeys(row.values))
            if number == _PEEK:
                break
        return list(seen)

    def _open(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"{self.path} is read through the library datasets, which isn't installed",
                where=str(self.path),
                remedy="pip install datasets, or download the files and name their folder",
            ) from None
        try:
            # Pictures and sounds stay as they are stored.
            return datasets.load_dataset(self.name, self.subset, split=self.split, streaming=True).decode(False)
        except Exception as error:  # Of its own, of the hub's client, of the network, of the files' formats.
            raise self._failed(error, str(self.path)) from None

    def _failed(self, error: Exception, where: str) -> UserError:
        import datasets

        first = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, (FileNotFoundError, datasets.exceptions.DatasetNotFoundError)):
            remedy = "check the name, and the network; a gated data set wants `hf auth login`"
        elif isinstance(error, ValueError):
            remedy = "name the configuration as the source's subset, and the split as its split"
        else:
            remedy = "check the network and try again, or download the files and name their folder"
        return UserError(f"the data set {self.name!r} cannot be read: {first}", where=where, remedy=remedy)
