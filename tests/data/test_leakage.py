"""Rows that are on two sides: exactly, by their question, nearly, or held in a longer text."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.examples import Source, TrainingExample
from luthier.data.leakage import decontaminated, held, overlap
from luthier.data.loader import load_file
from luthier.errors import UserError

STORY = "A long story about a fox that went to the river to drink and met a heron who told it where the fish are"

LONG = "In spring the ice on the lake breaks up with a noise like thunder, and after it the boats go out again"


def row(text: str, answer: str | None = "x", line: int = 0, **more) -> TrainingExample:
    return TrainingExample(input=text, output=answer, source=Source("f.jsonl", line), **more)


def test_the_kinds_of_overlap_are_told_apart():
    train = [row("one", "1"), row(STORY, "fox"), row("two", "2"), row("three", "3"), row("Anything else?", LONG)]
    test = [
        row("one ", "1"),
        row("one", "another"),
        row(f"{STORY} today.", "a quite different answer"),
        row("What more is there?", f"{LONG}!"),
        row("four", "4"),
        row("", "4"),
    ]
    found = overlap(test, train)
    assert found.exact.tolist() == [0, -1, -1, -1, -1, -1]
    assert found.prompt.tolist() == [-1, 0, -1, -1, -1, -1]
    # The last by its long answer, whose question is another.
    assert found.near.tolist() == [-1, -1, 1, 4, -1, -1]
    assert found.pairs("near", 1) == [(2, 1, pytest.approx(22 / 23))]
    assert found.pairs("exact") == [(0, 0, 1.0)]
    assert overlap(test, train, threshold=0.9).near.tolist() == [-1, -1, 1, -1, -1, -1]
    assert overlap(test, train, threshold=None).near.tolist() == [-1] * 6
    for nothing in ([], train[:1]):
        assert overlap([], nothing).exact.tolist() == []
        assert overlap(nothing, []).near.tolist() == [-1] * len(nothing)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 25), max_size=25), st.lists(st.integers(0, 25), max_size=25))
def test_each_row_among_the_others_is_found_once(ours, theirs):
    rows, others = ([row(f"{STORY} number {i}", str(i)) for i in side] for side in (ours, theirs))
    found = overlap(rows, others)
    assert found.exact.tolist() == [theirs.index(i) if i in theirs else -1 for i in ours]
    counted = np.stack([found.exact, found.prompt, found.near]) >= 0
    assert (counted.sum(0) <= 1).all()


def test_the_most_similar_of_the_others_is_named():
    others = [row(f"{STORY} {' '.join(f'more{i}' for i in range(n))}", "x") for n in (4, 1, 3)]
    found = overlap([row(STORY + " more0!", "y")], others)
    assert found.prompt.tolist() == [-1] and found.near.tolist() == [1]
    assert found.similarity[0] == 1.0


def test_a_question_that_every_row_has_is_no_leak():
    rng = random.Random(0)
    answers = [" ".join(f"w{rng.randrange(500)}" for _ in range(30)) for _ in range(130)]
    train = [row("Go on with the story.", a) for a in answers[:100]]
    test = [row("Go on with the story.", a) for a in answers[100:]] + [
        row("Go on with the story.", answers[3] + " end")
    ]
    found = overlap(test, train)
    assert (found.prompt == -1).all() and (found.exact == -1).all()
    assert np.flatnonzero(found.near >= 0).tolist() == [30] and found.near[30] == 3


def test_a_question_inside_a_longer_row_is_found():
    questions = [row(STORY), row("Too short to be told"), row("小明有五个苹果他又买了三个现在他一共有几个苹果")]
    # A template that twenty questions share is told by nothing but its own words.
    questions += [row(f"Which of the following statements about this one thing is true: t{i}") for i in range(30)]
    texts = [
        f"Here is a task from a book. {STORY.upper()}; say where they are. " * 2,
        "This is too short to be told from anything else at all",
        f"Read: {STORY.replace('heron', 'stork')}",
        "老师问:小明有五个苹果,他又买了三个,现在他一共有几个苹果?请回答",
        "Which of the following statements about this one thing is true: nothing is",
        " ".join(STORY.split()[:14]),
        "",
    ]
    found, share = held([row(t) for t in texts], questions)
    assert found.tolist() == [0, -1, -1, 2, -1, -1, -1]
    assert share[[0, 3]].tolist() == [1.0, 1.0]
    found, share = held([row("q", texts[0]), row(texts[2])], questions, share=0.4)
    assert found.tolist() == [0, 0] and share[1] == pytest.approx(8 / 16, abs=0.1)


def test_contaminated_rows_are_refused_with_the_benchmarks_row():
    benchmark = [TrainingExample(input=STORY, output="fox", source=Source("bench.jsonl", 5))]
    train = [
        row("something else", "1", 1),
        row(STORY, "fox", 2),
        row(STORY, "wolf", 3),
        row(f"{STORY} today", "wolf", 4),
        row(f"A task: {STORY}. {' '.join(f'w{i}' for i in range(80))}", "wolf", 5),
    ]
    kept, rejects = decontaminated(train, benchmark)
    assert kept.tolist() == [0]
    assert [(r.line, r.reason) for r in rejects] == [(i, "in_benchmark") for i in (2, 3, 4, 5)]
    assert [r.message for r in rejects] == [
        "it is bench.jsonl:5 of a benchmark, word for word",
        "it asks what bench.jsonl:5 of a benchmark asks",
        "it is nearly the same as bench.jsonl:5 of a benchmark (similarity 0.96)",
        "it holds the question of bench.jsonl:5 of a benchmark (100% of its 8-grams)",
    ]
    assert decontaminated(train, [])[0].tolist() == [0, 1, 2, 3, 4]
    assert decontaminated([], benchmark)[0].tolist() == []
    with pytest.raises(UserError, match="no similarity"):
        decontaminated(train, benchmark, threshold=2)


def test_the_real_test_rows_are_found_among_the_training_rows_they_were_put_in(shared_data):
    train = load_file(shared_data / "gsm8k_train.jsonl").examples[:3000]
    test = load_file(shared_data / "gsm8k_test.jsonl").examples[:400]
    kept, rejects = decontaminated(train, test)
    assert len(kept) == 3000 and not rejects
    rng = random.Random(0)
    planted = {}
    for i, place in enumerate(rng.sample(range(3000), 120)):
        question = test[i].input
        if i % 3 == 0:
            planted[place] = TrainingExample(input=question, output="No idea.")
        elif i % 3 == 1:
            words = question.split(" ")
            words[len(words) // 2] = "changed"
            planted[place] = TrainingExample(input=" ".join(words), output="No idea.")
        else:
            planted[place] = TrainingExample(input="Solve these.", output=f"1. {question} 2. {train[place].input}")
    mixed = [planted.get(i, e) for i, e in enumerate(train)]
    kept, rejects = decontaminated(mixed, test)
    assert not {i for i in range(3000) if i not in set(kept.tolist())} - planted.keys()
    # A changed word is not always near: in a question of 20 words it is a quarter of the 3-grams.
    missed = planted.keys() & set(kept.tolist())
    assert len(missed) <= 4 and all("changed" in planted[i].input for i in missed)
