"""Conversations, tool calls, labels and references in every form that files hold them."""

from __future__ import annotations

import json

import pytest

from luthier import UserError
from luthier.data.conversations import Unfit, checked_turns, parse_tools, reasoning_and_rest
from luthier.data.loader import load_file
from luthier.data.render import prompt_messages
from luthier.data_options import Columns
from luthier.recipe import Recipe

ASKED = {"role": "user", "content": "Weather?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
PLAIN = {"name": "weather", "arguments": {"city": "Oslo"}}
TEXT = {"name": "weather", "arguments": '{"city": "Oslo"}'}


def load(folder, *items, columns=None, name="rows.jsonl"):
    path = folder / name
    path.write_text("\n".join(i if isinstance(i, str) else json.dumps(i) for i in items) + "\n", encoding="utf-8")
    return load_file(path, columns)


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": TEXT}]},
        {"role": "assistant", "content": "", "tool_calls": PLAIN},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([PLAIN])},
        {"role": "assistant", "content": None, "function_call": TEXT, "tool_calls": None},
        {"from": "function_call", "value": json.dumps(PLAIN)},
        {"from": "function_call", "value": json.dumps([TEXT])},
        {"from": "function_call", "value": PLAIN},
        {"from": "gpt", "value": "", "tool_calls": [{"name": "weather", "parameters": {"city": "Oslo"}}]},
    ],
)
def test_a_call_is_read_in_every_form(turn):
    assert checked_turns([ASKED, turn], "m")[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_parallel_calls_and_their_results_keep_their_ids():
    calls = [{**CALL, "id": "a"}, {**CALL, "id": "b"}]
    results = [{"role": "tool", "tool_call_id": i, "content": {"t": 1}} for i in "ab"]
    made = checked_turns([ASKED, {"role": "assistant", "content": None, "tool_calls": calls}, *results], "m")
    assert [c["id"] for c in made[1]["tool_calls"]] == ["a", "b"]
    assert made[2:] == [{"role": "tool", "content": '{"t": 1}', "tool_call_id": i} for i in "ab"]


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ({"from": "observation", "value": {"t": "°"}}, '{"t": "°"}'),
        ({"role": "function", "name": "weather", "content": [1, 2]}, "[1, 2]"),
        ({"role": "tool", "content": [{"type": "text", "text": "clear"}]}, "clear"),
        ({"role": "tool", "content": ""}, ""),
        ({"role": "tool", "content": 21}, "21"),
    ],
)
def test_a_result_is_read_in_every_form(result, text):
    made = checked_turns([ASKED, {"from": "function_call", "value": PLAIN}, result], "m")
    assert made[2]["role"] == "tool" and made[2]["content"] == text


@pytest.mark.parametrize(
    "call", [{"name": ""}, {"name": "f", "arguments": [1]}, {"name": "f", "arguments": "[1"}, "f", {"name": 1}]
)
def test_a_call_that_is_none_is_refused(call):
    with pytest.raises(Unfit):
        checked_turns([ASKED, {"role": "assistant", "tool_calls": [call]}], "m")


