"""New examples from a few: what the model is shown, and what of its answers is kept."""

from __future__ import annotations

import json

import pytest
from chat_server import chat_server, said
from rouge_score import rouge_scorer

from luthier import TrainingExample
from luthier.data.augmentation import self_instruct
from luthier.data.augmentation.self_instruct import _parsed, rouge_l
from luthier.data.examples import Source
from luthier.endpoint import Endpoint
from luthier.errors import UserError

SUBJECTS = "apples boats candles drums engines forks gardens hats islands jars kites lamps".split()  # noqa: SIM905
SEEDS = [
    TrainingExample(
        f"How would somebody count {s} in a {t} quickly?", f"One {s} at a time.", source=Source("s.jsonl", i)
    )
    for i, (s, t) in enumerate(zip(SUBJECTS, reversed(SUBJECTS), strict=True), 1)
]


def lines(*pairs):
    return "\n".join(json.dumps({"prompt": p, "answer": a}, ensure_ascii=False) for p, a in pairs)


def fresh(number):
    """Four prompts that have nothing in common with others."""
    return [(" ".join(f"w{number}x{i}y{j}" for j in range(8)), f"answer {number} {i}") for i in range(4)]


def test_new_examples_until_there_are_enough(tmp_path):
    with chat_server(lambda body, number: (200, lines(*fresh(body["seed"])))) as server:
        model = Endpoint(server.url, "m", cache=tmp_path / "a.sqlite")
        made = self_instruct(SEEDS, model, 30)
        assert len(made.examples) == 30 and made.requests == len(server.bodies) == 8
        shown = [json.loads(line) for line in said(server.bodies[0]).splitlines() if line.startswith("{")]
        assert len(shown) == 6 and {s["prompt"] for s in shown} <= {s.input for s in SEEDS}
        again = self_instruct(SEEDS, model, 30)
        assert [e.input for e in again.examples] == [e.input for e in made.examples] and len(server.bodies) == 8
        other = self_instruct(SEEDS, model, 30, seed=1)
        assert [e.input for e in other.examples] != [e.input for e in made.examples]
    example = made.examples[0]
    assert example.metadata["augmented_by"] == "self_instruct" and example.output.startswith("answer")
    assert all(origin.startswith("s.jsonl:") for origin in example.metadata["augmented_from"])
    assert len(example.metadata["augmented_from"]) == 6


def test_no_more_is_asked_for_than_is_missing():
    asked = []

    def answer(conversations, seeds):
        asked.append(len(conversations))
        return [lines(*fresh(seed)[: 2 if len(asked) == 1 else 4]) for seed in seeds]

    assert len(self_instruct(SEEDS, answer, 10).examples) == 10
    assert asked == [3, 1]  # three for ten, of which six came; one for the four that are missing


def answers(*texts):
    return lambda conversations, seeds: [texts[i % len(texts)] for i in range(len(conversations))]


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        ((SEEDS[3].input, "x"), "like_a_seed"),
        (("", "x"), "no_prompt"),
        (("A new question about the sea", " "), "no_answer"),
        (("Why?", "x"), "too_short"),
        (("A new question about the sea", "x" * 5000), "too_long"),
        (("海为什么是咸的，请解释一下", "因为盐"), "language"),
        (("Sure! A new question about the sea", "x"), "meta"),
        (("A new question about the sea", "I'm sorry, I cannot say"), "meta"),
        (("A new question about the sea", "a new question about the sea"), "echo"),
        (("Describe what the attached image shows", "a boat"), "impossible"),
    ],
)
def test_what_is_refused_is_counted_by_reason(pair, reason):
    made = self_instruct(SEEDS, answers(lines(pair)), 3, max_requests=2)
    assert not made.examples and dict(made.refused) == {reason: made.requests}
    assert made.samples[reason] and made.to_dict()["refused"] == {reason: made.requests}


def test_repetitions_and_unreadable_answers_are_refused():
    pair = ("Which sea is the saltiest of all of them", "the Dead Sea")
    near = ("Which sea is the saltiest one of all of them", "the Dead Sea")
    made = self_instruct(SEEDS, answers(lines(pair, near, pair)), 5, max_requests=1)
    assert len(made.examples) == 1 and made.refused["like_another"] == 2
    made = self_instruct(SEEDS, answers("no json here {", '{"question": 1}'), 8, max_requests=2)
    assert dict(made.refused) == {"no_examples": 2}
    made = self_instruct(SEEDS, lambda c, s: [UserError("busy")] * len(c), 8, max_requests=2)
    assert made.failed == ["busy", "busy"] and not made.examples


def test_labels_must_be_of_the_seeds():
    seeds = [TrainingExample(f"这家店的第{i}种菜很好吃", label=i % 2) for i in range(8)]
    answer = lines(("外卖送来的时候汤全洒了", 0), ("面条劲道，分量也足，下次还来", "1"), ("不好说的一顿饭", "2"))
    made = self_instruct(seeds, answers(answer), 8, max_requests=1)
    assert [(e.label, e.output) for e in made.examples] == [(0, None), (1, None)] and dict(made.refused) == {"label": 1}


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "p", "answer": "a"}\n{"prompt": "q", "answer": "b"}',
        '```json\n[{"prompt": "p", "answer": "a"},\n {"prompt": "q", "answer": "b"}]\n```',
        'Here:\n1. {"prompt": "p",\n "answer": "a"}\n2. {bad} {"prompt": "q", "answer": "b"} done',
        '{"examples": [{"prompt": "p", "answer": "a"}, {"prompt": "q", "answer": "b"}]}',
    ],
)
def test_examples_are_found_in_whatever_form_they_come(text):
    assert [(x["prompt"], x["answer"]) for x in _parsed(text)] == [("p", "a"), ("q", "b")]


def test_rouge_l_is_the_reference_implementations():
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    texts = ["the cat sat on the mat", "a cat sat there on mats", "on the mat the cat sat down", "dogs"]
    for one in texts:
        for other in texts:
            expected = scorer.score(one, other)["rougeL"].fmeasure
            assert rouge_l(one.split(), other.split()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: self_instruct([TrainingExample("plain text")], answers(""), 3), "no seed is a prompt"),
        (lambda: self_instruct([], answers(""), 3), "no seed is a prompt"),
        (lambda: self_instruct(SEEDS, answers(""), 0), "count=0"),
        (lambda: self_instruct(SEEDS, answers(""), 3, most_alike=2), "most_alike=2"),
    ],
)
def test_wrong_arguments_are_told(call, message):
    with pytest.raises(UserError, match=message):
        call()
