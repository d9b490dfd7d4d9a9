"""Encoded rows on disk: written once as Arrow files, mapped into memory, found again by a later run.

A folder of the cache holds ``part-N.arrow`` (record batches of rows), ``rejects.jsonl`` and, written last,
``summary.json``. Its name is the hash of all that decides what is in it; see :func:`cache_key`.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from luthier.data.encode import EncodedExample, Encoder, WordsDiffer, mask, runs_of
from luthier.data.examples import Reject, Source, TrainingExample
from luthier.data.render import Renderer
from luthier.data.store import Chosen, digest, release, remove_work, work_folder
from luthier.errors import UserError
from luthier.runfolder import cache_root

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

_BATCH = 1_000
# Fewer rows are encoded before a process of its own has started.
_ROWS_A_PROCESS = 20_000
_KEPT_BYTES = 20 * 2**30
WORDS_DIFFER = 4
"""Exit code of a process that met :class:`luthier.data.encode.WordsDiffer`."""
_COLUMNS = ("ids", "runs", "index", "cut", "file", "line")


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
            columns["index"].append(batch.column("index").to_numpy())
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
        ids, ids_at, runs, runs_at, cut, file, line = views
        found = ids[ids_at[within] : ids_at[within + 1]]
        ends = runs[runs_at[within] : runs_at[within + 1]].tolist()
        trained = mask(zip(ends[::2], ends[1::2], strict=True), len(found))
        place = Source(self._names[part][file[within]], int(line[within])) if file[within] >= 0 else None
        return EncodedExample(found, trained, place, int(self._index[number]), int(cut[within]))


def lengths_of(rows: Sequence[EncodedExample]) -> np.ndarray:
    """``[n] int64``: tokens of each row."""
    return rows.lengths if isinstance(rows, EncodedRows) else np.array([len(row) for row in rows], dtype=np.int64)


def trained_of(rows: Sequence[EncodedExample]) -> int:
    """Trained tokens of all rows."""
    return int(rows.trained.sum()) if isinstance(rows, EncodedRows) else sum(int(row.trained.sum()) for row in rows)


def _views(batch: pa.RecordBatch) -> tuple[np.ndarray, ...]:
    """The columns of a batch as arrays over its memory."""
    views: list[np.ndarray] = []
    for name in ("ids", "runs"):
        column = batch.column(name)
        views += [column.values.to_numpy(), column.offsets.to_numpy()]
    return (*views, *(batch.column(name).to_numpy() for name in ("cut", "file", "line")))


# --- writing ---


@dataclass(frozen=True, slots=True)
class Job:
    """What one process encodes: every ``step``-th part, from ``begin`` on."""

    tokenizer: PreTrainedTokenizerBase
    renderer: dict[str, Any]
    settings: dict[str, Any]
    examples: Sequence[TrainingExample]
    folder: Path
    borders: list[int]
    """Where each part begins among the examples, and where the last one ends."""
    begin: int
    step: int

    def run(self) -> None:
        """Write the parts.

        Raises:
            WordsDiffer: see :class:`luthier.data.encode.Encoder`.
        """
        encoder = Encoder(Renderer(self.tokenizer, **self.renderer), **self.settings)
        for part in range(self.begin, len(self.borders) - 1, self.step):
            first, end = self.borders[part], self.borders[part + 1]
            _write_part(encoder.stream(self.examples[first:end], first=first), self.folder / f"part-{part}")


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
        cache: keep them for a later run; otherwise they go with the result.
        processes: how many encode together; None: one a core, for so many rows that it pays.

    Raises:
        UserError: the disk is full.
    """
    target = cache_root() / "encoded" / cache_key(encoder, examples) if cache else None
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

    renderer, tokenizer = encoder.renderer, encoder.tokenizer
    code = hashlib.blake2b(digest_size=16)
    for name in ("encode", "encoded", "words", "render", "conversations", "examples"):
        code.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    decides: dict[str, Any] = {
        "examples": digest(examples),
        "tokenizer": hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=16).hexdigest(),
        "special": sorted(map(str, tokenizer.all_special_tokens)),
        "template": tokenizer.chat_template,
        "renderer": [renderer.system, renderer.train_on, renderer.allow_special_tokens],
        "limits": [encoder.max_length, encoder.truncation],
        "code": code.hexdigest(),
        "libraries": [transformers.__version__, tokenizers.__version__],
    }
    return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=16).hexdigest()


