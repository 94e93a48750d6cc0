"""Are a network's probabilities true? Of the voxels that get 0.8, four of five are of the class.

found = reliability(probability, truth, near_masks([truth, mask], spacing))
found.ece  # expected calibration error
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from seg3dcam.explaining.explanation import Explanation

#: Probabilities are counted in so many bins of equal width.
BINS = 15

#: Voxels count that are so near to a mask. Farther ones are easy, and so many that any network
#: would look reliable by them.
NEAR_MM = 10.0


@dataclass(frozen=True)
class Reliability:
    """How often a class is there, by the probability that a network gives it.

    Attributes:
        count: (BINS,), voxels whose probability lies in each bin.
        expected: (BINS,), the sum of their probabilities.
        found: (BINS,), how many of them are of the class.
    """

    count: NDArray[np.float64]
    expected: NDArray[np.float64]
    found: NDArray[np.float64]

    def __add__(self, other: Reliability) -> Reliability:
        """Return the reliability over the voxels of both."""
        return Reliability(
            self.count + other.count, self.expected + other.expected, self.found + other.found
        )

    @property
    def ece(self) -> float:
        """The expected calibration error, 0 to 1; NaN without a voxel.

        It is the mean over all voxels of how far probability and frequency of their bin differ.
        """
        total = float(self.count.sum())
        return float(np.abs(self.expected - self.found).sum()) / total if total else math.nan

    @property
    def probability(self) -> NDArray[np.float64]:
        """(BINS,), the mean probability in each bin; NaN in an empty one."""
        return _divided(self.expected, self.count)

    @property
    def frequency(self) -> NDArray[np.float64]:
        """(BINS,), which part of the voxels in each bin is of the class; NaN in an empty one."""
        return _divided(self.found, self.count)


def reliability(
    probability: ArrayLike, truth: ArrayLike, region: ArrayLike | None = None
) -> Reliability:
    """Count how often a class is there, by its probability.

    Args:
        probability: of any shape, 0 to 1.
        truth: bool, of the same shape.
        region: bool, the voxels that count; None for all.

    Source: Guo et al., "On Calibration of Modern Neural Networks", 2017; class by class as in
    Nixon et al., "Measuring Calibration in Deep Learning", 2019.

    >>> found = reliability([0.8, 0.8, 0.8, 0.8, 0.8], [True, True, True, True, False])
    >>> round(found.ece, 6), round(reliability([0.9, 0.9], [True, False]).ece, 6)
    (0.0, 0.4)
    """
    values, there = np.asarray(probability, np.float64), np.asarray(truth, bool)
    if region is not None:
        inside = np.asarray(region, bool)
        values, there = values[inside], there[inside]
    values, there = values.ravel(), there.ravel()
    bins = np.minimum((values * BINS).astype(np.intp), BINS - 1)

    def summed(weights: NDArray[np.float64] | None) -> NDArray[np.float64]:
        return np.bincount(bins, weights, minlength=BINS).astype(np.float64)

    return Reliability(summed(None), summed(values), summed(there.astype(np.float64)))


def near_masks(masks: Sequence[ArrayLike], spacing: Sequence[float]) -> NDArray[np.bool_]:
    """Return the voxels that are no farther than `NEAR_MM` from any of the masks, (*S) bool.

    >>> line = np.zeros((30, 1, 1), bool)
    >>> line[0] = True
    >>> int(near_masks([line], (2, 1, 1)).sum())
    6
    """
    union = np.logical_or.reduce([np.asarray(mask, bool) for mask in masks])
    near = np.zeros(union.shape, bool)
    if union.any():
        reach = [math.ceil(NEAR_MM / step) for step in spacing]
        box = tuple(
            slice(max(0, part.start - more), part.stop + more)
            for part, more in zip(ndimage.find_objects(union.view(np.uint8))[0], reach, strict=True)
        )
        # Only the distance to the masks matters, so what lies outside of the box is not measured.
        near[box] = ndimage.distance_transform_edt(~union[box], sampling=spacing) <= NEAR_MM
    return near


def reliability_of(explanation: Explanation) -> Reliability | None:
    """Return how true the probabilities of an explanation's class are near its masks.

    Returns:
        None without a truth, where a part of the class is explained, for an explanation that was
        read back, and where neither truth nor prediction has a voxel.
    """
    truth, drawn, index = explanation.truth, explanation.mask, explanation.class_index
    if truth is None or drawn is None or index is None or explanation.region is not None:
        return None
    if explanation.probability is None or not (truth.any() or drawn.any()):
        return None
    region = near_masks([truth.numpy(), drawn.numpy()], explanation.scan.spacing)
    return reliability(explanation.probability(index).numpy(), truth.numpy(), region)


def _divided(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.divide(
        part, whole, out=np.full_like(part, math.nan), where=whole > 0
    )
    return found
