"""Risk and coverage, beside a slow reference and what is known by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from seg3dcam.cohort.calibration import of_classes, risk_coverage
from seg3dcam.errors import EvaluationError
from seg3dcam.job.record import Entry


def slow_area(confidence, risk):
    """The mean over coverages, and over all orders of cases of the same confidence."""
    areas = []
    for order in itertools.permutations(range(len(risk))):
        ordered = [confidence[number] for number in order]
        if ordered == sorted(ordered, reverse=True):
            kept = [risk[number] for number in order]
            areas.append(np.mean([np.mean(kept[: n + 1]) for n in range(len(kept))]))
    return np.mean(areas)


@pytest.mark.parametrize("seed", range(6))
def test_area_is_that_of_the_definition(seed):
    random = np.random.default_rng(seed)
    risk = random.random(6).tolist()
    confidence = random.integers(0, 4, 6).astype(float).tolist()  # some are equal
    assert risk_coverage(confidence, risk).area == pytest.approx(slow_area(confidence, risk))


def test_what_orders_by_risk_is_best_and_the_reverse_is_worst():
    risk = np.linspace(0, 1, 20)
    best, worst = risk_coverage(-risk, risk), risk_coverage(risk, risk)
    assert best.area == best.at_best < best.by_chance < worst.area
    assert best.p_value == 0.001
    assert worst.p_value > 0.99
    assert best.risk[-1] == pytest.approx(risk.mean())
    assert worst.risk[-1] == pytest.approx(risk.mean())


def test_a_confidence_that_is_always_the_same_is_chance():
    found = risk_coverage([0.5] * 8, np.arange(8) / 8)
    assert found.area == pytest.approx(found.by_chance)
    assert found.p_value == 1


@pytest.mark.parametrize(
    ("confidence", "risk"),
    [([1, 2, 3, 4], [0, 0, 0, 0]), ([1] * 5, [0] * 6), ([1, 2, 3, 4, np.nan], [0] * 5)],
)
def test_bad_input(confidence, risk):
    with pytest.raises(EvaluationError):
        risk_coverage(confidence, risk)


def test_cases_without_a_truth_are_left_out():
    def entry(label, **found):
        return Entry(label=label, name=label, run="r", found=found)

    known = [entry("lesion", confidence=0.1 * n, dice=0.1 * n) for n in range(6)]
    found = of_classes([*known, entry("lesion", confidence=0.9), entry("organ", dice=0.5)])
    assert list(found) == ["lesion"]
    assert found["lesion"].by_chance == pytest.approx(0.75)
