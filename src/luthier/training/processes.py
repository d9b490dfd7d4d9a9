"""The processes that train one run together: how they find each other, wait, agree, and fail as one.

Tensors travel through Accelerate's process group. Everything else, waiting for the main process above all, goes
through a small key-value store of the run's own: a wait there may last for hours (the main process compares models),
hears signals, and ends when another process fails, where a collective would block until a time-out.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.errors import FailedElsewhere, UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed import Store

_LAUNCHER = "LUTHIER_LAUNCHER"  # set by `luthier train --nproc`: its process id

_VARIABLES = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_COLLECTIVE_PATIENCE = datetime.timedelta(minutes=30)
_STORE_PATIENCE = datetime.timedelta(minutes=2)
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_BUCKET = 1 << 24
"""Numbers added up in one collective: 64 MB of float32, large enough to be fast, small beside the gradients."""

# What Gloo says when a peer does not come, and what the libraries below say when its connection is gone.
_LATE = ("Timed out waiting",)
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process", "Connection refused", "NCCL")


class Processes:
    """The processes of a run, as one of them sees it. Use :meth:`join`.

    Attributes:
        index: this one's number, from 0; the main process has 0.
        count: how many there are, on all machines.
        local_count: how many there are on this machine.
    """

    _joined: Processes | None = None

    def __init__(self, index: int = 0, count: int = 1, local_count: int = 1, store: Store | None = None) -> None:
        self.index = index
        self.count = count
        self.local_count = local_count
        self._store = store
        self._meetings = 0

    @classmethod
    def join(cls) -> Processes:
        """This process among those that it was started with; alone where it was started alone.

        Raises:
            UserError: the environment names several processes and does not say how to reach them, or asks for what
                is not built.
        """
        _refuse_other_engines()
        if int(os.environ.get("WORLD_SIZE") or 1) == 1:
            return cls()
        if cls._joined is None:
            cls._joined = _join_others()
        return cls._joined

    @classmethod
    def leave(cls) -> None:
        """Let go of the others, at the end of a program."""
        if cls._joined is not None:
            cls._joined = None
            torch.distributed.destroy_process_group()

    @property
    def main(self) -> bool:
        """Whether this process prints, and writes the run folder."""
        return self.index == 0

    def wait(self) -> None:
        """Until all have come here.

        Raises:
            FailedElsewhere: another process has failed instead.
        """
        self.gather(None)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process goes first; the others follow, and find what it has made.

        Raises:
            FailedElsewhere: another process has failed.
        """
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    def gather(self, value: Any) -> list[Any]:
        """One JSON-able value of each process, in their order; all wait until all have given theirs.

        Raises:
            FailedElsewhere: another process has failed instead.
        """
        store = self._store
        if store is None:
            return [value]
        self._meetings += 1
        name = f"meeting/{self._meetings}"
        keys = [f"{name}/{i}" for i in range(self.count)]
        with _store_alive():
            store.set(keys[self.index], json.dumps(value))
            self._until(lambda: store.check(keys))
            values = [json.loads(store.get(key)) for key in keys]
            # The main process holds the store, so it is the last to leave.
            if self.main:
                self._until(lambda: store.add(f"{name}/left", 0) == self.count - 1)
                for key in (*keys, f"{name}/left"):
                    store.delete_key(key)
            else:
                store.add(f"{name}/left", 1)
        return values

    def agree(self, what: str, value: str) -> None:
        """Refuse to go on with processes that do not train the same thing.

        Raises:
            UserError: ``value`` is another one elsewhere.
        """
        values = self.gather(value)
        odd = next((i for i, other in enumerate(values) if other != values[0]), None)
        if odd is not None:
            raise UserError(
                f"process {odd} has other {what} than process 0",
                where=f"process {self.index} of {self.count}",
                remedy="give every machine the same recipe, files, model and versions",
            )

    @contextlib.contextmanager
    def telling(self, *agreed: type[BaseException]) -> Iterator[None]:
        """Make an error in one process the end of all. The first that fails keeps its error, and is the one to print.

        Args:
            agreed: exceptions that all processes raise together and that are no failure.

        Raises:
            FailedElsewhere: in the place of any error, where another process had failed before.
        """
        try:
            yield
        except BaseException as error:
            if self._store is None or isinstance(error, (FailedElsewhere, *agreed)):
                raise
            lines = str(error).strip().splitlines()
            note = f"process {self.index} failed: {lines[0] if lines else type(error).__name__}"
            lost = isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST)
            if isinstance(error, RuntimeError) and any(text in str(error) for text in _LATE):
                error = _waited_in_vain(self)
                note = f"process {self.index} failed: {error.what}"
            with _store_alive():
                if lost and not self._store.check(["failed"]):
                    raise FailedElsewhere("another process of this run ended without a word") from None
                first = self._store.compare_set("failed", "", note).decode()
            if first != note:
                raise FailedElsewhere(first, told=True) from None
            raise error

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors of one dtype by their sums over all processes, in place; every process gives the same list.

        The sum is computed once and handed out, so all get the same bits.
        """
        if self._store is None:
            return
        bucket: list[torch.Tensor] = []
        for i, tensor in enumerate(tensors):
            bucket.append(tensor)
            if sum(t.numel() for t in bucket) < _BUCKET and i + 1 < len(tensors):
                continue
            flat = torch.cat([t.reshape(-1) for t in bucket])
            torch.distributed.all_reduce(flat)
            for target, piece in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                target.copy_(piece.view_as(target))
            bucket = []

    def _until(self, done: Callable[[], bool]) -> None:
        assert self._store is not None
        pause = 0.0005
        while not done():
            if self._store.check(["failed"]):
                raise FailedElsewhere(self._store.get("failed").decode(), told=True)
            time.sleep(pause)
            pause = min(2 * pause, 0.1)


def make_accelerator(trackers: list[str], run_dir: Path) -> Accelerator:
    """Accelerate's view of devices, processes and trackers. Precision and accumulation are the recipe's alone.

    Raises:
        UserError: a tracker is unknown or not installed.
    """
    from accelerate import Accelerator

    try:
        return Accelerator(
            cpu=_only_cpus(),
            mixed_precision="no",
            log_with=trackers or None,
            project_dir=str(run_dir / "tracking"),
        )
    except ValueError as error:
        raise UserError(
            f"training.report_to={trackers}: {str(error).splitlines()[0]}",
            where="training.report_to",
            remedy="name trackers whose package is installed, or [] for none",
        ) from None


def _only_cpus() -> bool:
    """Accelerate must be told: without an accelerator it would take each of several processes for a run of its own."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not torch.accelerator.is_available()


