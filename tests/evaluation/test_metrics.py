"""Scores against sacrebleu and rouge-score themselves, and what each metric means at its edges."""

from __future__ import annotations

import itertools
import json

import pytest
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU

from luthier.errors import UserError
from luthier.evaluation.metrics import bleu, exact_match, json_exact, json_valid, rouge, score

ENGLISH = ["The cat sat on the mat, and it was 3.5 kg.", "Janet sells 16 - 3 - 4 = 9 duck eggs a day.", ""]
ENGLISH_RIGHT = ["The cat sat on a mat and weighed 3.5 kg.", "Janet sells 9 duck eggs every day .", "Nothing to say."]
CHINESE = ["今天的天气非常好，我们去公园散步。", "细胞是生命的基本单位。"]
CHINESE_RIGHT = ["今天天气很好，我们一起去公园散步吧。", "细胞是所有生命的基本结构单位。"]


def _alpaca(folder, name: str, count: int = 40) -> tuple[list[str], list[str]]:
    """Real answers, each row's later part with some of the next row, so that scores are neither 0 nor 1."""
    rows = [r["output"] for r in json.loads((folder / name).read_text(encoding="utf-8"))][: count + 1]
    return [r[len(r) // 3 :] + after[:50] for r, after in itertools.pairwise(rows)], rows[:count]


def _reference_rouge(answers: list[str], references: list[str]) -> dict[str, float]:
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    rows = [scorer.score(r, a) for a, r in zip(answers, references, strict=True)]
    return {k: sum(row[k].fmeasure for row in rows) / len(rows) for k in rows[0]}


def test_english_scores_are_those_of_sacrebleu_and_rouge_score():
    ours = score(ENGLISH, ENGLISH_RIGHT)
    assert ours["bleu"] == pytest.approx(BLEU(tokenize="13a").corpus_score(ENGLISH, [ENGLISH_RIGHT]).score / 100)
    for name, value in _reference_rouge(ENGLISH, ENGLISH_RIGHT).items():
        assert ours[name] == pytest.approx(value, abs=1e-12)
    assert 0 < ours["bleu"] < ours["rouge1"] < 1


def test_chinese_bleu_is_sacrebleus_zh_and_rouge_counts_characters():
    ours = score(CHINESE, CHINESE_RIGHT)
    assert ours["bleu"] == pytest.approx(BLEU(tokenize="zh").corpus_score(CHINESE, [CHINESE_RIGHT]).score / 100)
    assert "tok:zh" in bleu(CHINESE, CHINESE_RIGHT).signature
    # rouge-score over Latin letters that stand for the characters one by one
    spelt = [[" ".join(f"c{ord(c)}" for c in t if c.isalpha()) for t in texts] for texts in (CHINESE, CHINESE_RIGHT)]
    for name, value in _reference_rouge(*spelt).items():
        assert ours[name] == pytest.approx(value, abs=1e-12)
    assert ours["rougeL"] > 0.5


def test_real_english_and_chinese_rows(shared_data):
    answers, right = _alpaca(shared_data, "alpaca_en_demo.json")
    ours = score(answers, right)
    assert ours["bleu"] == pytest.approx(BLEU(tokenize="13a").corpus_score(answers, [right]).score / 100)
    for name, value in _reference_rouge(answers, right).items():
        assert ours[name] == pytest.approx(value, abs=1e-12)
    answers, right = _alpaca(shared_data, "alpaca_zh_demo.json")
    ours = bleu(answers, right)
    assert ours.score == pytest.approx(BLEU(tokenize="zh").corpus_score(answers, [right]).score / 100)
    assert 0.1 < rouge(answers, right)["rougeL"] < 1


def test_the_best_of_several_references_counts_even_where_rows_have_different_numbers():
    answers = ["a small brown dog runs home", "no"]
    rows = [["something else entirely", "a small brown dog runs home"], ["no"]]
    assert score(answers, rows) == {
        "bleu": pytest.approx(1.0), "rouge1": 1.0, "rouge2": 0.5, "rougeL": 1.0, "exact_match": 1.0,
    }  # fmt: skip


def test_words_of_other_alphabets_are_words():
    assert rouge(["привет, мир"], ["Привет мир!"])["rouge2"] == 1.0
    assert rouge(["naïve café"], ["naïve café"]) == _reference_rouge(["naïve café"], ["naïve café"])


def test_exact_match_leaves_out_white_space_around_and_nothing_else():
    assert exact_match([" 42\n", "4 2", "42.", ""], ["42", "42", "42", "42"]) == 0.25


def test_json_metrics():
    right = ['{"a": 1, "b": [true, null]}'] * 7
    answers = [
        ' {"b":[true,null],\n "a":1.0} ',  # the same in another order and spacing
        '{"a": 1, "b": [1, null]}',  # true is not 1
        '{"a": 1}',
        '```json\n{"a": 1, "b": [true, null]}\n```',  # fenced: no JSON to a parser
        '[{"a": 1}]',
        '{"a": NaN}',
        "",
    ]
    assert json_valid(answers) == pytest.approx(3 / 7)
    assert json_exact(answers, right) == pytest.approx(1 / 7)
    assert score(answers, right)["json_exact"] == pytest.approx(1 / 7)
    assert "json_valid" not in score(["{}", "{}"], ["{}", "plain"])
    assert json_valid(['{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}"]) == 0.0


def test_empty_answers_are_legal_and_score_zero():
    assert set(score(["", ""], ["one two three four", "五"]).values()) == {0.0}


@pytest.mark.parametrize(
    ("answers", "references", "message"),
    [
        ([], [], "no answers"),
        (["a"], ["a", "b"], "1 answers but 2 references"),
        (["a", None], ["a", "b"], "answers, row 2"),
        (["a", "b"], ["a", None], "references, row 2"),
        (["a"], [[]], "references, row 1"),
        (None, ["a"], "answers must be a list"),
        ("abc", ["a", "b", "c"], "answers must be a list"),
    ],
)
def test_bad_input_is_named(answers, references, message):
    with pytest.raises(UserError, match=message):
        score(answers, references)
