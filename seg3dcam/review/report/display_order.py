"""The order in which a page has the voxels of a scan: as a reader looks at the patient.

Everything is put into display order, (Z, Y, X): x towards the patient's left, y towards the back,
z upwards. A page cuts all three planes out of that without knowing how the file was stored.
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
    """How arrays of a scan are turned into display order.

    Attributes:
        axes: the array's own axes for slices, rows and columns.
        flips: which of them run the other way.
        shape: (X, Y, Z) of the array.
        affine: (4, 4), display index (x, y, z) -> RAS mm.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    shape: tuple[int, ...]
    affine: NDArray[np.float64]

    def arrange(self, volume: NDArray[Any]) -> NDArray[Any]:
        """Return a view of (X, Y, Z) as (slices, rows, columns)."""
        steps = tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)
        return volume.transpose(self.axes)[steps]

    def by_axis(self, values: Sequence[Any]) -> list[Any]:
        """Order one value for each of the array's axes as columns, rows, slices (x, y, z)."""
        return [values[axis] for axis in reversed(self.axes)]

    @property
    def spacing(self) -> tuple[float, ...]:
        """The array's own spacing in mm."""
        of_axis = dict(zip(self.axes, reversed(spacing_of(self.affine)), strict=True))
        return tuple(of_axis[axis] for axis in range(3))

    @property
    def flipped(self) -> list[bool]:
        """Which of the array's own axes run the other way."""
        return [flip for _, flip in sorted(zip(self.axes, self.flips, strict=True))]

    def place(self, voxel: Sequence[int]) -> list[int]:
        """Return the display index (x, y, z) of one of the array's voxels."""
        shown = [
            self.shape[axis] - 1 - voxel[axis] if flip else voxel[axis]
            for axis, flip in zip(self.axes, self.flips, strict=True)
        ]
        return [int(index) for index in reversed(shown)]


def plan_order(shape: Sequence[int], affine: NDArray[np.float64]) -> DisplayOrder:
    """Plan the display order of a grid; it agrees with `plan_view` of all three planes.

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