def deepspeed_asked_for() -> bool:
    """Whether Accelerate's launcher was configured for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true")


def _refuse_other_engines() -> None:
    if deepspeed_asked_for():
        missing = importlib.util.find_spec("deepspeed") is None
        if missing or int(os.environ.get("WORLD_SIZE") or 1) == 1:
            raise UserError(
                "the Accelerate configuration asks for DeepSpeed, which "
                + ("is not installed" if missing else "divides work among processes; this run has one"),
                where="ACCELERATE_USE_DEEPSPEED",
                remedy=("pip install deepspeed" if missing else "start several")
                + ", or leave it out there; training.sharding=full divides as well",
            )
    for variable, name in (
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ):
        if os.environ.get(variable, "").lower() in ("1", "true"):
            raise UserError(
                f"the Accelerate configuration asks for {name}, which would not be used",
                where=variable,
                remedy="choose plain multi-GPU or multi-CPU there, and training.sharding=full in the recipe to divide "
                "weights, gradients and optimiser among the processes",
            )


def _join_others() -> Processes:
    from accelerate import PartialState

    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} names several processes, but {', '.join(missing)} is not set",
            where="environment",
            remedy="start with `luthier train RECIPE --nproc N`, torchrun or accelerate launch, or unset WORLD_SIZE",
        )
    _end_with_launcher()
    cpus = _only_cpus()
    local_count = int(os.environ["LOCAL_WORLD_SIZE"])
    devices = 0 if cpus else torch.accelerator.device_count()
    if not cpus and local_count > devices:
        raise UserError(
            f"{local_count} processes on a machine with {devices} devices",
            where="LOCAL_WORLD_SIZE",
            remedy=f"start at most {devices} here, or set ACCELERATE_USE_CPU=true to train on the CPU",
        )
    state = PartialState(cpu=cpus, timeout=_COLLECTIVE_PATIENCE)
    host = os.environ["MASTER_ADDR"]
    port: list[Any] = [0]
    store = None
    if state.process_index == 0:
        store = _tcp_store(host, 0, is_master=True)
        port[0] = store.port
    torch.distributed.broadcast_object_list(port, src=0, device=state.device)
    store = store or _tcp_store(host, port[0], is_master=False)
    return Processes(state.process_index, state.num_processes, local_count, store)


def _tcp_store(host: str, port: int, *, is_master: bool) -> Any:
    return torch.distributed.TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=_STORE_PATIENCE)


def ending_with_parent() -> Callable[[], Any]:
    """What a process on Linux does to get SIGTERM from the kernel when its parent is gone."""
    return functools.partial(ctypes.CDLL(None).prctl, _PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _end_with_launcher() -> None:
    """Ask the kernel for SIGTERM when `luthier train --nproc` is killed: nobody else would end this process."""
    launcher = os.environ.get(_LAUNCHER)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ending_with_parent()()
    if os.getppid() != int(launcher):
        sys.exit(128 + signal.SIGTERM)


def _waited_in_vain(processes: Processes) -> UserError:
    minutes = _COLLECTIVE_PATIENCE.total_seconds() / 60
    return UserError(
        f"another process did not come to add up gradients or hand over weights within {minutes:g} minutes",
        where=f"process {processes.index} of {processes.count}",
        remedy="see whether every process still runs and every machine is reached; --resume goes on from the last "
        "checkpoint",
    )


@contextlib.contextmanager
def _store_alive() -> Iterator[None]:
    """Where the store is gone, its holder is: the main process."""
    try:
        yield
    except RuntimeError as error:
        raise FailedElsewhere(f"process 0 of this run ended without a word ({str(error).splitlines()[0]})") from None
