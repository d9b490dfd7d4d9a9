"""Tasks of lm-evaluation-harness by name, file or folder, with rows from local files, checked before a model loads."""

from __future__ import annotations

import difflib
import functools
import random
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from lm_eval.api.task import ConfigurableTask
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager

from luthier.errors import UserError
from luthier.evaluation.harness.rows import FROM_FILES, Choice, TaskFile, given_rows, local_rows, shown_files

OWN_TASKS = Path(__file__).parent / "local"


@dataclass(slots=True)
class Tasks:
    """What is asked: tasks that hold their rows."""

    tasks: dict[str, Any] = field(default_factory=dict)
    """the harness's ``Task`` of each name"""
    groups: dict[str, Any] = field(default_factory=dict)
    """the harness's ``Group`` of each name, whose scores are made of its tasks'"""
    sources: dict[str, str] = field(default_factory=dict)
    """the file or the name that a task was made from"""
    notes: list[str] = field(default_factory=list)


def load_tasks(
    names: Sequence[str],
    *,
    data: str | None = None,
    shots: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    unsafe_code: bool = False,
) -> Tasks:
    """Tasks with their rows, each of which is rendered once.

    Args:
        names: of each a folder of task files, one such file, a task that comes with luthier, or a task, tag or group
            that comes with the harness.
        data: a file of rows that is asked in place of the tasks' own.
        shots: a file of rows that examples before a question are taken from, in place of the tasks' own.
        num_fewshot: examples before each question; None: as a task says, else none.
        limit: rows of each task; None: all.
        unsafe_code: whether tasks may run code that a model writes.

    Raises:
        UserError: there is no such task, its file cannot be read, its rows are not there or do not fit it.
    """
    # As the harness does it before it loads tasks, for some choose rows by chance.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    found, choice = Tasks(), Choice(data, shots, num_fewshot, unsafe_code)
    for name in names:
        if (files := _files(name)) is not None:
            for file in files:
                _add(found, TaskManager(include_defaults=False), file, choice)
            continue
        shipped = _shipped()
        for spec in _matching(shipped, name):
            entry = shipped.task_index[spec]
            if entry.kind.name == "TASK":
                _add(found, shipped, TaskFile(entry.yaml_path, entry.cfg), choice, known_as=spec)
            elif data or shots:
                raise UserError(
                    f"{spec!r} is several tasks, whose rows are not of one file",
                    where="--data" if data else "--shots",
                    remedy="name one task",
                )
            else:
                _load(found, shipped, spec, spec)
    for name, task in found.tasks.items():
        _refuse(name, found.sources[name], task, unsafe_code)
        _set_examples(found, name, task, num_fewshot)
        _check_rows(found.sources[name], task, limit)
    return found


# -- finding


def _files(name: str) -> list[TaskFile] | None:
    """The task files behind a folder, a file or a name of ours; None: it is a name of the harness's."""
    path = Path(name).expanduser()
    own = OWN_TASKS / f"{name}.yaml"
    if not path.exists() and own.is_file():
        path = own
    if path.is_dir():
        paths = sorted(path.resolve().rglob("*.yaml"))
        if not paths:
            raise UserError("the folder holds no task file", where=name, remedy="name a folder with NAME.yaml in it")
    elif path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise UserError(f"there is no task file or folder {name!r}", where="--tasks", remedy="check the path")
        paths = [path.resolve()]
    else:
        return None
    contents = {each: _parse(each) for each in paths}
    root = paths[0].parent if path.is_file() else path.resolve()
    entries = {
        entry.yaml_path: entry for entry in TaskManager(include_defaults=False, include_path=root).task_index.values()
    }
    for each, content in contents.items():
        if isinstance(content.get("task"), str) and each not in entries:
            raise UserError(
                f"the task {content['task']!r} is not taken: what it includes is missing, or another file has its name",
                where=str(each),
                remedy="mend its include, or rename it",
            )
    files = [TaskFile(e, entries[e].cfg) for e in paths if e in entries and "group" not in entries[e].cfg]
    if not files:
        raise UserError(
            "no task is defined there",
            where=name,
            remedy="a task file has `task: NAME`, which no other file of its folder has",
        )
    return files


class _Loader(yaml.SafeLoader):
    """YAML whose functions are not looked up."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: suffix)


def _parse(path: Path) -> dict[str, Any]:
    """What a file says by itself. The harness would pass over what is no YAML in silence."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or (str(error).splitlines() or [""])[0]
        raise UserError(
            f"the task file is no YAML: {what}",
            where=str(path) if mark is None else f"{path}:{mark.line + 1}",
            remedy="mend the line; texts with a colon or braces in them want quotes",
        ) from None
    if not isinstance(content, dict):
        raise UserError("the task file holds no `key: value` lines", where=str(path), remedy="see docs/evaluation.md")
    return content


@functools.cache
def _shipped() -> TaskManager:
    """All that the harness brings; to look through its files takes up to half a minute."""
    return TaskManager()


def _matching(manager: TaskManager, name: str) -> list[str]:
    found: list[str] = manager.match_tasks([name])
    if not found:
        own = sorted(path.stem for path in OWN_TASKS.glob("*.yaml"))
        near = difflib.get_close_matches(name, [*own, *manager.all_tasks], 3)
        raise UserError(
            f"there is no task {name!r}" + (f"; near it are {', '.join(near)}" if near else ""),
            where="--tasks",
            remedy=f"name a folder of task files, one of {', '.join(own)}, or a task of lm_eval",
        )
    return found


# -- loading


