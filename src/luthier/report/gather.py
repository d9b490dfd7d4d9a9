"""The report of a run: what its folder holds, read once, with nothing secret in it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from luthier.errors import UserError
from luthier.report.evaluation_files import Evaluation, finite, read_evaluation
from luthier.report.verdict import harmed, helped
from luthier.runfolder import RunFolder
from luthier.training.runlog import read_metrics

OWN = "comparison"
"""The evaluation that the run makes itself."""
_REJECTS = 20  # refused rows that are shown
# What a name must end in to hold a secret; a variable's name that ends in _env holds none.
_SECRET = re.compile(r"(?:key|token|secret|password|passwd|auth|authorization|credentials?)$", re.IGNORECASE)
_IN_TEXT = [
    (re.compile(r"(\w+://)[^/@\s]+@"), r"\1"),
    (re.compile(r"([?&][^=&\s]*(?:key|token|secret|password|signature)[^=&\s]*=)[^&\s]+", re.I), r"\1(left out)"),
    (re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,})"), "(left out)"),
]  # fmt: skip


@dataclass(slots=True)
class Report:
    """Everything that the views show."""

    folder: Path
    manifest: dict[str, Any]
    preflight: dict[str, Any]
    recipe: dict[str, Any]
    steps: list[dict[str, Any]]
    """Records of training steps."""
    validations: list[dict[str, Any]]
    """Records of validations; step 0 is the base."""
    rejects: list[dict[str, Any]]
    """The first refused rows."""
    evaluations: list[Evaluation] = field(default_factory=list)
    """The run's own comparison comes first."""
    harm: dict[str, Any] = field(default_factory=dict)
    """``checks`` and ``notes``; empty where harm was not measured."""
    saved_record: dict[str, Any] = field(default_factory=dict)
    """What the saved adapter says of itself."""
    unread: list[str] = field(default_factory=list)
    """Files that could not be read."""

    @classmethod
    def of(cls, path: str | Path) -> Report:
        """The report of a run, finished or not.

        Raises:
            UserError: the folder holds no run.
        """
        run = RunFolder(Path(path).expanduser())
        if not run.manifest:
            raise UserError(f"{str(path)!r} holds no run of Luthier's", remedy="name the output_dir of a run")
        records = [r for r in read_metrics(run.path / "metrics.jsonl") if isinstance(r, dict) and "step" in r]
        report = cls(
            run.path,
            without_secrets(run.manifest),
            without_secrets(_json(run.path / "preflight.json")),
            without_secrets(_recipe(run.path / "recipe.yaml")),
            [r for r in records if "loss" in r],
            [r for r in records if "eval_loss" in r],
            _first_lines(run.path / "rejects.jsonl"),
            saved_record=_json(run.saved / "luthier_base.json"),
        )
        files = sorted((run.path / "evaluation").glob("*.json"), key=lambda file: (file.stem != OWN, file.stem))
        for file in files:
            report._take(file)
        return report

    def _take(self, file: Path) -> None:
        content = _json(file)
        # An address may hold one.
        content |= {key: without_secrets(content[key]) for key in ("judge", "notes") if key in content}
        try:
            if "checks" in content:
                self.harm = content
            elif (found := read_evaluation(file.stem, content)) is not None:
                self.evaluations.append(found)
            elif not content:
                self.unread.append(f"evaluation/{file.name}")
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            self.unread.append(f"evaluation/{file.name}")

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def status(self) -> str:
        return str(self.manifest.get("status", "unknown"))

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def task(self) -> str:
        return str(self.recipe.get("task", {}).get("name", "causal_lm"))

    @property
    def method(self) -> str:
        return str(self.manifest.get("method", ""))

    @property
    def base(self) -> str:
        """The base model, by the name that loads it."""
        return str(self.manifest.get("model", {}).get("name", ""))

    @property
    def saved(self) -> Path | None:
        """``adapter/`` or ``model/``; None where nothing is saved."""
        folder = RunFolder(self.folder).saved
        return folder if folder.is_dir() else None

    @property
    def training(self) -> dict[str, Any]:
        """How training went, of a run that came to its end; else what the last recorded step says."""
        told = self.manifest.get("training")
        if isinstance(told, dict):
            return told
        if not self.steps:
            return {}
        sums = {
            key: sum(finite(r.get(key)) or 0 for r in self.steps) for key in ("tokens", "trained_tokens", "seconds")
        }
        return {"step": self.steps[-1]["step"], **sums, "peak_memory_bytes": self.steps[-1].get("peak_memory_bytes")}

    @property
    def comparison(self) -> Evaluation | None:
        """The evaluation that the headline speaks of."""
        return self.evaluations[0] if self.evaluations else None

    def part_of(self, evaluation: Evaluation) -> str:
        """Which rows an evaluation asked, in words."""
        if evaluation.name != OWN:
            return evaluation.name
        kept = self.manifest.get("rows", {}).get("test", {}).get("kept")
        return "held-out test rows" if kept else "held-out validation rows"

    def to_json(self) -> dict[str, Any]:
        """Everything, as what ``json.dumps`` takes."""
        told = {
            "luthier_report": 1,
            "run": self.name,
            "status": self.status,
            "helped": asdict(helped(self)),
            "harmed": asdict(harmed(self)),
            "task": self.task,
            "method": self.method,
            "manifest": self.manifest,
            "preflight": self.preflight,
            "recipe": self.recipe,
            "training": {"steps": self.steps, "validations": self.validations},
            "rejects": self.rejects,
            "evaluations": [evaluation.to_json() for evaluation in self.evaluations],
            "harm": self.harm,
            "unread": self.unread,
        }
        plain: dict[str, Any] = _plain(told)
        return plain


def _plain(value: Any) -> Any:
    """What JSON holds, in the place of sets and of numbers that it has none for."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, frozenset):
        return sorted(value)
    return finite(value) if isinstance(value, float) else value


def without_secrets(value: Any, name: str = "") -> Any:
    """A tree of settings without what a key, a token or a password may be; names of environment variables stay."""
    if isinstance(value, dict):
        return {key: without_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [without_secrets(item, name) for item in value]
    if not isinstance(value, str):
        return value
    if value and _SECRET.search(name):
        return "(left out)"
    for pattern, instead in _IN_TEXT:
        value = pattern.sub(instead, value)
    return value


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _recipe(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _first_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found = []
    with path.open(encoding="utf-8") as lines:
        for line in itertools.islice(lines, _REJECTS):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found
