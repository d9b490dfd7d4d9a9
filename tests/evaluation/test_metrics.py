"""Scores against sacrebleu, rouge-score and scikit-learn themselves, and what each metric means at its edges."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter

import numpy as np
import pytest
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU, CHRF

from luthier.errors import UserError
from luthier.evaluation.metrics import (
    METRICS,
    ON_REQUEST,
    ROUGE,
    bleu,
    check_rows,
    chrf,
    exact_match,
    metric_of,
    metrics_for,
    rouge,
    score,
)
from luthier.evaluation.metrics.words import jieba_words, normalized, normalized_words, words

ENGLISH = ["The cat sat on the mat, and it was 3.5 kg.", "Janet sells 16 - 3 - 4 = 9 duck eggs a day.", ""]
ENGLISH_RIGHT = ["The cat sat on a mat and weighed 3.5 kg.", "Janet sells 9 duck eggs every day .", "Nothing to say."]
CHINESE = ["今天的天气非常好，我们去公园散步。", "细胞是生命的基本单位。"]
CHINESE_RIGHT = ["今天天气很好，我们一起去公园散步吧。", "细胞是所有生命的基本结构单位。"]


@pytest.fixture(scope="module", params=["en", "zh"])
def alpaca(request, shared_data) -> tuple[str, list[str], list[list[str]]]:
    """500 real answers, each row's later part with some of the next row, so that scores are neither 0 nor 1.

    Every third row has a second reference, another real answer. Long ones are cut: the libraries take their time.
    """
    file = shared_data / f"alpaca_{request.param}_demo.json"
    rows = [r["output"][:150] for r in json.loads(file.read_text(encoding="utf-8"))][:501]
    answers = [r[len(r) // 3 :] + after[:50] for r, after in itertools.pairwise(rows)]
    references = [[row, rows[i - 1]] if i % 3 == 0 else [row] for i, row in enumerate(rows[:500])]
    return request.param, answers, references


def _streams(references: list[list[str]]) -> list[list[str | None]]:
    return [list(stream) for stream in itertools.zip_longest(*references)]


def _library(name: str, language: str = "en"):
    tokenize = "zh" if language == "zh" else "13a"
    return {
        "bleu": BLEU(tokenize=tokenize, force=True),
        "chrf": CHRF(),
        "chrf++": CHRF(word_order=2),
    }[name]


def _reference_rouge(answers: list[str], references: list[list[str]], cut=None) -> np.ndarray:
    """rouge-score's own F of each row, ``[N, 3]``."""
    tokenizer = None if cut is None else type("Cut", (), {"tokenize": staticmethod(cut)})()
    scorer = rouge_scorer.RougeScorer(list(ROUGE), tokenizer=tokenizer)
    rows = [scorer.score_multi(r, a) for a, r in zip(answers, references, strict=True)]
    return np.array([[row[kind].fmeasure for kind in ROUGE] for row in rows])


@pytest.mark.parametrize("name", ["bleu", "chrf", "chrf++"])
def test_bleu_and_chrf_of_real_rows_and_of_any_choice_of_them_are_sacrebleus(alpaca, name):
    language, answers, references = alpaca
    metric, library = metric_of(name), _library(name, language)
    expected = library.corpus_score(answers, _streams(references))
    assert metric.score(answers, references) == pytest.approx(expected.score / 100, abs=1e-12)
    assert metric.signature(references) == str(library.get_signature())
    # What sums of rows make: the whole, and bootstrap resamples, all at once.
    statistics = metric.statistics(answers, references)
    chosen = np.random.default_rng(0).integers(0, 500, (4, 500))
    counts = np.stack([np.bincount(c, minlength=500) for c in chosen])
    values = metric.value(counts @ statistics, 500)
    assert values.shape == (4,)
    some = [answers[i] for i in chosen[0]], _streams([references[i] for i in chosen[0]])
    assert values[0] == pytest.approx(library.corpus_score(*some).score / 100, abs=1e-12)
    for indices, value in zip(chosen, values, strict=True):
        sums = statistics[indices].sum(axis=0).astype(int).tolist()
        assert value == pytest.approx(library._compute_score_from_stats(sums).score / 100, abs=1e-12)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_a_rows_own_score_is_sacrebleus_of_the_sentence(alpaca, name):
    language, answers, references = alpaca
    library = BLEU(tokenize=language.replace("en", "13a"), effective_order=True) if name == "bleu" else CHRF()
    answers = [*answers[:100], "", "no", "a b"]
    references = [*references[:100], ["x"], ["no"], ["a b c d e f"]]
    rows = METRICS[name].rows(answers, references)
    for value, answer, right in zip(rows, answers, references, strict=True):
        assert value == pytest.approx(library.sentence_score(answer, right).score / 100, abs=1e-12)


