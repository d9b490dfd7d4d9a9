"""Rows that parse and still hold something that would be lost, misread, or break the tokenizer later."""

from __future__ import annotations

import json

import pytest

from luthier import DataAugmentor, DataPreprocessor, DatasetLoader, TrainingExample, UserError
from luthier.data.columns import propose
from luthier.data.loader import load_file
from luthier.models.loading import load_tokenizer

GOOD = {"prompt": "a", "response": "b"}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def rows(folder, *items, name="rows.jsonl"):
    path = folder / name
    path.write_text("\n".join(i if isinstance(i, str) else json.dumps(i) for i in items) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("NaN", "bad_json"),
        ("-Infinity", "bad_json"),
        ("1e999", "bad_json"),
        ("1" * 5000, "bad_json"),
        (r'"half \ud83d an emoji"', "half_character"),
        ('{"k": 1, "k": 2}', "duplicate_key"),
    ],
)
def test_a_value_that_no_row_can_hold_refuses_its_row_alone(tmp_path, kind, value, reason):
    bad = f'{{"prompt": "a", "response": "b", "more": [{value}]}}'
    lines = [json.dumps(GOOD), bad, json.dumps(GOOD)]
    path = rows(tmp_path, "[" + ",\n".join(lines) + "]" if kind == "json" else "\n".join(lines), name=f"rows.{kind}")
    loaded = load_file(path)
    assert (loaded.rows_in, len(loaded.examples)) == (3, 2)
    assert [(r.line, r.reason) for r in loaded.rejects] == [(2, reason)]
    json.dumps(loaded.rejects[0].value).encode("utf-8")


def test_a_whole_emoji_in_json_escapes_is_kept(tmp_path):
    path = rows(tmp_path, r'{"prompt": "a", "response": "\ud83d\ude42"}')
    assert load_file(path).examples[0].output == "🙂"


def test_a_list_of_rows_named_twice_is_an_error(tmp_path):
    with pytest.raises(UserError, match="'data' stands twice"):
        load_file(rows(tmp_path, '{"data": [{"prompt": "a", "response": "b"}], "data": []}', name="rows.json"))


@pytest.mark.parametrize("encoding", ["big5", "shift_jis"])
def test_other_encodings_are_not_misread_as_gb18030(tmp_path, encoding):
    text = {"big5": "請問現在幾點鐘，謝謝", "shift_jis": "今日は何曜日ですか、月曜日です"}[encoding]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps({"prompt": text, "response": text}, ensure_ascii=False).encode(encoding))
    with pytest.raises(UserError, match="save it as UTF-8"):
        load_file(path)
    path.write_bytes(json.dumps({"prompt": "請問現在幾點鐘", "response": "三點"}, ensure_ascii=False).encode("gb18030"))
    assert load_file(path).examples[0].input == "請問現在幾點鐘"


def test_tables_with_a_blank_first_line_a_quoted_separator_or_no_row(tmp_path):
    assert load_file(rows(tmp_path, "", "prompt,response", "a,b", name="blank.csv")).examples[0].source.line == 3
    assert load_file(rows(tmp_path, '"prompt";"response";"n, m"', "a;b;c", name="semi.csv")).examples[0].output == "b"
    for look in (load_file, propose):
        with pytest.raises(UserError, match="a header and no row"):
            look(rows(tmp_path, "prompt,response", name="head.csv"))


def test_a_parquet_column_named_twice_is_an_error(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([["a"], ["b"], ["c"]], names=["prompt", "response", "response"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="two columns are called 'response'"):
        load_file(tmp_path / "rows.parquet")


def test_one_indented_object_called_jsonl(tmp_path):
    path = rows(tmp_path, json.dumps({"data": [GOOD, GOOD]}, indent=1))
    assert load_file(path).rows_in == len(load_file(path).examples) == 2


@pytest.mark.parametrize(
    ("row", "left"),
    [
        ({"messages": TURNS, "history": [["x", "y"]]}, {"history": [["x", "y"]]}),
        ({"messages": [{"role": "system", "content": "S2"}, *TURNS], "system": "S1"}, {"system": "S1"}),
        ({"text": "t", "system": "S", "tools": [], "history": 1}, {"system": "S", "tools": [], "history": 1}),
    ],
)
def test_what_an_example_does_not_use_stays_in_its_metadata(tmp_path, row, left):
    assert load_file(rows(tmp_path, row)).examples[0].metadata == left


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Who?", "context": "Tea is hot.", "response": "b"}, "Who?\n\nTea is hot."),
        ({"指令": "翻译", "输入": "茶", "输出": "tea"}, "翻译\n\n茶"),
        ({"指令": "你好", "输入": "", "输出": "好"}, "你好"),
    ],
)
def test_what_a_prompt_is_about_is_part_of_it(tmp_path, row, prompt):
    assert load_file(rows(tmp_path, row)).examples[0].input == prompt


