"""Files to examples: every format and encoding gives the same rows, and every known shape is recognised."""

from __future__ import annotations

import csv
import json
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier import DatasetLoader, UserError
from luthier.data.columns import propose
from luthier.data.examples import TaskType, TrainingExample
from luthier.data.loader import load_file
from luthier.data.readers import encoding_of
from luthier.data.split import split_examples

ROWS = [
    {"question": "What is tea?", "answer": "A drink."},
    {"question": "茶是什么？\n两行", "answer": "一种饮料，“好喝”。"},
    {"question": 'Quotes " and, commas', "answer": "yes; \ttabs"},
]
PAIRS = [(r["question"], r["answer"]) for r in ROWS]


def pairs(path):
    loaded = load_file(path)
    assert not loaded.rejects and loaded.rows_in == len(loaded.examples)
    return [(e.input, e.output) for e in loaded.examples]


def write_as(folder, kind):
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(ROWS, ensure_ascii=False, indent=2), encoding="utf-8")
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, ["question", "answer"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    assert pairs(write_as(tmp_path, kind)) == PAIRS


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_every_encoding_gives_the_same_rows(tmp_path, kind, encoding):
    plain = write_as(tmp_path, kind)
    path = tmp_path / f"other.{kind}"
    path.write_bytes(plain.read_bytes().decode("utf-8").encode(encoding))
    assert pairs(path) == PAIRS
    assert encoding_of(path) == {"utf-8-sig": "utf-8"}.get(encoding, encoding)


@pytest.mark.parametrize("ending", ["\r\n", "\r", "\n"])
def test_every_line_ending(tmp_path, ending):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ending.join(json.dumps(r) for r in ROWS).encode())
    assert pairs(path) == PAIRS
    assert [e.source.line for e in load_file(path).examples] == [1, 2, 3]


def test_lists_in_odd_places(tmp_path):
    under_data = tmp_path / "data.json"
    under_data.write_text(json.dumps({"version": 1, "data": ROWS}))
    lines_called_json = tmp_path / "lines.json"
    lines_called_json.write_text("\n".join(json.dumps(r) for r in ROWS))
    list_called_jsonl = tmp_path / "list.jsonl"
    list_called_jsonl.write_text(json.dumps(ROWS, indent=1))
    semicolons = tmp_path / "semi.csv"
    semicolons.write_text("question;answer\na;b\n")
    assert pairs(under_data) == pairs(lines_called_json) == pairs(list_called_jsonl) == PAIRS
    assert pairs(semicolons) == [("a", "b")]


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=5))
def test_any_text_comes_back_as_it_was(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("any") / "rows.jsonl"
    lines = [json.dumps({"prompt": p, "response": r}, ensure_ascii=True) for p, r in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    loaded = load_file(path)
    assert loaded.rows_in == len(rows)
    wanted = [(p, r) for p, r in rows if p.strip() and r.strip()]
    assert [(e.input, e.output) for e in loaded.examples] == wanted
    assert len(loaded.rejects) == len(rows) - len(wanted)


@pytest.mark.parametrize(
    ("row", "name", "wanted"),
    [
        ({"instruction": "Add", "input": "1 2", "output": "3"}, "Alpaca", ("Add\n\n1 2", "3")),
        ({"instruction": "Add", "input": "", "output": "3"}, "Alpaca", ("Add", "3")),
        ({"prompt": "a", "completion": "b"}, "prompt/completion", ("a", "b")),
        ({"input": "a", "output": "b"}, "input/output", ("a", "b")),
        ({"问题": "几点？", "答案": "三点"}, "问题/答案", ("几点？", "三点")),
        ({"question": "a", "answers": ["b", "c"]}, "question/answers", ("a", "b")),
        ({"text": "plain"}, "plain text", ("plain", None)),
        ({"input": "plain"}, "plain text", ("plain", None)),
        ({"review": "好吃", "label": 1}, "review with label", ("好吃", "1")),
    ],
)
def test_known_shapes_are_recognised(tmp_path, row, name, wanted):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    loaded = load_file(path)
    assert loaded.format == name == propose(path).format
    assert (loaded.examples[0].input, loaded.examples[0].output) == wanted


def test_several_right_answers_become_references(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answers": ["b", "c"], "id": 7}')
    example = load_file(path).examples[0]
    assert example.references == ["c"] and example.metadata == {"id": 7}


def test_conversations(tmp_path):
    share = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
            {"from": "observation", "value": '{"sky": "clear"}'},
            {"from": "gpt", "value": "Clear."},
        ],
        "tools": '[{"name": "weather", "parameters": {}}]',
    }
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([share]))
    example = load_file(path).examples[0]
    assert [m["role"] for m in example.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert example.messages[2]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Oslo"}}
    assert example.tools == [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    assert example.answer == "Clear."


def test_alpaca_history_and_system_become_turns(tmp_path):
    row = {"instruction": "And 2?", "output": "4", "history": [["1?", "2"]], "system": "Double it."}
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row]))
    turns = load_file(path).examples[0].messages
    assert [(m["role"], m["content"]) for m in turns] == [
        ("system", "Double it."),
        ("user", "1?"),
        ("assistant", "2"),
        ("user", "And 2?"),
        ("assistant", "4"),
    ]


