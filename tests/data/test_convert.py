"""What is written reads back the same, in every format and kind of file that can hold it; the rest is refused."""

from __future__ import annotations

import csv
import gzip
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.data.convert import FORMATS, convert, difference
from luthier.data.examples import TrainingExample
from luthier.data.loader import load_file
from luthier.data_options import Columns
from luthier.errors import UserError

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xlsx", ".jsonl.gz", ".csv.zst")

# What breaks writers: separators, quotes, line ends of all kinds, formulas, other planes, white space at the ends.
texts = st.text(
    st.sampled_from("ab ,;\t\"'\n\r|=+-@#{}[]:\\/你好。é🙂\u2028\u200b\xa0<>&%"), min_size=1, max_size=12
).filter(lambda t: t.strip())
names = st.sampled_from(["id", "lang", "note", "主题"])
scalars = st.one_of(texts, st.integers(-5, 5), st.booleans(), st.none())
metadata = st.dictionaries(names, st.one_of(scalars, st.lists(scalars, max_size=2)), max_size=2)


@st.composite
def calls(draw):
    arguments = draw(st.dictionaries(st.sampled_from(["city", "n"]), st.one_of(texts, st.integers(0, 9)), max_size=2))
    call = {"type": "function", "function": {"name": draw(st.sampled_from(["look", "sum"])), "arguments": arguments}}
    return {**call, "id": "c1"} if draw(st.booleans()) else call


@st.composite
def conversations(draw):
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(texts)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(texts)})
        if draw(st.integers(0, 3)) == 0:
            said = draw(st.one_of(st.just(""), texts))
            messages.append({"role": "assistant", "content": said, "tool_calls": draw(st.lists(calls(), min_size=1))})
            messages.append({"role": "tool", "content": draw(texts)})
        messages.append({"role": "assistant", "content": draw(texts)})
    return messages


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@st.composite
def chats(draw):
    common = {
        "label": draw(st.one_of(st.none(), texts, st.integers(0, 3))),
        "metadata": draw(metadata),
        "references": draw(st.lists(texts, max_size=2)),
        "tools": draw(st.one_of(st.none(), st.just([TOOL]))),
    }
    if draw(st.booleans()):
        return TrainingExample(draw(texts), draw(texts), **common)
    return TrainingExample(messages=draw(conversations()), **common)


plain = st.builds(lambda text, more: TrainingExample(text, metadata=more), texts, metadata)
datasets = st.one_of(st.lists(chats(), min_size=1, max_size=4), st.lists(plain, min_size=1, max_size=3))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(datasets, st.sampled_from(list(FORMATS)), st.sampled_from(list(FORMATS)), st.sampled_from(KINDS))
def test_a_round_trip_loses_nothing_or_is_refused(rows, to, back, kind):
    table = kind in (".csv", ".tsv", ".xlsx", ".csv.zst")

    def lost(path: Path) -> list:
        read = load_file(path)
        assert not read.rejects
        pairs = zip(rows, read.examples, strict=True)
        return [found for before, after in pairs if (found := difference(before, after, table=table))]

    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, f"first{kind}"), Path(folder, "second.jsonl")
        try:
            convert(rows, first, to)
        except UserError as error:
            assert not list(Path(folder).iterdir()) and error.remedy
            # JSON in these formats holds whatever there is.
            pairs = all(row.messages is None for row in rows)
            chat = {"openai", "sharegpt", *(("alpaca", "prompt-completion") if pairs else ())}
            assert ".json" not in kind or to not in ({"text"} if rows[0].is_plain_text else chat), error
            return
        assert lost(first) == []
        try:
            convert(load_file(first).examples, second, back)
        except UserError:
            assert list(Path(folder).iterdir()) == [first]
        else:
            assert lost(second) == []


