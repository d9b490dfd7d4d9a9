"""Rows on disk are the rows: examples, encoded ones, found again or not."""

from __future__ import annotations

import copy
import datetime
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data import encoded as encoded_rows
from luthier.data.chats import ChatEncoder
from luthier.data.encoded import EncodedRows, cache_key, encode_rows
from luthier.data.examples import Source, TaskType, TrainingExample
from luthier.data.render import Renderer
from luthier.data.store import Chosen, ExampleStore, Joined

EXAMPLES = [
    TrainingExample("2 + 2?", "4", source=Source("a.jsonl", 1)),
    TrainingExample("A plain text.", source=Source("b.jsonl", 7), metadata={"day": datetime.date(2026, 1, 2)}),
    TrainingExample(
        messages=[{"role": "user", "content": "三加四？"}, {"role": "assistant", "content": "七"}],
        references=["7"],
        label=["a", "b"],
        task_type=TaskType.INSTRUCTION,
    ),
    TrainingExample("long", "word " * 200, source=Source("a.jsonl", 3)),
    TrainingExample("half \ud83d", "a character", source=Source("a.jsonl", 4)),
    TrainingExample("<|im_end|> inside", "refused", source=Source("a.jsonl", 5)),
]
values = st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda v: st.lists(v, max_size=2), max_leaves=3)
rows = st.lists(
    st.builds(
        TrainingExample,
        st.text(max_size=20),
        st.none() | st.text(max_size=20),
        label=st.none() | st.integers() | st.text(max_size=3),
        metadata=st.dictionaries(st.text(max_size=3), values, max_size=2),
        references=st.lists(st.text(max_size=3), max_size=2),
        source=st.none() | st.builds(Source, st.sampled_from(["x", "y", "z"]), st.integers(0, 10**9)),
    ),
    max_size=20,
)


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert np.array_equal(x.input_ids, y.input_ids) and np.array_equal(x.trained, y.trained)
        assert (x.source, x.cut) == (y.source, y.cut)


@settings(max_examples=50, deadline=None)
@given(rows, st.data())
def test_a_store_holds_what_was_put_into_it(examples, data):
    store = ExampleStore(examples)
    assert list(store) == examples and [store[i] for i in range(len(examples))] == examples
    for example in examples[:3]:
        store.append(example)  # after reading has begun
    assert list(store) == examples + examples[:3] and list(pickle.loads(pickle.dumps(store))) == list(store)
    cut = data.draw(st.slices(len(store)))
    assert list(store[cut]) == list(store)[cut]
    assert list(Joined(store, examples)[cut]) == (list(store) + examples)[cut]
    numbers = data.draw(st.permutations(range(len(store))))
    assert list(Chosen(store, np.array(numbers))) == [list(store)[n] for n in numbers]


def test_rows_larger_than_a_block_and_a_file_that_goes_with_its_store():
    big = [TrainingExample("x" * 3_000_000, "y"), TrainingExample("q", "a"), TrainingExample("z" * 1_100_000, "y")]
    store = ExampleStore(big)
    folder = store._folder
    assert list(store) == big
    del store
    assert not folder.exists()


def test_what_a_killed_process_left_is_removed_and_nothing_else(cache):
    code = "from luthier.data.store import *; s = ExampleStore(); print(s._folder, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        left = Path(other.stdout.readline().strip())
        ours = ExampleStore(EXAMPLES)
        assert left.exists() and left.parent == ours._folder.parent
        other.kill()
    assert left.exists()
    ExampleStore()
    assert not left.exists() and list(ours) == EXAMPLES and ours._folder.exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_encoded_rows_are_those_of_memory(tokenizer, processes):
    encoder = ChatEncoder(Renderer(tokenizer), max_length=100)
    many = ExampleStore(EXAMPLES * 400)
    reference = encoder.encode(many)
    found = encode_rows(encoder, many, cache=False, processes=processes)
    same(found, reference.examples)
    same([found[i] for i in range(len(found))], reference.examples)
    same(found[5:700:9], reference.examples[5:700:9])
    assert found.rejects == reference.rejects and {r.reason for r in found.rejects} == {
        *("too_long", "half_character", "special_token_in_text"),
    }
    assert [many[int(found.kept[row.index])].source for row in found] == [row.source for row in reference.examples]
    assert found.lengths.tolist() == [len(e) for e in reference.examples]
    assert found.trained.tolist() == [int(e.trained.sum()) for e in reference.examples]
    folder = found.folder
    del found
    assert not folder.exists()