def _write(encoder: Encoder, examples: Sequence[TrainingExample], folder: Path, processes: int | None) -> None:
    count = len(examples)
    workers = processes or min(_cores(), max(1, count // _ROWS_A_PROCESS))
    # Several parts a process, so that none waits long for another.
    parts = 1 if workers == 1 else 4 * workers
    renderer = encoder.renderer
    jobs = [
        Job(
            encoder.tokenizer,
            {k: getattr(renderer, k) for k in ("system", "train_on", "allow_special_tokens")},
            {"max_length": encoder.max_length, "truncation": encoder.truncation, "by_words": encoder.by_words},
            examples,
            folder,
            [count * n // parts for n in range(parts + 1)],
            begin,
            workers,
        )
        for begin in range(workers)
    ]
    others = [_start(job, folder / f"job-{job.begin}") for job in jobs[1:]]
    try:
        jobs[0].run()
        codes = [other.wait() for other in others]
    finally:
        for other in others:
            other.kill()
            other.wait()
    if WORDS_DIFFER in codes:
        raise WordsDiffer
    for job, code in zip(jobs[1:], codes, strict=True):
        if code:
            said = (folder / f"job-{job.begin}.err").read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"a process that encodes rows ended with {code}: {said[-4000:]}")
    listed = []
    with (folder / "rejects.jsonl").open("w", encoding="utf-8") as rejects:
        for part in range(parts):
            said = json.loads((folder / f"part-{part}.json").read_text(encoding="utf-8"))
            listed.append({"name": f"part-{part}.arrow", "files": said["files"]})
            rejects.writelines(json.dumps(reject) + "\n" for reject in said["rejects"])
    for path in (*folder.glob("job-*"), *folder.glob("part-*.json")):
        path.unlink()
    (folder / "summary.json").write_text(json.dumps({"parts": listed}), encoding="utf-8")


def _start(job: Job, path: Path) -> subprocess.Popen[bytes]:
    path.write_bytes(pickle.dumps(job))
    with path.with_suffix(".err").open("wb") as errors:
        return subprocess.Popen(
            # Not by multiprocessing, which would import the user's script anew. -P: nor modules of the user's folder.
            [sys.executable, "-P", "-m", "luthier.data.worker", str(path)],
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
        )


def _write_part(rows: Iterable[EncodedExample | Reject], path: Path) -> None:
    """``PATH.arrow`` with the rows, ``PATH.json`` with the refused ones and the names of the files."""
    import pyarrow as pa

    numbers = pa.list_(pa.int32())
    kinds = (numbers, numbers, pa.int64(), pa.int32(), pa.int32(), pa.int64())
    schema = pa.schema(list(zip(_COLUMNS, kinds, strict=True)))
    files: dict[str, int] = {}
    rejects: list[Reject] = []
    waiting: list[EncodedExample] = []

    def flush(writer: pa.RecordBatchWriter) -> None:
        runs = [np.array(runs_of(row.trained), dtype=np.int32).reshape(-1) for row in waiting]
        places = [
            (-1, 0) if (s := row.source) is None else (files.setdefault(s.file, len(files)), s.line) for row in waiting
        ]
        columns = [
            _lists([row.input_ids for row in waiting]),
            _lists(runs),
            pa.array([row.index for row in waiting], pa.int64()),
            pa.array([row.cut for row in waiting], pa.int32()),
            pa.array([file for file, _ in places], pa.int32()),
            pa.array([line for _, line in places], pa.int64()),
        ]
        writer.write_batch(pa.record_batch(columns, schema=schema))
        waiting.clear()

    with pa.OSFile(str(path.with_suffix(".arrow")), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for row in rows:
            if isinstance(row, Reject):
                rejects.append(row)
                continue
            waiting.append(row)
            if len(waiting) == _BATCH:
                flush(writer)
        if waiting:
            flush(writer)
    said = {"files": list(files), "rejects": [asdict(reject) for reject in rejects]}
    path.with_suffix(".json").write_text(json.dumps(said), encoding="utf-8")


def _lists(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    import pyarrow as pa

    ends = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(ends, np.concatenate([np.empty(0, dtype=np.int32), *arrays]))


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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
