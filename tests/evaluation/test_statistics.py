"""Intervals and significance against sacrebleu's and scipy's own, and at the edges where a naive bootstrap lies."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

from luthier.evaluation.statistics import (
    Resampling,
    change,
    column,
    interval,
    mean_value,
    smallest_difference,
    unpaired,
)

WORDS = [f"w{number}" for number in range(16)]


def texts(seed: int, count: int = 120) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 12)) for _ in range(count)]


def noisy(rows: list[str], share: float, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(w if rng.random() > share else str(rng.choice(WORDS)) for w in row.split()) for row in rows]


@pytest.fixture(scope="module")
def bleu():
    """sacrebleu's own statistics and score, as a metric over sums."""
    metric = BLEU()

    def value(sums, count):
        flat = np.atleast_2d(sums).reshape(-1, sums.shape[-1])
        found = [metric._compute_score_from_stats(s.tolist()).score / 100 for s in flat]
        return np.array(found).reshape(sums.shape[:-1])

    def statistics(answers, references):
        return np.array(metric._extract_corpus_statistics(answers, [references]), dtype=np.float64)

    return value, statistics


def both(ours, theirs, resampling, better="higher", binary=False):
    """Change between means over rows."""
    a, b = np.asarray(ours, float), np.asarray(theirs, float)
    return change(mean_value, column(a), column(b), (a, b), resampling, better=better, binary=binary)


def test_bleu_is_as_sure_and_as_significant_as_sacrebleu_says(bleu):
    value, statistics = bleu
    right = texts(0)
    systems = {"base": noisy(right, 0.5, 1), "near": noisy(right, 0.47, 2), "far": noisy(right, 0.2, 3)}
    resampling = Resampling(len(right), resamples=1_000)
    named = list(systems.items())
    _, randomised = PairedTest(named, {"BLEU": BLEU()}, [right], test_type="ar", n_ar_confidence=1_000)()
    base = statistics(systems["base"], right)
    for place, name in enumerate(("near", "far"), 1):
        mine = statistics(systems[name], right)
        theirs = randomised["BLEU"][place]
        found = change(value, base, mine, (np.zeros(120), np.ones(120)), resampling, better="higher")
        assert found.value == pytest.approx((theirs.score - randomised["BLEU"][0].score) / 100, abs=1e-9)
        assert found.p == pytest.approx(theirs.p_value, abs=0.02)
        around = interval(value, mine, resampling)
        assert around.value == pytest.approx(theirs.score / 100, abs=1e-9)
        assert (around.high - around.low) / 2 == pytest.approx(theirs.ci / 100, rel=0.1)
    assert found.significant and found.low > 0 and (found.wins, found.ties, found.losses) == (120, 0, 0)


def test_means_are_as_scipys_bootstrap_and_permutation_test_say():
    from scipy import stats

    rng = np.random.default_rng(5)
    before = rng.gamma(2.0, 1.0, 80)
    after = before + rng.normal(0.25, 0.8, 80)
    resampling = Resampling(80)
    theirs = stats.bootstrap((after,), np.mean, n_resamples=4_000, method="percentile", rng=6).confidence_interval
    mine = interval(mean_value, column(after), resampling)
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)
    tested = stats.permutation_test(
        (after, before), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=9_999, rng=7
    )
    assert both(before, after, resampling).p == pytest.approx(tested.pvalue, abs=0.01)


@pytest.mark.parametrize(("right", "count"), [(0, 48), (48, 48), (7, 10), (1, 1), (500, 1319)])
def test_shares_have_wilsons_interval(right, count):
    from scipy import stats

    found = interval(mean_value, column([1.0] * right + [0.0] * (count - right)), Resampling(count), binary=True)
    theirs = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    # A bootstrap of rows that are all right knows no other possibility.
    assert found.low < found.high


def test_two_models_that_never_differ_are_not_surely_equal():
    same = both([1] * 20, [1] * 20, Resampling(20), binary=True)
    assert (same.value, same.p, same.ties) == (0, 1, 20) and same.low < 0 < same.high
    assert not same.significant


