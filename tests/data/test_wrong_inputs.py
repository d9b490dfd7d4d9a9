"""What users really hand in: each is a clear error with its place, or a counted reject with its line. Never a loss."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from luthier.data.dataset import prepare
from luthier.data.loader import load_file
from luthier.data_options import Columns
from luthier.errors import UserError
from luthier.models.loading import load_tokenizer
from luthier.recipe import Recipe

GOOD = '{"prompt": "Say yes.", "response": "yes"}\n'


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("empty.jsonl", "", "is empty"),
        ("blank.jsonl", "\n  \n", "is empty"),
        ("empty.csv", "", "is empty"),
        ("empty.parquet", b"", "is empty"),
        ("list.json", "[]", "empty list"),
        ("number.json", "42", "a number, not rows"),
        ("half.json", '[{"prompt": "a", "response": "b"},\n {"prompt": "c", "resp', ":2"),
        ("strange.docx", "PK", "no known kind"),
        ("strange.parquet.gz", "PK", "no known kind"),
        ("fake.xlsx", "PK", "not a readable Excel"),
        ("empty.xlsx", "", "is empty"),
        ("fake.arrow", "ARROW", "not a readable Arrow"),
        ("fake.jsonl.gz", GOOD, "cannot be unpacked"),
        ("fake.jsonl.zst", GOOD, "cannot be unpacked"),
        ("fake.parquet", b"PAR0 this is no table", "not a readable Parquet"),
        ("columns.jsonl", '{"foo": "a", "bar": "b"}\n', "'foo', 'bar'"),
        ("prefs.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "preference pairs"),
        ("open.csv", 'prompt,response\n"never closed,b\n', "close the quotes"),
        ("twice.csv", "prompt,prompt\na,b\n", "two columns"),
        ("unnamed.csv", "prompt,,response\na,b,c\n", "column 2 has no name"),
        ("bytes.jsonl", b'{"prompt": "\xff\xff\xff\xff", "response": "b"}\n', "neither UTF-8"),
        ("zero.csv", b"prompt,response\na\0,b\n", "is 0x00"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, name, content, wanted):
    path = write(tmp_path, name, content)
    with pytest.raises(UserError) as caught:
        load_file(path)
    assert wanted in str(caught.value) and name in str(caught.value) and "to do:" in str(caught.value)


def test_a_missing_file_a_folder_and_a_locked_file(tmp_path):
    write(tmp_path, "other.jsonl", GOOD)
    with pytest.raises(UserError, match=r"does not exist(.|\n)*other\.jsonl"):
        load_file(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        load_file(tmp_path)
    locked = write(tmp_path, "locked.jsonl", GOOD)
    locked.chmod(0)
    if os.access(locked, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(UserError, match="cannot be read"):
        load_file(locked)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"prompt": "half a line', "bad_json"),
        ('{"prompt": "a", "response": NaN}', "bad_json"),
        ('{"prompt": "a", "response": "b", "response": "c"}', "duplicate_key"),
        ('["a", "b"]', "not_an_object"),
        ("null", "not_an_object"),
        ('{"prompt": "a", "response": ""}', "empty_answer"),
        ('{"prompt": "a", "response": " \\n\\t"}', "empty_answer"),
        ('{"prompt": "a", "response": null}', "empty_answer"),
        ('{"prompt": "a"}', "empty_answer"),
        ('{"prompt": "", "response": "b"}', "empty_prompt"),
        ('{"prompt": 3, "response": "b"}', "wrong_type"),
        ('{"prompt": ["a"], "response": "b"}', "wrong_type"),
        ('{"prompt": "a", "response": {"x": 1}}', "wrong_type"),
        ('{"prompt": "a", "response": true}', "wrong_type"),
    ],
)
def test_a_bad_row_is_a_reject_with_its_line(tmp_path, row, reason):
    path = write(tmp_path, "rows.jsonl", GOOD * 3 + row + "\n" + GOOD)
    loaded = load_file(path)
    assert (loaded.rows_in, len(loaded.examples), len(loaded.rejects)) == (5, 4, 1)
    reject = loaded.rejects[0]
    assert (reject.file, reject.line, reject.reason) == (str(path), 4, reason)
    assert reject.message and reject.remedy


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "no_messages"),
        ("not json", "bad_json"),
        ([{"role": "user", "content": "a"}], "no_assistant_turn"),
        ([{"role": "wizard", "content": "a"}, {"role": "assistant", "content": "b"}], "bad_role"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}], "empty_answer"),
        ([{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}], "empty_prompt"),
        ([{"role": "user", "content": 7}, {"role": "assistant", "content": "b"}], "wrong_type"),
        (["a", "b"], "bad_turn"),
        ([{"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant", "content": "b"}], "not_text"),
        ([{"from": "human", "value": "a"}, {"from": "function_call", "value": "{broken"}], "bad_json"),
        ([{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"arguments": {}}'}], "bad_tool_call"),
    ],
)
def test_a_bad_conversation_is_a_reject(tmp_path, turns, reason):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = write(tmp_path, "rows.json", json.dumps([good, {"messages": turns}, good]))
    loaded = load_file(path)
    assert [(r.line, r.reason) for r in loaded.rejects] == [(2, reason)]
    assert len(loaded.examples) == 2


def test_ragged_table_rows_name_their_first_line(tmp_path):
    path = write(tmp_path, "rows.csv", 'prompt,response\n"two\nlines",yes\na,b,c\nd\ne,f\n')
    loaded = load_file(path)
    assert [(e.input, e.source.line) for e in loaded.examples] == [("two\nlines", 2), ("e", 6)]
    assert [(r.line, r.reason) for r in loaded.rejects] == [(4, "ragged_row"), (5, "ragged_row")]


def test_a_named_column_that_is_not_there(tmp_path):
    path = write(tmp_path, "rows.jsonl", '{"question": "a", "answer": "b"}\n')
    with pytest.raises(UserError, match=r"'qestion'(.|\n)*did you mean 'question'"):
        load_file(path, Columns(prompt="qestion", response="answer"))
    with pytest.raises(UserError, match="no response"):
        load_file(path, Columns(prompt="question"))


# --- rows that only the model's tokenizer can judge ---


@pytest.fixture(scope="module")
def tiny_tokenizer(tiny_model_dir):
    return load_tokenizer(tiny_model_dir)


def encoded(path: Path, tokenizer, **data):
    settings = Recipe.from_dict({"data": {"train": str(path), "split": {"validation": 0, "test": 0}, **data}})
    return prepare(settings, tokenizer).train


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_control_tokens_in_user_text_are_refused_by_name(tmp_path, tiny_tokenizer, token):
    row = json.dumps({"prompt": f"before {token} after", "response": "b"})
    part = encoded(write(tmp_path, "rows.jsonl", GOOD + row + "\n"), tiny_tokenizer)
    assert [(r.line, r.reason) for r in part.rejects] == [(2, "special_token_in_text")]
    assert token in part.rejects[0].message
    allowed = encoded(tmp_path / "rows.jsonl", tiny_tokenizer, special_tokens_in_text="allow")
    assert not allowed.rejects and len(allowed.encoded) == 2


def test_a_two_megabyte_row_is_refused_by_its_tokens_and_not_printed(tmp_path, tiny_tokenizer):
    row = json.dumps({"prompt": "word " * 400_000, "response": "b"})
    part = encoded(write(tmp_path, "rows.jsonl", GOOD + row + "\n" + GOOD), tiny_tokenizer)
    assert [(r.line, r.reason) for r in part.rejects] == [(2, "too_long")]
    assert "400," in part.rejects[0].message and len(str(part.rejects[0])) < 1000
    assert part.rows_in == len(part.examples) + len(part.rejects) == 3


@pytest.mark.parametrize(
    "answer", ["🙂👩‍👩‍👧 fine", "zero\u200bwidth", "\ufeffmarked", "右\u2028左", "e\u0301", "\x07bell", "اهلا", "𝔘𝔫𝔦"]
)
def test_strange_characters_come_through_as_they_are(tmp_path, tiny_tokenizer, answer):
    path = write(tmp_path, "rows.jsonl", json.dumps({"prompt": "p", "response": answer}, ensure_ascii=False) + "\n")
    part = encoded(path, tiny_tokenizer)
    row = part.encoded[0]
    assert tiny_tokenizer.decode(row.input_ids[row.trained]) == answer + "<|im_end|>"


def test_on_error_raise_stops_at_the_first_bad_row(tmp_path, tiny_tokenizer):
    path = write(tmp_path, "rows.jsonl", GOOD + '{"prompt": "a", "response": ""}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2"):
        encoded(path, tiny_tokenizer, on_error="raise")
