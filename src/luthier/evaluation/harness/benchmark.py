"""The harness's scores of several models, row by row beside each other: what changed, and how surely."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval import evaluator
from lm_eval.api.metrics import bits_per_byte, mean, perplexity, weighted_perplexity
from lm_eval.utils import handle_non_serializable

from luthier import __version__
from luthier.errors import UserError
from luthier.evaluation.harness.model import HarnessModel
from luthier.evaluation.harness.tasks import Tasks
from luthier.evaluation.measures import Measure, changed
from luthier.evaluation.statistics import Change, Resampling, Value, mean_value

if TYPE_CHECKING:
    from rich.console import RenderableType

Key = tuple[str, str, str]
"""Task or group, metric, filter."""

_PACKAGES = ("lm_eval", "torch", "transformers", "datasets")


def _perplexity(sums: np.ndarray, count: int) -> np.ndarray:
    found: np.ndarray = np.exp(-sums[..., 0] / count)
    return found


def _weighted_perplexity(sums: np.ndarray, count: int) -> np.ndarray:
    found: np.ndarray = np.exp(-sums[..., 0] / sums[..., 1])
    return found


def _bits(sums: np.ndarray, count: int) -> np.ndarray:
    found: np.ndarray = -sums[..., 0] / sums[..., 1] / math.log(2)
    return found


# How the harness adds rows up, as a value of their sums. What is not here (F1, BLEU) has no paired change.
_VALUES: dict[Any, Value] = {
    mean: mean_value,
    perplexity: _perplexity,
    weighted_perplexity: _weighted_perplexity,
    bits_per_byte: _bits,
}


@dataclass(frozen=True, slots=True)
class Score:
    """One number of one model."""

    value: float
    stderr: float | None
    """The harness's; None where it gives none"""
    measure: Measure
    """Its rows; none where the number is no sum of rows"""

    @property
    def paired(self) -> bool:
        return len(self.measure.rows) > 0


@dataclass(slots=True)
class ModelScores:
    """One model's part."""

    name: str
    scores: dict[Key, Score]
    samples: dict[str, list[dict[str, Any]]]
    """The harness's record of each row, by task"""
    seconds: float
    dtype: str
    """Precision of its weights"""
    chat_template: str | None
    """What its questions went through"""
    changes: dict[Key, Change] = field(default_factory=dict)
    """Against the first model; empty for the first itself"""


@dataclass(slots=True)
class TaskRecord:
    """What was asked, so that the same can be asked again."""

    version: Any
    num_fewshot: int
    rows: int
    of: int
    """rows that the task has"""
    source: str
    config: dict[str, Any]
    config_hash: str
    """SHA-256 of the definition, without where its files lie"""
    rows_hash: str
    """SHA-256 of the rows that were asked"""


@dataclass(slots=True)
class Benchmark:
    """What :func:`benchmark` found. The first model is the base."""

    models: list[ModelScores]
    tasks: dict[str, TaskRecord]
    settings: dict[str, Any]
    versions: dict[str, str]
    notes: list[str]
    """What a reader should know who believes the numbers"""

    def render(self) -> RenderableType:
        """See :func:`luthier.evaluation.harness.view.render_benchmark`."""
        from luthier.evaluation.harness.view import render_benchmark

        return render_benchmark(self)

    def to_json(self) -> dict[str, Any]:
        """Everything, as what ``json.dumps`` takes: scores by model, and each row with every answer."""
        models: dict[str, Any] = {}
        for model in self.models:
            models[model.name] = {
                "results": _nested({key: _score(score) for key, score in model.scores.items()}),
                "changes": _nested({key: _finite(asdict(found)) for key, found in model.changes.items()}),
                "dtype": model.dtype,
                "chat_template": model.chat_template,
                "seconds": round(model.seconds, 3),
            }
        found = {
            "models": models,
            "tasks": {name: asdict(task) for name, task in self.tasks.items()},
            "settings": self.settings,
            "versions": self.versions,
            "notes": self.notes,
            "rows": {name: self._rows(name) for name in self.tasks},
        }
        plain: dict[str, Any] = json.loads(json.dumps(found, default=handle_non_serializable))
        return plain

    def _rows(self, task: str) -> list[dict[str, Any]]:
        """A task's rows, of each filter, with what every model was asked and said."""
        rows = []
        for records in zip(*(model.samples[task] for model in self.models), strict=True):
            asked = {key: records[0][key] for key in ("doc_id", "doc", "target", "filter", "doc_hash")}
            said = {
                model.name: {key: record[key] for key in ("arguments", "resps", "filtered_resps", *record["metrics"])}
                for model, record in zip(self.models, records, strict=True)
            }
            rows.append(asked | {"models": said})
        return rows


def _nested(found: Mapping[Key, Any]) -> dict[str, dict[str, Any]]:
    made: dict[str, dict[str, Any]] = {}
    for (task, metric, chosen), value in found.items():
        made.setdefault(task, {})[f"{metric},{chosen}"] = value
    return made


