"""The area under a curve that falls, from few of its points.

To delete blocks in 25 steps by 20 random maps takes 500 predictions. But the curves of deletion
fall, so two points of a curve bound all those between them, and a few points tell the area well
enough, or on which side of another area it lies.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


class FallingCurve:
    """A curve that falls, of which points are measured one by one, where they say most.

    Args:
        height_at: the curve's height at a step, which is what costs time.
        fractions: (steps + 1,), the place of each step.
        first, last: the curve's heights at the first and the last step.

    Attributes:
        heights: step -> the curve's height there, as far as it is measured.

    >>> curve = FallingCurve(lambda step: 0.0, np.linspace(0, 1, 5), 1, 0)
    >>> curve.area, curve.error
    (0.5, 0.5)
    >>> curve.refine()
    >>> curve.area, curve.error
    (0.25, 0.25)
    """

    def __init__(
        self,
        height_at: Callable[[int], float],
        fractions: NDArray[np.float64],
        first: float,
        last: float,
    ) -> None:
        self._height_at, self._fractions = height_at, fractions
        self.heights = {0: first, len(fractions) - 1: last}

    @property
    def area(self) -> float:
        """The area under the curve by the trapezoid rule, as far as it is known."""
        places, values = self.points
        return float((np.diff(places) * (values[1:] + values[:-1])).sum() / 2)

    @property
    def error(self) -> float:
        """The largest error of the area, if the curve falls."""
        return float(self._unknown().sum())

    def refine(self) -> None:
        """Measure one point more, in the middle of the part that is known least."""
        steps, unknown = sorted(self.heights), self._unknown()
        if unknown.any():
            widest = int(unknown.argmax())
            middle = (steps[widest] + steps[widest + 1]) // 2
            self.heights[middle] = self._height_at(middle)

    def complete(self) -> None:
        """Measure every point, so that the area is known even if the curve does not fall."""
        for step in range(len(self._fractions)):
            if step not in self.heights:
                self.heights[step] = self._height_at(step)

    @property
    def points(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The places and heights that are measured, from left to right."""
        steps = sorted(self.heights)
        return self._fractions[steps], np.array([self.heights[step] for step in steps])

    def _unknown(self) -> NDArray[np.float64]:
        """Return how wrong the area can be in each part between two measured points."""
        places, values = self.points
        # Between neighbouring steps the rule itself is a line, so nothing is unknown.
        open_ = np.diff(sorted(self.heights)) > 1
        unknown: NDArray[np.float64] = np.where(
            open_, np.diff(places) * np.abs(np.diff(values)) / 2, 0.0
        )
        return unknown


def area_between(
    height_at: Callable[[int], float],
    fractions: NDArray[np.float64],
    first: float,
    last: float,
    *,
    error: float = 0.02,
    other: float | None = None,
) -> tuple[float, float]:
    """Return the area under a falling curve, by the trapezoid rule, and the largest error.

    Points are taken where they say most, until the error is small enough.

    Args:
        height_at: the curve's height at a step, which is what costs time.
        fractions: (steps + 1,), the place of each step.
        first, last: the curve's heights at the first and the last step.
        error: how large the error may be, if the curve falls.
        other: another area. It is also enough to know on which side of it this one lies.

    >>> area_between(lambda step: 1 - step / 4, np.linspace(0, 1, 5), 1, 0, error=0)
    (0.5, 0.0)
    >>> asked = []
    >>> area_between(lambda step: asked.append(step) or 0.0, np.linspace(0, 1, 5), 1, 0, other=0.9)
    (0.25, 0.25)
    >>> asked
    [2]
    """
    curve = FallingCurve(height_at, fractions, first, last)
    while True:
        area, left = curve.area, curve.error
        if left <= error or (other is not None and abs(area - other) > left):
            return area, left
        curve.refine()
