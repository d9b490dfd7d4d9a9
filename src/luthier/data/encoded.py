"""Encoded rows on disk: written once as Arrow files, mapped into memory, found again by a later run.

A folder of the cache holds ``rows-N.arrow`` (record batches of rows), ``rejects.jsonl`` and, written last,
``summary.json``. Its name is the hash of all that decides what is in it; see :func:`cache_key`.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from luthier.data.encode import EncodedExample, EncodedRow, Encoder, WordsDiffer, mask
from luthier.data.examples import Reject, Source, TrainingExample
from luthier.data.parallel import over_pieces
from luthier.data.store import Chosen, digest, release, remove_work, work_folder
from luthier.errors import UserError
from luthier.runfolder import cache_root

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

_BATCH = 1_000
_KEPT_BYTES = 20 * 2**30
_COLUMNS = ("ids", "runs", "extra", "index", "cut", "file", "line")


class EncodedRows(Sequence[EncodedExample]):
    """The rows of a folder that :func:`encode_rows` wrote.

    Attributes:
        rejects: the rows that could not be encoded.
        kept: ``[k] int64``: the numbers of the examples that were, ascending; ``index`` of a row points into these.
        lengths: ``[n] int64``: tokens of each row.
        trained: ``[n] int64``: trained tokens of each row.
    """

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        self.folder = folder
        with (folder / "rejects.jsonl").open(encoding="utf-8") as lines:
            self.rejects = [Reject(**json.loads(line)) for line in lines]
        self._names: list[list[str]] = [part["files"] for part in summary["parts"]]
        self._paths = [str(folder / part["name"]) for part in summary["parts"]]
        self._readers = [pa.ipc.open_file(pa.memory_map(path)) for path in self._paths]
        self._places = [(part, n) for part, r in enumerate(self._readers) for n in range(r.num_record_batches)]
        columns: dict[str, list[np.ndarray]] = {name: [] for name in ("lengths", "trained", "index")}
        self._ends: list[int] = []  # rows up to the end of each batch
        for _, batch in self._batches():
            columns["lengths"].append(np.diff(batch.column("ids").offsets.to_numpy()))
            runs, at = batch.column("runs").values.to_numpy(), batch.column("runs").offsets.to_numpy()
            # A run's two ends stand beside each other; what lies before them is counted twice with opposite signs.
            signed = np.concatenate([[0], np.cumsum(np.where(np.arange(len(runs)) % 2, runs, -runs))])
            columns["trained"].append(np.diff(signed[at]))
            # A copy: a view would keep the whole batch in memory.
            columns["index"].append(batch.column("index").to_numpy().copy())
            self._ends.append(len(batch) + (self._ends[-1] if self._ends else 0))
        empty = np.empty(0, dtype=np.int64)
        self.lengths, self.trained, index = (
            np.concatenate([empty, *columns[name]]).astype(np.int64) for name in ("lengths", "trained", "index")
        )
        self.kept, self._index = np.unique(index, return_inverse=True)
        self._opened: dict[int, tuple[np.ndarray, ...]] = {}

    def _batches(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Every batch in turn with its part, read and let go, so that a sweep leaves nothing in memory."""
        import pyarrow as pa

        for part, path in enumerate(self._paths):
            with pa.OSFile(path) as file, pa.ipc.open_file(file) as reader:
                for n in range(reader.num_record_batches):
                    yield part, reader.get_batch(n)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> EncodedExample: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[EncodedExample]: ...

    def __getitem__(self, index: int | slice) -> EncodedExample | Sequence[EncodedExample]:
        if isinstance(index, slice):
            return Chosen(self, np.arange(len(self))[index])
        number = range(len(self))[index]
        batch = bisect.bisect_right(self._ends, number)
        part, n = self._places[batch]
        if batch not in self._opened:
            self._opened[batch] = _views(self._readers[part].get_batch(n))
        return self._row(self._opened[batch], part, number - (self._ends[batch - 1] if batch else 0), number)

    def __iter__(self) -> Iterator[EncodedExample]:
        number = 0
        for part, batch in self._batches():
            views = _views(batch)
            for within in range(len(batch)):
                yield self._row(views, part, within, number)
                number += 1

    def _row(self, views: tuple[np.ndarray, ...], part: int, within: int, number: int) -> EncodedExample:
        ids, ids_at, runs, runs_at, extra, extra_at, cut, file, line = views
        found = ids[ids_at[within] : ids_at[within + 1]]
        ends = runs[runs_at[within] : runs_at[within + 1]].tolist()
        trained = mask(zip(ends[::2], ends[1::2], strict=True), len(found))
        place = Source(self._names[part][file[within]], int(line[within])) if file[within] >= 0 else None
        more = tuple(extra[extra_at[within] : extra_at[within + 1]].tolist())
        return EncodedExample(found, trained, place, int(self._index[number]), int(cut[within]), more)


