"""The command line from a data file to a merged model, with sockets blocked; and what it says to mistakes."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
import yaml


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was asked: {args!r}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def rows_file(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"What colour has thing {i}?", "answer": f"Thing {i} is blue."} for i in range(120)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


SHORT = ("training.max_steps=6", "training.eval_steps=3", "evaluation.max_new_tokens=8", "evaluation.max_examples=4")


def test_from_a_file_to_a_merged_model(luthier, no_network, rows_file, terse_model_dir, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    code, out, err = luthier("init", rows_file, "--model", terse_model_dir)
    assert code == 0, err
    assert "120 rows" in out
    proposed = yaml.safe_load(Path("recipe.yaml").read_text(encoding="utf-8"))
    assert proposed["data"]["train"] == "rows.jsonl"

    code, out, err = luthier("check", "recipe.yaml")
    assert code == 0, out + err
    assert "pre-flight: passed" in out and "Thing" in out and "trained" in out

    run = Path(proposed["output_dir"])
    code, out, err = luthier("train", "recipe.yaml", *SHORT)
    assert code == 0, out + err
    assert "base" in out and "tuned" in out and f"luthier chat {run}" in out and f"luthier merge {run}" in out
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "finished" and manifest["rows"]["train"]["kept"] == 96
    assert all(p["passed"] for p in manifest["parity"])
    for name in ("recipe.yaml", "preflight.json", "metrics.jsonl", "rejects.jsonl", "report.html", "checkpoints"):
        assert (run / name).exists(), name
    for name in ("report.md", "report.json", "adapter/README.md"):
        assert (run / name).exists(), name
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in steps if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert (run / "adapter" / "adapter_model.safetensors").is_file()

    before = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    code, _, err = luthier("train", "recipe.yaml", *SHORT)
    assert code == 2 and "--resume" in err and "--overwrite" in err
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == before

    code, out, err = luthier("merge", run)
    assert code == 0, out + err
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    assert tokenizer.chat_template and tokenizer.eos_token_id in _listed(merged.generation_config.eos_token_id)

    code, out, err = luthier("evaluate", run)
    assert code == 0, out + err
    assert "merged" in out
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "What colour?", "answer": "blue"}\n')
    code, out, err = luthier("evaluate", run, "--data", other)
    assert code == 0, out + err

    monkeypatch.setattr("sys.stdin", __import__("io").StringIO("What colour has thing 3?\n/exit\n"))
    code, out, err = luthier("chat", run, "--max-new-tokens", 8)
    assert code == 0, out + err

    # A refused replacement leaves the run that is there.
    code, out, err = luthier("train", "recipe.yaml", *SHORT, "--overwrite", "data.max_length=30")
    assert code == 2 and "pre-flight refuses" in err and (run / "merged").is_dir()
    code, out, err = luthier("train", "recipe.yaml", *SHORT, "--overwrite")
    assert code == 0, out + err
    # The same recipe and seed give the same bytes.
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == before


def _listed(value) -> list[int]:
    return value if isinstance(value, list) else [value]


def test_full_tuning_saves_a_plain_model(luthier, no_network, rows_file, terse_model_dir, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    assert luthier("init", rows_file, "--model", terse_model_dir, "--method", "full")[0] == 0
    code, out, err = luthier("train", "recipe.yaml", *SHORT, "output_dir=run")
    assert code == 0, out + err
    tuned = AutoModelForCausalLM.from_pretrained("run/model")
    base = AutoModelForCausalLM.from_pretrained(terse_model_dir)
    assert not torch.equal(tuned.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)
    code, _, err = luthier("merge", "run")
    assert code == 2 and "nothing to merge" in err


def test_a_refused_run_says_so_and_leaves_no_model(luthier, rows_file, terse_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    luthier("init", rows_file, "--model", terse_model_dir)
    code, out, err = luthier("check", "recipe.yaml", "data.max_length=30")
    assert code == 1 and "rows_lost" in out and "too_long" in out
    code, out, err = luthier("train", "recipe.yaml", "data.max_length=30", "output_dir=run")
    assert code == 2 and "pre-flight refuses" in err
    assert not Path("run/adapter").exists() and not Path("run/checkpoints").exists()
    assert json.loads(Path("run/manifest.json").read_text())["status"] == "failed"
    rejects = [json.loads(line) for line in Path("run/rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == 120 and {r["reason"] for r in rejects} == {"too_long"}


def test_a_folder_of_the_users_is_never_touched(luthier, rows_file, terse_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    luthier("init", rows_file, "--model", terse_model_dir)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for flags in ((), ("--overwrite",), ("--resume",)):
        code, _, err = luthier("train", "recipe.yaml", f"output_dir={mine}", *flags)
        assert code == 2 and "holds no run" in err
    assert (mine / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["train", "absent.yaml"], "does not exist"),
        (["train", "recipe.yaml", "training.learning_rte=1"], "did you mean 'training.learning_rate'"),
        (["train", "recipe.yaml", "training.learning_rate=fast"], "training.learning_rate"),
        (["train", "recipe.yaml", "nonsense"], "key=value"),
        (["train", "recipe.yaml", "model.name=./nowhere"], "there is no folder"),
        (["train", "recipe.yaml", "data.train=nowhere.jsonl"], "nowhere.jsonl"),
        (["train", "recipe.yaml", "data.columns.prompt=qestion", "data.columns.response=answer"], "question"),
        (["train", "recipe.yaml", "--resume", "output_dir=new"], "no run to resume"),
        (["train", "recipe.yaml", "output_dir=rows.jsonl"], "is a file"),
        (["train", "recipe.yaml", "training.report_to=[nosuch]"], "report_to"),
        (["init", "nowhere.csv", "-o", "x.yaml"], "nowhere.csv"),
        (["init", "rows.jsonl"], "exists"),
        (["init", "rows.jsonl", "-o", "x.yaml", "--method", "magic"], "unknown method"),
        (["evaluate", "nowhere"], "no folder"),
        (["evaluate", "."], "no run"),
        (["merge", "nowhere"], "no folder"),
        (["chat", "nowhere/at/all"], "nowhere"),
        (["models", "--prepare", "gpt9"], "gpt9"),
    ],
)
def test_mistakes_get_one_message_and_exit_code_two(
    luthier, no_network, rows_file, terse_model_dir, tmp_path, monkeypatch, arguments, wanted
):
    monkeypatch.chdir(tmp_path)
    assert luthier("init", rows_file, "--model", terse_model_dir)[0] == 0
    code, out, err = luthier(*arguments)
    assert code == 2, out + err
    assert wanted in err and "Traceback" not in err
    assert not list(tmp_path.glob("runs/*/adapter"))


def test_one_of_several_processes_without_the_others_is_refused(
    luthier, rows_file, terse_model_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    luthier("init", rows_file, "--model", terse_model_dir)
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = luthier("train", "recipe.yaml")
    assert code == 2 and "MASTER_ADDR" in err and "--nproc" in err
    code, _, err = luthier("train", "recipe.yaml", "--nproc", 2)
    assert code == 2 and "inside another launcher" in err


def test_a_wrong_option_is_exit_code_two(luthier):
    assert luthier("train")[0] == 2
    assert luthier("dance")[0] == 2


def test_help_names_every_verb(luthier):
    code, out, _ = luthier("--help")
    assert code == 0
    for verb in ("init", "check", "train", "evaluate", "report", "chat", "merge", "models"):
        assert f"│ {verb}" in out