WEATHER = {"name": "weather", "description": "of a city", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": WEATHER}


@pytest.mark.parametrize(
    "value",
    [
        [WRAPPED],
        [WEATHER],
        WEATHER,
        WRAPPED,
        json.dumps([WEATHER]),
        json.dumps(WRAPPED),
        [json.dumps(WEATHER)],
        [{"type": "function", **WEATHER}],
    ],
)
def test_tools_are_read_in_every_form(value):
    assert parse_tools(value, "tools") == [WRAPPED]


def test_tools_that_are_none():
    assert [parse_tools(v, "tools") for v in (None, "", " ", "[]", [])] == [None] * 5
    for value in ("{", [1], [{"description": "no name"}], 7):
        with pytest.raises(Unfit):
            parse_tools(value, "tools")


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}, {"weight": 0.0}])
def test_marks_are_kept_as_one(tmp_path, mark):
    turns = [ASKED, {"role": "assistant", "content": "a", **mark}, ASKED, {"role": "assistant", "content": "b"}]
    (example,) = load(tmp_path, {"messages": turns}).examples
    assert [m.get("train") for m in example.messages] == [None, False, None, None]
    assert example.answer == "b" and len(prompt_messages(example)) == 3
    shared = load(tmp_path, {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", **mark}]})
    assert shared.examples[0].messages[1] == {"role": "assistant", "content": "a", "train": False}


def test_a_question_cannot_be_marked_as_trained(tmp_path):
    turns = [{**ASKED, "train": True}, {"role": "assistant", "content": "a", "train": True}]
    loaded = load(tmp_path, {"messages": turns}, {"messages": [{**ASKED, "train": False}, turns[1]]})
    assert [(r.line, r.reason) for r in loaded.rejects] == [(1, "bad_mark")] and "train_on=all" in loaded.rejects[
        0
    ].remedy
    assert loaded.examples[0].messages[0] == ASKED


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_one_name(tmp_path, key):
    turns = [ASKED, {"role": "assistant", "content": "a", key: "why", "train": True}]
    (example,) = load(tmp_path, {"messages": turns}).examples
    assert example.messages[1] == {"role": "assistant", "content": "a", "reasoning_content": "why", "train": True}


def test_reasoning_is_told_from_an_answer():
    assert reasoning_and_rest("<think>\nwhy\n</think>\n\na") == ("why", "a")
    assert reasoning_and_rest("why</think>a") == ("why", "a")
    for text in ("a", "<think>why", "a <think>b</think> c"):
        assert reasoning_and_rest(text) == ("", text)


def test_an_empty_system_turn_is_kept(tmp_path):
    turns = [{"role": "system", "content": ""}, ASKED, {"role": "assistant", "content": "a"}]
    assert load(tmp_path, {"messages": turns}).examples[0].to_chat_format("Be terse.")[0] == turns[0]


NAMES = {"0": "差评", "1": "好评"}


@pytest.mark.parametrize("given", [NAMES, {0: "差评", 1: "好评"}, ["差评", "好评"]])
def test_numbered_classes_are_learnt_by_name(tmp_path, given):
    columns = Columns(label_names=given)
    assert columns.label_names == NAMES
    loaded = load(
        tmp_path, *[{"text": "t", "label": v} for v in (1, "1", 1.0, " 0 ", "1.0", "好评", [0, 1])], columns=columns
    )
    assert [e.output for e in loaded.examples] == ["好评", "好评", "好评", "差评", "好评", "好评", "差评, 好评"]
    assert loaded.examples[0].label == "好评" and loaded.examples[-1].label == ["差评", "好评"]


def test_an_unknown_class_names_itself_and_the_known_ones(tmp_path):
    columns = Columns(label_names=NAMES)
    (reject,) = load(tmp_path, {"text": "t", "label": 0}, {"text": "t", "label": 2}, columns=columns).rejects
    assert (reject.line, reject.reason, reject.field, reject.value) == (2, "unknown_label", "label", "2")
    assert "0 (差评)" in reject.message and "1 (好评)" in reject.message
    with pytest.raises(UserError, match=r"data\.columns\.label"):
        load(tmp_path, {"text": "t"}, columns=columns)


def test_named_classes_are_set_in_a_recipe_beside_named_columns(tmp_path):
    recipe = Recipe.from_dict(
        {"data": {"columns": {"prompt": "评", "label": "级", "label_names": {0: "bad", True: "good"}}}}
    )
    assert recipe.data.columns.label_names == {"0": "bad", "true": "good"}
    loaded = load(tmp_path, {"评": "a", "级": 0}, {"评": "b", "级": True}, columns=recipe.data.columns)
    assert [(e.input, e.output, e.metadata) for e in loaded.examples] == [("a", "bad", {}), ("b", "good", {})]


def test_classes_without_names(tmp_path):
    loaded = load(tmp_path, *[{"text": "t", "label": v} for v in (1, "pos", True, 2.0, ["a", "b"], None)])
    assert [e.output for e in loaded.examples] == ["1", "pos", "true", "2", "a, b"]
    assert [r.reason for r in loaded.rejects] == ["empty_answer"]


def test_real_reviews_are_learnt_by_name(shared_data):
    loaded = load_file(shared_data / "waimai_10k.csv", Columns(label_names=["差评", "好评"]))
    assert not loaded.rejects and {e.output for e in loaded.examples} == {"差评", "好评"}


@pytest.mark.parametrize(
    ("row", "answer", "references"),
    [
        ({"prompt": "q", "response": ["a", "b", "a"]}, "a", ["b"]),
        ({"prompt": "q", "response": [1, 2]}, "1", ["2"]),
        ({"prompt": "q", "response": "a", "references": ["b", 3]}, "a", ["b", "3"]),
        ({"prompt": "q", "response": "a", "references": '["b", "c"]'}, "a", ["b", "c"]),
        ({"prompt": "q", "response": "a", "references": "[b] or c"}, "a", ["[b] or c"]),
        ({"question": "q", "answers": {"text": ["a", "a", "b"], "answer_start": [0, 0, 4]}}, "a", ["b"]),
    ],
)
def test_several_right_answers(tmp_path, tokenizer, row, answer, references):
    from luthier.evaluation.metrics import score
    from luthier.evaluation.question import ask

    (example,) = load(tmp_path, row).examples
    assert (example.output, example.references) == (answer, references)
    question = ask(tokenizer, example, 1)
    assert question.references == [answer, *references]
    assert score([references[0]], [question.references])["exact_match"] == 1