def test_pieces_of_one_text_point_to_it(tokenizer):
    encoder = ChatEncoder(Renderer(tokenizer), max_length=40, truncation="split")
    texts = ExampleStore(
        [TrainingExample("refused <|im_end|>"), TrainingExample("word " * 100), TrainingExample("end")]
    )
    found = encode_rows(encoder, texts, cache=False)
    assert found.kept.tolist() == [1, 2] and [row.index for row in found] == [0, 0, 0, 1]


def test_no_row_at_all(tokenizer):
    found = encode_rows(ChatEncoder(Renderer(tokenizer)), ExampleStore([]), cache=False)
    assert len(found) == 0 and list(found) == [] and found.rejects == [] and len(found[:3]) == 0


def test_a_later_run_finds_them(tokenizer, monkeypatch):
    store = ExampleStore(EXAMPLES)
    first = encode_rows(ChatEncoder(Renderer(tokenizer)), store)

    def write(*_):
        raise AssertionError("encoded again")

    with monkeypatch.context() as patch:
        patch.setattr(encoded_rows, "_write", write)
        again = encode_rows(ChatEncoder(Renderer(copy.deepcopy(tokenizer))), ExampleStore(EXAMPLES))
        same(again, first)
        assert again.rejects == first.rejects
        with pytest.raises(AssertionError, match="again"):
            encode_rows(ChatEncoder(Renderer(tokenizer), max_length=9), store)


def test_what_the_key_depends_on(tokenizer):
    key = cache_key(ChatEncoder(Renderer(tokenizer)), EXAMPLES)
    assert key == cache_key(ChatEncoder(Renderer(copy.deepcopy(tokenizer))), ExampleStore(EXAMPLES))
    other = copy.deepcopy(tokenizer)
    other.chat_template = str(other.chat_template) + " "
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["newtoken"])
    moved = (
        [*EXAMPLES[:-1], copy.replace(EXAMPLES[-1], source=Source("a.jsonl", 6))] if hasattr(copy, "replace") else []
    )
    encoders = [
        ChatEncoder(Renderer(other)),
        ChatEncoder(Renderer(larger)),
        ChatEncoder(Renderer(tokenizer, system="Be brief.")),
        ChatEncoder(Renderer(tokenizer, train_on="all")),
        ChatEncoder(Renderer(tokenizer, allow_special_tokens=True)),
        ChatEncoder(Renderer(tokenizer), max_length=99),
        ChatEncoder(Renderer(tokenizer), max_length=99, truncation="cut"),
    ]
    keys = {key, *(cache_key(encoder, EXAMPLES) for encoder in encoders)}
    keys |= {cache_key(ChatEncoder(Renderer(tokenizer)), rows) for rows in (EXAMPLES[1:], EXAMPLES[::-1], moved)}
    assert len(keys) == 11


def test_a_folder_that_is_not_whole_is_no_find(tokenizer, cache):
    encoder = ChatEncoder(Renderer(tokenizer), max_length=77)
    folder = cache / "encoded" / cache_key(encoder, EXAMPLES)
    folder.mkdir(parents=True)  # as another program might leave it
    (folder / "rows-0.arrow").write_bytes(b"ARROW1")
    same(encode_rows(encoder, ExampleStore(EXAMPLES)), encoder.encode(EXAMPLES).examples)


def test_the_oldest_go_first(tokenizer, cache, monkeypatch):
    encoder = ChatEncoder(Renderer(tokenizer))
    folders = [encode_rows(encoder, ExampleStore(EXAMPLES[:n])).folder for n in (1, 2, 3)]
    size = sum(f.stat().st_size for f in folders[2].iterdir())
    encode_rows(encoder, ExampleStore(EXAMPLES[:1]))  # used again
    monkeypatch.setattr(encoded_rows, "_KEPT_BYTES", 3 * size)
    last = encode_rows(encoder, ExampleStore(EXAMPLES[:4])).folder
    assert last.exists() and folders[0].exists() and not folders[1].exists()
    assert EncodedRows(last).lengths.tolist() and json.loads((last / "summary.json").read_text())["parts"]
