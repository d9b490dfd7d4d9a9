"""`luthier data`, run as a user runs it."""

from __future__ import annotations

import json
import sys

import pytest
from chat_server import chat_server

from luthier.cli import main
from luthier.data.loader import load_file


@pytest.fixture
def data(capsys, monkeypatch):
    """Runs a verb; gives back the exit code and what was printed."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["luthier", "data", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


@pytest.fixture
def rows(tmp_path):
    """Twelve rows: one twice, one of white space, one that is no JSON."""
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"What is {i} and {i}?", "response": f"It  is {2 * i}.", "kind": "ab"[i % 2]} for i in range(9)]
    text = "\n".join(json.dumps(line) for line in [*lines, lines[0], {"prompt": "q", "response": " "}])
    path.write_text(text + "\n{broken\n", encoding="utf-8")
    return path


@pytest.fixture
def clean(tmp_path):
    path = tmp_path / "clean.jsonl"
    lines = [{"prompt": f"How many are {i} and {i}?", "response": f"{2 * i}", "kind": "ab"[i % 2]} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def test_help_names_every_verb(data):
    code, out, _ = data("--help")
    assert code == 0
    for verb in ("stats", "lint", "preview", "clean", "augment", "generate", "split", "convert"):
        assert f" {verb} " in out


def test_stats_and_lint_of_a_file_and_a_recipe(data, rows, tmp_path, tiny_model_dir):
    code, out, _ = data("stats", rows, "--model", tiny_model_dir, "--json", "--html", tmp_path / "s.html")
    (part,) = json.loads(out).values()
    assert code == 0 and part["rows"] == part["measured"] == 10 and part["exact_copies"] == 1
    assert (tmp_path / "s.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{name: {tiny_model_dir}}}\ndata: {{train: rows.jsonl, test: rows.jsonl}}", "utf-8")
    code, out, _ = data("lint", recipe, "data.max_length=8", "--html", tmp_path / "l.html")
    assert code == 1 and (tmp_path / "l.html").is_file()
    for said in ("refused_bad_json", f"{rows}:12", "duplicates", "too_long", "test: ", "lora, a light adaptation"):
        assert said in out.replace("\n", ""), said
    code, out, err = data("lint", rows, "--html", tmp_path / "l.html")
    assert code == 2 and "exists" in err and not out


def test_lint_passes_sound_rows(data, clean, tiny_model_dir):
    code, out, _ = data("lint", clean, "--model", tiny_model_dir, "--json", "--no-near")
    assert code == 0 and json.loads(out)["passed"] is True


def test_preview_shows_what_is_trained(data, rows, tiny_model_dir):
    code, out, _ = data("preview", rows, "--rows", 2, "--model", tiny_model_dir)
    assert code == 0 and "What is 1 and 1?" in out and "What is 2 and 2?" not in out and "<|im_end|>" in out
    code, out, _ = data("preview", rows, "--row", "rows.jsonl:3", "--row", "11", "--model", tiny_model_dir, "--json")
    shown = json.loads(out)
    (row,), (refused,) = shown["rows"], shown["refused"]
    assert row["source"] == f"{rows}:3" and refused["reason"] == "empty_answer"
    assert "".join(p["text"] for p in row["pieces"] if p["trained"]) == "It  is 4.<|im_end|>"
    assert sum(len(p["text"]) for p in row["pieces"]) > 60 and row["trained_tokens"] < row["tokens"]
    code, _, err = data("preview", rows, "--row", "99", "--model", tiny_model_dir)
    assert code == 2 and "no row at '99'" in err


def test_clean_writes_rows_and_rejects(data, rows, tmp_path):
    code, out, _ = data("clean", rows, "--step", "normalize_whitespace", "--deduplicate", "exact")
    cleaned, rejects = tmp_path / "rows.cleaned.jsonl", tmp_path / "rows.rejects.jsonl"
    assert code == 0 and "normalize_whitespace" in out and str(cleaned) in out.replace("\n", "")
    read = load_file(cleaned).examples
    assert [e.output for e in read] == [f"It is {2 * i}." for i in range(9)] and read[1].metadata == {"kind": "b"}
    reasons = [json.loads(line)["reason"] for line in rejects.read_text("utf-8").splitlines()]
    assert reasons == ["empty_answer", "bad_json", "duplicate"]
    before = rows.read_bytes()
    code, _, err = data("clean", rows, "--step", "normalize_whitespace")
    assert code == 2 and "exists" in err and rows.read_bytes() == before
    code, _, err = data("clean", rows)
    assert code == 2 and "no cleaner is named" in err
    code, _, err = data("clean", rows, "--step", "normalise_whitespace", "-o", tmp_path / "x.jsonl")
    assert code == 2 and "normalize_whitespace" in err and not (tmp_path / "x.jsonl").exists()


def test_clean_takes_the_recipes_steps(data, rows, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: {train: rows.jsonl, clean: [{filter_length: {max: 9, on: answer}}]}", "utf-8")
    code, out, _ = data("clean", recipe, "-o", tmp_path / "out.csv", "--json")
    assert code == 0
    assert json.loads(out)["files"] == {str(tmp_path / "out.csv"): 6, str(tmp_path / "out.rejects.jsonl"): 6}
    assert [e.output for e in load_file(tmp_path / "out.csv").examples][:2] == ["It  is 0.", "It  is 2."]


def test_split_writes_three_files(data, clean, tmp_path):
    words = ("--validation", 0.2, "--test", 0.1, "--strategy", "stratified", "--by", "kind", "--seed", 1)
    code, out, _ = data("split", clean, *words, "--output-dir", tmp_path / "parts", "--json")
    files = json.loads(out)["files"]
    assert code == 0 and list(files.values()) == [28, 8, 4]
    parts = [load_file(path).examples for path in files]
    assert sorted(e.input for part in parts for e in part) == sorted(e.input for e in load_file(clean).examples)
    assert [sum(e.metadata["kind"] == "a" for e in part) for part in parts] == [14, 4, 2]
    again = data("split", clean, *words, "--output-dir", tmp_path / "again", "--json")[1]
    for one, other in zip(files, json.loads(again)["files"], strict=True):
        assert load_file(one).examples[0].input == load_file(other).examples[0].input
    assert data("split", clean, "--output-dir", tmp_path / "parts")[0] == 2


def test_augment_adds_variants(data, clean, tmp_path):
    code, out, _ = data("augment", clean, "--step", "noise_injection", "--ratio", 0.25, "--seed", 3)
    read = load_file(tmp_path / "clean.augmented.jsonl").examples
    assert code == 0 and "noise_injection" in out and len(read) == 50
    assert [e.input for e in read[:40]] == [e.input for e in load_file(clean).examples]
    assert all(e.input not in {r.input for r in read[:40]} for e in read[40:])


def test_convert(data, rows, clean, tmp_path):
    code, out, _ = data("convert", clean, tmp_path / "x.csv", "--to", "openai")
    assert code == 0 and "40 rows" in out and len(load_file(tmp_path / "x.csv").examples) == 40
    code, _, err = data("convert", rows, tmp_path / "y.jsonl")
    assert code == 2 and f"{rows}:11" in err and not (tmp_path / "y.jsonl").exists()
    code, out, _ = data("convert", rows, tmp_path / "y.jsonl", "--lossy")
    assert code == 0 and "2 rows could not be read" in out
    code, _, err = data("convert", clean, tmp_path / "z.jsonl", "--column", "prompt=question")
    assert code == 2 and "no column 'question'" in err
    code, _, err = data("convert", clean, tmp_path / "z.jsonl", "--column", "prompt")
    assert code == 2 and "part=column" in err


def test_generate_writes_what_a_model_makes_of_the_rows(data, clean, tmp_path):
    def reply(body, number):
        words = [f"w{body['seed']}x{i}" for i in range(4)]
        pairs = [{"prompt": " ".join(f"{w}y{j}" for j in range(8)), "answer": f"answer {w}"} for w in words]
        return 200, "\n".join(map(json.dumps, pairs))

    with chat_server(reply) as server:
        asked = ("--model", "m", "--base-url", server.url, "--count", 6)
        code, _, _ = data("generate", clean, *asked, "--json")
        again, _, err = data("generate", clean, *asked)
    made = load_file(tmp_path / "clean.generated.jsonl").examples
    assert code == 0 and len(made) == 6 and all(e.output.startswith("answer w") for e in made)
    assert again == 2 and "--force" in err


def test_what_is_read_is_never_written_and_files_stand_beside_folders_and_patterns(data, clean, tmp_path):
    before = clean.read_bytes()
    code, _, err = data("convert", clean, clean, "--to", "openai", "--force")
    assert code == 2 and "one of the files that are read" in err and clean.read_bytes() == before
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(before)
    assert data("augment", folder, "--step", "noise_injection")[0] == 0
    assert [p.name for p in folder.iterdir()] == ["a.jsonl"] and (tmp_path / "rows.augmented.jsonl").is_file()
    assert data("split", tmp_path / "cl*n.jsonl")[0] == 0
    assert (tmp_path / "cln.train.jsonl").is_file()
