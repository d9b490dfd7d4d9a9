"""Parquet and Arrow files, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from luthier.data.examples import Reject, Source
from luthier.data.readers.files import open_bytes
from luthier.data.readers.rows import Reader, Row, check_header, plain
from luthier.errors import UserError

if TYPE_CHECKING:
    import pyarrow

_BATCH = 1_000
_BUFFER = 2**20


class ArrowReader(Reader):
    """A table in Parquet, or in Arrow's own format (a stream, as data sets are saved by ``datasets``, or a file)."""

    same_columns = True

    def rows(self) -> Iterator[Row | Reject]:
        import pyarrow

        path = str(self.path)
        if self.path.stat().st_size == 0:
            raise UserError(f"{path!r} is empty", where=path, remedy="put rows into it")
        name = "Parquet" if self.path.suffix.lower() == ".parquet" else "Arrow"
        number = 0
        with open_bytes(self.path):
            pass  # One that may not be read says so in our words.
        try:
            for batch in self._parquet() if name == "Parquet" else self._arrow():
                for values in batch.to_pylist():
                    number += 1
                    yield Row({key: plain(value) for key, value in values.items()}, Source(path, number))
        except UserError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError, TypeError) as error:
            # Values that Python has no form for, such as dates before year 1, are told of by the last three.
            first = (str(error).splitlines() or [type(error).__name__])[0]
            where = f"{path}:{number + 1}" if number else path
            raise UserError(f"not a readable {name} file: {first}", where=where, remedy="write it again") from None
        if not number:
            raise UserError("the file holds no row", where=path, remedy="put rows into it")

    def _parquet(self) -> Iterator[pyarrow.RecordBatch]:
        import pyarrow.parquet

        # Through a buffer of its own for each column, a row group is never in memory as a whole.
        with pyarrow.parquet.ParquetFile(self.path, buffer_size=_BUFFER, pre_buffer=False) as file:
            check_header(file.schema_arrow.names, self.path)
            yield from file.iter_batches(batch_size=_BATCH)

    def _arrow(self) -> Iterator[pyarrow.RecordBatch]:
        import pyarrow.ipc

        with pyarrow.memory_map(str(self.path)) as mapped:
            if mapped.read(6) == b"ARROW1":
                with pyarrow.ipc.open_file(mapped) as file:
                    check_header(file.schema.names, self.path)
                    for index in range(file.num_record_batches):
                        yield from _pieces(file.get_batch(index))
                return
            mapped.seek(0)
            with pyarrow.ipc.open_stream(mapped) as stream:
                check_header(stream.schema.names, self.path)
                for batch in stream:
                    yield from _pieces(batch)


def _pieces(batch: pyarrow.RecordBatch) -> Iterator[pyarrow.RecordBatch]:
    # Bytes of a file become offsets into memory here; damaged ones would lead outside of it.
    batch.validate(full=True)
    for begin in range(0, batch.num_rows, _BATCH):
        yield batch.slice(begin, _BATCH)