def lengths_of(rows: Sequence[EncodedExample]) -> np.ndarray:
    """``[n] int64``: tokens of each row."""
    return rows.lengths if isinstance(rows, EncodedRows) else np.array([len(row) for row in rows], dtype=np.int64)


def trained_of(rows: Sequence[EncodedExample]) -> int:
    """Trained tokens of all rows."""
    return int(rows.trained.sum()) if isinstance(rows, EncodedRows) else sum(int(row.trained.sum()) for row in rows)


def _views(batch: pa.RecordBatch) -> tuple[np.ndarray, ...]:
    """The columns of a batch as arrays over its memory."""
    views: list[np.ndarray] = []
    for name in ("ids", "runs", "extra"):
        column = batch.column(name)
        views += [column.values.to_numpy(), column.offsets.to_numpy()]
    return (*views, *(batch.column(name).to_numpy() for name in ("cut", "file", "line")))


# --- writing ---


def encode_rows(
    encoder: Encoder,
    examples: Sequence[TrainingExample],
    *,
    cache: bool = True,
    processes: int | None = None,
) -> EncodedRows:
    """Encode rows to disk, or find them there.

    Args:
        encoder: renders and tokenises.
        examples: any number, which other processes can read (a store, or some of one).
        cache: keep them for a later run, where the tokenizer is a fast one; otherwise they go with the result.
        processes: how many encode together; None: one a core, for so many rows that it pays.

    Raises:
        UserError: the disk is full.
    """
    # Nothing tells one slow tokenizer from another for certain.
    kept = cache and encoder.tokenizer.is_fast
    target = cache_root() / "encoded" / cache_key(encoder, examples) if kept else None
    if target is not None and (target / "summary.json").is_file():
        os.utime(target)  # what was used last is thrown away last
        return EncodedRows(target)
    folder = work_folder()
    try:
        try:
            _write(encoder, examples, folder, processes)
        except WordsDiffer:
            encoder.distrust_words()
            _write(encoder, examples, folder, processes)
        if target is not None:
            folder = _put(folder, target)
            _forget(target.parent, keep=target)
    except OSError as error:
        remove_work(folder)
        raise UserError(
            f"encoded rows cannot be written: {error.strerror}",
            where=str(folder),
            remedy="make room there, or name another folder in the environment variable LUTHIER_CACHE",
        ) from None
    except BaseException:
        remove_work(folder)
        raise
    rows = EncodedRows(folder)
    if target is None:
        weakref.finalize(rows, remove_work, folder)
    return rows


def _put(folder: Path, target: Path) -> Path:
    """Rename a finished folder. Where another process was faster and wrote the same, its folder is taken."""
    target.parent.mkdir(parents=True, exist_ok=True)
    release(folder)
    for _ in range(2):
        try:
            return folder.rename(target)
        except OSError:
            if (target / "summary.json").is_file():
                shutil.rmtree(folder)
                return target
            shutil.rmtree(target, ignore_errors=True)  # half of one
    return folder


def cache_key(encoder: Encoder, examples: Iterable[TrainingExample]) -> str:
    """A hash of the rows, the tokenizer and its template, the settings of rendering, the limits, and the code."""
    import tokenizers
    import transformers

    tokenizer = encoder.tokenizer
    code = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        code.update(path.read_bytes())
    decides: dict[str, Any] = {
        "examples": digest(examples),
        "tokenizer": hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=16).hexdigest(),
        "special": sorted(map(str, tokenizer.all_special_tokens)),
        "template": tokenizer.chat_template,
        "encoder": [type(encoder).__name__, encoder.settings],
        "code": code.hexdigest(),
        "libraries": [transformers.__version__, tokenizers.__version__],
    }
    return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=16).hexdigest()