def test_the_interval_of_a_paired_difference_of_shares():
    """The cells of Agresti and Min's formula, by hand."""
    before, after = [1] * 30 + [0] * 20 + [1] * 4 + [0] * 46, [1] * 30 + [1] * 20 + [0] * 4 + [0] * 46
    found = both(before, after, Resampling(100), binary=True)
    half = 1.959963984540054 * math.sqrt(20.5 + 4.5 - (20.5 - 4.5) ** 2 / 102) / 102
    assert (found.low, found.high) == pytest.approx((16 / 102 - half, 16 / 102 + half))
    assert (found.wins, found.ties, found.losses) == (20, 76, 4) and found.value == pytest.approx(0.16)
    # The exact test of the sign of 24 differing rows (McNemar's) gives 0.0015.
    assert found.p == pytest.approx(0.0015, abs=0.002)


def test_an_interval_covers_as_often_as_it_says():
    """Of 300 samples of 60 rows, about 95 in a hundred intervals hold the truth, for shares and for means."""
    rng = np.random.default_rng(8)
    inside = {"share": 0, "mean": 0, "difference": 0}
    for _ in range(300):
        resampling = Resampling(60, resamples=500, trials=1)
        hits = (rng.random(60) < 0.85).astype(float)
        numbers, others = rng.normal(1.0, 2.0, 60), rng.normal(1.5, 2.0, 60)
        share = interval(mean_value, column(hits), resampling, binary=True)
        mean = interval(mean_value, column(numbers), resampling)
        apart = both(numbers, others, resampling)
        inside["share"] += share.low <= 0.85 <= share.high
        inside["mean"] += mean.low <= 1.0 <= mean.high
        inside["difference"] += apart.low <= 0.5 <= apart.high
    assert all(0.90 <= count / 300 <= 0.99 for count in inside.values()), inside


def test_equal_models_are_called_different_one_time_in_twenty():
    rng = np.random.default_rng(9)
    found = 0
    for number in range(200):
        rows = rng.normal(size=(2, 50))
        found += both(*rows, Resampling(50, resamples=50, trials=500, seed=number)).significant
    assert 2 <= found <= 20


def test_what_is_better_where_lower_is_and_where_nothing_is():
    resampling = Resampling(3)
    assert both([3, 2, 1], [1, 2, 3], resampling, "lower").wins == 1
    assert both([3, 2, 1], [1, 2, 2], resampling, None).ties == 3


def test_the_same_seed_gives_the_same_numbers_whatever_is_held_at_once(monkeypatch):
    import luthier.evaluation.statistics as module

    rng = np.random.default_rng(10)
    values = column(rng.normal(size=37))
    whole = (Resampling(37).sums(values), Resampling(37).swapped(values))
    assert not np.allclose(whole[0], Resampling(37, seed=1).sums(values))
    monkeypatch.setattr(module, "_AT_ONCE", 100)
    pieces = (Resampling(37).sums(values), Resampling(37).swapped(values))
    assert np.allclose(whole[0], pieces[0]) and np.allclose(whole[1], pieces[1])


def test_how_small_a_difference_so_many_rows_can_show():
    assert smallest_difference(0.5, 100) == pytest.approx(0.198, abs=0.001)
    assert smallest_difference(0.5, 10_000) < 0.02
    assert 0 < smallest_difference(1.0, 50) < 1


def test_means_over_different_rows_are_compared_as_scipy_does():
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    first, second = rng.normal(0.4, 1, 35), rng.normal(0, 1, 50)
    found = unpaired(first, second)
    theirs = scipy_stats.permutation_test(
        (first, second), lambda a, b, axis: a.mean(axis) - b.mean(axis), vectorized=True, n_resamples=9999, rng=rng
    )
    assert found.value == pytest.approx(first.mean() - second.mean())
    assert found.p == pytest.approx(theirs.pvalue, abs=0.02)
    spread = np.sqrt(first.var() / len(first) + second.var() / len(second))
    assert found.low == pytest.approx(found.value - 1.96 * spread, abs=0.05)
    assert found.high == pytest.approx(found.value + 1.96 * spread, abs=0.05)
    assert unpaired(first, second) == found
    assert unpaired(np.ones(30), np.ones(20)).p == 1 and unpaired(np.ones(30), np.zeros(20)).p < 0.001
