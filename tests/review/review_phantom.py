"""A phantom with one marker off centre in every direction, stored in any orientation."""

from __future__ import annotations

import nibabel
import numpy as np
from numpy.typing import NDArray

# In patient space: size in mm, and the marker's centre from the middle (R, A, S positive).
CUBE_MM = 120.0
MARKER_MM = np.array([30.0, 20.0, 25.0])

SPACINGS = {"even": (2.0, 2.0, 2.0), "thick": (1.6, 1.6, 5.0)}
ORIENTATIONS = ["RAS", "LAS", "LPS", "LPI", "PIR", "SLA", "IPR", "ASL"]


def make_affine(
    codes: str, spacing: tuple[float, float, float], rotation: NDArray[np.float64] | None = None
) -> tuple[tuple[int, int, int], NDArray[np.float64]]:
    """Shape and voxel -> RAS affine of a grid centred on the origin, axes towards `codes`.

    `spacing` is in the order R-L, A-P, S-I.
    """
    sides = ["RL", "AP", "SI"]
    matrix = np.zeros((3, 3))
    shape = []
    for column, code in enumerate(codes):
        world = next(n for n, pair in enumerate(sides) if code in pair)
        matrix[world, column] = spacing[world] * (1 if code == sides[world][0] else -1)
        shape.append(round(CUBE_MM / spacing[world]))
    if rotation is not None:
        matrix = rotation @ matrix
    affine = np.eye(4)
    affine[:3, :3] = matrix
    affine[:3, 3] = -matrix @ ((np.array(shape) - 1) / 2)
    return (shape[0], shape[1], shape[2]), affine


def make_scan(
    shape: tuple[int, int, int], affine: NDArray[np.float64], at: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """A dim volume with one bright voxel nearest to `at` (RAS mm), and that voxel's index."""
    index = np.rint(nibabel.affines.apply_affine(np.linalg.inv(affine), at)).astype(int)
    scan = np.full(shape, 10, np.float32)
    scan[tuple(index)] = 100
    return scan, index


def brightest(picture: NDArray[np.uint8]) -> tuple[float, float]:
    """Centre of the bright blob, (row, column) in pixels from the picture's top left corner."""
    weight = np.maximum(picture[..., 0].astype(float) - 40, 0)
    rows, columns = np.indices(weight.shape) + 0.5
    return (rows * weight).sum() / weight.sum(), (columns * weight).sum() / weight.sum()
