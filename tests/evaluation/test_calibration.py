"""What probabilities are worth: scikit-learn's numbers, and a word where a model is surer than right."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from luthier.evaluation.calibration import BINS, calibration


def drawn(rows: int, classes: int, seed: int = 0, sharp: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and right classes that follow them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, sharp, (rows, classes))
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    chosen = (rng.random(rows)[:, None] > scores.cumsum(1)).sum(1).clip(max=classes - 1)
    return scores, np.arange(classes) == chosen[:, None]


NAMES = tuple("abcdefgh")


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_of_one_class_they_are_scikit_learns(classes):
    for seed in range(10):
        scores, right = drawn(300, classes, seed)
        found = calibration(scores, right, NAMES[:classes], multi_label=False)
        truth = right.argmax(1)
        assert found.nll == pytest.approx(log_loss(truth, scores, labels=range(classes)), abs=1e-9)
        theirs = brier_score_loss(truth, scores if classes > 2 else scores[:, 1], labels=range(classes))
        assert found.brier == pytest.approx(theirs, abs=1e-9)
        # The curve of the class given and of whether it is right.
        accuracy, confidence = calibration_curve(scores.argmax(1) == truth, scores.max(1), n_bins=BINS)
        assert [b.accuracy for b in found.bins] == pytest.approx(accuracy)
        assert [b.confidence for b in found.bins] == pytest.approx(confidence)
        counts = np.histogram(scores.max(1), np.linspace(0, 1, BINS + 1))[0]
        assert [b.count for b in found.bins] == counts[counts > 0].tolist()
        assert found.ece == pytest.approx((counts[counts > 0] / 300 * np.abs(accuracy - confidence)).sum(), abs=1e-12)
        assert found.accuracy == pytest.approx((scores.argmax(1) == truth).mean()) and not found.by_label


def test_of_several_classes_each_label_is_scikit_learns():
    rng = np.random.default_rng(3)
    scores, right = rng.random((400, 3)), rng.random((400, 3)) < 0.4
    found = calibration(scores, right, ("x", "y", "z"), multi_label=True)
    for i, name in enumerate("xyz"):
        own = found.by_label[name]
        assert own["brier"] == pytest.approx(brier_score_loss(right[:, i], scores[:, i]), abs=1e-9)
        assert own["nll"] == pytest.approx(log_loss(right[:, i], scores[:, i]), abs=1e-9)
        share, given = calibration_curve(right[:, i], scores[:, i], n_bins=BINS)
        counts = np.histogram(scores[:, i], np.linspace(0, 1, BINS + 1))[0] / 400
        assert own["ece"] == pytest.approx((counts * np.abs(share - given)).sum(), abs=1e-12)
    for key in ("ece", "brier", "nll"):
        assert getattr(found, key) == pytest.approx(np.mean([v[key] for v in found.by_label.values()]))
    assert sum(b.count for b in found.bins) == 1200


def test_what_is_sure_and_wrong_costs_a_finite_number():
    scores, right = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[False, True], [False, True]])
    for multi_label in (False, True):
        found = calibration(scores, right, ("a", "b"), multi_label=multi_label)
        assert found.nll == pytest.approx(log_loss([1, 1], scores, labels=[0, 1])) and found.brier == 0.5
        assert json.loads(json.dumps(found.to_json(), allow_nan=False))["reliability"][-1]["to"] == 1
    # A probability on a border belongs to the bin below it.
    assert calibration(np.array([[0.6, 0.4]]), right[:1], ("a", "b"), multi_label=False).bins[0].high == pytest.approx(
        0.6
    )


def test_a_word_where_a_model_is_surer_than_right_or_less_sure():
    scores, right = drawn(400, 3)
    assert calibration(scores, right, NAMES[:3], multi_label=False).note("tuned") is None
    for power, word in ((4.0, "more sure than right"), (0.3, "less sure than right")):
        bent = scores**power / (scores**power).sum(1, keepdims=True)
        found = calibration(bent, right, NAMES[:3], multi_label=False)
        note = found.note("tuned")
        assert f"tuned is {word}: {found.confidence:.0%} sure" in note and f"right in {found.accuracy:.0%}" in note
        assert found.ece > 0.05
        # Of few rows nothing is said.
        assert calibration(bent[:20], right[:20], NAMES[:3], multi_label=False).note("tuned") is None


def test_a_calibrated_model_gets_no_word_but_one_time_in_a_hundred():
    noted = sum(calibration(*drawn(100, 3, s), NAMES[:3], multi_label=False).note("m") is not None for s in range(300))
    assert noted <= 8
