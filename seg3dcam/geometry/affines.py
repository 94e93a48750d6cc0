"""Affines from voxels to RAS mm: check them, compare them, and describe them in words."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import nibabel as nib
import numpy as np
import numpy.typing as npt

from seg3dcam.errors import InputError, Seg3dcamError, nearest
from seg3dcam.geometry.planes import WORLD_AXIS, Axis

#: An affine to LPS mm (as in DICOM and ITK), multiplied by this from the left, becomes one to RAS
#: mm, and the other way round.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

#: Two grids are the same if no voxel's centre lies farther apart than this. So much may be lost
#: when an affine is written to a file, in float32 or as text, and read again.
SAME_GRID_MM = 1e-3

#: The same for a mask that another program made for a scan, as a fraction of the scan's smallest
#: spacing. Such programs round what they write. A shift by a tenth of a voxel does no harm to a
#: mask.
SAME_GRID_VOXELS = 0.1

#: No voxel of a patient can lie farther away than this.
_FARTHEST_MM = 1e9


def spacing_of(affine: np.ndarray) -> tuple[float, ...]:
    """Return the voxel size in mm along each axis.

    >>> spacing_of(np.diag([0.8, 0.8, 5.0, 1.0]))
    (0.8, 0.8, 5.0)
    """
    columns = np.asarray(affine, dtype=np.float64)[:3, :3]
    return tuple(float(size) for size in np.linalg.norm(columns, axis=0))


def voxel_ml(affine: np.ndarray) -> float:
    """Return the volume of a voxel in ml.

    >>> voxel_ml(np.eye(4))
    0.001
    """
    return abs(float(np.linalg.det(affine[:3, :3]))) / 1000


def size_text(sizes: Sequence[float] | npt.NDArray[np.floating], digits: int = 4) -> str:
    """Write the sizes along several axes as a text.

    >>> size_text((0.8, 0.8, 5.0))
    '0.8 x 0.8 x 5'
    """
    return " x ".join(f"{size:.{digits}g}" for size in sizes)


def corner_gap(one: npt.ArrayLike, other: npt.ArrayLike, shape: Sequence[int]) -> float:
    """Return the largest distance in mm between the places that two affines give to one voxel.

    It is found at one of the corners, since the difference of two affines is affine.

    >>> corner_gap(np.diag([1, 1, 1, 1]), np.diag([1, 1, 1.5, 1]), (10, 10, 5))
    2.0
    """
    ends = [(0, size - 1) for size in shape]
    corners = np.array([(*corner, 1) for corner in itertools.product(*ends)], dtype=np.float64)
    moved = corners @ (np.asarray(one, np.float64) - np.asarray(other, np.float64)).T
    return float(np.linalg.norm(moved[:, :3], axis=1).max())


def same_grid(
    one: npt.ArrayLike,
    other: npt.ArrayLike,
    shape: Sequence[int],
    *,
    within_mm: float = SAME_GRID_MM,
) -> bool:
    """Return whether two affines put every voxel of a grid in the same place, up to rounding.

    >>> same_grid(np.eye(4), np.diag([1.00001, 1, 1, 1]), (64, 64, 64))
    True
    """
    return corner_gap(one, other, shape) <= within_mm


def to_world(affine: np.ndarray, voxel: Sequence[float]) -> tuple[float, ...]:
    """Return the RAS position in mm of a voxel index.

    >>> to_world(np.diag([2.0, 2.0, 2.0, 1.0]), (1, 0, 3))
    (2.0, 0.0, 6.0)
    """
    return tuple(float(x) for x in (np.asarray(affine) @ [*voxel, 1.0])[:3])


def ras_affine(affine: np.ndarray, space: str | Sequence[str] | None) -> np.ndarray:
    """Return (4, 4) or (B, 4, 4) affines in RAS.

    Args:
        space: the space that the affines lead to, "RAS", "LPS" or None for RAS; for a collated
            batch, a list with one space for each item.
    """
    affine = np.asarray(affine, dtype=np.float64)
    if isinstance(space, list | tuple):
        return np.stack([ras_affine(a, s) for a, s in zip(affine, space, strict=True)])
    written = "RAS" if space is None else str(getattr(space, "value", space)).upper()
    if written not in ("RAS", "LPS"):
        raise InputError(
            f"the MetaTensor's meta['space'] is {space!r}. Legal: 'RAS', 'LPS', or none (RAS). "
            "Set it to the space that the affine maps to."
        )
    return LPS_TO_RAS @ affine if written == "LPS" else affine


def checked_affine(
    affine: npt.ArrayLike, name: str, error_class: type[Seg3dcamError] = InputError
) -> npt.NDArray[np.float64]:
    """Return an affine as a (4, 4) float64 matrix that can be inverted.

    Args:
        affine: anything that numpy can turn into a matrix.
        name: what the affine belongs to, such as a file's path; the error begins with it.
        error_class: the class of the error that is raised if the affine is illegal.

    >>> checked_affine(np.eye(3), "the map")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    seg3dcam.errors.InputError: the map: the affine has shape (3, 3). Legal: a (4, 4) invertible...
    """
    advice = "Legal: a (4, 4) invertible matrix from voxel index to RAS mm, last row (0, 0, 0, 1)."
    try:
        matrix = np.array(affine, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise error_class(f"{name}: the affine is not a matrix of numbers. {advice}") from error
    repair = f"{advice} Correct the sform or qform of the file, or the affine that you pass."
    if matrix.shape != (4, 4):
        raise error_class(f"{name}: the affine has shape {matrix.shape}. {repair}")
    if not np.isfinite(matrix).all():
        raise error_class(f"{name}: the affine holds NaN or infinite values. {repair}")
    # In a product of affines and inverses, rounding may have changed the last row.
    if not np.allclose(matrix[3], [0, 0, 0, 1], rtol=0, atol=1e-6):
        raise error_class(f"{name}: the affine's last row is {matrix[3].tolist()}. {repair}")
    matrix[3] = [0, 0, 0, 1]
    if np.abs(matrix).max() > _FARTHEST_MM:
        raise error_class(f"{name}: the affine holds {np.abs(matrix).max():.3g} mm. {repair}")
    steps = np.array(spacing_of(matrix))
    if not steps.any():
        raise error_class(f"{name}: the affine is all zero. {repair}")
    if not steps.all() or abs(np.linalg.det(matrix[:3, :3] / steps)) < 1e-6:
        raise error_class(
            f"{name}: the affine is singular, it flattens the volume "
            f"(spacing ({', '.join(f'{step:.6g}' for step in steps)}) mm). {repair}"
        )
    return matrix


def scale_and_shift(scale: Sequence[float], shift: Sequence[float]) -> np.ndarray:
    """Return the (4, 4) affine that scales each axis, then shifts it.

    >>> scale_and_shift((2, 2, 2), (0.5, 0, 0))[0].tolist()
    [2.0, 0.0, 0.0, 0.5]
    """
    matrix = np.diag([*scale, 1.0]).astype(np.float64)
    matrix[:3, 3] = shift
    return matrix


def anatomical_axis(affine: np.ndarray, axis: Axis) -> int:
    """Return the array axis along which the slices of an anatomical plane follow one another.

    It is the axis nearest to the anatomical direction; axial slices, for example, follow S.

    >>> anatomical_axis(np.diag([1.0, 1.0, 3.0, 1.0]), "axial")
    2
    """
    if axis not in WORLD_AXIS:
        raise InputError(f"axis {axis!r}: {nearest(axis, WORLD_AXIS)}")
    return int(np.flatnonzero(nib.io_orientation(affine)[:, 0] == WORLD_AXIS[axis])[0])