def test_a_column_that_first_appears_late_is_used(tmp_path):
    path = rows(tmp_path, *[GOOD] * 1500, {**GOOD, "system": "Be brief."})
    assert load_file(path).examples[-1].messages[0] == {"role": "system", "content": "Be brief."}


def test_preference_rows_without_a_rejected_answer_are_named(tmp_path):
    with pytest.raises(UserError, match="preference"):
        load_file(rows(tmp_path, {"prompt": "a", "chosen": "b"}))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"content": "b", "weight": 0.5}, "bad_mark"),
        ({"content": "b", "train": "no"}, "bad_mark"),
        ({"content": "", "function_call": {"name": "f", "arguments": "[1]"}}, "bad_tool_call"),
        ({"content": "b", "reasoning_content": ["x"]}, "wrong_type"),
        ({"content": "b", "tool_calls": 7}, "bad_tool_call"),
    ],
)
def test_a_turn_that_would_be_misunderstood_is_refused(tmp_path, answer, reason):
    turns = [TURNS[0], {"role": "assistant", **answer}]
    loaded = load_file(rows(tmp_path, {"messages": TURNS}, {"messages": turns}))
    assert [(r.line, r.reason) for r in loaded.rejects] == [(2, reason)]


def test_the_older_function_call_is_a_tool_call(tmp_path):
    call = {"name": "f", "arguments": '{"x": 1}'}
    turns = [TURNS[0], {"role": "assistant", "content": "Sure.", "function_call": call}]
    last = load_file(rows(tmp_path, {"messages": turns})).examples[0].messages[-1]
    assert last["content"] == "Sure." and last["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}


def test_labels(tmp_path):
    loaded = load_file(rows(tmp_path, *[{"text": "t", "label": v} for v in (1, 1.0, "x", 0.5, {"a": 1})]))
    assert [(e.label, e.output) for e in loaded.examples] == [(1, "1"), (1, "1"), ("x", "x"), ("0.5", "0.5")]
    assert [(r.line, r.reason) for r in loaded.rejects] == [(5, "wrong_type")]


def test_the_loader_can_stop_at_a_bad_row(tmp_path):
    path = rows(tmp_path, GOOD, {**GOOD, "response": ""})
    with pytest.raises(UserError, match=r"rows\.jsonl:2"):
        DatasetLoader(on_error="raise").load_from_jsonl(path)


def test_rows_that_cleaning_empties_are_listed():
    cleaner = DataPreprocessor().add_cleaner("remove_empty_lines").add_cleaner(DataPreprocessor.remove_special_chars)
    given = [TrainingExample("a\n\nb", "c\u200b"), TrainingExample("a", "\u200b")]
    with pytest.warns(UserWarning, match="emptied 1 of 2"):
        kept = cleaner.clean_examples(given)
    assert [(e.input, e.output) for e in kept] == [("a\nb", "c")] and given[0].input == "a\n\nb"
    assert [r.reason for r in cleaner.rejects] == ["emptied"]
    with pytest.raises(UserError, match="normalize_whitespace"):
        DataPreprocessor().add_cleaner("normalise")
    with pytest.raises(UserError, match="NoneType"):
        DataPreprocessor().add_cleaner(lambda text: None).clean_text("a")


@pytest.mark.parametrize("text", ["𝔘𝔫𝔦", "plain words here", "👩‍👩‍👧 茶茶茶"])
def test_truncation_keeps_whole_characters_within_the_limit(tiny_model_dir, text):
    tokenizer = load_tokenizer(tiny_model_dir)
    for limit in range(1, len(tokenizer(text)["input_ids"]) + 1):
        kept = DataPreprocessor.truncate_by_tokens(tokenizer, limit)(text)
        assert text.startswith(kept) and len(tokenizer(kept)["input_ids"]) <= limit
    assert kept == text


def test_only_prompts_are_varied_and_a_failing_augmenter_names_its_row():
    noisy = DataAugmentor().add_augmenter(DataAugmentor.noise_injection)
    assert len(noisy.augment_examples([TrainingExample("all of this is trained")], 1.0)) == 1
    made = noisy.augment_examples([TrainingExample("this is asked about", "answer")], 1.0)
    assert made[1].input != made[0].input and made[1].output == "answer"
    with pytest.raises(UserError, match=r"IndexError(.|\n)*short"):
        DataAugmentor().add_augmenter(lambda text: text[99]).augment_examples([TrainingExample("short", "b")], 1.0)
