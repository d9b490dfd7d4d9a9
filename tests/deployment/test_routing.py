"""How many choices of experts a right candidate may make otherwise."""

from __future__ import annotations

import pytest

from luthier.deployment.parity import ParityReport, judge_routing
from luthier.deployment.routing import Detours


@pytest.mark.parametrize(
    ("other", "by_rounding", "passes"), [(5, 0, True), (6, 0, False), (8, 1, True), (9, 1, False), (0, 9, True)]
)
def test_more_detours_than_rounding_explains_are_refused(other, by_rounding, passes):
    report = ParityReport("merged", True, [])
    judge_routing(report, Detours(100, other), Detours(100, by_rounding))
    assert report.passed is passes and bool(report.reasons) is not passes
    assert report.numbers == {"candidate_rerouted": other / 100, "rounding_rerouted": by_rounding / 100}


def test_a_model_without_routers_is_not_told_of_them():
    report = ParityReport("merged", True, [])
    judge_routing(report, Detours(), Detours())
    assert report.passed and not report.numbers
