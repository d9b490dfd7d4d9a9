"""One function over many rows, by several processes."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from luthier.data.store import remove_work, work_folder

T = TypeVar("T")
R = TypeVar("R")

# Fewer rows are done before a process of its own has started.
_ROWS_A_PROCESS = 20_000
# Pieces for each process, so that none waits long for another.
_PIECES = 4


def over_pieces(
    function: Callable[[Sequence[T], int], R], rows: Sequence[T], *, processes: int | None = None
) -> list[R]:
    """What a function makes of each piece of the rows, in order.

    Args:
        function: takes a piece and the number of its first row; it and its results can be pickled.
        rows: can be read by other processes of this machine, as a store can.
        processes: how many work together; None: one a core, for so many rows that it pays.

    Raises:
        Exception: what the function raised in any process.
    """
    count = len(rows)
    workers = processes or min(cores(), max(1, count // _ROWS_A_PROCESS))
    pieces = 1 if workers == 1 else _PIECES * workers
    borders = [count * n // pieces for n in range(pieces + 1)]

    def work(worker: int) -> dict[int, R]:
        return {n: function(rows[borders[n] : borders[n + 1]], borders[n]) for n in range(worker, pieces, workers)}

    if workers == 1:
        return list(work(0).values())
    folder = work_folder()
    others = []
    try:
        for worker in range(1, workers):
            own = [(n, borders[n], rows[borders[n] : borders[n + 1]]) for n in range(worker, pieces, workers)]
            others.append(_start(pickle.dumps((function, own)), folder / f"job-{worker}"))
        results = work(0)
        for worker, other in enumerate(others, 1):
            other.wait()
            results |= _result(folder / f"job-{worker}")
    finally:
        for other in others:
            other.kill()
            other.wait()
        remove_work(folder)
    return [results[n] for n in range(pieces)]


def _start(job: bytes, path: Path) -> subprocess.Popen[bytes]:
    path.write_bytes(job)
    with path.with_suffix(".said").open("wb") as said:
        return subprocess.Popen(
            # Not by multiprocessing, which would import the user's script anew. -P: nor modules of the user's folder.
            [sys.executable, "-P", "-m", "luthier.data.parallel", str(path)],
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )


def _result(job: Path) -> dict[int, R]:
    made = job.with_suffix(".made")
    if not made.is_file():
        said = job.with_suffix(".said").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"a process that works on rows has ended without a result (out of memory?): {said[-4000:]}")
    results, error, trace = pickle.loads(made.read_bytes())
    if error is not None:
        raise error from RuntimeError(trace)
    return dict(results)


def _run(job: Path) -> None:
    """What another process does."""
    outcome: tuple[dict[int, object], Exception | None, str] = ({}, None, "")
    function, pieces = pickle.loads(job.read_bytes())
    try:
        outcome = ({number: function(rows, first) for number, first, rows in pieces}, None, "")
    except Exception as error:
        outcome = ({}, error, traceback.format_exc())
    made = job.with_suffix(".made")
    aside = made.with_suffix(".part")
    aside.write_bytes(pickle.dumps(outcome))
    aside.rename(made)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    _run(Path(sys.argv[1]))