def _write(encoder: Encoder, examples: Sequence[TrainingExample], folder: Path, processes: int | None) -> None:
    write = _Writer(type(encoder), encoder.tokenizer, encoder.settings, encoder.by_words, folder)
    written = over_pieces(write, examples, processes=processes)
    with (folder / "rejects.jsonl").open("w", encoding="utf-8") as rejects:
        for piece in written:
            rejects.writelines(json.dumps(asdict(reject)) + "\n" for reject in piece.rejects)
    parts = [{"name": piece.name, "files": piece.files} for piece in written]
    (folder / "summary.json").write_text(json.dumps({"parts": parts}), encoding="utf-8")


@dataclass(slots=True)
class _Piece:
    """A file of encoded rows: its name, the names of the files that the rows come from, and the refused ones."""

    name: str
    files: list[str]
    rejects: list[Reject]


@dataclass
class _Writer:
    """Encodes pieces of the rows; sent to other processes before its encoder is made."""

    kind: type[Encoder]
    tokenizer: PreTrainedTokenizerBase
    settings: dict[str, Any]
    by_words: bool
    folder: Path

    @cached_property
    def _encoder(self) -> Encoder:
        return self.kind.made(self.tokenizer, self.settings, by_words=self.by_words)

    def __call__(self, examples: Sequence[TrainingExample], first: int) -> _Piece:
        return _write_part(self._encoder.rows(examples, first=first), self.folder / f"rows-{first}.arrow")


def _write_part(rows: Iterable[EncodedRow | Reject], path: Path) -> _Piece:
    import pyarrow as pa

    numbers = pa.list_(pa.int32())
    kinds = (numbers, numbers, numbers, pa.int64(), pa.int32(), pa.int32(), pa.int64())
    schema = pa.schema(list(zip(_COLUMNS, kinds, strict=True)))
    files: dict[str, int] = {}
    rejects: list[Reject] = []
    waiting: list[EncodedRow] = []

    def flush(writer: pa.RecordBatchWriter) -> None:
        ends = np.array([end for row in waiting for run in row.runs for end in run], dtype=np.int32)
        places = [
            (-1, 0) if (s := row.source) is None else (files.setdefault(s.file, len(files)), s.line) for row in waiting
        ]
        columns = [
            _lists([len(row.input_ids) for row in waiting], np.concatenate([row.input_ids for row in waiting])),
            _lists([2 * len(row.runs) for row in waiting], ends),
            _lists([len(row.extra) for row in waiting], np.array([n for row in waiting for n in row.extra], np.int32)),
            pa.array([row.index for row in waiting], pa.int64()),
            pa.array([row.cut for row in waiting], pa.int32()),
            pa.array([file for file, _ in places], pa.int32()),
            pa.array([line for _, line in places], pa.int64()),
        ]
        writer.write_batch(pa.record_batch(columns, schema=schema))
        waiting.clear()

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for row in rows:
            if isinstance(row, Reject):
                rejects.append(row)
                continue
            waiting.append(row)
            if len(waiting) == _BATCH:
                flush(writer)
        if waiting:
            flush(writer)
    return _Piece(path.name, list(files), rejects)


def _lists(lengths: Sequence[int], values: np.ndarray) -> pa.ListArray:
    import pyarrow as pa

    return pa.ListArray.from_arrays(np.cumsum([0, *lengths], dtype=np.int32), values)


def _forget(folder: Path, *, keep: Path) -> None:
    """Remove what was used longest ago, above 20 GiB in all."""
    sizes = []
    for entry in folder.iterdir():
        with contextlib.suppress(OSError):
            sizes.append((entry.stat().st_mtime, sum(f.stat().st_size for f in entry.iterdir()), entry))
    total = sum(size for _, size, _ in sizes)
    for _, size, entry in sorted(sizes):
        if total <= _KEPT_BYTES:
            break
        if entry != keep:
            shutil.rmtree(entry, ignore_errors=True)
            total -= size
