"""The run folder: what may be written where, what it says of itself, and how a finished run is told from half of one.

``recipe.yaml`` (resolved), ``manifest.json`` (status, versions, seed, hashes), ``preflight.json``, ``metrics.jsonl``,
``rejects.jsonl``, ``checkpoints/step-N/``, ``adapter/`` or ``model/``, ``merged/``, ``int8/`` and other quantised
models, ``evaluation/*.json``, ``report.html``, ``report.json`` and ``report.md``.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.errors import UserError

QUANTIZED = ("int8", "int4", "nf4", "float16", "bfloat16")
"""Folders of a run's quantised models."""
_OURS = (
    "recipe.yaml",
    "manifest.json",
    "preflight.json",
    "metrics.jsonl",
    "rejects.jsonl",
    "checkpoints",
    "adapter",
    "model",
    "merged",
    *QUANTIZED,
    "evaluation",
    "report.html",
    "report.json",
    "report.md",
    "tracking",
)


def cache_root() -> Path:
    """Where Luthier keeps what it can make again: ``$LUTHIER_CACHE``, else ``~/.cache/luthier``."""
    root = os.environ.get("LUTHIER_CACHE")
    if root:
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "luthier"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run's folder."""

    path: Path

    @property
    def manifest(self) -> dict[str, Any]:
        """``manifest.json``; empty where there is none or it cannot be read."""
        try:
            content = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    @property
    def finished(self) -> bool:
        return self.manifest.get("status") == "finished"

    @property
    def saved(self) -> Path:
        """The folder of the tuned weights: ``adapter/`` or ``model/``."""
        return self.path / ("adapter" if (self.path / "adapter").is_dir() else "model")

    def claim(self, *, resume: bool, overwrite: bool) -> None:
        """Make the folder ready for a run; what an earlier run left stays until :meth:`clear`.

        Raises:
            UserError: the folder holds something else, or an earlier run that was not asked to be resumed or replaced.
        """
        path = self.path
        if path.exists() and not path.is_dir():
            raise UserError(f"output_dir {str(path)!r} is a file", where="output_dir", remedy="name a folder")
        if path.is_dir() and any(path.iterdir()):
            if not self.manifest:
                raise UserError(
                    f"output_dir {str(path)!r} is not empty and holds no run of Luthier's",
                    where="output_dir",
                    remedy="name a new folder; nothing in it was touched",
                )
            if not resume and not overwrite:
                state = "a finished run" if self.finished else "an unfinished run"
                raise UserError(
                    f"output_dir {str(path)!r} holds {state}",
                    where="output_dir",
                    remedy="--resume goes on with it, --overwrite replaces it, or name another output_dir",
                )
        elif resume:
            raise UserError(
                f"there is no run to resume in {str(path)!r}", where="output_dir", remedy="start it without --resume"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"output_dir {str(path)!r} cannot be made: {error.strerror}",
                where="output_dir",
                remedy="name a folder that you may write to",
            ) from None

    def clear(self) -> None:
        """Remove an earlier run's own files, and nothing else."""
        for name in _OURS:
            entry = self.path / name
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)

    @classmethod
    def of(cls, path: str | Path) -> RunFolder:
        """A finished run's folder.

        Raises:
            UserError: there is none, or the run is not finished.
        """
        folder = cls(Path(path).expanduser())
        if not folder.path.is_dir():
            raise UserError(f"there is no folder {str(path)!r}", remedy="name the output_dir of a run")
        if not folder.manifest:
            raise UserError(f"{str(path)!r} holds no run of Luthier's", remedy="name the output_dir of a run")
        if not folder.finished:
            raise UserError(
                f"the run in {str(path)!r} is not finished (status: {folder.manifest.get('status')})",
                remedy="finish it with `luthier train RECIPE --resume`",
            )
        return folder
