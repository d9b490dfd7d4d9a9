"""What the tasks that write share: answers during training, and the comparison after it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.data.dataset import Dataset
from luthier.data.encode import EncodedExample
from luthier.data.examples import TrainingExample
from luthier.errors import UserError
from luthier.evaluation.comparison import Comparison, compare
from luthier.evaluation.contestants import Models
from luthier.evaluation.judge import judge_of
from luthier.evaluation.metrics import require_metrics
from luthier.evaluation.sample import AnswerSample
from luthier.recipe import Recipe
from luthier.training.runlog import write_json

if TYPE_CHECKING:
    from rich.console import Console


def check_sampling(recipe: Recipe) -> None:
    """Refuse metrics that do not exist, a judge that cannot be asked, and a choice by answers that nobody gives.

    Raises:
        UserError: there is one.
    """
    require_metrics(recipe.evaluation.metrics)
    judge_of(recipe.evaluation.judge, resume=False)
    best = recipe.training.metric_for_best_model
    if best == "loss":
        return
    require_metrics([best], "training.metric_for_best_model")
    if not recipe.training.predict_with_generate:
        raise UserError(
            f"{best} is a score of answers, and none are asked for during training",
            where="training.metric_for_best_model",
            remedy="set training.predict_with_generate=true, or name loss",
        )


def sample_of(recipe: Recipe, dataset: Dataset) -> AnswerSample | None:
    """The first validation rows that can be asked, as the recipe wants them scored; None: it does not.

    Raises:
        UserError: no row can be asked, or a metric does not apply to them.
    """
    settings = recipe.training
    if not settings.predict_with_generate:
        return None
    rows = (e for e in dataset.validation.examples if dataset.pairs is not None or not e.is_plain_text)
    return AnswerSample(
        dataset.tokenizer,
        list(itertools.islice(rows, settings.generation_examples)),
        best=settings.metric_for_best_model,
        more_metrics=recipe.evaluation.metrics,
        system=dataset.system,
        pairs=dataset.pairs,
        max_new_tokens=recipe.evaluation.max_new_tokens,
        batch_size=recipe.evaluation.batch_size,
    )


def judge_answers(
    recipe: Recipe,
    dataset: Dataset,
    models: Models,
    target: Path,
    console: Console,
    *,
    part: str,
    rows: Sequence[TrainingExample],
    encoded: Sequence[EncodedExample],
) -> Comparison:
    """Let each model answer the same rows, print how they do and write it.

    Args:
        recipe: its evaluation section and seed.
        dataset: whose tokenizer, system message and pairs are asked with.
        models: names and context managers; the base first.
        target: the JSON file to write.
        console: where the tables are printed.
        part: the rows' name.
        rows: with answers.
        encoded: the same ones as in training, for the perplexity.
    """
    settings = recipe.evaluation
    judge = judge_of(settings.judge, resume=settings.resume)
    with console.status(f"answering {len(rows)} {part} rows") as status:
        comparison = compare(
            models,
            dataset.tokenizer,
            rows,
            system=dataset.system,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            decoding=settings.decoding(recipe.seed),
            resume=settings.resume,
            samples=settings.samples,
            more_metrics=settings.metrics,
            seed=recipe.seed,
            encoded=encoded,
            pairs=dataset.pairs,
            judge=judge,
            progress=lambda name, done, total: status.update(f"{name}: {done} of {total} {part} rows"),
        )
    write_json(target, comparison.to_json())
    console.print(comparison.render())
    return comparison
