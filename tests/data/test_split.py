"""Splits: a partition, no group on two sides, shares kept, the same parts for the same seed and as ever."""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from luthier.data.examples import Source, TrainingExample
from luthier.data.groups import groups_of
from luthier.data.loader import load_file
from luthier.data.shingles import normal
from luthier.data.split import split_examples, split_indices
from luthier.data.times import microseconds
from luthier.errors import UserError


def some_rows(n: int) -> list[TrainingExample]:
    rng = random.Random(7)
    return [
        TrainingExample(input=f"q{rng.randrange(n)}", output=f"a{rng.randrange(3)}", metadata={"row": i})
        for i in range(n)
    ]


@pytest.mark.parametrize(
    ("count", "train", "validation", "seed", "sizes", "digest"),
    [
        (100, 0.8, 0.1, 42, [80, 10, 10], "9cbead0f5524f0d6"),
        (1000, 0.8, 0.1, 42, [800, 100, 100], "e81da121078dab3d"),
        (1000, 0.9, 0.1, 7, [900, 100, 0], "c9ecfbb52c93e209"),
        (997, 0.75, 0.15, 3, [748, 149, 100], "b301cec2a1204268"),
        (3, 0.8, 0.1, 1, [2, 1, 0], "022e2a2bb76a0a80"),
    ],
)
def test_a_random_split_gives_the_parts_that_it_gave_in_version_0_1(count, train, validation, seed, sizes, digest):
    examples = some_rows(count)
    parts = [[e.metadata["row"] for e in part] for part in split_examples(examples, train, validation, seed)]
    assert [len(p) for p in parts] == sizes
    assert hashlib.sha256(repr(parts).encode()).hexdigest()[:16] == digest
    test = max(0.0, round(1 - train - validation, 9))
    found = split_indices(examples, validation=validation, test=test, seed=seed)
    assert [p.tolist() for p in found.parts] == parts


rows = st.lists(
    st.builds(
        dict,
        text=st.sampled_from([f"the text with the number {i} is a short one" for i in range(12)] + ["Ünïcode", ""]),
        label=st.sampled_from(["a", "b", "c", None]),
        speaker=st.sampled_from(["x", "y", "z", "w", None]),
        day=st.integers(1, 28),
        made_from=st.one_of(st.none(), st.none(), st.integers(0, 20)),
    ),
    min_size=2,
    max_size=60,
)


def examples_of(values: list[dict]) -> list[TrainingExample]:
    return [
        TrainingExample(
            input=v["text"],
            output="x",
            label=v["label"],
            metadata={"speaker": v["speaker"], "day": f"2024-01-{v['day']:02}"}
            | ({} if v["made_from"] is None else {"augmented_from": f"f.jsonl:{v['made_from']}"}),
            source=Source("f.jsonl", i),
        )
        for i, v in enumerate(values)
    ]


@settings(max_examples=150, deadline=None)
@given(
    values=rows,
    strategy=st.sampled_from(["random", "stratified", "time"]),
    group_by=st.sampled_from([None, "speaker", "prompt", "near_duplicates"]),
    validation=st.floats(0, 0.45),
    test=st.floats(0, 0.45),
    seed=st.integers(0, 3),
)
def test_any_split_is_a_partition_and_no_group_is_on_two_sides(values, strategy, group_by, validation, test, seed):
    examples = examples_of(values)
    wanted = {
        "validation": validation,
        "test": test,
        "strategy": strategy,
        "column": "day" if strategy == "time" else None,
        "group_by": group_by,
        "seed": seed,
    }
    try:
        found = split_indices(examples, **wanted)
    except UserError as error:
        # Only where there is nothing else to say: no label or speaker at all, or all rows in one group.
        assert "no row" in error.what
        assume(False)
    assert sorted(np.concatenate(found.parts).tolist()) == list(range(len(examples)))
    assert len(found.train)
    assert [p.tolist() for p in split_indices(examples, **wanted).parts] == [p.tolist() for p in found.parts]
    side = {i: name for name, part in zip("tve", found.parts, strict=True) for i in part.tolist()}
    # Told apart here by the rows themselves, not by the code under test.
    sides = defaultdict(set)
    for i, example in enumerate(examples):
        sides["words", normal(example.input)].add(side[i])
        origin = example.metadata.get("augmented_from")
        sides["made from", origin or str(example.source)].add(side[i])
        if group_by == "speaker" and example.metadata["speaker"] is not None:
            sides["speaker", example.metadata["speaker"]].add(side[i])
    split_up = {k: v for k, v in sides.items() if len(v) > 1}
    # A copy of a copy has the source of a row that is itself made from another.
    assert not {k for k in split_up if k[0] != "made from"}
    for i, example in enumerate(examples):
        origin = example.metadata.get("augmented_from")
        if origin:
            first = int(origin.split(":")[1])
            if first < len(examples) and not examples[first].metadata.get("augmented_from"):
                assert side[i] == side[first]
    groups = groups_of(examples, group_by, 0.8, [])
    for i, group in enumerate(groups.tolist()):
        assert side[i] == side[group]


