"""Are a network's probabilities true? Of the voxels that get 0.8, four of five are of the class.

found = reliability(probability, truth, near_masks([truth, mask], spacing))
found.ece  # expected calibration error
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from seg3dcam.errors import EvaluationError
from seg3dcam.explaining.explanation import Explanation

#: Probabilities are counted in so many bins of equal width.
BINS = 15

#: Voxels count that are so near to a mask. Farther ones are easy, and so many that any network
#: would look reliable by them.
NEAR_MM = 10.0

#: So many slices are measured at once.
_SLAB = 32


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

    @classmethod
    def of_lists(cls, lists: Sequence[Sequence[float]]) -> Reliability:
        """Return what `lists` has returned."""
        count, expected, found = (np.asarray(part, np.float64) for part in lists)
        return cls(count, expected, found)

    @property
    def lists(self) -> list[list[float]]:
        """Its numbers, ready for JSON."""
        return [self.count.tolist(), self.expected.tolist(), self.found.tolist()]

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

    Raises:
        EvaluationError: a probability that is not finite, or not from 0 to 1.

    Source: Guo et al., "On Calibration of Modern Neural Networks", 2017; class by class as in
    Nixon et al., "Measuring Calibration in Deep Learning", 2019.

    >>> found = reliability([0.8, 0.8, 0.8, 0.8, 0.8], [True, True, True, True, False])
    >>> round(found.ece, 6), round(reliability([0.9, 0.9], [True, False]).ece, 6)
    (0.0, 0.4)
    """
    inside = ... if region is None else np.asarray(region, bool)
    values = np.asarray(probability)[inside].ravel().astype(np.float64)
    there = np.asarray(truth, bool)[inside].ravel()
    if not ((values >= 0) & (values <= 1)).all():  # NaN is neither
        raise EvaluationError("probabilities must be finite, and from 0 to 1")
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
    union = np.zeros(np.shape(masks[0]), bool)
    for mask in masks:
        union |= np.asarray(mask, bool)
    near = np.zeros_like(union)
    if not union.any():
        return near
    reach = [math.ceil(NEAR_MM / step) for step in spacing]
    found = ndimage.find_objects(union.view(np.uint8))[0]
    first, *box = (
        slice(max(0, part.start - more), part.stop + more)
        for part, more in zip(found, reach, strict=True)
    )
    # A slab at a time, with what is in reach of it: distances take fifty bytes for each voxel.
    for start in range(first.start, min(first.stop, len(union)), _SLAB):
        low, stop = max(0, start - reach[0]), min(start + _SLAB, first.stop, len(union))
        part = union[(slice(low, stop + reach[0]), *box)]
        if part.any():
            distance = ndimage.distance_transform_edt(~part, sampling=spacing)
            near[(slice(start, stop), *box)] = distance[start - low : stop - low] <= NEAR_MM
    return near


def reliability_of(explanation: Explanation) -> Reliability | None:
    """Return how true the probabilities of an explanation's class are near its masks.

    Voxels that the network did not see, such as those that were cropped away, do not count.

    Returns:
        None without a truth, where a part of the class is explained, for an explanation that was
        read back, where neither truth nor prediction has a voxel, and where probabilities are not
        finite.
    """
    truth, drawn, index = explanation.truth, explanation.mask, explanation.class_index
    if truth is None or drawn is None or index is None or explanation.region is not None:
        return None
    if explanation.probability is None or not (truth.any() or drawn.any()):
        return None
    probability = explanation.probability(index)
    region = near_masks([truth.numpy(), drawn.numpy()], explanation.scan.spacing)
    region &= explanation.probability.seen().numpy()
    finite = bool(torch.isfinite(probability[torch.from_numpy(region)]).all())
    return reliability(probability.numpy(), truth.numpy(), region) if finite else None


def _divided(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.divide(
        part, whole, out=np.full_like(part, math.nan), where=whole > 0
    )
    return found
