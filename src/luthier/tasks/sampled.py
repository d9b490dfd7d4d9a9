"""What the tasks that write share: answers to some validation rows during training."""

from __future__ import annotations

import itertools

from luthier.data.dataset import Dataset
from luthier.errors import UserError
from luthier.evaluation.metrics import require_metrics
from luthier.evaluation.sample import AnswerSample
from luthier.recipe import Recipe


def check_sampling(recipe: Recipe) -> None:
    """Refuse metrics that do not exist, and a choice by answers that nobody gives.

    Raises:
        UserError: there is one.
    """
    require_metrics(recipe.evaluation.metrics)
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