@settings(max_examples=150, deadline=None)
@given(
    labels=st.lists(st.sampled_from("aaaaaabbbcd"), min_size=1, max_size=200),
    validation=st.floats(0, 0.45),
    test=st.floats(0, 0.45),
    seed=st.integers(0, 3),
)
def test_each_class_keeps_its_share_within_one_row(labels, validation, test, seed):
    examples = [TrainingExample(input=f"{i}", output=label, label=label) for i, label in enumerate(labels)]
    found = split_indices(examples, validation=validation, test=test, strategy="stratified", seed=seed)
    shares = (1 - validation - test, validation, test)
    moved = 0
    for label, count in Counter(labels).items():
        got = [sum(labels[i] == label for i in part) for part in found.parts]
        assert got[0] >= 1
        moved += sum(abs(g - count * s) >= 1 + 1e-6 for g, s in zip(got, shares, strict=True))
    # An otherwise empty part is given one row, which can be one more than a class's share.
    assert moved <= 4 * sum(bool(s) and len(p) == 1 for p, s in zip(found.parts, shares, strict=True))


def test_the_whole_keeps_its_shares_where_many_classes_are_small():
    examples = [TrainingExample(input=f"{i}", output="x", label=f"class {i % 300}") for i in range(1500)]
    found = split_indices(examples, strategy="stratified")
    # Five rows a class at 10% is half a row: rounded alike, all classes would be absent, or twice too many.
    assert [len(p) for p in found.parts] == pytest.approx([1200, 150, 150], abs=3)
    assert min(Counter(examples[i].label for i in found.train).values()) >= 3
    assert any("classes of too few rows for every part: 300" in note for note in found.notes)


def test_a_class_of_one_row_is_trained_on():
    examples = [TrainingExample(input=f"{i}", output="x", label="rare" if i == 5 else "common") for i in range(100)]
    for seed in range(10):
        found = split_indices(examples, strategy="stratified", seed=seed)
        assert 5 in found.train
        assert [len(p) for p in found.parts] == [80, 10, 10]
        assert found.notes == ["classes of too few rows for every part: 1, 'rare' (1)"]


def test_stratified_with_groups_keeps_both():
    rng = random.Random(0)
    examples = [
        TrainingExample(input=f"{i}", output="x", label=rng.choice("aab"), metadata={"author": rng.randrange(120)})
        for i in range(1200)
    ]
    found = split_indices(examples, strategy="stratified", group_by="author")
    authors = [{examples[i].metadata["author"] for i in part} for part in found.parts]
    assert not (authors[0] & authors[1] or authors[0] & authors[2] or authors[1] & authors[2])
    assert [len(p) for p in found.parts] == pytest.approx([960, 120, 120], abs=15)


def test_one_conversation_under_two_wordings_of_a_tool_is_in_one_part():
    examples = [
        TrainingExample(
            messages=[{"role": "user", "content": f"{i // 2}"}, {"role": "assistant", "content": "Yes."}],
            tools=[{"name": "ask", "description": f"wording {i % 2}"}],
        )
        for i in range(200)
    ]
    side = {i: k for k, part in enumerate(split_indices(examples).parts) for i in part.tolist()}
    assert all(side[i] == side[i + 1] for i in range(0, 200, 2))


def test_grouped_parts_keep_their_sizes():
    sizes = [300, 90, 80, 70, 60, *[20] * 15, *[1] * 100]
    examples = [
        TrainingExample(input=f"{g} {i}", output="x", metadata={"author": g})
        for g, n in enumerate(sizes)
        for i in range(n)
    ]
    for seed in range(5):
        found = split_indices(examples, group_by="author", seed=seed)
        assert [len(p) for p in found.parts] == [800, 100, 100]
        assert found.notes == []


def test_one_group_of_nearly_everything_is_told_with_a_remedy():
    # Windows over one long text, each four words on: neighbours are alike, and all hang together in one chain.
    words = [f"word{j}" for j in range(400)]
    examples = [TrainingExample(input=" ".join(words[4 * k : 4 * k + 60]), output="same") for k in range(80)]
    examples += [TrainingExample(input=f"something else {i}", output=f"{i}") for i in range(2)]
    found = split_indices(examples, group_by="near_duplicates")
    assert [len(p) for p in found.parts] == [80, 1, 1]
    assert any("largest group that stays together has 80" in n and "near_threshold" in n for n in found.notes)
    with pytest.raises(UserError, match="no row to train on"):
        split_indices(examples[:1], validation=0.6, test=0.3)