def test_there_and_back_is_the_very_same_example(tmp_path):
    rows = [TrainingExample("q", "a", label=1, metadata={"id": 7}), TrainingExample("问", "答", references=["也对"])]
    convert(rows, tmp_path / "chat.jsonl", "sharegpt")
    chat = load_file(tmp_path / "chat.jsonl").examples
    assert chat[0].messages == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    convert(chat, tmp_path / "pairs.jsonl", "prompt-completion")
    for before, after in zip(rows, load_file(tmp_path / "pairs.jsonl").examples, strict=True):
        after.source = None
        assert after == before


def test_files_are_those_that_other_tools_read(tmp_path):
    call = {"type": "function", "function": {"name": "look", "arguments": {"city": "北京"}}}
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "Sunny."},
    ]
    row = TrainingExample(messages=turns, tools=[TOOL])
    convert([row], tmp_path / "o.jsonl", "openai")
    openai = json.loads((tmp_path / "o.jsonl").read_text("utf-8"))
    assert json.loads(openai["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {"city": "北京"}
    convert([row], tmp_path / "s.json", "sharegpt")
    (sharegpt,) = json.loads((tmp_path / "s.json").read_text("utf-8"))
    assert [t["from"] for t in sharegpt["conversations"]] == ["human", "function_call", "observation", "gpt"]
    assert json.loads(sharegpt["tools"]) == [TOOL["function"]]
    pair = TrainingExample("a\r\nb", 'say "x", y', label="好", metadata={"id": "1"})
    convert([pair], tmp_path / "p.csv.gz", "prompt-completion")
    with gzip.open(tmp_path / "p.csv.gz", "rt", encoding="utf-8", newline="") as stream:
        assert list(csv.reader(stream)) == [
            ["prompt", "completion", "label", "id"],
            ["a\r\nb", 'say "x", y', "好", "1"],
        ]


def turns_of_two() -> TrainingExample:
    said = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
    return TrainingExample(messages=[{"role": r, "content": c} for r, c in said])


@pytest.mark.parametrize(
    ("rows", "name", "to", "says"),
    [
        ([TrainingExample("q", "a"), turns_of_two()], "x.csv", "prompt-completion", "would be refused when read back"),
        ([TrainingExample("q", "a"), TrainingExample("text")], "x.jsonl", "alpaca", "cannot hold the row: it is plain"),
        ([TrainingExample("q", "a", metadata={"prompt": "p"})], "x.jsonl", "prompt-completion", "called 'prompt'"),
        ([TrainingExample("q", "a", metadata={"k": "p"}), TrainingExample("q", "b")], "x.csv", "alpaca", "absent"),
        ([TrainingExample("q", "a", metadata={"id": 1})], "x.csv", "alpaca", "'id', 1, would become '1'"),
        ([TrainingExample("q", "a", metadata={"dialog": "x"})], "x.jsonl", "alpaca", "would be refused"),
        ([TrainingExample("q", "x" * 32_768)], "x.xlsx", "alpaca", "longer than an Excel cell"),
        ([TrainingExample("q", "\x01")], "x.xlsx", "alpaca", "control characters"),
        ([TrainingExample("q", "\ud83d")], "x.jsonl", "alpaca", "half a character"),
        ([TrainingExample("q", "a", label=1), TrainingExample("q", "b", label="1")], "x.parquet", "alpaca", "one type"),
        ([TrainingExample("q", "a", metadata={"v": {1, 2}})], "x.jsonl", "alpaca", "no JSON value"),
        ([TrainingExample("q", "a")], "x.jsonl", "alpacca", "unknown format"),
        ([TrainingExample("q", "a")], "x.doc", "alpaca", "no kind of file that can be written"),
        ([], "x.jsonl", "alpaca", "no row to write"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_refused_and_leaves_nothing(rows, name, to, says, tmp_path):
    with pytest.raises(UserError) as caught:
        convert(rows, tmp_path / name, to)
    assert says in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_refusal_names_the_row_and_formats_that_can(tmp_path):
    rows = [{"text": "good", "label": "1"}, {"text": "bad", "label": "0", "answer": "no"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    examples = load_file(tmp_path / "in.jsonl", Columns(prompt="text", label="label")).examples
    examples[1].output = examples[1].metadata.pop("answer")
    with pytest.raises(UserError) as caught:
        convert(examples, tmp_path / "x.jsonl", "classification")
    assert caught.value.where == f"{tmp_path / 'in.jsonl'}:2"
    assert caught.value.remedy == "formats that can: openai, sharegpt, alpaca, prompt-completion"


def test_metadata_may_change_only_where_it_is_allowed(tmp_path):
    rows = [TrainingExample("q", "a", metadata={"id": 1}), TrainingExample("q", "b", metadata={"id": "x"})]
    done = convert(rows, tmp_path / "x.csv", "alpaca", lossy=True)
    assert (done.rows, done.changed) == (2, 1) and "'id', 1, would become '1'" in str(done.first_change)
    # A cell holds a list as JSON, so a label that is no list and looks like one would come back as another.
    with pytest.raises(UserError, match="label"):
        convert([TrainingExample("q", "a", label='["x", "y"]')], tmp_path / "y.csv", "alpaca", lossy=True)
    assert not (tmp_path / "y.csv").exists()
    convert([TrainingExample("q", "a", label=["x", "y"])], tmp_path / "y.csv", "alpaca", lossy=True)
    assert load_file(tmp_path / "y.csv").examples[0].label == ["x", "y"]


def test_an_existing_file_stays_unless_forced(tmp_path):
    target = tmp_path / "x.jsonl"
    target.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="exists"):
        convert([TrainingExample("q", "a")], target, "alpaca")
    assert target.read_text("utf-8") == "mine"
    with pytest.raises(UserError):
        convert([TrainingExample("q", "a"), TrainingExample("plain")], target, "alpaca", force=True)
    assert target.read_text("utf-8") == "mine"
    convert([TrainingExample("q", "a")], target, "alpaca", force=True)
    assert load_file(target).examples[0].output == "a"


@pytest.mark.parametrize(
    ("rows", "format"),
    [
        ([TrainingExample("t")], "text"),
        ([TrainingExample("q", "a", label="a"), turns_of_two()], "prompt-completion"),
        ([TrainingExample(messages=[{"role": "developer", "content": "s"}, *turns_of_two().messages])], "openai"),
    ],
)
def test_auto_takes_the_simplest_format_that_holds_all(rows, format, tmp_path):
    assert convert(rows, tmp_path / "x.jsonl", "auto").format == format


def test_real_files_go_through_every_format_that_holds_them(shared_data, tmp_path):
    rows = load_file(shared_data / "glaive_toolcall_en_demo.json").examples
    for number, name in enumerate(("openai", "sharegpt")):
        for kind in (".jsonl", ".csv", ".parquet"):
            convert(rows, tmp_path / f"{number}{kind}", name)
            rows = load_file(tmp_path / f"{number}{kind}").examples
    first = load_file(shared_data / "glaive_toolcall_en_demo.json").examples
    assert [difference(a, b) for a, b in zip(first, rows, strict=True)] == [None] * 300


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", ["openai", "sharegpt"])
def test_a_conversation_with_everything_fits_every_kind_of_file(to, kind, tmp_path):
    first = {
        "type": "function",
        "function": {"name": "look", "arguments": {"city": "北京", "n": [1, None]}},
        "id": "c1",
    }
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u\r\n"},
        {"role": "assistant", "content": "", "tool_calls": [first]},
        {"role": "tool", "content": "", "tool_call_id": "c1", "name": "look"},
        {"role": "assistant", "content": "said", "tool_calls": [{**first, "id": "c2"}, first]},
        {"role": "tool", "content": '{"t": 1}'},
        {"role": "assistant", "content": "b", "train": False},
        {"role": "user", "content": "v"},
        {"role": "assistant", "content": " a ", "reasoning_content": "r"},
    ]
    rows = [TrainingExample(messages=turns, tools=[TOOL], label="x"), TrainingExample("q", "a", label="y")]
    convert(rows, tmp_path / f"x{kind}", to)
    read = load_file(tmp_path / f"x{kind}").examples
    assert read[0].messages == turns and read[0].tools == [TOOL] and [r.label for r in read] == ["x", "y"]
