"""Runs to report of: answers, classes, and one that was stopped; trained once."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
from chat_server import chat_server, said
from hostile import HOSTILE, JUDGE
from rich.console import Console

from luthier import TrainingExample
from luthier.finished import evaluate_run
from luthier.pipeline import run
from luthier.recipe import Recipe
from luthier.training.loop import Interrupted
from luthier.training.progress import Silent


def recipe_of(folder: Path, model: Path, **sections) -> Recipe:
    training = {"max_steps": 4, "eval_steps": 2, "per_device_train_batch_size": 2, "report_to": []}
    return Recipe.from_dict(
        {
            "model": {"name": str(model)},
            "training": training | sections.pop("training", {}),
            "evaluation": {"max_new_tokens": 4, "max_examples": 6} | sections.pop("evaluation", {}),
            "output_dir": str(folder / "run"),
            **sections,
        }
    )


@pytest.fixture(scope="session")
def chat(terse_model_dir, tmp_path_factory) -> Path:
    """Answers, with rows that try to break out, one that is refused, and an evaluation of other rows."""
    folder = tmp_path_factory.mktemp("chat")
    rows = [{"prompt": f"{HOSTILE} {n}", "response": f"{n} {HOSTILE}"} for n in range(40)]
    lines = [json.dumps(row) for row in rows]
    (folder / "rows|`x`.jsonl").write_text("\n".join([*lines, "{}", ""]))
    (folder / "other.jsonl").write_text("\n".join(lines[:2]) + "\n")
    recipe = recipe_of(
        folder,
        terse_model_dir,
        data={"train": str(folder / "rows|`x`.jsonl"), "max_rejected_share": 0.5},
        training={"predict_with_generate": True, "generation_examples": 2, "learning_rate": 0.05},
    )
    result = run(recipe, console=Console(file=io.StringIO()))
    evaluate_run(result.run_dir, data=str(folder / "other.jsonl"), console=Console(file=io.StringIO()))
    return result.run_dir


@pytest.fixture(scope="session")
def classes(tiny_encoder_dir, tmp_path_factory) -> Path:
    """Two classes, one with a hostile name."""
    folder = tmp_path_factory.mktemp("classes")
    draw = random.Random(0)
    names = {"good": "pos", "bad": "</td><b>neg"}

    def rows(count: int, part: int) -> list[TrainingExample]:
        words = [draw.choice(list(names)) for _ in range(count)]
        return [TrainingExample(f"the {part}{n} is {word} 很好", label=names[word]) for n, word in enumerate(words)]

    recipe = recipe_of(
        folder,
        tiny_encoder_dir,
        task="classification",
        training={"max_steps": 30, "learning_rate": 5e-3, "per_device_train_batch_size": 8},
        evaluation={"max_examples": 40},
    )
    given = {"train": rows(60, 1), "validation": rows(10, 2), "test": rows(40, 3)}
    return run(recipe, given=given, console=Console(file=io.StringIO())).run_dir


@pytest.fixture(scope="session")
def words(tiny_encoder_dir, tmp_path_factory) -> Path:
    """Hidden words; the base's head is new, so the tuned model alone is asked."""
    folder = tmp_path_factory.mktemp("words")
    rows = [TrainingExample(f"the good bread {n} is in the house and the <b>wine</b> 好吃") for n in range(30)]
    recipe = recipe_of(folder, tiny_encoder_dir, task="masked_lm", method="full", training={"max_steps": 2})
    given = {"train": rows[:20], "validation": rows[20:24], "test": rows[24:]}
    return run(recipe, given=given, console=Console(file=io.StringIO())).run_dir


class _Stopping(Silent):
    def step(self, record):
        if record["step"] == 3:
            raise Interrupted(signal.SIGINT, Path("checkpoints"))


@pytest.fixture(scope="session")
def stopped(terse_model_dir, tmp_path_factory) -> Path:
    """A run that was interrupted in its fourth step."""
    folder = tmp_path_factory.mktemp("stopped")
    rows = [TrainingExample(f"say {n}", output=f"{n} and more") for n in range(20)]
    recipe = recipe_of(folder, terse_model_dir)
    with pytest.raises(Interrupted):
        run(recipe, given={"train": rows[:14], "validation": rows[14:]}, reporter=_Stopping())
    return folder / "run"


def _reply(body: dict, number: int) -> tuple[int, object]:
    """A judge by a rule, with words that try to break out; of some rows it gives no verdict, of others no reply."""
    texts = dict(re.findall(r"<(question|answer_a|answer_b) \w+>\n(.*?)\n</\1", said(body), re.DOTALL))
    row = int(texts["question"].split()[-1])
    if row % 4 == 1:
        return 400, {"error": {"message": f"too long {HOSTILE}"}}
    if row % 4 == 2:
        return 200, f"{HOSTILE}\n\nI cannot say."
    ordered = texts["answer_a"] > texts["answer_b"]
    first = True if row % 4 == 0 else ordered == (row % 8 == 3)
    return 200, f"{HOSTILE}\n\n[[{'A' if first else 'B'}]]"


@pytest.fixture(scope="session")
def judged(chat, tmp_path_factory) -> Path:
    """The answers, judged by a model whose name tries to break out, behind an address with a password."""
    run_dir = tmp_path_factory.mktemp("judged") / "run"
    shutil.copytree(chat, run_dir, ignore=shutil.ignore_patterns("checkpoints"))
    data = run_dir.parent / "more.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"say {n}", "response": f"{n}"}) for n in range(16)))
    with chat_server(_reply) as server:
        judge = {"endpoint": server.url.replace("//", "//me:hidden@"), "model": JUDGE}
        settings = [f"evaluation.judge={json.dumps(judge)}", f"data.test={json.dumps(str(data))}"]
        settings.append("evaluation.max_examples=null")
        evaluate_run(run_dir, overrides=settings, console=Console(file=io.StringIO()))
    return run_dir