def _add(found: Tasks, manager: TaskManager, file: TaskFile, choice: Choice, known_as: str | None = None) -> None:
    """Load the task of a file, with rows from where they are to be taken."""
    if file.config.get("unsafe_code"):
        _refuse_code(file.name, choice.unsafe_code)
    changes = given_rows(file, choice) if choice.data or choice.shots else local_rows(file)
    if not changes:
        _load(found, manager, known_as or str(file.path), known_as or str(file.path), file)
        return
    with tempfile.TemporaryDirectory() as folder:
        # The harness's own way to change a task: a file that includes another.
        changed = Path(folder) / "task.yaml"
        changed.write_text(yaml.safe_dump({"include": str(file.path), "task": file.name, **changes}), encoding="utf-8")
        _load(found, manager, str(changed), known_as or str(file.path), file, changes)


def _load(
    found: Tasks,
    manager: TaskManager,
    spec: str,
    source: str,
    file: TaskFile | None = None,
    changes: Mapping[str, Any] | None = None,
) -> None:
    try:
        loaded = manager.load([spec])
    except UserError:
        raise
    except Exception as error:  # Of YAML, templates, `datasets`, the hub's client, and the Python of a task.
        raise _explained(error, source, {} if file is None else {**file.config, **(changes or {})}) from error
    for name, task in loaded["tasks"].items():
        if name in found.tasks:
            raise UserError(
                f"two tasks are called {name!r}", where=f"{found.sources[name]}, {source}", remedy="name one of them"
            )
        found.tasks[name], found.sources[name] = task, source
    found.groups |= loaded["groups"]


def _explained(error: Exception, source: str, config: Mapping[str, Any]) -> UserError:
    """What kept a task from loading, in words."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    local = config.get("dataset_path") in FROM_FILES
    rows = config.get("dataset_path")
    if isinstance(error, jinja2.UndefinedError):
        return _missing(first, source, config)
    if isinstance(error, ImportError):
        return UserError(f"the task wants more than is installed: {first}", where=source, remedy="install it")
    if isinstance(error, OSError) and not local:
        return UserError(
            f"the task's rows{f' ({rows})' if rows else ''} are not on this machine: {first}",
            where=source,
            remedy="--download fetches them where there is a network; or name a file of such rows with --data",
        )
    if isinstance(error, KeyError):
        return UserError(f"the task names {first}, which is not there", where=source, remedy="check its splits")
    return UserError(f"the task cannot be loaded: {first}", where=source, remedy="check the task file and its rows")


def _missing(first: str, source: str, config: Mapping[str, Any]) -> UserError:
    column = re.search(r"'([^']+)' is undefined|has no attribute '([^']+)'", first)
    named = (column[1] or column[2]) if column else None
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    there = ""
    if config.get("dataset_path") in FROM_FILES and files:
        from datasets import load_dataset

        read = load_dataset(config["dataset_path"], **config["dataset_kwargs"])
        there = f"; theirs are {', '.join(next(iter(read.values())).column_names)}"
    return UserError(
        (f"the rows have no column {named!r}" if named else f"the rows do not fit the task: {first}") + there,
        where=source if not files else f"{source}, {shown_files(files)}",
        remedy="rename it, or say in doc_to_text, doc_to_target and doc_to_choice which columns are what",
    )


# -- checking


def _refuse(name: str, source: str, task: Any, unsafe_code: bool) -> None:
    if isinstance(task, ConfigurableTask) and task.config.process_results is None:
        # The harness only logs that it has not found one.
        for metric in (each for each, function in task._metric_fn_list.items() if function is None):
            raise UserError(
                f"there is no metric {metric!r}", where=f"{source}, metric_list", remedy="name one of lm_eval's metrics"
            )
    if getattr(task, "UNSAFE_CODE", False):
        _refuse_code(name, unsafe_code)
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"task {name!r} asks about pictures or sounds", where="--tasks", remedy="leave it out")


def _refuse_code(name: str, allowed: bool) -> None:
    if not allowed:
        raise UserError(
            f"task {name!r} runs code that the model writes, on this machine and unguarded",
            where="--tasks",
            remedy="ask it where that can do no harm, with --confirm-run-unsafe-code",
        )


def _set_examples(found: Tasks, name: str, task: Any, num_fewshot: int | None) -> None:
    """How many examples stand before a question, by the harness's rules: a task that says 0 keeps to it."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own == 0 and num_fewshot:
        found.notes.append(f"{name} is asked without examples, for its definition says num_fewshot: 0")
    elif num_fewshot is not None or own is None:
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    count = task.get_config("num_fewshot")
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    if count and (there := len(list(task.fewshot_docs()))) <= count:
        raise UserError(
            f"{name} shows {count} examples before each question, and {there} rows are there to choose from",
            where="--num-fewshot",
            remedy="ask for fewer, or give more rows",
        )


def _check_rows(source: str, task: Any, limit: int | None) -> None:
    """Render every row that will be asked: what is wrong with one shows before a model is loaded."""
    if not isinstance(task, ConfigurableTask):
        return
    for number, row in enumerate(islice(task.eval_docs, limit), 1):
        try:
            parts = {"doc_to_text": task.doc_to_text(row), "doc_to_target": task.doc_to_target(row)}
            if task.config.doc_to_choice is not None:
                parts["doc_to_choice"] = task.doc_to_choice(row)
        except Exception as error:  # Of a template, or of the Python of a task.
            raise UserError(
                f"the row cannot be asked: {(str(error).splitlines() or [type(error).__name__])[0]}",
                where=f"{source}, row {number}",
                remedy="mend the row, or the task file",
            ) from error
        for what, part in parts.items():
            if part is None or (isinstance(part, str) and part == getattr(task.config, what) and part.isidentifier()):
                raise UserError(
                    f"the row has no column {getattr(task.config, what)!r}, which {what} names",
                    where=f"{source}, row {number}",
                    remedy=f"mend the row, or the task file; its columns are {', '.join(row)}",
                )
