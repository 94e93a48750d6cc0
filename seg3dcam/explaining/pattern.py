"""Where in the body a CAM lies, in a form in which scans of different patients can be compared.

The body is what is brighter than its surroundings. Cells are counted along the patient's axes over
the body's own box, so that scans of other fields of view and other orientations have the same
cells.
"""

from __future__ import annotations

from typing import Any

import cv2
import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

#: Cells along each axis: so many of the body's box, and one on each side for what lies beyond.
CELLS = 6

#: The body is looked for on a grid of at most so many voxels along each axis.
_COARSE = 64

#: A body fills at least this part of its scan; what is smaller is no body.
_LEAST = 0.02

#: How often something very bright is left out to find it.
_TRIES = 4


def body_mask(scan: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Return the body in a scan (X, Y, Z): its largest bright part, with holes filled.

    None where nothing is brighter than its surroundings, so that no body can be told from them.

    >>> scan = np.zeros((20, 20, 20))
    >>> scan[4:16, 4:16, 4:16], scan[0, 0, 0] = 100, 100
    >>> mask = body_mask(scan)
    >>> int(mask.sum()), bool(mask[0, 0, 0])
    (1728, False)
    """
    steps = tuple(slice(None, None, max(1, -(-size // _COARSE))) for size in scan.shape)
    coarse = np.asarray(scan[steps], dtype=np.float32)
    low, high = np.percentile(coarse, (0.5, 99.5))
    filled = None
    # Metal or a burnt-in letter may be so bright that all else counts as dark: then again below it.
    for _ in range(_TRIES):
        if not np.isfinite([low, high]).all() or low >= high:
            return None
        high, bright = _brighter(coarse, low, high)
        filled = _largest(bright)
        if filled.mean() >= _LEAST:
            break
    else:
        return None
    whole: NDArray[np.bool_] = filled
    for axis, (size, step) in enumerate(zip(scan.shape, steps, strict=True)):
        whole = np.repeat(whole, step.step, axis=axis).take(range(size), axis=axis)
    return whole


def _brighter(
    voxels: NDArray[np.float32], low: float, high: float
) -> tuple[float, NDArray[np.bool_]]:
    """Return Otsu's threshold between two values, and what is brighter."""
    grey = np.clip((voxels - low) * (255 / (high - low)), 0, 255).astype(np.uint8)
    level, bright = cv2.threshold(grey.reshape(len(grey), -1), 0, 1, cv2.THRESH_OTSU)
    return low + (high - low) * level / 255, bright.reshape(grey.shape).astype(bool)


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return a mask's largest part, with holes filled."""
    parts, count = ndimage.label(mask)
    if not count:
        return mask
    largest = parts == np.bincount(parts.ravel())[1:].argmax() + 1
    found: NDArray[np.bool_] = ndimage.binary_fill_holes(ndimage.binary_closing(largest) | largest)
    return found


def pattern_of(
    heat: NDArray[np.floating], body: NDArray[np.bool_] | None, affine: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """Return which part of a CAM lies in each cell (8, 8, 8), along R, A and S; they sum to 1.

    Args:
        heat: (X, Y, Z), 0 or larger.
        body: (X, Y, Z); None takes the whole scan.
        affine: (4, 4), voxel -> RAS mm.

    Returns:
        None for a CAM without heat.
    """
    total = float(heat.sum(dtype=np.float64))
    if total <= 0:
        return None
    box = ndimage.find_objects(np.ones(heat.shape, np.uint8) if body is None else body * 1)[0]
    cells: Any = heat
    for axis, part in enumerate(box):
        inner = np.linspace(part.start, part.stop, CELLS + 1)
        where = np.searchsorted(inner, np.arange(heat.shape[axis]) + 0.5)
        sums = [
            cells.take(np.flatnonzero(where == cell), axis).sum(axis, dtype=np.float64)
            for cell in range(CELLS + 2)
        ]
        cells = np.stack(sums, axis)
    turned = nib.orientations.apply_orientation(cells, nib.io_orientation(affine))
    found: NDArray[np.float64] = turned / total
    return found
