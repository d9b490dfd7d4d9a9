"""What is done with a finished run: judge it again, on its own held-out rows or on others, and merge it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from luthier.data.dataset import prepare
from luthier.deployment.merge import merge_adapter
from luthier.deployment.parity import ParityReport
from luthier.errors import UserError
from luthier.methods import get_method
from luthier.methods.saved import load_saved
from luthier.models.loading import context_of, load_model, load_tokenizer
from luthier.recipe import Recipe
from luthier.runfolder import RunFolder
from luthier.tasks import Judgement, get_task


def evaluate_run(
    path: str | Path, *, data: str | None = None, overrides: Sequence[str] = (), console: Console
) -> Judgement:
    """Compare base, tuned and (where it exists) merged of a finished run, on its held-out rows or on another file.

    Raises:
        UserError: the folder holds no finished run, or no row has an answer to compare with.
    """
    folder = RunFolder.of(path)
    changes = [*overrides, *([f"data.test={Path(data).absolute()}"] if data else [])]
    recipe = Recipe.load(folder.path / "recipe.yaml", changes)
    saved = load_saved(folder.path)
    if not recipe.data.train and not recipe.data.test:
        raise UserError(
            "this run's rows came from Python, so they cannot be read again",
            where=str(folder.path),
            remedy="name a file of rows: `luthier evaluate RUN --data FILE`",
        )
    if data:
        recipe.data.train, recipe.data.validation = recipe.data.test, []
        recipe.data.test = []
        recipe.data.split.validation = recipe.data.split.test = 0.0
    context = context_of(saved.model.config, saved.tokenizer)
    dataset = prepare(recipe, saved.tokenizer, context=context, classes=saved.head.classes)
    if data:
        dataset.train, dataset.test = dataset.test, dataset.train
        dataset.test.name = "given"
    for reject in dataset.test.rejects[:5]:
        console.print(f"refused {reject.file}:{reject.line}: {reject.message}", style="yellow", highlight=False)
    models: list[tuple[str, Callable[[], Any]]] = [
        ("base", saved.as_base),
        ("tuned", lambda: contextlib.nullcontext(saved.model)),
    ]
    if (folder.path / "merged").is_dir():
        models.append(("merged", lambda: contextlib.nullcontext(load_model(folder.path / "merged"))))
    name = Path(data).stem if data else "comparison"
    task = get_task(recipe.task.name)
    comparison = task.judge(recipe, dataset, models, folder.path / "evaluation" / f"{name}.json", console)
    if comparison is None:
        raise UserError(
            "no held-out row has a right answer to compare with", where=str(folder.path), remedy="give --data"
        )
    return comparison


def merge_saved(run_dir: str | Path, output: Path | None = None) -> tuple[Path, ParityReport]:
    """Merge the adapter of a finished run into its base; ``RUN/merged`` where no folder is named.

    Raises:
        UserError: the folder holds no finished run with an adapter, or the merged model answers otherwise.
    """
    folder = RunFolder.of(run_dir)
    recipe = Recipe.load(folder.path / "recipe.yaml")
    get_method(recipe.method.name).require_merging()
    prompts = None
    if recipe.data.train or recipe.data.test:
        task = get_task(recipe.task.name)
        tokenizer = load_tokenizer(folder.saved, chats=task.writes)
        prompts = task.parity_texts(prepare(recipe, tokenizer), tokenizer)
    target = output or folder.path / "merged"
    return target, merge_adapter(folder.saved, target, prompts=prompts)
