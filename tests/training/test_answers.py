"""Answers during training: scored at each validation, and what the best weights are chosen by."""

from __future__ import annotations

import json
import math

import pytest
import torch

from luthier.data.dataset import prepare
from luthier.errors import UserError
from luthier.models.loading import load_tokenizer
from luthier.recipe import Recipe
from luthier.tasks import get_task


def validations(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "eval_loss" in line]


def scripted(bench, folder, recipe, scores):
    """A trainer that is told how good its answers are, validation by validation."""
    trainer, left = bench.trainer(folder, recipe), iter(scores)
    trainer.answers = lambda model: {"exact_match": next(left), "rougeL": 0.5}
    return trainer


def test_scores_are_those_of_the_weights_as_they_are(bench, tmp_path):
    recipe = bench.recipe(max_steps=2, eval_steps=1, predict_with_generate=True, generation_examples=3)
    recipe.evaluation.max_new_tokens = 5
    recipe.evaluation.metrics = ["chrf++"]
    answers = get_task("causal_lm").answers(recipe, bench.dataset(recipe))
    assert len(answers.questions) == 3
    trainer = bench.trainer(tmp_path / "with", recipe)
    trainer.answers = answers
    trainer.run()
    found = validations(tmp_path / "with")
    after = answers(trainer.model)
    assert {f"eval_{name}" for name in after} <= set(found[-1]) and "chrf++" in after
    assert all(found[-1][f"eval_{name}"] == pytest.approx(value) for name, value in after.items())
    # Answering changes nothing of the training.
    without = bench.trainer(tmp_path / "without", recipe)
    without.run()
    for name, weights in trainer.optimiser.weights().items():
        assert torch.equal(weights, without.optimiser.weights()[name])
    assert trainer.model.training is without.model.training


@pytest.mark.parametrize(("scores", "best"), [([0.1, 0.2, 0.9, 0.3, 0.3], 2), ([0.0, 0.5, 0.5, 0.5, 0.1], 3)])
def test_the_best_weights_are_those_of_the_best_answers(bench, tmp_path, scores, best):
    """The loss falls all the time here, and would choose the last step; it decides between equal scores alone."""
    settings = {"predict_with_generate": True, "metric_for_best_model": "exact_match", "save_total_limit": 4}
    recipe = bench.recipe("full", max_steps=4, eval_steps=1, **settings)
    trainer = scripted(bench, tmp_path, recipe, scores)
    outcome = trainer.run()
    assert [v["eval_loss"] for v in validations(tmp_path)] == sorted(
        (v["eval_loss"] for v in validations(tmp_path)), reverse=True
    )
    assert (outcome.state.best_step, outcome.state.best_score) == (best, scores[best])
    for name, weights in trainer.checkpoints.load(best).weights.items():
        assert torch.equal(trainer.optimiser.weights()[name], weights)
    assert [v["best"] for v in validations(tmp_path)][best] and validations(tmp_path)[1]["best_by"] == "exact_match"


def test_early_stopping_watches_the_answers_and_a_resumed_run_knows_the_best(bench, tmp_path):
    settings = {"predict_with_generate": True, "metric_for_best_model": "exact_match", "early_stopping_patience": 2}
    recipe = bench.recipe("full", max_steps=8, eval_steps=1, save_steps=1, **settings)
    outcome = scripted(bench, tmp_path / "whole", recipe, [0.1, 0.8, 0.2, 0.3, 0.9]).run()
    assert (outcome.stopped, outcome.state.step, outcome.state.best_step) == ("early stopping", 3, 1)
    cut = scripted(bench, tmp_path / "cut", recipe, [0.1, 0.8, 0.2])
    with pytest.raises(StopIteration):
        cut.run()
    resumed = scripted(bench, tmp_path / "cut", recipe, [0.3, 0.9]).run(resume=True)
    assert (resumed.stopped, resumed.state.step, resumed.state.best_score) == ("early stopping", 3, 0.8)


@pytest.mark.parametrize(
    ("task", "training", "message"),
    [
        ("causal_lm", {"metric_for_best_model": "rougeL"}, "none are asked for during training"),
        ("causal_lm", {"metric_for_best_model": "rouge9", "predict_with_generate": True}, "no metric 'rouge9'"),
        ("classification", {"predict_with_generate": True}, "no use for training.predict_with_generate"),
        ("masked_lm", {"predict_with_generate": True}, "no use for training.predict_with_generate"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(task, training, message):
    with pytest.raises(UserError, match=message):
        get_task(task).check(Recipe.from_dict({"task": task, "training": training}))


def test_rows_that_cannot_be_asked_or_scored_are_told(bench):
    tokenizer = load_tokenizer(bench.model_dir)
    texts = [{"input": f"a text of its own, number {n}"} for n in range(4)]
    for rows, best, message in (
        (texts, "loss", "no validation row has an answer"),
        ([row | {"output": "no number"} for row in texts], "numeric_match", "numeric_match wants"),
        ([row | {"output": "no number"} for row in texts], "repetition", "more of repetition is not better"),
    ):
        recipe = bench.recipe(predict_with_generate=True, metric_for_best_model=best)
        dataset = prepare(recipe, tokenizer, given={"train": rows, "validation": rows})
        with pytest.raises(UserError, match=message):
            get_task("causal_lm").answers(recipe, dataset)


def test_the_first_validation_is_of_the_base(bench, tmp_path):
    """Before any step its score counts as well: worse ones do not take its place as the best."""
    recipe = bench.recipe(max_steps=2, eval_steps=1, predict_with_generate=True, metric_for_best_model="exact_match")
    outcome = scripted(bench, tmp_path, recipe, [0.9, 0.1, 0.2]).run()
    assert outcome.state.best_step == 0 and math.isclose(outcome.state.best_score, 0.9)
