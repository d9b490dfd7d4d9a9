"""The model card: what the hub reads of it is what was measured, and its lines of Python run."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard

from luthier.finished import merge_saved
from luthier.report import Report, write_reports
from luthier.report.card import hub_id, model_card


def code_of(card: ModelCard) -> str:
    return re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]


def said_by(code: str, **paths: object) -> str:
    """What a card's code prints, with its folders filled in."""
    for name, path in paths.items():
        code = code.replace(f'"path/to/{name}"', repr(str(path)))
    assert "path/to" not in code
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    return printed.getvalue()


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
