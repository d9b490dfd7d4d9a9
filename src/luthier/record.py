"""What a run writes of itself: recipe, manifest, pre-flight and refused rows, and how it ended."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from luthier.errors import FailedElsewhere, UserError
from luthier.preparation import Prepared
from luthier.runfolder import RunFolder
from luthier.training.checkpoint import writing
from luthier.training.loop import Interrupted, Outcome
from luthier.training.preflight import Preflight
from luthier.training.runlog import environment, peak_memory, write_json, write_rejects


class Record:
    """The record of one run, kept by its main process.

    Attributes:
        manifest: what ``manifest.json`` holds, or will.
    """

    def __init__(self, folder: RunFolder, ready: Prepared) -> None:
        recipe = ready.recipe
        self._folder = folder
        self._recipe = recipe
        self._rejects = ready.dataset.rejects
        self._device = ready.accelerator.device
        self.manifest: dict[str, Any] = {
            "luthier_run": 1,
            "status": "running",
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "method": recipe.method.name,
            "seed": recipe.seed,
            "model": {"name": ready.base_name, "fingerprint": ready.base_fingerprint},
            "chat_template_sha256": sha256(str(ready.tokenizer.chat_template).encode()).hexdigest(),
            "data": [_named(file) for file in ready.dataset.files],
            "data_notes": ready.dataset.notes,
            "rows": {part.name: part.summary() for part in ready.dataset.parts},
            "environment": environment(),
            "processes": ready.processes.count,
        }

    def start(self, report: Preflight) -> None:
        """Write what is known before step one."""
        path = self._folder.path
        write_json(path / "manifest.json", self.manifest)
        with writing(path):
            (path / "recipe.yaml").write_text(self._recipe.with_paths_from(Path.cwd()).to_yaml(), encoding="utf-8")
        write_rejects(path / "rejects.jsonl", self._rejects)
        write_json(path / "preflight.json", report.to_dict())

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Write how the run ended, where it does not finish."""
        try:
            yield
        except Interrupted:
            self.finish("interrupted")
            raise
        except (UserError, FailedElsewhere) as error:
            self.finish("failed", error=str(error))
            raise

    def trained(self, outcome: Outcome) -> None:
        """Keep how training went; written with the end of the run."""
        state = {k: v for k, v in asdict(outcome.state).items() if k != "course"}
        self.manifest["training"] = {
            **state,
            "stopped": outcome.stopped,
            "first_eval_loss": outcome.first_eval_loss,
            "last_loss": outcome.last_loss,
            "plan": asdict(outcome.plan),
            "peak_memory_bytes": peak_memory(self._device),
        }

    def finish(self, status: str, **more: Any) -> None:
        """Write the manifest with the run's last word."""
        self.manifest |= {"status": status, "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **more}
        write_json(self._folder.path / "manifest.json", self.manifest)


def _named(file: str) -> dict[str, str]:
    """A file and its hash; a data set of the hub has none."""
    return {"file": file, "sha256": _file_sha256(Path(file))} if Path(file).is_file() else {"file": file}


def _file_sha256(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
