"""What the benchmark scripts share in the parent process: fresh children, what disturbed them, numbers as text."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
# Other programs' share of all processor time above which a child's numbers are marked as disturbed.
DISTURBED = 0.05

Settings = dict[str, Any]
Outcome = dict[str, Any]


def run_child(
    module: str,
    function: str,
    settings: Settings,
    scratch: str | Path,
    python: str = sys.executable,
    *,
    gpu: bool = False,
) -> Outcome:
    """Call ``module.function(settings)`` in a fresh process and return what it returned.

    Args:
        module: a module of this folder.
        function: takes the settings and returns a dictionary that JSON can hold.
        settings: also ``threads``, the child's OMP_NUM_THREADS.
        scratch: a folder for what parent and child tell each other.
        python: the interpreter; a peer's own, for a peer in its own environment.
        gpu: whether the child sees this machine's GPUs.

    Returns:
        the result, and ``others_share``: the share of all processor time that other programs took meanwhile.
    """
    given, returned = Path(scratch) / "given.json", Path(scratch) / "returned.json"
    given.write_text(json.dumps(settings), encoding="utf-8")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(settings["threads"]),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if python != sys.executable:
        # Another environment's packages are its own.
        environment.pop("PYTHONPATH", None)
    before = _processor_seconds()
    child = subprocess.run(
        [python, str(Path(__file__).with_name("_child.py")), module, function, str(given), str(returned)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if child.returncode:
        sys.exit(f"{child.stdout[-4000:]}\n{function} failed (status {child.returncode}); see above")
    result: Outcome = json.loads(returned.read_text(encoding="utf-8"))
    every, own, idle = (after - then for after, then in zip(_processor_seconds(), before, strict=True))
    return result | {"others_share": max(0.0, (every - idle - own) / every) if every else 0.0}


def _processor_seconds() -> tuple[float, float, float]:
    """Seconds of all processors since the machine started: in all, used by finished children, idle."""
    times = psutil.cpu_times()
    # On Linux, guests' seconds are counted in user and nice already.
    every = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    own = os.times()
    return every, own.children_user + own.children_system, times.idle + getattr(times, "iowait", 0.0)


def measure_peak(settings: Settings, scratch: str | Path) -> float:
    """The machine's matmul peak in the run's precision, in FLOP/s, measured by a child."""
    flops: float = run_child("_prepare", "peak", settings, scratch)["flops"]
    return flops


def say(text: str) -> None:
    """Progress, apart from the tables."""
    print(text, file=sys.stderr, flush=True)


def cell(values: list[float], unit: float, digits: int, suffix: str = "") -> str:
    """The median over the rounds, with its spread where there are several."""
    middle = f"{statistics.median(values) / unit:,.{digits}f}{suffix}"
    return middle if len(values) == 1 else f"{middle} ({spread(values, unit, digits)})"


def spread(values: list[float], unit: float, digits: int) -> str:
    return f"{min(values) / unit:,.{digits}f} to {max(values) / unit:,.{digits}f}"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table's lines."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
