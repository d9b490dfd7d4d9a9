"""Sources: a file, a folder, a glob and a hub data set give one stream in which every row is accounted for."""

from __future__ import annotations

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from luthier import DatasetLoader, UserError
from luthier.data.examples import Reject
from luthier.data.loader import load_source
from luthier.data.sources import read_examples
from luthier.data_options import Columns, Source

ALPACA = {"instruction": "Add", "input": "1 2", "output": "3"}
PLAIN = {"question": "What is tea?", "answer": "A drink."}


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def names(reading, folder):
    return [path.removeprefix(f"{folder}/") for path in reading.paths]


def test_a_folder_is_its_files_each_with_its_own_columns(tmp_path):
    write(tmp_path / "b.jsonl", PLAIN, {"question": "", "answer": "x"})
    write(tmp_path / "a/c.jsonl.gz", ALPACA)
    write(tmp_path / ".cache/d.jsonl", PLAIN)
    write(tmp_path / ".e.jsonl", PLAIN)
    write(tmp_path / "f.parquet", {"text": "plain"})
    (tmp_path / "README.md").write_text("No rows.")
    reading = read_examples(str(tmp_path))
    assert names(reading, tmp_path) == ["a/c.jsonl.gz", "b.jsonl", "f.parquet"]
    assert reading.left_out == [str(tmp_path / "README.md")]
    rows = list(reading)
    assert [(r.input, r.output) for r in rows if not isinstance(r, Reject)] == [
        ("Add\n\n1 2", "3"),
        ("What is tea?", "A drink."),
        ("plain", None),
    ]
    assert [(r.reason, r.file, r.line) for r in rows if isinstance(r, Reject)] == [
        ("empty_prompt", str(tmp_path / "b.jsonl"), 2)
    ]
    assert reading.format == "Alpaca, question/answer, plain text"
    assert (reading.rows_in, dict(reading.refused)) == (4, {"empty_prompt": 1})
    assert [(f.rows_in, f.kept, f.encoding) for f in reading.files] == [
        (1, 1, "utf-8"),
        (2, 1, "utf-8"),
        (1, 1, "binary"),
    ]
    assert len(list(reading)) == 4 and reading.rows_in == 4  # Again from the beginning.


def test_a_glob(tmp_path):
    for name in ("b-1.jsonl", "b-2.jsonl", "c.jsonl", "deep/b-3.jsonl"):
        write(tmp_path / name, PLAIN)
    assert names(read_examples(f"{tmp_path}/b-*.jsonl"), tmp_path) == ["b-1.jsonl", "b-2.jsonl"]
    assert names(read_examples(f"{tmp_path}/**/b-*.jsonl"), tmp_path) == ["b-1.jsonl", "b-2.jsonl", "deep/b-3.jsonl"]
    odd = write(tmp_path / "odd[1].jsonl", PLAIN)
    assert read_examples(str(odd)).paths == [str(odd)]


def test_a_folder_in_the_hubs_layout_gives_one_split(tmp_path):
    write(tmp_path / "data/train-00000-of-00002.parquet", PLAIN)
    write(tmp_path / "data/train-00001-of-00002.parquet", PLAIN)
    write(tmp_path / "data/test-00000-of-00001.parquet", PLAIN, PLAIN)
    write(tmp_path / "validation/rows.jsonl", PLAIN)
    train = read_examples(str(tmp_path))
    assert names(train, tmp_path) == [f"data/train-0000{i}-of-00002.parquet" for i in (0, 1)]
    assert len(train.left_out) == 2
    for split, rows in (("test", 2), ("validation", 1)):
        assert len(list(read_examples(Source(path=str(tmp_path), split=split)))) == rows
    with pytest.raises(UserError, match=r"no split 'extra'(.|\n)*test, train, validation"):
        read_examples(Source(path=str(tmp_path), split="extra"))


def test_what_datasets_saved(tmp_path):
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(2_500)]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "cache-0123456789abcdef.arrow").write_bytes(
        (tmp_path / "one/data-00000-of-00001.arrow").read_bytes()
    )
    examples = list(read_examples(str(tmp_path / "one")))
    assert [e.output for e in examples] == [row["answer"] for row in rows]
    assert examples[-1].source.line == 2_500
    both = datasets.DatasetDict({"train": data.select(range(10)), "test": data.select(range(3))})
    both.save_to_disk(tmp_path / "two")
    assert len(list(read_examples(str(tmp_path / "two")))) == 10
    assert len(list(read_examples(Source(path=str(tmp_path / "two"), split="test")))) == 3