def test_bleu_of_few_matches_is_smoothed_as_sacrebleu_does():
    for answers, right in (
        (["a b x y z", "c q"], ["a b c d e", "c d"]),  # no run of three or four is right
        (["a b c"], ["a b c"]),  # no run of four at all
        (["x y z w"], ["a b c d"]),  # nothing is right
        (["a b c d e"], [""]),
        ([""], ["a b c d e"]),
    ):
        expected = BLEU().corpus_score(answers, [right]).score / 100
        assert METRICS["bleu"].score(answers, right) == pytest.approx(expected, abs=1e-12)


def test_rouge_of_real_rows_is_rouge_scores(alpaca):
    language, answers, references = alpaca
    expected = _reference_rouge(answers, references, words)
    for kind, column in zip(ROUGE, expected.T, strict=True):
        rows = METRICS[kind].rows(answers, references)
        assert rows == pytest.approx(column, abs=1e-12)
    assert rouge(answers, references) == pytest.approx(dict(zip(ROUGE, expected.mean(0), strict=True)), abs=1e-12)
    plain = _reference_rouge(answers, references)
    if language == "en":
        plainest = [i for i, a in enumerate(answers) if all(map(str.isascii, (a, *references[i])))]
        assert len(plainest) > 400 and plain[plainest] == pytest.approx(expected[plainest], abs=1e-12)
    else:
        # The reason for words of our own: without Latin letters and digits, its default finds nothing at all.
        pure = [i for i, a in enumerate(answers) if not any(c.isascii() and c.isalnum() for c in a)]
        assert len(pure) > 100 and not plain[pure].any() and expected[pure, 0].min() > 0


def test_rouge_of_words_that_jieba_finds(alpaca):
    language, answers, references = alpaca
    if language == "en":
        pytest.skip("jieba cuts Chinese alone")
    expected = _reference_rouge(answers, references, jieba_words)
    for kind, column in zip(ROUGE, expected.T, strict=True):
        assert ON_REQUEST[f"{kind}_jieba"].rows(answers, references) == pytest.approx(column, abs=1e-12)
    assert jieba_words("我们使用Python3编程。") == ("我们", "使用", "python3", "编程")
    assert words("我们使用Python3编程。") == ["我", "们", "使", "用", "python3", "编", "程"]


def test_token_f1_of_real_rows_is_scikit_learns_and_squads(alpaca):
    metrics = pytest.importorskip("sklearn.metrics")
    from sklearn.preprocessing import MultiLabelBinarizer

    _, answers, references = alpaca
    right = [row[0] for row in references]
    # A word's second coming is a label of its own, so that sets can be compared for bags of words.
    bags = [[_numbered(normalized_words(text)) for text in texts] for texts in (right, answers)]
    marks = MultiLabelBinarizer(sparse_output=True).fit([*bags[0], *bags[1]])
    expected = metrics.f1_score(*(marks.transform(bag) for bag in bags), average="samples", zero_division=0)
    assert METRICS["token_f1"].score(answers, right) == pytest.approx(expected, abs=1e-12)


def _numbered(tokens: list[str]) -> set[tuple[str, int]]:
    return {(word, i) for word, count in Counter(tokens).items() for i in range(count)}


def _squad_normalized(text: str) -> str:
    """As SQuAD's evaluate-v1.1.py."""
    import re
    import string

    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def test_normalising_is_squads_for_plain_english(shared_data):
    rows = json.loads((shared_data / "alpaca_en_demo.json").read_text(encoding="utf-8"))[:500]
    texts = [r["output"] for r in rows if r["output"].isascii()]
    assert len(texts) > 400
    assert [normalized(t) for t in texts] == [_squad_normalized(t) for t in texts]


def test_normalising_at_its_edges():
    assert normalized("  The Cat,\n a DOG! ") == "cat dog"
    assert normalized("「你好」，世界！") == "你好世界"
    # SQuAD's makes nothing of these, so that a wrong choice is an exact match.
    assert [normalized(t) for t in ("A", "(A)", "The", "+", "-", " ")] == ["a", "a", "the", "+", "-", ""]
    match = METRICS["exact_match_normalized"]
    assert match.rows(["The cat.", "B", "A.", "你好！", "+"], [["cat"], ["A"], ["a"], ["你好"], ["-"]]).tolist() == [
        1, 0, 1, 1, 0,
    ]  # fmt: skip
    f1 = METRICS["token_f1"]
    assert f1.rows(["the cat cat", "我喜欢猫", "", "x"], [["cat"], ["我爱猫", "狗"], ["a b"], ["y", "x"]]).tolist() == [
        pytest.approx(2 / 3), pytest.approx(4 / 7), 0, 1,
    ]  # fmt: skip


