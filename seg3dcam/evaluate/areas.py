"""The area under a curve that falls, from few of its points.

To delete blocks in 25 steps by 20 maps takes 500 predictions. But the curves of deletion fall, so
two points of a curve bound all those between them, and a few points tell the area well enough, or
on which side of another area it lies. That a curve falls is an assumption. Where the points that
are known rise, the bounds are widened by as much.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


class PartialCurve:
    """A curve that is known at some of its steps, and taken to fall between them.

    Args:
        height_at: the curve's height at a step, which is what costs time.
        fractions: (steps + 1,), the place of each step.
        first, last: the curve's heights at the first and the last step.

    Attributes:
        heights: step -> height, as far as it is known.
        fractions: (steps + 1,).

    >>> curve = PartialCurve(lambda step: 1 - step / 4, np.linspace(0, 1, 5), first=1, last=0)
    >>> curve.area, curve.error()
    (0.5, 0.5)
    >>> curve.take(curve.widest())
    >>> curve.area, curve.error(), sorted(curve.heights)
    (0.5, 0.25, [0, 2, 4])
    """

    def __init__(
        self,
        height_at: Callable[[int], float],
        fractions: NDArray[np.float64],
        first: float,
        last: float,
    ) -> None:
        self._height_at = height_at
        self.fractions = fractions
        self.heights = {0: first, len(fractions) - 1: last}

    def take(self, step: int) -> None:
        """Let a step be known."""
        if step not in self.heights:
            self.heights[step] = self._height_at(step)

    def refine(self) -> None:
        """Let the step be known that says most, if any is not known."""
        if self.error() > 0:
            self.take(self.widest())

    def complete(self) -> None:
        """Let every step be known, so that the area holds even if the curve does not fall."""
        for step in range(len(self.fractions)):
            self.take(step)

    @property
    def points(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The fractions and heights that are known, in order."""
        return self._known()

    @property
    def steps(self) -> list[int]:
        """The steps that are known, in order."""
        return sorted(self.heights)

    @property
    def area(self) -> float:
        """The area by the trapezoid rule over what is known, from 0 to 1."""
        places, values = self._known()
        return float((np.diff(places) * (values[1:] + values[:-1])).sum() / 2)

    @property
    def rise(self) -> float:
        """By how much the known heights rise at most, from any to a later one."""
        _, values = self._known()
        return float((values - np.minimum.accumulate(values)).max())

    def error(self, rise: float = 0.0) -> float:
        """Return how far the area may be from that of all steps.

        Args:
            rise: by how much the curve may leave the range between two neighbouring known heights.
        """
        return float(self._unknown(rise).sum())

    def widest(self, rise: float = 0.0) -> int:
        """Return the step that says most of those that are not known."""
        gap, steps = int(self._unknown(rise).argmax()), self.steps
        return (steps[gap] + steps[gap + 1]) // 2

    def _known(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        steps = self.steps
        return self.fractions[steps], np.array([self.heights[step] for step in steps])

    def _unknown(self, rise: float) -> NDArray[np.float64]:
        """Return the largest error between each known step and the next."""
        places, values = self._known()
        largest = np.diff(places) * (np.abs(np.diff(values)) / 2 + rise)
        # Between neighbouring steps the rule itself is a line, so nothing is unknown.
        return np.where(np.diff(self.steps) > 1, largest, 0.0)


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

    Points are taken where they say most, until the error is small enough; one in the middle always,
    which shows a curve that falls and comes back.

    Args:
        height_at, fractions, first, last: see `PartialCurve`.
        error: how large the error may be.
        other: another area. It is also enough to know on which side of it this one lies.

    >>> area_between(lambda step: 1 - step / 4, np.linspace(0, 1, 5), 1, 0, error=0)
    (0.5, 0.0)
    >>> asked = []
    >>> area_between(lambda step: asked.append(step) or 0.0, np.linspace(0, 1, 5), 1, 0, other=0.9)
    (0.25, 0.25)
    >>> asked
    [2]
    """
    curve = PartialCurve(height_at, fractions, first, last)
    curve.take((len(fractions) - 1) // 2)
    while True:
        left = curve.error(curve.rise)
        if left <= error or (other is not None and abs(curve.area - other) > left):
            return curve.area, left
        curve.take(curve.widest(curve.rise))