def test_a_hub_data_set_is_streamed(tmp_path, monkeypatch):
    write(tmp_path / "set/train.jsonl", PLAIN, {"question": "late", "answer": "x", "system": "Be brief."})
    write(tmp_path / "set/test.jsonl", PLAIN)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    reading = read_examples(f"hub:{tmp_path}/set")
    examples = list(reading)
    assert [str(e.source) for e in examples] == [f"hub:{tmp_path}/set:{i}" for i in (1, 2)]
    assert examples[0].output == "A drink." and examples[1].messages[0]["content"] == "Be brief."
    assert len(list(read_examples(Source(path=f"hub:{tmp_path}/set", split="test")))) == 1
    with pytest.raises(UserError, match=r"cannot be read(.|\n)*split"):
        list(read_examples(Source(path=f"hub:{tmp_path}/set", split="extra")))


def test_a_hub_data_set_without_a_network_or_the_library(monkeypatch):
    with pytest.raises(UserError, match=r"'nobody/nothing' cannot be read(.|\n)*network"):
        list(read_examples("hub:nobody/nothing"))
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"isn't installed(.|\n)*pip install datasets"):
        list(read_examples("hub:nobody/nothing"))


def test_sources_that_name_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    file = write(tmp_path / "rows.jsonl", PLAIN)
    for source, words in (
        (str(tmp_path / "missing.jsonl"), "does not exist"),
        (f"{tmp_path}/none-*.jsonl", "no file matches"),
        (str(tmp_path / "empty"), "holds no file"),
        (f"{tmp_path}/empty/*.txt", "no known kind"),
        (Source(path=str(file), subset="sheet"), "the subset 'sheet'"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            read_examples(source)
        assert caught.value.where and caught.value.remedy


def test_a_file_of_unknown_columns_is_told_of_before_any_row(tmp_path):
    write(tmp_path / "a.jsonl", PLAIN)
    write(tmp_path / "b.jsonl", {"foo": "x", "bar": "y"})
    with pytest.raises(UserError, match=r"'foo', 'bar'(.|\n)*b\.jsonl"):
        next(iter(read_examples(str(tmp_path))))


@pytest.mark.parametrize(("before", "after"), [([PLAIN], "茶".encode()[:2]), ([1], json.dumps(PLAIN).encode())])
def test_a_file_that_changes_while_it_is_read(tmp_path, before, after):
    path = write(tmp_path / "rows.jsonl", *before)
    reading = read_examples(str(path))
    assert len(reading.formats) == 1
    with path.open("ab") as stream:
        stream.write(after)
    with pytest.raises(UserError, match="has changed while it was read"):
        list(reading)


def test_the_sources_columns_win(tmp_path):
    file = write(tmp_path / "rows.jsonl", {"a": "x", "b": "y"})
    source = Source(path=str(file), columns=Columns(prompt="a", response="b"))
    assert next(iter(read_examples(source, Columns(prompt="b", response="a")))).output == "y"
    assert next(iter(read_examples(str(file), Columns(prompt="b", response="a")))).output == "x"


def test_the_loader_takes_any_source(tmp_path):
    write(tmp_path / "a.jsonl.gz", PLAIN)
    write(tmp_path / "b.parquet", ALPACA)
    loader = DatasetLoader().load(tmp_path)
    assert [e.output for e in loader] == ["A drink.", "3"]
    assert len(loader.load_from_jsonl(tmp_path / "a.jsonl.gz")) == 3
    with pytest.raises(UserError, match="use load_from_parquet"):
        loader.load_from_excel(tmp_path / "b.parquet")
    with pytest.raises(UserError, match="is a folder"):
        loader.load_from_jsonl(tmp_path)


def test_real_files_as_one_source(shared_data):
    loaded = load_source(f"{shared_data}/gsm8k_*.jsonl")
    assert loaded.rows_in == len(loaded.examples) == 7473 + 1319
    with pytest.raises(UserError, match="columns"):
        # Each file must be understood; nothing is skipped in silence.
        write_nothing = Source(path=f"{shared_data}/*.jsonl", columns=Columns(prompt="nothing", response="answer"))
        load_source(write_nothing)
