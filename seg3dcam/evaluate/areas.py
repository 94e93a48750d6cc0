"""The area under a curve that falls, from few of its points.

To delete blocks in 25 steps by 20 random maps takes 500 predictions. But the curves of deletion
fall, so two points of a curve bound all those between them, and a few points tell the area well
enough, or on which side of another area it lies.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


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
    heights = {0: first, len(fractions) - 1: last}
    while True:
        steps = sorted(heights)
        places, values = fractions[steps], np.array([heights[step] for step in steps])
        widths, falls = np.diff(places), np.abs(np.diff(values))
        area = float((widths * (values[1:] + values[:-1])).sum() / 2)
        # Between neighbouring steps the rule itself is a line, so nothing is unknown.
        unknown = np.where(np.diff(steps) > 1, widths * falls / 2, 0.0)
        left = float(unknown.sum())
        if left <= error or (other is not None and abs(area - other) > left):
            return area, left
        widest = int(unknown.argmax())
        middle = (steps[widest] + steps[widest + 1]) // 2
        heights[middle] = height_at(middle)