def test_chinese_is_found_by_the_references():
    assert "tok:zh" in bleu(CHINESE, CHINESE_RIGHT).signature
    assert "tok:zh" in bleu(ENGLISH[:2], CHINESE_RIGHT).signature
    assert "tok:13a" in bleu(CHINESE, ENGLISH_RIGHT[:2]).signature
    assert "tok:13a" in bleu(["a"], ["123"]).signature
    assert bleu(CHINESE, CHINESE_RIGHT).score == pytest.approx(
        BLEU(tokenize="zh").corpus_score(CHINESE, [CHINESE_RIGHT]).score / 100
    )
    assert chrf(CHINESE, CHINESE_RIGHT).signature == "nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:" + (
        BLEU.__module__ and __import__("sacrebleu").__version__
    )
    assert score(CHINESE, CHINESE_RIGHT)["rougeL"] > 0.5


def test_the_number_of_references_is_in_the_signature(caplog):
    with caplog.at_level(logging.WARNING):
        assert "nrefs:var" in bleu(["a b", "c ."], [["a", "b"], ["c"]]).signature
        assert "nrefs:2" in chrf(["a b"], [["a", "b"]], word_order=2).signature
    assert not caplog.records


def test_the_best_of_several_references_counts_even_where_rows_have_different_numbers():
    answers = ["a small brown dog runs home", "no"]
    rows = [["something else entirely", "a small brown dog runs home"], ["no"]]
    assert score(answers, rows) == {
        "bleu": 1.0, "chrf": 1.0, "rouge1": 1.0, "rouge2": 0.5, "rougeL": 1.0, "exact_match": 1.0,
        "exact_match_normalized": 1.0, "token_f1": 1.0,
        "distinct_1": 1.0, "distinct_2": 0.5, "repetition": 0.0, "answer_characters": 14.5,
    }  # fmt: skip


def test_words_of_other_alphabets_are_words():
    assert rouge(["привет, мир"], ["Привет мир!"])["rouge2"] == 1.0
    expected = _reference_rouge(["naïve café"], [["naïve café"]])[0]
    assert rouge(["naïve café"], ["naïve café"]) == dict(zip(ROUGE, expected, strict=True))


def test_exact_match_leaves_out_white_space_around_and_nothing_else():
    assert exact_match([" 42\n", "4 2", "42.", ""], ["42", "42", "42", "42"]) == 0.25


def test_variety_repetition_and_length():
    answers = ["a b a b a b", "我们我们我们", "one", "", "a b c d e"]
    references = check_rows(answers, ["x"] * 5)
    rows = {name: METRICS[name].rows(answers, references) for name in ("distinct_1", "distinct_2", "repetition")}
    assert rows["distinct_1"] == pytest.approx([2 / 6, 2 / 6, 1, 0, 1])
    assert rows["distinct_2"] == pytest.approx([2 / 5, 2 / 5, 0, 0, 1])
    assert rows["repetition"] == pytest.approx([1 / 3, 1 / 3, 0, 0, 0])  # abab baba abab: one of three was there
    assert score(answers, references)["answer_characters"] == pytest.approx((11 + 6 + 3 + 0 + 9) / 5)


def test_empty_answers_are_legal_and_score_zero():
    assert set(score(["", ""], ["one two three four", "五"]).values()) == {0.0}
    assert set(score(["", ""], ["#### 1", "2"]).values()) == {0.0}
    assert set(score([""], ['{"name": "f", "arguments": {}}']).values()) == {0.0}


def test_every_metric_adds_up(alpaca):
    """Means of rows are sums too, and many sums at once are each as alone."""
    _, answers, references = alpaca
    answers, references = answers[:40], references[:40]
    for metric in metrics_for(references):
        statistics = metric.statistics(answers, references)
        assert statistics.shape[0] == 40 and statistics.dtype == np.float64
        halves = np.stack([statistics[:20].sum(0), statistics[20:].sum(0)])
        alone = [metric.score(answers[:20], references[:20]), metric.score(answers[20:], references[20:])]
        assert metric.value(halves, np.array([20, 20])) == pytest.approx(alone, abs=1e-12)
        assert metric.rows(answers, references).shape == (40,)
        assert metric.label and metric.better in ("higher", "lower", None)


@pytest.mark.parametrize(
    ("answers", "references", "message"),
    [
        ([], [], "no answers"),
        (["a"], ["a", "b"], "1 answers but 2 references"),
        (["a", None], ["a", "b"], "answers, row 2"),
        (["a", "b"], ["a", None], "references, row 2"),
        (["a", "b"], ["a", 7], "references, row 2"),
        (["a"], [[]], "references, row 1"),
        (["a"], [["a", None]], "references, row 1"),
        (None, ["a"], "answers must be a list"),
        ("abc", ["a", "b", "c"], "answers must be a list"),
        (["a"], None, "references must be a list"),
    ],
)
def test_bad_input_is_named(answers, references, message):
    for scorer in (score, bleu, chrf, rouge, exact_match, METRICS["token_f1"].score):
        with pytest.raises(UserError, match=message):
            scorer(answers, references)
