"""Harm measured of runs: by the recipe, and by ``luthier evaluate RUN --harm``."""

from __future__ import annotations

import io
import json
import random
import sys

import pytest
from rich.console import Console

from luthier.cli import main
from luthier.finished import evaluate_run
from luthier.pipeline import run
from luthier.recipe import Recipe


@pytest.fixture(scope="module")
def finished(terse_model_dir, tmp_path_factory):
    """A run that was told to measure harm, its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("harm")
    words = [f"{a}{b}" for a in ("am", "bir", "ce", "del") for b in ("ber", "ch", "dar", "ta")]
    shuffled = [random.Random(n).sample(words, 10) for n in range(40)]
    rows = [{"prompt": " ".join(some[:3]), "response": " ".join(some)} for some in shuffled]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "general.jsonl").write_text(json.dumps({"prompt": "Up or down?", "response": "up"}) + "\n{}\n")
    recipe = Recipe.from_dict(
        {
            "model": {"name": str(terse_model_dir)},
            "data": {"train": str(folder / "rows.jsonl")},
            "training": {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": []},
            "evaluation": {"max_new_tokens": 4, "harm": True, "general": str(folder / "general.jsonl")},
            "output_dir": str(folder / "run"),
        }
    )
    printed = io.StringIO()
    result = run(recipe, console=Console(file=printed, width=120))
    return result.run_dir, printed.getvalue()


def test_a_recipe_can_ask_for_it(finished):
    folder, printed = finished
    stored = json.loads((folder / "evaluation" / "harm.json").read_text())
    checks = {check["name"]: check for check in stored["checks"]}
    assert checks["forgetting_general"]["rows"] == 120
    assert checks["forgetting_general (1)"]["rows"] == 1
    assert {"memorised_longest_run", "control_longest_run", "memorised_continued", "leaked", "refusals"} <= set(checks)
    assert "what tuning has cost" in printed and "general.jsonl:2" in printed
    assert "What tuning has cost" in (folder / "report.html").read_text()


def test_a_finished_run_can_be_asked_later(finished):
    folder, _ = finished
    target = folder / "evaluation" / "harm.json"
    before = json.loads(target.read_text())
    target.unlink()
    evaluate_run(folder, overrides=["evaluation.harm=false"], harm=True, console=Console(file=io.StringIO()))
    after = json.loads(target.read_text())
    assert [check | {"examples": []} for check in after["checks"]] == [
        check | {"examples": []} for check in before["checks"]
    ]


def test_fresh_asks_everything_anew(finished, monkeypatch, capsys):
    folder, _ = finished
    for words, anew in (([], False), (["--fresh"], True), ([], False)):
        monkeypatch.setattr(sys, "argv", ["luthier", "evaluate", str(folder), "evaluation.harm=false", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, capsys.readouterr().err
        stored = json.loads((folder / "evaluation" / "comparison.json").read_text())
        for model in stored["models"].values():
            assert model["kept_answers"] == (0 if anew else len(stored["rows"])) and model["metrics"]


def test_a_template_that_is_not_the_trained_one_is_noted(finished):
    folder, _ = finished
    place = folder / "adapter" / "chat_template.jinja"
    kept = place.read_text()
    (folder / "evaluation" / "harm.json").unlink(missing_ok=True)
    printed = io.StringIO()
    try:
        place.write_text(kept.replace("<|im_start|>", "<|turn|>"))
        found = evaluate_run(folder, overrides=["evaluation.harm=false"], console=Console(file=printed, width=400))
    finally:
        place.write_text(kept)
    assert found.notes[0].startswith("the saved chat template is not the one that the run was trained with")
    assert "! the saved chat template" in printed.getvalue()
    assert json.loads((folder / "evaluation" / "comparison.json").read_text())["notes"] == found.notes
    assert not (folder / "evaluation" / "harm.json").exists()  # it was not asked for
    found = evaluate_run(folder, overrides=["evaluation.harm=false"], console=Console(file=printed))
    assert not any("template is not" in note for note in found.notes)
