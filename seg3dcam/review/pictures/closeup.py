"""A close look at one place: how much of a scan is shown around it, and the picture of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from seg3dcam.geometry import spacing_of
from seg3dcam.review.pictures import display, frame
from seg3dcam.review.pictures.draw import Picture
from seg3dcam.review.pictures.slices import draw_pair
from seg3dcam.review.plan import Review

#: The smallest and the largest part of the scan's middle extent that a close-up shows, and the part
#: where nothing stands out.
LEAST, MOST, USUAL = 1 / 8, 1 / 2, 1 / 4
#: What stands out takes this part of the close-up.
FILLED = 0.6


def closeup_mm(
    shape: Sequence[int],
    affine: ArrayLike,
    voxel: Sequence[int],
    strength: NDArray[Any] | None,
    threshold: float,
) -> float:
    """Choose the side in mm of the square that a close-up of a voxel shows, in every plane.

    What stands out is the heat around the voxel, as far as it hangs together in the three planes
    through it.

    Args:
        shape: (X, Y, Z) of the scan.
        affine: (4, 4), voxel index -> RAS mm.
        voxel: where to look.
        strength: (X, Y, Z) how strong the CAM is; None where there is none.
        threshold: what is weaker is not drawn.

    >>> heat = np.zeros((80, 80, 80))
    >>> heat[30:42, 30:36, 30:36] = 1
    >>> round(closeup_mm(heat.shape, np.eye(4), (33, 33, 33), heat, 0.2), 3)
    20.0
    >>> closeup_mm(heat.shape, np.eye(4), (0, 0, 0), None, 0.2)
    20.0
    """
    spacing = spacing_of(np.asarray(affine, dtype=np.float64))
    middle = sorted(np.multiply(shape, spacing))[1]
    if strength is None or not strength[tuple(voxel)] >= threshold:
        return float(USUAL * middle)
    extents = [
        size * mm
        for axis in range(3)
        for size, mm in zip(
            _extent(strength.take(voxel[axis], axis) >= threshold, np.delete(voxel, axis)),
            np.delete(spacing, axis),
            strict=True,
        )
    ]
    return float(np.clip(max(extents) / FILLED, LEAST * middle, MOST * middle))


def _extent(mask: NDArray[np.bool_], at: ArrayLike) -> tuple[int, int]:
    """Return rows and columns that the part of a plane's mask around a pixel takes."""
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    rows, columns = np.nonzero(labels == labels[tuple(np.asarray(at))])
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


def closeup_of(review: Review, voxel: Sequence[int]) -> float:
    """Return `closeup_mm` of a case."""
    strength = None if review.cam is None else review.look.strength(review.cam)
    return closeup_mm(review.scan.shape, review.affine, voxel, strength, review.look.threshold)


def draw_closeup(plane: Review, voxel: Sequence[int], side_mm: float, side: int) -> list[Picture]:
    """Draw the scan and the scan with the CAM around a voxel, each framed as whole slices are.

    The voxel is in the middle, unless it lies near the scan's edge.

    Args:
        plane: the case, cut along the plane to be drawn.
        voxel: where to look.
        side_mm: from `closeup_mm`.
        side: pixels of each picture's longer side; its cell is a square of these.
    """
    view = plane.view
    rows = _part(view, view.row_axis, view.flip_rows, voxel, side_mm)
    columns = _part(view, view.column_axis, view.flip_columns, voxel, side_mm)
    row_mm, column_mm = display.spacing_mm(view)
    height, width = len(rows) * row_mm, len(columns) * column_mm
    zoom = side / max(height, width)
    size = display.Size(max(1, round(height * zoom)), max(1, round(width * zoom)), zoom)
    pair = draw_pair(plane, voxel[view.slice_axis], size, part=np.ix_(rows, columns))
    letters = display.edge_letters(view)
    return [frame.frame_picture(picture, letters, zoom, (side, side)) for picture in pair]


def _part(view: display.View, axis: int, flip: bool, voxel: Sequence[int], side_mm: float) -> range:
    """Choose the rows or columns around a voxel; at the scan's edge they are moved, not cut."""
    count, step = view.shape[axis], spacing_of(view.affine)[axis]
    at = count - 1 - voxel[axis] if flip else voxel[axis]
    shown = min(count, math.ceil(side_mm / step))
    first = min(max(at - shown // 2, 0), count - shown)
    return range(first, first + shown)
