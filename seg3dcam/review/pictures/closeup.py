"""Close-ups of a place: how much of the scan they show, and their pictures."""

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

#: A close-up shows at least and at most these fractions of the scan's middle extent, and the last
#: one if there is no heat.
LEAST, MOST, USUAL = 1 / 8, 1 / 2, 1 / 4
#: The hot region fills this fraction of the close-up.
FILLED = 0.6


def closeup_mm(
    shape: Sequence[int],
    affine: ArrayLike,
    voxel: Sequence[int],
    strength: NDArray[Any] | None,
    threshold: float,
) -> float:
    """Return the side in mm of the square that a close-up of a voxel shows in every plane.

    It depends on the extent of the hot region around the voxel: the connected parts above the
    threshold in the three planes through it.

    Args:
        shape: (X, Y, Z) of the scan.
        affine: (4, 4), voxel index -> RAS mm.
        voxel: the voxel to look at.
        strength: (X, Y, Z) strength of the CAM; None if there is no CAM.
        threshold: weaker values are not drawn.

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
    """Return the rows and columns of the connected part of a mask around a pixel."""
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    rows, columns = np.nonzero(labels == labels[tuple(np.asarray(at))])
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


def closeup_of(review: Review, voxel: Sequence[int]) -> float:
    """Return `closeup_mm` for a voxel of a case."""
    strength = None if review.cam is None else review.look.strength(review.cam)
    return closeup_mm(review.scan.shape, review.affine, voxel, strength, review.look.threshold)


def draw_closeup(plane: Review, voxel: Sequence[int], side_mm: float, side: int) -> list[Picture]:
    """Draw the scan, and the scan with the CAM, around a voxel, framed like whole slices.

    The voxel is in the middle, unless it lies near the edge of the scan.

    Args:
        plane: the case, cut along the plane to be drawn.
        voxel: the voxel to look at.
        side_mm: from `closeup_mm`.
        side: longer side of each picture in pixels, which is also the side of its square cell.
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
    """Return the rows or columns around a voxel; at the scan's edge they are shifted inwards."""
    count, step = view.shape[axis], spacing_of(view.affine)[axis]
    at = count - 1 - voxel[axis] if flip else voxel[axis]
    shown = min(count, math.ceil(side_mm / step))
    first = min(max(at - shown // 2, 0), count - shown)
    return range(first, first + shown)