def test_by_time_nothing_trained_on_is_newer_than_what_is_held_out():
    rng = random.Random(3)
    days = [rng.randrange(1, 29) for _ in range(400)]
    examples = [
        TrainingExample(input=f"{i}", output="x", metadata={"when": f"2024年2月{d}日"}) for i, d in enumerate(days)
    ]
    examples[7].input = examples[8].input = "the same"
    days[7], days[8] = 1, 28
    examples[7].metadata["when"], examples[8].metadata["when"] = "2024-02-01", "2024/2/28"
    found = split_indices(examples, strategy="time", column="when")
    newest = [max(days[i] for i in p) for p in found.parts]
    oldest = [min(days[i] for i in p if i != 7) for p in found.parts]
    assert newest[0] < oldest[1] and newest[1] < oldest[2]
    assert [len(p) for p in found.parts] == pytest.approx([320, 40, 40], abs=12)
    assert {7, 8} <= set(found.test.tolist())
    assert found.notes[0].startswith("groups with rows of several times: 1;")


def test_a_time_that_cannot_be_read_is_named_with_its_place():
    examples = [
        TrainingExample(input=f"{i}", output="x", metadata={"when": "2024-03-05"}, source=Source("rows.csv", i + 2))
        for i in range(10)
    ]
    examples[3].metadata["when"] = "03/05/2024"
    with pytest.raises(UserError, match=r"(?s)'when'.*'03/05/2024'.*day.*month.*rows\.csv:5"):
        split_indices(examples, strategy="time", column="when")
    examples[3].metadata["when"] = None
    with pytest.raises(UserError, match=r"(?s)None.*rows\.csv:5"):
        split_indices(examples, strategy="time", column="when")


@pytest.mark.parametrize(
    ("written", "iso"),
    [
        ("2024-03-05", "2024-03-05"),
        ("2024-03-05T08:30:00+08:00", "2024-03-05T00:30:00"),
        ("2024年3月5日", "2024-03-05"),
        ("2024年3月5日 下午3:05", "2024-03-05T15:05:00"),
        ("2024年3月5号8时5分6秒", "2024-03-05T08:05:06"),
        ("2024/3/5 8:30", "2024-03-05T08:30:00"),
        ("2024年", "2024-01-01"),
        (20240305, "2024-03-05"),
        (1709622000, "2024-03-05T07:00:00"),
        ("1709622000000", "2024-03-05T07:00:00"),
        (1709622000_000_000_000, "2024-03-05T07:00:00"),
    ],
)
def test_times_are_read_as_rows_have_them(written, iso):
    assert microseconds(written) == microseconds(iso)


def test_numbers_of_any_kind_order_the_rows():
    for numbers in (range(100), range(950, 1050), [2024_01_01 + i for i in range(28)], [1.7e9 + i for i in range(50)]):
        numbers = list(numbers)
        order = list(range(len(numbers)))
        random.Random(1).shuffle(order)
        examples = [TrainingExample(input=str(i), output="x", metadata={"step": numbers[i]}) for i in order]
        found = split_indices(examples, strategy="time", column="step")
        assert sorted(order[i] for i in found.test) == sorted(range(len(order)))[-len(found.test) :]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"validation": 0.6, "test": 0.4}, "no row to train on"),
        ({"validation": -0.1}, "no share"),
        ({"strategy": "by hand"}, "unknown strategy 'by hand'"),
        ({"strategy": "time"}, "needs the column of the time"),
        ({"strategy": "time", "column": "when"}, "(?s)no row has a column 'when'.*'row'"),
        ({"strategy": "stratified"}, "no row has a label"),
        ({"strategy": "stratified", "column": "kind"}, "no row has a column 'kind'"),
        ({"group_by": "speaker"}, "(?s)no row has a column 'speaker'.*data.split.group_by.*'row'"),
        ({"group_by": "near_duplicates", "near_threshold": 0}, "no similarity"),
    ],
)
def test_mistakes_are_named(wanted, message):
    with pytest.raises(UserError, match=message):
        split_indices(some_rows(20), **wanted)


def test_real_rows_keep_their_classes_and_their_copies_together(shared_data):
    examples = load_file(shared_data / "waimai_10k.csv").examples
    found = split_indices(examples, strategy="stratified", group_by="near_duplicates")
    assert [len(p) for p in found.parts] == pytest.approx([len(examples) * s for s in (0.8, 0.1, 0.1)], abs=5)
    share = [np.mean([examples[i].label == "1" for i in p]) for p in found.parts]
    assert max(share) - min(share) < 0.005
    assert found.notes == []
    side = {i: k for k, part in enumerate(found.parts) for i in part.tolist()}
    words = defaultdict(set)
    for i, example in enumerate(examples):
        plain = "".join(c for c in example.input.casefold() if c.isalnum())
        if len(plain) > 3:
            words[plain, example.output].add(side[i])
    assert not [w for w, sides in words.items() if len(sides) > 1]
