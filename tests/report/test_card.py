"""The model card: what the hub reads of it is what was measured, and its lines of Python run."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import yaml
from card_code import code_of, said_by
from hostile import JUDGE
from huggingface_hub import ModelCard

from luthier.finished import merge_saved
from luthier.report import Report, write_reports
from luthier.report.card import hub_id, model_card
from luthier.report.markdown import inline


@pytest.mark.parametrize("name", ["chat", "classes"])
def test_the_hub_reads_what_was_measured(name, request):
    run = request.getfixturevalue(name)
    card = ModelCard.load(run / "adapter" / "README.md")
    assert card.data.library_name == "peft" and card.data.tags == ["luthier", "lora", "transformers"]
    assert card.data.pipeline_tag == {"chat": "text-generation", "classes": "text-classification"}[name]
    # Nothing is made up: the base was a folder, and nobody has named a licence or a language.
    assert card.data.license is None and card.data.base_model is None and card.data.language is None
    assert "None is stated here" in card.text
    source = json.loads((run / "evaluation" / "comparison.json").read_text())
    tuned = source["models"]["tuned"]["metrics"]
    wanted = {n: tuned[n] for n, told in source["measures"].items() if told["better"] is not None}
    assert wanted and {r.metric_type: r.metric_value for r in card.data.eval_results} == wanted
    assert {r.metric_name for r in card.data.eval_results} == {source["measures"][n]["label"] for n in wanted}
    # No folder of this machine is published.
    assert str(run.parent) not in card.content and "/tmp" not in card.content
    # Written again, it is the same.
    assert str(ModelCard(card.content)) == card.content


def test_its_code_runs_and_answers_as_the_run_did(chat, terse_model_dir):
    from transformers import AutoTokenizer

    card = ModelCard.load(chat / "adapter" / "README.md")
    source = json.loads((chat / "evaluation" / "comparison.json").read_text())
    row = source["rows"][0]
    code = code_of(card).replace('"QUESTION"', repr(row["asked"]))
    tokens = row["answers"]["tuned"]["token_ids"]
    right = AutoTokenizer.from_pretrained(terse_model_dir).decode(tokens, skip_special_tokens=True)
    assert said_by(code, base=terse_model_dir, adapter=chat / "adapter") == right + "\n"


def test_its_code_classifies_as_the_run_did(classes, tiny_encoder_dir):
    card = ModelCard.load(classes / "adapter" / "README.md")
    row = json.loads((classes / "evaluation" / "comparison.json").read_text())["rows"][0]
    printed = said_by(code_of(card).replace("TEXT", row["text"]), base=tiny_encoder_dir, adapter=classes / "adapter")
    scores = {name: float(score) for name, score in (line.rsplit(" ", 1) for line in printed.splitlines())}
    assert max(scores, key=scores.__getitem__) == row["given"]["tuned"][0] and sum(scores.values()) == pytest.approx(
        1, abs=1e-3
    )


def test_its_code_fills_in_words(words):
    card = ModelCard.load(words / "model" / "README.md")
    assert card.data.pipeline_tag == "fill-mask" and card.data.library_name == "transformers"
    assert re.match(r"\['.+'\]\n", said_by(code_of(card), model=words / "model"))


def test_a_merged_model_has_its_own(chat, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(chat, run, ignore=shutil.ignore_patterns("checkpoints"))
    merge_saved(run)
    card = ModelCard.load(run / "merged" / "README.md")
    assert card.data.library_name == "transformers" and "peft" not in code_of(card)
    assert said_by(code_of(card), model=run / "merged")
    write_reports(run, ["card"])
    assert ModelCard.load(run / "adapter" / "README.md").data.library_name == "peft"


def test_a_judges_numbers_are_on_it_and_nothing_else_of_it(judged, tmp_path):
    (target,) = write_reports(judged, ["card"], tmp_path / "README.md")
    card = ModelCard.load(target)
    told = json.loads((judged / "evaluation" / "comparison.json").read_text())["judge"]["models"]["tuned"]
    text = card.text.replace("\\", "")
    for label, key in (("won", "wins"), ("lost", "losses"), ("left out: no reply", "failed")):
        assert f"| {label} | {told[key]} |" in text
    rate, low, high = told["win_rate"]
    assert f"share won, ties as half | {rate:.1%} [{low:.1%} … {high:.1%}] |" in text
    assert f"Judged by {inline(JUDGE.split('/')[-1])}, beside base" in card.text
    # No address, no prompt, no reply, no folder; and no score of a judge's where the hub lists metrics.
    for hidden in ("127.0.0.1", "hidden", "impartial", "alert(1)", "/models"):
        assert hidden not in card.content
    assert "judge" not in {result.metric_type for result in card.data.eval_results}


def test_the_index_has_what_the_hub_wants(chat):
    content = (chat / "adapter" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(content.split("---\n")[1])
    (index,) = front["model-index"]
    assert index["name"] == "run" and not {"license", "language", "base_model"} & set(front)
    write_reports(chat, ["card"])
    front = yaml.safe_load((chat / "adapter" / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    (index,) = front["model-index"]
    assert [result["dataset"]["name"] for result in index["results"]] == ["held-out test rows", "other"]
    for result in index["results"]:
        # No configuration of a data set is named: rows of files have none.
        assert result["task"]["type"] == "text-generation" and result["dataset"]["type"] == "local-rows"
        assert "config" not in result["dataset"]
        for metric in result["metrics"]:
            assert isinstance(metric["type"], str) and isinstance(metric["value"], float) and metric["name"]


def test_what_is_known_is_said(chat, tmp_path):
    report = Report.of(chat)
    report.manifest["model"] = {"name": "smollm2"}
    report.recipe["data"]["train"] = [{"path": "hub:someone/rows"}]
    report.recipe["task"] = {
        "name": "seq_to_seq",
        "src_lang": "eng_Latn",
        "tgt_lang": "zho_Hans",
        "source_prefix": "to zh: ",
    }
    card = ModelCard(model_card(report, chat / "adapter"))
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and card.data.datasets == ["someone/rows"]
    assert card.data.language == ["eng", "zho"] and {r.dataset_type for r in card.data.eval_results} == {
        "someone/rows",
        "local-rows",
    }
    code = code_of(card)
    compile(code, "card", "exec")
    assert card.data.pipeline_tag == "translation" == card.data.eval_results[0].task_type
    assert "AutoModelForSeq2SeqLM" in code and "forced_bos_token_id" in code and "'to zh: TEXT'" in code
    for method, task, wanted in (("adapter", "causal_lm", "load_saved"), ("lora", "masked_lm", "mask_token_id")):
        report.manifest["method"], report.recipe["task"] = method, {"name": task}
        code = code_of(ModelCard(model_card(report, chat / "adapter")))
        compile(code, "card", "exec")
        assert wanted in code


def test_a_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert [hub_id(name) for name in ("org/name", "gpt2", "/a/b", "./a", "mine", "x.gguf", "~/x")] == [
        "org/name", "gpt2", None, None, None, None, None,
    ]  # fmt: skip
