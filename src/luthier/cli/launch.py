"""``luthier train --nproc N``: N processes on this machine, one voice, one end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from types import FrameType
from typing import IO, Any

from luthier.data.parallel import cores
from luthier.errors import UserError

LAUNCHER = "LUTHIER_LAUNCHER"
"""Environment variable of the children: this process's id. They end with it, and leave it to say who was lost."""

FAILED_ELSEWHERE = 3
"""Exit code of a process that ended because another one failed; see :class:`luthier.errors.FailedElsewhere`."""

GRACE = 20.0
"""Seconds that the others get to end by themselves once one has ended badly."""

_INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


def launch(arguments: list[str], count: int) -> int:
    """Run ``luthier ARGUMENTS`` in ``count`` processes and wait for them.

    Ctrl-C, SIGTERM and SIGHUP are handed to all of them, so that they stop together after saving a checkpoint. Where
    one fails, the others are ended and its message is shown; the main process writes to this terminal itself.

    Returns:
        the exit code: 0, or that of the process that failed.

    Raises:
        UserError: started inside another launcher.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError(
            "--nproc inside another launcher would start processes in each of its processes",
            where="--nproc",
            remedy="leave --nproc out under torchrun and accelerate launch",
        )
    shared = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        LAUNCHER: str(os.getpid()),
    }
    shared.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
    children: list[subprocess.Popen[bytes]] = []
    with _logs(count) as logs, _forwarding(children):
        for index, log in enumerate(logs):
            children.append(
                subprocess.Popen(
                    # -P: a yaml.py of the user's, in the folder where luthier runs, is not ours to import.
                    [sys.executable, "-P", "-m", "luthier.cli", *arguments],
                    env={**shared, "RANK": str(index), "LOCAL_RANK": str(index)},
                    stdout=None if log is None else subprocess.DEVNULL,
                    stderr=log,
                    # Not in the terminal's group: Ctrl-C reaches the children once, from here.
                    start_new_session=True,
                )
            )
        failed = _wait(children)
        if failed is None:
            return 0
        code = children[failed].returncode
        if code not in _INTERRUPTED:
            _tell(failed, code, count, logs[failed])
    return code if code > 0 else 128 - code


def _wait(children: list[subprocess.Popen[bytes]]) -> int | None:
    """Until all have ended; returns the one to blame, if any: the first that failed by itself."""
    blamed: int | None = None
    deadline: float | None = None
    while any(child.poll() is None for child in children):
        for index, child in enumerate(children):
            bad = child.returncode not in (None, 0)
            if bad and (blamed is None or children[blamed].returncode == FAILED_ELSEWHERE != child.returncode):
                blamed = index
                deadline = deadline or time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            _end(children)
            break
        time.sleep(0.05)
    codes = [child.wait() for child in children]
    if blamed is None or codes[blamed] == FAILED_ELSEWHERE:
        own = [i for i, code in enumerate(codes) if code not in (0, FAILED_ELSEWHERE)]
        blamed = own[0] if own else next((i for i, code in enumerate(codes) if code), None)
    return blamed


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    """End those that are left: they wait for a process that is no more."""
    for stop in (subprocess.Popen.terminate, subprocess.Popen.kill):
        for child in children:
            if child.poll() is None:
                stop(child)
        until = time.monotonic() + 3
        while time.monotonic() < until and any(child.poll() is None for child in children):
            time.sleep(0.05)


def _tell(index: int, code: int, count: int, log: IO[bytes] | None) -> None:
    """Say what the failed process could not say on this terminal."""
    if log is not None and code not in (-signal.SIGKILL, -signal.SIGTERM):
        log.seek(0)
        sys.stderr.write(log.read().decode("utf-8", "replace")[-8000:])
    if code < 0:
        name = signal.Signals(-code).name
        memory = "; the system kills so where memory runs out" if -code == signal.SIGKILL else ""
        sys.stderr.write(f"error: process {index} of {count} was ended by {name}{memory}; --resume goes on\n")
    sys.stderr.flush()


@contextlib.contextmanager
def _logs(count: int) -> Iterator[list[IO[bytes] | None]]:
    """Where each process writes its errors: the main one to this terminal, the others where only a failure shows."""
    with contextlib.ExitStack() as stack:
        yield [None, *(stack.enter_context(tempfile.TemporaryFile()) for _ in range(count - 1))]


@contextlib.contextmanager
def _forwarding(children: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Hand signals to the children; a third one ends them at once."""
    received = 0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received += 1
        if received > 2:
            number = signal.SIGKILL
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    before: dict[int, Any] = {
        number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        _end(children)
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
