"""Display order: the order of a scan's voxels in a page.

In a page all arrays are (Z, Y, X), with x towards the patient's left, y towards the back and z
upwards. So the page can cut all three planes without knowing how the scan's file was stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from seg3dcam.geometry import spacing_of
from seg3dcam.review.pictures.display import plan_view


@dataclass(frozen=True, eq=False)
class DisplayOrder:
    """How to turn arrays of a scan into display order.

    Attributes:
        axes: the axes of the array that become slices, rows and columns.
        flips: whether each of them is reversed.
        shape: shape (X, Y, Z) of the array.
        affine: (4, 4), display index (x, y, z) -> RAS mm.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    shape: tuple[int, ...]
    affine: NDArray[np.float64]

    def arrange(self, volume: NDArray[Any]) -> NDArray[Any]:
        """Return a view of an array (X, Y, Z) as (slices, rows, columns)."""
        steps = tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)
        return volume.transpose(self.axes)[steps]

    def by_axis(self, values: Sequence[Any]) -> list[Any]:
        """Reorder one value per axis of the array to columns, rows, slices (x, y, z)."""
        return [values[axis] for axis in reversed(self.axes)]

    @property
    def spacing(self) -> tuple[float, ...]:
        """Spacing in mm along the axes of the array."""
        of_axis = dict(zip(self.axes, reversed(spacing_of(self.affine)), strict=True))
        return tuple(of_axis[axis] for axis in range(3))

    @property
    def flipped(self) -> list[bool]:
        """Whether each axis of the array is reversed."""
        return [flip for _, flip in sorted(zip(self.axes, self.flips, strict=True))]

    def place(self, voxel: Sequence[int]) -> list[int]:
        """Return the display index (x, y, z) of a voxel of the array."""
        shown = [
            self.shape[axis] - 1 - voxel[axis] if flip else voxel[axis]
            for axis, flip in zip(self.axes, self.flips, strict=True)
        ]
        return [int(index) for index in reversed(shown)]


def plan_order(shape: Sequence[int], affine: NDArray[np.float64]) -> DisplayOrder:
    """Return the display order for a grid, which agrees with `plan_view` for all three planes.

    >>> order = plan_order((2, 3, 4), np.eye(4))  # x to the right and y to the front: flipped
    >>> order.place((0, 0, 0)), order.arrange(np.zeros((2, 3, 4))).shape
    ([1, 2, 0], (4, 3, 2))
    """
    view = plan_view(shape, affine, "axial")
    axes = (view.slice_axis, view.row_axis, view.column_axis)
    downwards = nibabel.aff2axcodes(view.affine)[view.slice_axis] == "I"
    flips = (downwards, view.flip_rows, view.flip_columns)
    to_own = np.zeros((4, 4))
    to_own[3, 3] = 1
    for shown, (axis, flip) in enumerate(zip(reversed(axes), reversed(flips), strict=True)):
        to_own[axis, shown] = -1 if flip else 1
        to_own[axis, 3] = view.shape[axis] - 1 if flip else 0
    return DisplayOrder(axes, flips, view.shape, view.affine @ to_own)
