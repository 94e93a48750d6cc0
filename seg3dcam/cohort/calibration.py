"""What a network's confidence is worth, where truths are known.

found = risk_coverage(confidence, 1 - dice)
found.area, found.by_chance, found.at_best

`seg3dcam.explaining.reliability` tells what the probabilities of voxels are worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
from numpy.typing import NDArray

from seg3dcam.cohort.triage import group_of
from seg3dcam.errors import EvaluationError
from seg3dcam.explaining.reliability import Reliability
from seg3dcam.job.record import Entry

#: With fewer cases an area says nothing.
FEWEST = 5


@dataclass(frozen=True)
class RiskCoverage:
    """How the risk falls when the least confident cases are left to a human.

    Attributes:
        coverage: (N,), the part of the cases that are kept, the most confident first.
        risk: (N,), their mean risk.
        area: below the risk, the mean over all coverages. The smaller, the better.
        by_chance: the area of a confidence that says nothing: the mean risk of all cases.
        at_best: the area of a confidence that orders the cases by their risk.
        p_value: how often a random order is as good; 1 / (draws + 1) at least.
    """

    coverage: NDArray[np.float64]
    risk: NDArray[np.float64]
    area: float
    by_chance: float
    at_best: float
    p_value: float


def risk_coverage(
    confidence: Sequence[float], risk: Sequence[float], *, draws: int = 999, seed: int = 0
) -> RiskCoverage:
    """Return the risk-coverage curve of cases, and its area.

    Of cases with the same confidence each counts with their mean risk.

    Args:
        confidence: one for each case.
        risk: one for each case, such as 1 - Dice.
        draws: of random orders.

    Raises:
        EvaluationError: fewer than five cases, or figures that are not finite.

    Source: Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks", 2017; the
    area as in Geifman et al., "Bias-Reduced Uncertainty Estimation", 2019.

    >>> found = risk_coverage([0.9, 0.8, 0.7, 0.6, 0.5], [0.0, 0.1, 0.2, 0.3, 0.4])
    >>> round(found.area, 3), round(found.by_chance, 3), found.area == found.at_best
    (0.1, 0.2, True)
    """
    sure, wrong = np.asarray(confidence, np.float64), np.asarray(risk, np.float64)
    if sure.shape != wrong.shape or sure.ndim != 1 or len(sure) < FEWEST:
        raise EvaluationError(
            f"{sure.shape} confidences and {wrong.shape} risks: a curve needs one of each for "
            f"{FEWEST} cases or more"
        )
    if not (np.isfinite(sure).all() and np.isfinite(wrong).all()):
        raise EvaluationError("confidences and risks must be finite: leave the other cases out")
    curve = _curve(sure, wrong)
    area, best = float(curve.mean()), float(_curve(-wrong, wrong).mean())
    random = np.random.default_rng(seed)
    drawn = [_curve(random.permutation(sure), wrong).mean() for _ in range(draws)]
    as_good = sum(one <= area + 1e-12 for one in drawn)
    return RiskCoverage(
        np.arange(1, len(sure) + 1) / len(sure),
        curve,
        area,
        float(wrong.mean()),
        best,
        (as_good + 1) / (draws + 1),
    )


def _curve(confidence: NDArray[np.float64], risk: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean risk of the most confident 1, 2, ... cases."""
    _, group = np.unique(-confidence, return_inverse=True)
    means = np.bincount(group, risk) / np.bincount(group)
    ordered = means[np.sort(group)]
    found: NDArray[np.float64] = np.cumsum(ordered) / np.arange(1, len(risk) + 1)
    return found


@dataclass(frozen=True)
class ClassReliability:
    """How true the probabilities of a class are in a cohort.

    Attributes:
        reliability: over the voxels of all cases that have a truth and in which the class is drawn.
        cases: how many these are. Where it is missed nothing is explained, so those do not count.
    """

    reliability: Reliability
    cases: int

    @property
    def words(self) -> str:
        """The figure in a few words."""
        cases = f"{self.cases} case{'s' * (self.cases > 1)}"
        return (
            f"expected calibration error {self.reliability.ece:.3f}, in {cases} with a truth in "
            "which it is drawn"
        )


def reliability_of_classes(entries: Sequence[Entry]) -> dict[str, ClassReliability]:
    """Return class -> how true its probabilities are.

    Args:
        entries: of all cases, by one method.
    """
    found: dict[str, list[Reliability]] = {}
    for entry in entries:
        if (one := entry.reliable()) is not None:
            found.setdefault(group_of(entry), []).append(one)
    return {
        label: ClassReliability(reduce(add, of_class), len(of_class))
        for label, of_class in found.items()
    }


def of_classes(entries: Sequence[Entry]) -> dict[str, RiskCoverage]:
    """Return class -> the curve of its explanations with a confidence and a Dice.

    Args:
        entries: of all cases, by one method.
    """
    pairs: dict[str, list[tuple[float, float]]] = {}
    for entry in entries:
        sure, dice = entry.figure("confidence"), entry.figure("dice")
        if sure is not None and dice is not None:
            pairs.setdefault(group_of(entry), []).append((sure, 1 - dice))
    return {
        label: risk_coverage(*zip(*of_class, strict=True))
        for label, of_class in pairs.items()
        if len(of_class) >= FEWEST
    }
