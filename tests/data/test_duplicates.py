"""Copies, near copies and contradictions: exact keys, recall and precision against all pairs, linear work."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections import Counter, defaultdict
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.duplicates import contradictions, deduplicated, find_copies
from luthier.data.examples import Source, TrainingExample
from luthier.data.loader import load_file
from luthier.data.minhash import candidates, form, sketched
from luthier.data.shingles import grams, keys_of
from luthier.errors import UserError

# --- exact copies ---


def chat(*turns: str, **more) -> TrainingExample:
    roles = ("user", "assistant") * len(turns)
    return TrainingExample(messages=[{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)], **more)


def test_what_no_reader_sees_makes_no_difference_and_all_else_does():
    row = TrainingExample(input="Où est le café ?", output="Là.")
    same = [
        TrainingExample(input=unicodedata.normalize("NFD", "Où est le café ?"), output="Là."),
        TrainingExample(input="  Où est le café ?\n", output="\tLà. "),
        chat("Où est le café ?", "Là."),
        TrainingExample(input="Où est le café ?", output="Là.", metadata={"id": 7}, source=Source("f", 3)),
    ]
    assert {keys_of(e) for e in same} == {keys_of(row)}
    others = [
        TrainingExample(input="où est le café ?", output="Là."),
        TrainingExample(input="Où est  le café ?", output="Là."),
        TrainingExample(input="Où est le café ?Là."),
        TrainingExample(input="Où est le café ?", output=""),
        TrainingExample(input="", output="Où est le café ?Là."),
        TrainingExample(input="Où est le café ?", label="Là"),
        chat("Où est le café ?", "Là.", "Merci.", "De rien."),
        chat("Où est le café ?", "Là.", tools=[{"name": "map"}]),
        TrainingExample(messages=[{"role": "system", "content": "Où est le café ?"}, *chat("", "Là.").messages]),
    ]
    assert len({keys_of(e)[1] for e in [row, *others]}) == len(others) + 1
    assert keys_of(others[3])[0] == keys_of(row)[0] and keys_of(others[7])[0] != keys_of(row)[0]


def test_a_lone_surrogate_is_a_character_like_any_other():
    rows = [TrainingExample(input="broken \ud83d here", output="x"), TrainingExample(input="broken here", output="x")]
    assert find_copies([*rows, *rows], near=0.8).exact_first.tolist() == [0, 1, 0, 1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=3), st.one_of(st.none(), st.text(max_size=2))), max_size=30))
def test_exact_copies_are_those_of_the_same_words(pairs):
    examples = [TrainingExample(input=a, output=b) for a, b in pairs]
    seen: dict = {}
    expected = [
        seen.setdefault(tuple(t and unicodedata.normalize("NFC", t.strip()) for t in pair), i)
        for i, pair in enumerate(pairs)
    ]
    copies = find_copies(examples)
    assert copies.exact_first.tolist() == expected
    assert copies.groups().tolist() == expected


# --- near copies, against all pairs ---


def words_of(text: str) -> list[str]:
    return re.findall(r"[一-鿿぀-ゟ゠-ヿ]|[^\W一-鿿぀-ヿ]+|[-+=<>*/%^$€😀👍👎]", text.casefold())


def shingles_of(text: str) -> set[tuple[str, ...]]:
    """The definition in words, as one would write it down."""
    words = words_of(text)
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))} if words else {(text.strip(),)} - {("",)}


def all_pairs(examples: list[TrainingExample], most: int = 200) -> dict[tuple[int, int], float]:
    """Similarity of each pair of rows that share a shingle which at most so many rows have; (earlier, later)."""
    parts = [(shingles_of(e.input), shingles_of(e.output or "")) for e in examples]
    times = Counter(s for a, b in parts for s in a | b)
    form = {s for s, n in times.items() if n >= max(20, 0.05 * len(examples))}
    parts = [tuple(p - form or p for p in part) for part in parts]
    whole = [a | b for a, b in parts]
    holders = defaultdict(list)
    for i, both in enumerate(whole):
        for s in both:
            holders[s].append(i)
    found = {}
    for pair in {p for rows in holders.values() if len(rows) <= most for p in combinations(rows, 2)}:
        sides = ((whole[pair[0]], whole[pair[1]]), (parts[pair[0]][1], parts[pair[1]][1]))
        found[pair] = min(len(a & b) / len(a | b) if a | b else 1.0 for a, b in sides)
    return found


def test_shingles_are_those_of_the_definition():
    texts = [
        "Hello, WORLD again and again",
        "很好吃！下次还来。",
        "一 two 三four",
        "5 + 3",
        "5 - 3",
        "ok",
        "",
        "!!!",
        "👍",
        "👎",
    ]
    texts += ["snake_case x1", "日本語とEnglish", "a b c a b c", "straße", "STRASSE", " \n ", "x " * 50]
    [batch] = grams([TrainingExample(input=t, output="") for t in texts], np.arange(len(texts)))
    offsets = batch.offsets()
    hashed = [set(batch.hashes[a:b].tolist()) for a, b in pairwise(offsets)]
    assert [len(h) for h in hashed] == [len(shingles_of(t)) for t in texts]
    # Equal shingles have equal hashes, and others have others.
    names = {}
    for text, hashes in zip(texts, hashed, strict=True):
        names.setdefault(frozenset(shingles_of(text)), set()).add(frozenset(hashes))
    assert all(len(n) == 1 for n in names.values())
    assert len({frozenset(h) for h in hashed}) == len(names)


def test_batches_do_not_change_a_rows_shingles(monkeypatch):
    rng = random.Random(0)
    examples = [
        TrainingExample(input=" ".join(rng.choice("abcdefg") for _ in range(rng.randrange(40))), output="好" * i)
        for i in range(50)
    ]

    def collected() -> list[list[int]]:
        rows = []
        for batch in grams(examples, np.arange(len(examples))):
            edges = batch.offsets(parts=True)
            rows += [batch.hashes[a:b].tolist() for a, b in pairwise(edges)]
        return rows

    whole = collected()
    monkeypatch.setattr("luthier.data.shingles._BATCH", 100)
    assert collected() == whole and len(whole) == 100


EDITS = ("nothing", "case", "full stops", "one word", "a word less", "half")


def edited(text: str, edit: str, rng: random.Random) -> str:
    gap = " " if text.isascii() else ""
    words = text.split(" ") if gap else list(text)
    place = rng.randrange(len(words))
    if edit == "case":
        return text.upper()
    if edit == "full stops":
        return text.replace(".", " !").replace("，", "；")
    if edit == "one word":
        return gap.join([*words[:place], "新", *words[place + 1 :]])
    if edit == "a word less":
        return gap.join(words[:place] + words[place + 1 :])
    return gap.join(words[: len(words) // 2]) if edit == "half" else text


def test_every_near_copy_is_found_and_nothing_else():
    rng = random.Random(4)
    vocabulary = [f"word{i}" for i in range(800)]
    examples = []
    for _ in range(400):
        text = " ".join(rng.choice(vocabulary) for _ in range(rng.randrange(4, 90))) + "."
        answer = " ".join(rng.choice(vocabulary) for _ in range(rng.randrange(1, 60)))
        for edit in rng.sample(EDITS, 2):
            examples.append(TrainingExample(input=edited(text, edit, rng), output=edited(answer, edit, rng)))
    rng.shuffle(examples)
    pairs = all_pairs(examples)
    for threshold in (0.5, 0.7, 0.8, 0.95):
        expected = {p for p, s in pairs.items() if s >= threshold}
        copies = find_copies(examples, near=threshold)
        found = {(b, a) for a, b in copies.pairs.tolist()}
        found |= {(first, i) for i, first in enumerate(copies.exact_first.tolist()) if first != i}
        assert len(expected) > 60
        assert not found - expected
        assert len(found) >= 0.995 * len(expected)
        for index in np.flatnonzero(copies.near_first != np.arange(len(examples))).tolist():
            first = int(copies.near_first[index])
            assert first < index and copies.near_first[first] == first
            assert copies.similarity[index] == pytest.approx(pairs[first, index])
        # No two of those kept are near copies.
        kept = set(np.flatnonzero(copies.near_first == np.arange(len(examples))).tolist())
        assert len({p for p in expected if kept.issuperset(p)}) <= 0.005 * len(expected)


@pytest.mark.parametrize("name", ["waimai_10k.csv", "alpaca_zh_demo.json", "gsm8k_train.jsonl"])
def test_real_rows_against_all_pairs(name, shared_data):
    examples = load_file(shared_data / name).examples
    examples = examples[: 3000 if name.endswith("csv") else 700]
    rng = random.Random(1)
    # Real rows have few near copies: some are made, by the edits that people make.
    examples += [
        TrainingExample(input=edited(e.input, rng.choice(EDITS), rng), output=e.output)
        for e in rng.sample(examples, 300)
    ]
    exact = find_copies(examples).exact_first
    examples = [e for i, e in enumerate(examples) if exact[i] == i]
    pairs = all_pairs(examples, most=200 if name.endswith("csv") else 10)
    expected = {p for p, s in pairs.items() if s >= 0.8}
    copies = find_copies(examples, near=0.8)
    found = {(b, a) for a, b in copies.pairs.tolist()}
    assert len(expected) > 40
    assert not found - expected
    assert len({b for _, b in found}) >= 0.99 * len({b for _, b in expected})


def test_short_rows_are_near_copies_only_where_they_say_the_same():
    examples = [
        TrainingExample(input=text, output=answer)
        for text, answer in (
            ("好吃", "1"),
            ("好吃！", "1"),
            ("很好吃", "1"),
            ("不好吃", "0"),
            ("好吃", "0"),
            ("👍", "1"),
            ("👎", "1"),
            ("!!!", "1"),
            ("???", "1"),
            ("5 + 3 =", "8"),
            ("5 - 3 =", "8"),
        )
    ]
    assert find_copies(examples, near=0.8).near_first.tolist() == [0, 0, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def test_one_long_question_with_other_answers_is_no_copy():
    story = " ".join(f"word{i}" for i in range(200))
    asked = [f"{story} Who came first?", f"{story} Who came last?", f"{story} Who came last??"]
    rows = [
        TrainingExample(input=q, output=a) for q, a in zip(asked, ("the fox", "the heron", "the heron"), strict=True)
    ]
    assert find_copies(rows, near=0.8).near_first.tolist() == [0, 1, 1]


def test_an_instruction_in_every_row_does_not_make_all_rows_copies():
    told = "You judge what guests of a restaurant write. Say good or bad and nothing else. " * 3
    rng = random.Random(2)
    words = [f"word{i}" for i in range(500)]
    said = [" ".join(rng.choice(words) for _ in range(12)) for _ in range(300)]
    rows = [TrainingExample(input=told + s, output=rng.choice(["good", "bad"])) for s in said]
    rows += [TrainingExample(input=told + said[5].upper() + "!", output=rows[5].output)]
    copies = find_copies(rows, near=0.8)
    assert np.flatnonzero(copies.near_first != np.arange(len(rows))).tolist() == [300]
    assert copies.near_first[300] == 5


def test_a_chain_loses_only_what_is_like_a_kept_row():
    words = [f"word{j}" for j in range(400)]
    rows = [TrainingExample(input=" ".join(words[3 * k : 3 * k + 60]), output="same") for k in range(12)]
    copies = find_copies(rows, near=0.8)
    # Windows of 60 words: 3 words on, 55 of 61 n-grams are shared; 6 words on, 52 of 64; 9 words on, too few.
    assert copies.near_first.tolist() == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9]
    assert set(copies.groups().tolist()) == {0}


def test_rows_that_begin_alike_cost_linear_work():
    def met_a_row(count: int) -> float:
        rng = random.Random(0)
        # 25 openings, each of 4% of the rows, so that none is taken for the form of the data.
        openings = [" ".join(f"w{rng.randrange(10**6)}" for _ in range(20)) for _ in range(25)]
        rows = [TrainingExample(input=f"{openings[i % 25]} {rng.random()} {rng.random()}") for i in range(count)]
        every = np.arange(count)
        common = form(rows, every)
        found = candidates(sketched(rows, every, 0.8, common), 0.8)
        assert not len(common) and len(found.pairs) <= 16 * count
        return found.met / count

    # Each row shares buckets with up to 4% of all, and is compared with no more of 2,400 than of 600.
    few, many = met_a_row(15_000), met_a_row(60_000)
    assert few > 100
    assert many < 1.5 * few < 512  # bands × rows of a bucket × partings


def test_rows_that_all_look_alike_are_compared_with_few():
    rng = random.Random(0)
    # 100 originals with 60 noisy copies each: every bucket is large, and all that is in it is a true copy.
    examples = []
    for _ in range(100):
        words = [f"w{rng.randrange(10**6)}" for _ in range(80)]
        for _ in range(60):
            noisy = list(words)
            noisy[rng.randrange(80)] = f"n{rng.randrange(10**6)}"
            examples.append(TrainingExample(input=" ".join(noisy), output="x"))
    copies = find_copies(examples, near=0.8)
    own = np.arange(len(examples))
    assert (copies.near_first == own).sum() == 100
    assert copies.near_first.tolist() == [i - i % 60 for i in range(6000)]
    assert len(copies.pairs) <= 16 * len(examples)


# --- contradictions ---


def test_contradictions_are_one_question_with_different_answers():
    rows = [
        TrainingExample(input="What is 2 + 2?", output="4"),
        TrainingExample(input="Capital of France?", output="Paris", references=["It is Paris"]),
        TrainingExample(input=" What is 2 + 2? ", output="5"),
        TrainingExample(input="Capital of France?", output="It is Paris"),
        TrainingExample(input="What is 2 + 2?", output="4 "),
        TrainingExample(input="plain text"),
        TrainingExample(input="plain text"),
        TrainingExample(input="gut", label="1"),
        TrainingExample(input="gut", label="0"),
        chat("Hi", "Hello", "And?", "Yes"),
        chat("Hi", "Hello", "And?", "No"),
        chat("Hi", "Hello", "And?", "Maybe", tools=[{"name": "ask"}]),
    ]
    assert [g.tolist() for g in contradictions(rows)] == [[0, 2], [7, 8], [9, 10]]
    rows.append(TrainingExample(input="Capital of France?", output="Lyon"))
    assert [g.tolist() for g in contradictions(rows)] == [[0, 2], [1, 3, 12], [7, 8], [9, 10]]
    assert contradictions([]) == []


# --- for the pipeline ---


def test_removed_rows_are_listed_with_the_row_that_they_repeat():
    story = "A long story about a fox that went to the river to drink and met a heron who told it where the fish are"
    texts = ["one", story, "one", story + " now", "two", story]
    rows = [TrainingExample(input=t, output="x", source=Source("rows.jsonl", i + 1)) for i, t in enumerate(texts)]
    kept, rejects = deduplicated(rows, "none")
    assert (kept.tolist(), rejects) == ([0, 1, 2, 3, 4, 5], [])
    kept, rejects = deduplicated(rows, "exact")
    assert kept.tolist() == [0, 1, 3, 4]
    assert [(r.file, r.line, r.reason, r.message) for r in rejects] == [
        ("rows.jsonl", 3, "duplicate", "it repeats rows.jsonl:1 word for word"),
        ("rows.jsonl", 6, "duplicate", "it repeats rows.jsonl:2 word for word"),
    ]
    kept, rejects = deduplicated(rows, "near", 0.8)
    assert kept.tolist() == [0, 1, 4]
    assert rejects[1].reason == "near_duplicate"
    assert rejects[1].message == "it is nearly the same as rows.jsonl:2 (similarity 0.96)"
    assert len(kept) + len(rejects) == len(rows)
    json.dumps([r.value for r in rejects])
    assert deduplicated([], "near")[0].tolist() == []


@pytest.mark.parametrize("threshold", [0, 1.2, "0.8", True, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(UserError, match="no similarity"):
        deduplicated([TrainingExample(input="a", output="b")], "near", threshold)


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match="unknown mode 'fuzzy'"):
        deduplicated([], "fuzzy")