def test_real_files_lose_no_row(shared_data):
    for name, count, shape in (
        ("gsm8k_train.jsonl", 7473, "question/answer"),
        ("alpaca_zh_demo.json", 1000, "Alpaca"),
        ("alpaca_en_demo.json", 999, "Alpaca"),
        ("glaive_toolcall_en_demo.json", 300, "ShareGPT"),
        ("waimai_10k.csv", 11987, "review with label"),
    ):
        loaded = load_file(shared_data / name)
        assert (loaded.rows_in, loaded.format) == (count, shape)
        assert len(loaded.examples) + len(loaded.rejects) == count and len(loaded.rejects) <= 1


def test_the_loader_is_a_list_that_adds(tmp_path):
    path = write_as(tmp_path, "jsonl")
    loader = DatasetLoader(task_type="instruction")
    assert loader.load_from_jsonl(path) is loader
    loader.load_from_csv(write_as(tmp_path, "csv"))
    assert len(loader) == 6 and loader[0].task_type is TaskType.INSTRUCTION and loader[-1].output == PAIRS[-1][1]
    assert loader.get_training_data(format="chat")[0][1] == {"role": "assistant", "content": "A drink."}
    assert loader.get_training_data(format="instruction")[0]["output"] == "A drink."
    assert loader.get_training_data(format="causal")[0] == "What is tea?\nA drink."
    for mistake in (
        lambda: loader.load_from_csv(path),
        lambda: loader.get_training_data(format="xml"),
        lambda: loader.load_from_jsonl(path, promt="question"),
        lambda: DatasetLoader(task_type="poetry"),
        lambda: DatasetLoader().split(),
    ):
        with pytest.raises(UserError):
            mistake()


def test_refused_rows_are_warned_of(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": ""}\n')
    with pytest.warns(UserWarning, match=r"1 of 2 rows refused \(empty_answer 1\).*rows\.jsonl:2"):
        loader = DatasetLoader().load_from_jsonl(path)
    assert len(loader.rejects) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DatasetLoader().load_from_jsonl(write_as(tmp_path, "jsonl"))


def test_a_sequence_to_sequence_example_reads_as_in_the_text():
    example = TrainingExample("cat", "chat", task_type=TaskType.SEQ_TO_SEQ)
    assert example.to_causal_lm_format() == "cat -> chat"


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.integers(0, 30), max_size=60),
    train=st.floats(0.01, 1),
    share=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_a_split_is_a_partition_that_leaks_nothing(texts, train, share, seed):
    examples = [TrainingExample(input=str(t), output="x", metadata={"row": i}) for i, t in enumerate(texts)]
    parts = split_examples(examples, train, (1 - train) * share, seed)
    rows = [e.metadata["row"] for part in parts for e in part]
    assert sorted(rows) == list(range(len(examples)))
    sides = [{e.input for e in part} for part in parts]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert parts == split_examples(examples, train, (1 - train) * share, seed)


def test_split_sizes_and_seeds():
    examples = [TrainingExample(input=str(i), output="x") for i in range(1000)]
    assert [len(p) for p in split_examples(examples, 0.8, 0.1)] == [800, 100, 100]
    assert split_examples(examples, 0.8, 0.1, seed=1) != split_examples(examples, 0.8, 0.1, seed=2)
    for ratios in ((0.9, 0.2), (0, 0.5), (-0.1, 0.5), ("0.8", 0.1)):
        with pytest.raises(UserError):
            split_examples(examples, *ratios)
