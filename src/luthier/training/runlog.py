"""The run folder's record: metrics.jsonl, rejects.jsonl, manifest.json, and the trackers of Accelerate."""

from __future__ import annotations

import json
import platform
import resource
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.examples import Reject
from luthier.training.checkpoint import writing

if TYPE_CHECKING:
    import torch

_PACKAGES = ("luthier", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy")


class MetricsLog:
    """``metrics.jsonl``: one line a record, flushed as it is written.

    Args:
        path: the file; appended to.
        resume_step: drop records past this step, written before an interruption that lost them.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        self.path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [] if resume_step is None else [r for r in read_metrics(path) if r["step"] <= resume_step]
            aside = path.with_suffix(".writing")
            aside.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
            aside.replace(path)
            self._stream = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Add a record; numbers that JSON cannot hold (NaN, infinities) are written as strings."""
        with writing(self.path):
            self._stream.write(json.dumps({k: _plain(v) for k, v in record.items()}) + "\n")
            self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; a last line that was cut off by a kill is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def write_rejects(path: Path, rejects: Iterable[Reject]) -> None:
    """``rejects.jsonl``: every refused row with file, line, field, value, reason and remedy."""
    lines = [json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rejects]
    with writing(path):
        path.write_text("".join(lines), encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """A JSON file, written aside and renamed."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.writing")
        aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        aside.replace(path)


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use at a time so far: of the GPU's memory, else of this process's."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def environment() -> dict[str, Any]:
    """Versions and hardware that a run's numbers depend on."""
    import torch

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": gpus,
        "versions": versions,
    }
