"""The data section as a whole: every row that goes in is kept, refused with a reason, or set aside."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from luthier.data.dataset import prepare
from luthier.data.examples import TrainingExample
from luthier.errors import UserError
from luthier.recipe import Recipe
from luthier.training.preflight.data_checks import check_conversations


def rows(topic, count, first=0):
    # Words of their own, so that no two rows are nearly the same.
    return [
        {
            "prompt": f"Question {topic}{n} about {topic} thing{n * 7} and place{n * 13}?",
            "response": f"Answer{n} {topic}.",
        }
        for n in range(first, first + count)
    ]


def write(path, lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def recipe(**data):
    return Recipe.from_dict({"data": {"split": {"validation": 0, "test": 0}, **data}, "seed": 3})


def adds_up(dataset):
    for part in dataset.parts:
        refused = len(part.rejects) + len(part.sifted)
        assert part.rows_in + part.repeated + part.augmented == len(part.examples) + refused + part.set_aside
        assert {row.index for row in part.encoded} == set(range(len(part.examples)))
        for row in part.encoded:
            assert row.source == part.examples[row.index].source
    return dataset


def test_every_step_at_once(tokenizer, tmp_path):
    large = rows("river", 200)
    large[5]["prompt"] = "Call me at 13812345678, please, about the river?"
    large += [large[0], {"prompt": "", "response": "nothing asked"}, {"prompt": "markup", "response": "<|im_end|>"}]
    small = rows("castle", 60)
    leaked = rows("castle", 3)
    settings = recipe(
        train=[
            {"path": write(tmp_path / "large.jsonl", large), "weight": 3},
            {"path": write(tmp_path / "small.jsonl", small), "weight": 1},
        ],
        benchmarks=write(tmp_path / "benchmark.jsonl", leaked),
        clean=["mask_personal_data", {"filter_length": {"max": 60, "on": "prompt"}}],
        deduplicate="exact",
        augment=["noise_injection"],
        augment_ratio=0.5,
        split={"validation": 0.1, "test": 0.1},
    )
    dataset = adds_up(prepare(settings, tokenizer))
    train, validation, test = dataset.parts
    reasons = Counter(r.reason for r in dataset.rejects)
    assert reasons["duplicate"] == 1 and reasons["in_benchmark"] == 3
    assert reasons["empty_prompt"] == 1 and reasons["special_token_in_text"] in (
        1,
        2,
    )
    assert not any("13812345678" in e.input for part in dataset.parts for e in part.examples)
    sources = Counter((e.source.file.rsplit("/", 1)[-1]) for e in train.examples if "augmented_by" not in e.metadata)
    assert sources == {"large.jsonl": 3 * sources["small.jsonl"] - 1, "small.jsonl": 39} and train.set_aside > 0
    variants = [e for e in train.examples if "augmented_by" in e.metadata]
    assert train.augmented == 4 * 39 // 2 and len(variants) == train.augmented + 1 - reasons["special_token_in_text"]
    originals = {str(e.source): e for e in train.examples if "augmented_by" not in e.metadata}
    for variant in variants:
        origin = originals[variant.metadata["augmented_from"]]
        assert variant.input != origin.input and variant.output == origin.output
    held_out = {e.output for part in (validation, test) for e in part.examples}
    assert held_out and not held_out & {e.output for e in train.examples}
    assert any("mask_personal_data: 1 of" in note for note in dataset.notes)


def test_small_sources_are_repeated_where_every_row_is_wanted(tokenizer, tmp_path):
    settings = recipe(
        train=[
            {"path": write(tmp_path / "a.jsonl", rows("river", 40)), "weight": 0.5},
            {"path": write(tmp_path / "b.jsonl", rows("castle", 10)), "weight": 0.5},
        ],
        stopping_strategy="all_exhausted",
    )
    train = adds_up(prepare(settings, tokenizer)).train
    assert (len(train.examples), train.repeated, train.set_aside) == (80, 30, 0)
    assert Counter(e.input for e in train.examples).most_common(1)[0][1] == 4


def test_the_same_rows_from_python(tokenizer, tmp_path):
    lines = rows("river", 30)
    file = write(tmp_path / "rows.jsonl", lines)
    settings = {"clean": ["remove_special_chars"], "augment": ["noise_injection"]}
    given = {"train": [TrainingExample(line["prompt"], line["response"]) for line in lines]}
    ours = adds_up(prepare(recipe(**settings), tokenizer, given=given)).train
    theirs = adds_up(prepare(recipe(train=file, **settings), tokenizer)).train
    assert [row.input_ids.tolist() for row in ours.encoded] == [row.input_ids.tolist() for row in theirs.encoded]


def test_the_first_bad_row_stops_where_asked(tokenizer, tmp_path):
    file = write(tmp_path / "rows.jsonl", [*rows("river", 4), {"prompt": "q"}, *rows("castle", 4)])
    with pytest.raises(UserError, match=r"rows\.jsonl:5"):
        prepare(recipe(train=file, on_error="raise"), tokenizer)
    too_long = write(tmp_path / "long.jsonl", [*rows("river", 2), {"prompt": "q", "response": "word " * 3000}])
    with pytest.raises(UserError, match=r"long\.jsonl:3"):
        prepare(recipe(train=too_long, on_error="raise"), tokenizer)


def test_a_function_of_the_users_beside_the_recipe(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def shout(text: str) -> str:\n    return text.upper()\n", encoding="utf-8")
    write(tmp_path / "rows.jsonl", rows("river", 3))
    (tmp_path / "recipe.yaml").write_text(
        "data: {train: rows.jsonl, clean: ['mine.py:shout'], split: {validation: 0, test: 0}}", encoding="utf-8"
    )
    monkeypatch.chdir("/")
    train = prepare(Recipe.load(tmp_path / "recipe.yaml"), tokenizer).train
    assert [e.output for e in train.examples] == ["ANSWER0 RIVER.", "ANSWER1 RIVER.", "ANSWER2 RIVER."]


def test_rows_that_the_recipe_sifts_out_are_listed_and_no_loss(tokenizer, tmp_path):
    lines = [*rows("river", 20), *rows("river", 20), {"prompt": "too short", "response": "x"}]
    file = write(tmp_path / "rows.jsonl", lines)
    sifting = {"deduplicate": "exact", "clean": [{"filter_length": {"min": 2, "on": "answer"}}]}
    settings = recipe(train=file, on_error="raise", **sifting)
    dataset = adds_up(prepare(settings, tokenizer))
    assert Counter(r.reason for r in dataset.rejects) == {"duplicate": 20, "too_short": 1}
    assert dataset.train.summary()["refused"] == 21 and not dataset.train.rejects
    findings = {f.code: f for f in check_conversations(settings, dataset)}
    assert "rows_lost" not in findings and findings["rows_sifted"].count == 21
    # Rows that cannot be read still count, in the same share of all.
    lost = recipe(train=write(tmp_path / "lost.jsonl", [*lines, {"prompt": "q"}, {"prompt": "r"}]), **sifting)
    findings = {f.code: f for f in check_conversations(lost, adds_up(prepare(lost, tokenizer)))}
    assert (findings["rows_lost"].severity, findings["rows_lost"].count) == ("error", 2)
