"""Answers that are suspicious whatever their scores, and what is said of them."""

from __future__ import annotations

import pytest

from luthier.evaluation.generation import Answer
from luthier.evaluation.question import Question
from luthier.evaluation.suspicions import suspicions

GOOD = [
    "The shop is open.",
    "We are closed on Sundays.",
    "红色的椅子在二楼。",
    "Yes.",
    "It costs 5 euros.",
    "No, sorry.",
]


def _notes(texts, *, right="An answer.", asked="Where is the next shop?", ids=None, tokenizer=None):
    questions = [Question(asked, asked, [right], f"row {i}") for i in range(len(texts))]
    return suspicions("tuned", questions, [Answer(t, ids or [], True, 1) for t in texts], tokenizer)


def test_good_answers_are_not_suspicious():
    assert _notes(GOOD) == []


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>assistant\nThe shop is open.",
        "assistant\nThe shop is open.",
        "The shop is open.[/INST]",
        "It is open.\nHuman: And on Sunday?",
        "<start_of_turn>model It is open.",
        "It is open.</s>",
        "### Response: It is open.",
        "It is open.<|eot_id|>",
        "助手：商店开着。",
    ],
)
def test_control_text_is_noted_with_what_to_do(text):
    (note,) = _notes([*GOOD, text])
    assert note.startswith("tuned: 1 of 7 answers hold a template's control text") and "model.chat_template" in note
    # Of many answers, one is a slip.
    assert _notes([*GOOD, *GOOD, text]) == []
    # Where the right answers have it, it is the task.
    assert _notes([*GOOD, text], right=text) == []


@pytest.mark.parametrize(
    "text", ["The user: is it him?", "A human model", "assistant managers are <b>many</b>", "a < b"]
)
def test_what_only_looks_like_control_text(text):
    assert _notes([text] * 3) == []


def test_control_tokens_within_answers_are_seen(tokenizer):
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert "'<|im_start|>'" in _notes(["fine"] * 3, ids=[start, 5, end], tokenizer=tokenizer)[0]
    assert _notes(["fine"] * 3, ids=[5, end], tokenizer=tokenizer) == []


def test_circles_and_repeated_questions_are_noted():
    (note,) = _notes([*GOOD, "to the shop and " * 10])
    assert "1 of 7 answers go round in circles" in note and "learning rate" not in note and "fewer epochs" in note
    assert _notes([*GOOD, "to the shop and " * 10], right="to the shop and " * 8) == []
    assert _notes([*GOOD, "to the shop and to the shop"]) == []
    (note,) = _notes([*GOOD, "Where is the next shop? Where"])
    assert "1 of 7 answers give the question again" in note and "data.train_on" in note
    (note,) = _notes([*GOOD, "“请问椅子在哪里？”"], asked="请问椅子在哪里？")
    assert "give the question again" in note
    assert _notes(["Hi!"] * 3, asked="Hi!") == []
