"""What every child process of the benchmarks shares, and its entry point.

    python benchmarks/_child.py MODULE FUNCTION given.json returned.json

Standard library alone: peers run it by the Python of their own environments.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Settings = dict[str, Any]
Outcome = dict[str, Any]
Row = dict[str, Any]


def read_rows(settings: Settings) -> list[Row]:
    """The encoded rows: ``prompt``, ``answer``, ``input_ids``, ``labels`` (-100 where a token isn't trained)."""
    return [json.loads(line) for line in Path(settings["rows"]).read_text(encoding="utf-8").splitlines()]


def trained(labels: list[int]) -> int:
    """How many tokens of a row are trained."""
    return sum(label != -100 for label in labels)


def per_step(counts: Iterable[tuple[int, int]], batch: int) -> tuple[list[int], list[int]]:
    """Tokens and trained tokens of each step, from those of each row in order."""
    listed = list(counts)
    steps = [listed[i : i + batch] for i in range(0, len(listed), batch)]
    return [sum(t for t, _ in step) for step in steps], [sum(k for _, k in step) for step in steps]


def step_counts(rows: list[Row], batch: int) -> dict[str, list[int]]:
    """``tokens`` and ``trained_tokens`` of each step that takes the rows in order."""
    tokens, kept = per_step(((len(r["labels"]), trained(r["labels"])) for r in rows), batch)
    return {"tokens": tokens, "trained_tokens": kept}


def peak_memory() -> int:
    """Peak resident memory of this process so far, in bytes (VmHWM; on other systems than Linux, ru_maxrss)."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak_memory() -> None:
    """Let :func:`peak_memory` count from here on (Linux; elsewhere it goes on counting from the start)."""
    place = Path("/proc/self/clear_refs")
    if place.exists():
        place.write_text("5")


def main() -> None:
    module, function, given, returned = sys.argv[1:]
    result = getattr(importlib.import_module(module), function)(json.loads(Path(given).read_text(encoding="utf-8")))
    Path(returned).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
