"""Examples on disk: a sequence of any length in constant memory."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pickle
import shutil
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, overload

import numpy as np

from luthier.data.examples import Source, TrainingExample
from luthier.runfolder import cache_root

T = TypeVar("T")
_BLOCK = 1 << 20


class Chosen(Sequence[T], Generic[T]):
    """Some items of a sequence, in an order of their own; nothing is copied.

    Args:
        base: where they are.
        numbers: ``[n] int``: which ones; one may come several times.
    """

    def __init__(self, base: Sequence[T], numbers: np.ndarray) -> None:
        numbers = np.asarray(numbers, dtype=np.int64)
        self.base: Sequence[T] = base
        self.numbers = numbers
        if isinstance(base, Chosen):
            self.base, self.numbers = base.base, base.numbers[numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return Chosen(self.base, self.numbers[index])
        return self.base[int(self.numbers[index])]

    def __iter__(self) -> Iterator[T]:
        if len(self.numbers) == len(self.base) and (self.numbers == np.arange(len(self.base))).all():
            return iter(self.base)
        return (self.base[number] for number in self.numbers.tolist())


class Joined(Sequence[T], Generic[T]):
    """Two sequences, one after the other; nothing is copied."""

    def __init__(self, first: Sequence[T], second: Sequence[T]) -> None:
        self.first = first
        self.second = second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return Chosen(self, np.arange(len(self))[index])
        number = range(len(self))[index]
        border = len(self.first)
        return self.first[number] if number < border else self.second[number - border]

    def __iter__(self) -> Iterator[T]:
        yield from self.first
        yield from self.second


class ExampleStore(Sequence[TrainingExample]):
    """Examples in a file of their own, which goes when the store does.

    A row is read when it is asked for. What is kept in memory is eight bytes a row, and the files' names.
    """

    def __init__(self, examples: Iterable[TrainingExample] = ()) -> None:
        self._folder = work_folder()
        self._remove = weakref.finalize(self, remove_work, self._folder)
        self._path = self._folder / "examples"
        self._stream: IO[bytes] = self._path.open("w+b")
        self._begins = array("q", [0])
        self._files: dict[str, int] = {}
        self._names: list[str] = []
        self._buffer = bytearray()
        for example in examples:
            self.append(example)

    def append(self, example: TrainingExample) -> None:
        """Add an example at the end."""
        source = example.source
        place = None
        if source is not None:
            number = self._files.setdefault(source.file, len(self._files))
            if number == len(self._names):
                self._names.append(source.file)
            place = (number, source.line)
        row = (
            *(example.input, example.output, example.label, example.metadata, str(example.task_type)),
            *(example.messages, example.tools, example.references, place),
        )
        record = pickle.dumps(row, protocol=5)
        self._buffer += record
        self._begins.append(self._begins[-1] + len(record))
        if len(self._buffer) > _BLOCK:
            self._flush()

    def _flush(self) -> None:
        self._stream.write(self._buffer)
        self._stream.flush()
        self._buffer = bytearray()

    def __len__(self) -> int:
        return len(self._begins) - 1

    @overload
    def __getitem__(self, index: int) -> TrainingExample: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[TrainingExample]: ...

    def __getitem__(self, index: int | slice) -> TrainingExample | Sequence[TrainingExample]:
        if isinstance(index, slice):
            return Chosen(self, np.arange(len(self))[index])
        number = range(len(self))[index]
        if self._buffer:
            self._flush()
        begin, end = self._begins[number], self._begins[number + 1]
        return self._example(os.pread(self._stream.fileno(), end - begin, begin))

    def __iter__(self) -> Iterator[TrainingExample]:
        if self._buffer:
            self._flush()
        number, count = 0, len(self)
        while number < count:
            begin = self._begins[number]
            block = memoryview(os.pread(self._stream.fileno(), max(_BLOCK, self._begins[number + 1] - begin), begin))
            while number < count and self._begins[number + 1] - begin <= len(block):
                yield self._example(block[self._begins[number] - begin : self._begins[number + 1] - begin])
                number += 1

    def _example(self, record: bytes | memoryview) -> TrainingExample:
        *values, place = pickle.loads(record)
        made = TrainingExample(*values)
        made.source = None if place is None else Source(self._names[place[0]], place[1])
        return made

    def __getstate__(self) -> dict[str, Any]:
        """For another process of this machine: it reads the same file, which stays this store's."""
        if self._buffer:
            self._flush()
        return {"path": self._path, "begins": self._begins, "names": self._names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._path, self._begins, self._names = state["path"], state["begins"], state["names"]
        self._files = {name: number for number, name in enumerate(self._names)}
        self._stream = self._path.open("rb")
        self._buffer = bytearray()


_locks: dict[Path, IO[bytes]] = {}


def work_folder() -> Path:
    """A new folder for what does not fit in memory. It is in the cache, for the system's own may be memory.

    Folders that processes left behind when they were killed are removed: their locks went with them.
    """
    root = cache_root() / "work"
    root.mkdir(parents=True, exist_ok=True)
    for left in root.iterdir():
        with contextlib.suppress(OSError), (left / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=root))
    # Made aside and moved in once it is locked, so that nobody finds it free.
    held = (root / f".{folder.name}").open("wb")
    fcntl.flock(held, fcntl.LOCK_EX)
    Path(held.name).rename(folder / "lock")
    _locks[folder] = held
    return folder


def release(folder: Path) -> None:
    """Take the lock off a work folder, which is to be removed or put elsewhere."""
    lock = _locks.pop(folder, None)
    if lock is not None:
        (folder / "lock").unlink(missing_ok=True)
        lock.close()


def remove_work(folder: Path) -> None:
    """Remove a work folder."""
    release(folder)
    shutil.rmtree(folder, ignore_errors=True)


def digest(examples: Iterable[TrainingExample]) -> str:
    """A hash of all that examples hold and that encoding them depends on, their places included."""
    state = hashlib.blake2b(digest_size=16)
    for e in examples:
        source = None if e.source is None else (e.source.file, e.source.line)
        state.update(json.dumps([e.input, e.output, e.messages, e.tools, source], default=repr).encode())
    return state.hexdigest()