def _score(score: Score) -> dict[str, Any]:
    return _finite({"value": score.value, "stderr": score.stderr, "better": score.measure.better})


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def benchmark(
    models: Sequence[tuple[str, Callable[[], AbstractContextManager[HarnessModel]]]],
    tasks: Tasks,
    *,
    limit: int | None = None,
    system: str | None = None,
    unsafe_code: bool = False,
    seed: int = 42,
) -> Benchmark:
    """Ask every model the same tasks.

    Args:
        models: names, and what gives each model for as long as it is asked. The first is the one to beat.
        tasks: see :func:`luthier.evaluation.harness.tasks.load_tasks`.
        limit: rows of each task; None: all.
        system: a system message.
        unsafe_code: whether tasks may run code that a model writes.
        seed: of the resamples that intervals and significance come from.

    Raises:
        UserError: a task cannot be asked of a model.
    """
    results: list[ModelScores] = []
    records: dict[str, TaskRecord] = {}
    notes = list(tasks.notes)
    chat = False
    for name, opened in models:
        with opened() as model, _heard(notes, name):
            chat = model.chat
            begin = time.perf_counter()
            found = _asked(model, tasks, limit, system, unsafe_code)
            seconds = time.perf_counter() - begin
            notes += [f"{name}: {note}" for note in model.notes]
            template = model.chat_template(True) if chat else None
            dtype = str(model.model.dtype).removeprefix("torch.")
        result = ModelScores(name, _scores(found, tasks), found["samples"], seconds, dtype, template)
        if results:
            result.changes = _changes(results[0], result, seed)
        results.append(result)
        records = {task: _record(task, found, tasks) for task in tasks.tasks}
    settings = {"limit": limit, "system": system, "apply_chat_template": chat, "unsafe_code": unsafe_code, "seed": seed}
    versions = {"luthier": __version__} | {name: version(name) for name in _PACKAGES}
    return Benchmark(results, records, settings, versions, notes)


def _asked(
    model: HarnessModel, tasks: Tasks, limit: int | None, system: str | None, unsafe_code: bool
) -> dict[str, Any]:
    for task in tasks.tasks.values():
        # Every model sees the same examples.
        task.set_fewshot_seed(seed=evaluator.DEFAULT_OTHER_SEED)
    # Bootstrapped errors are told on standard output.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            found: dict[str, Any] = evaluator.evaluate(
                model,
                {"tasks": tasks.tasks, "groups": tasks.groups},
                limit=limit,
                system_instruction=system,
                apply_chat_template=model.chat,
                fewshot_as_multiturn=model.chat,
                confirm_run_unsafe_code=unsafe_code,
            )
        except OverflowError:
            raise UserError(
                "a perplexity is larger than any number that the harness can write",
                where=f"task {', '.join(tasks.tasks)}",
                remedy="leave word_perplexity out of its metric_list: a text without spaces is one word",
            ) from None
    return found


@contextlib.contextmanager
def _heard(notes: list[str], name: str) -> Iterator[None]:
    """What the harness warns of becomes notes, each once."""
    seen: Counter[str] = Counter()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen[record.getMessage().strip().partition("\n")[0]] += 1

    logger, handler = logging.getLogger("lm_eval"), Handler(logging.WARNING)
    propagates = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
    notes += [f"{name}: {text}" + (f" ({count:,} times)" if count > 1 else "") for text, count in seen.items()]


# -- scores


def _scores(found: Mapping[str, Any], tasks: Tasks) -> dict[Key, Score]:
    scores = {}
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float, np.number)):
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            higher = found["higher_is_better"].get(task, {}).get(metric)
            better = None if higher is None else "higher" if higher else "lower"
            rows: list[Any] = []
            total = mean
            if task in tasks.tasks:
                rows = [s[metric] for s in found["samples"][task] if s["filter"] == chosen and metric in s]
                total = tasks.tasks[task].aggregation().get(metric, mean)
            scores[task, metric, chosen] = Score(
                float(value),
                float(error) if isinstance(error, (int, float, np.number)) else None,
                _measure(metric, rows, total, float(value), better),
            )
    return scores


def _measure(name: str, rows: list[Any], total: Any, value: float, better: Any) -> Measure:
    """The rows behind a number, or none where their sums do not give it."""
    count = len(rows)
    try:
        statistics = np.array(rows, dtype=np.float64).reshape(count, -1)
    except (ValueError, TypeError):  # Texts, or rows of unequal length.
        statistics = np.zeros((0, 1))
    given = _VALUES.get(total)
    if not statistics.size or given is None or not math.isclose(given(statistics.sum(0), count), value, rel_tol=1e-9):
        statistics = np.zeros((0, 1))
    each = np.array([float((given or mean_value)(row, 1)) for row in statistics])
    share = given is mean_value and bool(((each >= 0) & (each <= 1)).all())
    binary = share and bool(np.isin(each, (0, 1)).all())
    return Measure(name, name, better, share, binary, 4, given or mean_value, statistics, each)


def _changes(base: ModelScores, other: ModelScores, seed: int) -> dict[Key, Change]:
    changes = {}
    for key, score in other.scores.items():
        before = base.scores.get(key)
        if before is None or not score.paired or len(before.measure.rows) != len(score.measure.rows):
            continue
        resampling = Resampling(len(score.measure.rows), seed=seed)
        changes[key] = changed(before.measure, score.measure, resampling)
    return changes


def _record(name: str, found: Mapping[str, Any], tasks: Tasks) -> TaskRecord:
    config = dict(found["configs"][name])
    config["metadata"] = {k: v for k, v in (config.get("metadata") or {}).items() if k != "config_source"}
    defined = {k: v for k, v in config.items() if k not in ("dataset_path", "dataset_name", "dataset_kwargs")}
    hashes = {sample["doc_id"]: sample["doc_hash"] for sample in found["samples"][name]}
    counts = found["n-samples"][name]
    return TaskRecord(
        version=found["versions"][name],
        num_fewshot=found["n-shot"][name],
        rows=counts["effective"],
        of=counts["original"],
        source=tasks.sources[name],
        config=config,
        config_hash=_hash(defined),
        rows_hash=_hash(list(hashes.values())),
    )


def _hash(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=handle_non_serializable)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
