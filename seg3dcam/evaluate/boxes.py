"""The measures of weakly supervised localisation in 3D, to compare with papers that use them.

Source: Wisniewski, Giulivi and Boracchi, SE3D: a framework for saliency method evaluation in 3D
imaging (ICIP 2024), which carries the measures of Choe et al. (TPAMI 2022) over to volumes. They
are written here from their definitions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from seg3dcam.checks import check_whole_number
from seg3dcam.errors import EvaluationError
from seg3dcam.evaluate.arrays import refuse_constant
from seg3dcam.evaluate.places import on_one_grid

#: The overlaps of boxes that count as found: the second version of the measure takes their mean.
OVERLAPS = (0.3, 0.5, 0.7)

Array = torch.Tensor | NDArray[Any]
Box = tuple[slice, ...]


def max_box_overlap(values: Array, region: Array, *, thresholds: int = 100) -> float:
    """Return the best overlap of the region's box with that of the map above any threshold.

    The map is scaled to [0, 1]. The box is the one around the largest connected component, of the
    map at or above a threshold and of the region. The overlap is the intersection over the union.

    Args:
        values: the map, (*S).
        region: (*S), zero and nonzero.
        thresholds: how many there are, evenly from 0 to 1 without 1.

    Raises:
        EvaluationError: the region is empty or the map is constant.

    >>> values = np.array([[0.0, 0, 0], [0, 0.2, 1], [0, 0.2, 1]])
    >>> max_box_overlap(values, values > 0.5)
    1.0
    """
    check_whole_number("thresholds", thresholds)
    array, mask = _checked(values, region)
    array = (array - array.min()) / (array.max() - array.min())
    (own,) = _largest_first(mask)[:1]
    return max(
        _overlap(_largest_first(array >= threshold)[0], own)
        for threshold in np.arange(thresholds) / thresholds
    )


def max_box_accuracy(
    values: Array, region: Array, *, overlaps: Sequence[float] = (0.5,), thresholds: int = 100
) -> float:
    """Return which part of some overlaps the best box reaches: 0 or 1 for one (Max3DBoxAcc).

    With `overlaps=OVERLAPS` it is the mean over three. Of a set of scans it is the mean over them.
    The other arguments are those of `max_box_overlap`.

    >>> values = np.array([[0.0, 0, 0], [0, 0.2, 1], [0, 0.2, 1]])
    >>> max_box_accuracy(values, values > 0.1, overlaps=OVERLAPS)
    1.0
    """
    best = max_box_overlap(values, region, thresholds=thresholds)
    return float(np.mean([best >= overlap for overlap in overlaps]))


def voxel_average_precision(values: Array, region: Array) -> float:
    """Return the area under precision over recall, voxel by voxel (VxAP).

    All thresholds are taken, so it does not depend on how many there are. A random map gets the
    region's part of the volume.

    Raises:
        EvaluationError: the region is empty or the map is constant.

    >>> voxel_average_precision(np.array([0.9, 0.8, 0.1]), np.array([1, 0, 1])).__round__(3)
    0.833
    """
    array, mask = _checked(values, region)
    order = np.argsort(-array, axis=None, kind="stable")
    hits = np.cumsum(mask.reshape(-1)[order])
    last = np.append(np.diff(array.reshape(-1)[order]) != 0, True)  # of voxels of equal value
    hits, taken = hits[last], np.flatnonzero(last) + 1
    recall = np.diff(hits / hits[-1], prepend=0)
    return float((recall * hits / taken).sum())


def mass_concentration(values: Array, region: Array) -> float:
    """Return which part of a map's positive values lies in the part of a volume that should matter.

    The part is, for example, the half of a volume in which the object of the class lies (MC).

    Raises:
        EvaluationError: the map has no positive value, or is constant.

    >>> mass_concentration(np.array([3.0, 1.0, -2.0]), np.array([1, 0, 0]))
    0.75
    """
    array, mask = _checked(values, region)
    positive = np.clip(array, 0, None)
    if not positive.any():
        raise EvaluationError("undefined: the map has no positive value")
    return float(positive[mask].sum() / positive.sum())


def _largest_first(mask: NDArray[np.bool_]) -> list[Box]:
    """Return the boxes around the connected components of a mask, the largest component first."""
    labels, count = ndimage.label(mask, np.ones((3,) * mask.ndim))
    sizes = np.bincount(labels.reshape(-1), minlength=count + 1)[1:]
    boxes = ndimage.find_objects(labels)
    return [boxes[number] for number in np.argsort(-sizes, kind="stable")]


def _overlap(one: Box, other: Box) -> float:
    """Return the intersection of two boxes over their union."""
    inside = np.prod([max(0, high - low) for low, high in _common(one, other)])
    sizes = sum(np.prod([part.stop - part.start for part in box]) for box in (one, other))
    return float(inside / (sizes - inside))


def _common(one: Box, other: Box) -> Iterator[tuple[int, int]]:
    for a, b in zip(one, other, strict=True):
        yield max(a.start, b.start), min(a.stop, b.stop)


def _checked(values: Array, region: Array) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    array, mask = on_one_grid(values, region)
    if not mask.any():
        raise EvaluationError("undefined: the region is empty")
    refuse_constant(array)
    return array, mask
