"""Where things are: voxel grids, affines, and moving values between grids.

A *feature grid* is described in voxels of the network's input: feature voxel `u` lies at input
voxel `stride * u + offset` along each axis. An *affine* is a 4x4 matrix from voxel indices to
RAS millimetres. This is the only file that knows RAS from LPS.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample

from seg3dcam.errors import InputError

#: Voxels resampled at a time: bounds the memory of a resampling beyond its output.
SLAB_VOXELS = 4_000_000

#: No voxel of a patient lies farther away.
_FARTHEST_MM = 1e9

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class FeatureGrid:
    """The voxel grid of a layer, in voxels of the network's input.

    Attributes:
        shape: feature voxels along each spatial axis.
        stride: input voxels from one feature voxel to the next.
        offset: input voxel at which feature voxel 0 has its centre.
        measured: False where the offset could not be measured and is the usual convention
            `(stride - 1) / 2`.

    >>> grid = FeatureGrid(shape=(3,), stride=(8.0,), offset=(3.5,))
    >>> grid.positions(0).tolist()
    [3.5, 11.5, 19.5]
    """

    shape: tuple[int, ...]
    stride: tuple[float, ...]
    offset: tuple[float, ...]
    measured: bool = field(default=True, compare=False)

    @classmethod
    def of_voxels(cls, shape: Sequence[int]) -> FeatureGrid:
        """Return the input's own grid: stride 1, offset 0."""
        return cls(tuple(shape), (1.0,) * len(shape), (0.0,) * len(shape))

    def line(self, axis: int) -> FeatureGrid:
        """Return this grid along one axis alone."""
        return FeatureGrid((self.shape[axis],), (self.stride[axis],), (self.offset[axis],))

    def positions(self, axis: int) -> torch.Tensor:
        """Return the centres of the feature voxels along `axis`, in input voxels (float64)."""
        index = torch.arange(self.shape[axis], dtype=torch.float64, device="cpu")
        return index * self.stride[axis] + self.offset[axis]

    def affine(self, input_affine: np.ndarray) -> np.ndarray:
        """Return the affine of this grid, given the (4, 4) affine of the network's input."""
        return np.asarray(input_affine, dtype=np.float64) @ _scale_and_shift(
            self.stride, self.offset
        )


def interpolate(values: torch.Tensor, source: FeatureGrid, target: FeatureGrid) -> torch.Tensor:
    """Interpolate linearly from one feature grid to another of the same input.

    Outside the outermost source voxels the value of the nearest one is held.

    Args:
        values: (..., *source.shape).

    Returns:
        (..., *target.shape), same dtype and device.

    >>> coarse = FeatureGrid((2,), (2.0,), (0.5,))
    >>> interpolate(torch.tensor([0.0, 2.0]), coarse, FeatureGrid.of_voxels((4,))).tolist()
    [0.0, 0.5, 1.5, 2.0]
    """
    if source == target:
        return values
    first_axis = values.ndim - len(source.shape)
    for axis in range(len(source.shape)):
        index = (target.positions(axis) - source.offset[axis]) / source.stride[axis]
        values = _interpolate_axis(values, first_axis + axis, index)
    return values


def cropped(
    values: torch.Tensor, grid: FeatureGrid, shape: Sequence[int]
) -> tuple[torch.Tensor, FeatureGrid]:
    """Drop the voxels of a map that no voxel of a volume is interpolated from.

    Args:
        values: (..., *grid.shape).
        shape: voxels of the volume, whose first voxel is at 0.
    """
    offset = []
    for axis, size in enumerate(shape):
        ends = torch.tensor([0.0, size - 1.0], device="cpu")
        index = (ends - grid.offset[axis]) / grid.stride[axis]
        first, last = (int(i) for i in (index[0].floor(), index[1].ceil()))
        first = min(max(first, 0), grid.shape[axis] - 1)
        last = max(min(last, grid.shape[axis] - 1), first)
        values = values.narrow(values.ndim - len(shape) + axis, first, last - first + 1)
        offset.append(grid.offset[axis] + grid.stride[axis] * first)
    inner = tuple(values.shape[values.ndim - len(shape) :])
    return values, FeatureGrid(inner, grid.stride, tuple(offset), grid.measured)


def _interpolate_axis(values: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    last = values.shape[dim] - 1
    index = index.clamp(0, last)
    low = index.floor()
    weight = (index - low).to(values.device, values.dtype)
    low = low.long().to(values.device)
    below = values.index_select(dim, low)
    if not weight.any():
        return below
    above = values.index_select(dim, (low + 1).clamp(max=last))
    return below.lerp_(above, weight.view(-1, *[1] * (values.ndim - dim - 1)))


def resample(
    volume: torch.Tensor,
    affine: np.ndarray,
    to_affine: np.ndarray,
    to_shape: Sequence[int],
    *,
    seen_affine: np.ndarray | None = None,
    seen_shape: Sequence[int] | None = None,
) -> torch.Tensor:
    """Interpolate a 3-D volume linearly onto another grid in patient space.

    The work is done in slabs, so memory stays near that of the result.

    Args:
        volume: (X, Y, Z) on the grid of `affine`.
        affine: (4, 4) voxel -> mm of `volume`.
        to_affine, to_shape: the grid of the result.
        seen_affine, seen_shape: the grid that the network saw. Inside its outermost voxels' faces
            the nearest value is held where `volume`, being coarser, ends earlier; outside the
            result is 0. Default: the grid of `volume` itself.

    Returns:
        (X', Y', Z') on the CPU, in the dtype of `volume`.
    """
    check_affine(affine, "the affine of the map")
    check_affine(to_affine, "the affine to resample to")
    seen_affine = affine if seen_affine is None else seen_affine
    seen_shape = volume.shape if seen_shape is None else seen_shape
    to_shape = tuple(int(n) for n in to_shape)
    same = np.array_equal(affine, to_affine) and np.array_equal(affine, seen_affine)
    if same and to_shape == tuple(volume.shape) == tuple(seen_shape):
        return volume.detach().cpu().clone()
    result = torch.empty(to_shape, dtype=volume.dtype, device="cpu")
    resampler = SpatialResample(mode="bilinear", padding_mode="border", dtype=volume.dtype)
    thickness = max(1, SLAB_VOXELS // max(1, to_shape[1] * to_shape[2]))
    with torch.device("cpu"):  # MONAI works on the default device
        source = MetaTensor(volume.detach().cpu()[None], affine=torch.as_tensor(affine))
        for start in range(0, to_shape[0], thickness):
            slab = (min(thickness, to_shape[0] - start), *to_shape[1:])
            slab_affine = to_affine @ _scale_and_shift((1, 1, 1), (start, 0, 0))
            moved = resampler(source, dst_affine=torch.as_tensor(slab_affine), spatial_size=slab)
            moved = moved.as_tensor()[0].to(volume.dtype)
            seen = _inside(slab_affine, slab, seen_affine, seen_shape)
            result[start : start + slab[0]] = moved.masked_fill_(~seen, 0)
    return result


def resample_labels(
    labels: torch.Tensor, affine: np.ndarray, to_affine: np.ndarray, to_shape: Sequence[int]
) -> torch.Tensor:
    """Return each voxel's nearest label on another grid in patient space, 0 outside.

    Args:
        labels: (X, Y, Z) on the grid of `affine`, whole numbers, bool, or a mask's values: they
            are moved as they are, without a rounding.
        to_affine, to_shape: the grid of the result.
    """
    check_affine(affine, "the affine of the labels")
    check_affine(to_affine, "the affine to resample to")
    resampler = SpatialResample(mode="nearest", padding_mode="zeros", dtype=torch.float64)
    with torch.device("cpu"):
        moved = resampler(
            MetaTensor(labels.detach().cpu()[None].double(), affine=torch.as_tensor(affine)),
            dst_affine=torch.as_tensor(to_affine),
            spatial_size=tuple(to_shape),
        )
    return moved.as_tensor()[0].to(labels.dtype)


def _inside(
    affine: np.ndarray, shape: Sequence[int], seen_affine: np.ndarray, seen_shape: Sequence[int]
) -> torch.Tensor:
    """Tell which voxels of one grid have their centre inside the box of another grid."""
    to_seen = torch.as_tensor(np.linalg.inv(seen_affine) @ affine)
    axes = [torch.arange(n, dtype=torch.float64) for n in shape]
    inside = torch.ones(tuple(shape), dtype=torch.bool)
    tolerance = 1e-6
    for row, size in zip(to_seen[:3], seen_shape, strict=True):
        where = row[3] + (
            (row[0] * axes[0])[:, None, None]
            + (row[1] * axes[1])[None, :, None]
            + (row[2] * axes[2])[None, None, :]
        )
        inside &= (where >= -0.5 - tolerance) & (where <= size - 0.5 + tolerance)
    return inside


def spacing_of(affine: np.ndarray) -> tuple[float, ...]:
    """Return the voxel size in mm along each axis.

    >>> spacing_of(np.diag([0.8, 0.8, 5.0, 1.0]))
    (0.8, 0.8, 5.0)
    """
    columns = np.asarray(affine, dtype=np.float64)[:3, :3]
    return tuple(float(size) for size in np.linalg.norm(columns, axis=0))


def corner_gap(one: npt.ArrayLike, other: npt.ArrayLike, shape: Sequence[int]) -> float:
    """Largest distance in mm between where two affines put the same voxel of a grid.

    It is reached at one of the corners, since the difference of two affines is affine.

    >>> corner_gap(np.diag([1, 1, 1, 1]), np.diag([1, 1, 1.5, 1]), (10, 10, 5))
    2.0
    """
    ends = [(0, size - 1) for size in shape]
    corners = np.array([(*corner, 1) for corner in itertools.product(*ends)], dtype=np.float64)
    moved = corners @ (np.asarray(one, np.float64) - np.asarray(other, np.float64)).T
    return float(np.linalg.norm(moved[:, :3], axis=1).max())


def to_world(affine: np.ndarray, voxel: Sequence[float]) -> tuple[float, ...]:
    """Return the RAS position in mm of a voxel index.

    >>> to_world(np.diag([2.0, 2.0, 2.0, 1.0]), (1, 0, 3))
    (2.0, 0.0, 6.0)
    """
    return tuple(float(x) for x in (np.asarray(affine) @ [*voxel, 1.0])[:3])


def peak_voxel(volume: np.ndarray | torch.Tensor) -> tuple[int, ...]:
    """Return the voxel of the highest value; of equal neighbours one in their middle.

    >>> volume = np.zeros((5, 5, 2))
    >>> volume[1:4, 1:4, 1] = 1
    >>> peak_voxel(volume)
    (2, 2, 1)
    """
    values = np.asarray(volume)
    first = np.unravel_index(int(values.argmax()), values.shape)
    return plateau_middle(values, [int(i) for i in first])


def plateau_middle(values: np.ndarray, voxel: Sequence[int]) -> tuple[int, ...]:
    """Go from a voxel to the middle of those that are as high, along one axis after another."""
    place = list(voxel)
    for axis, at in enumerate(voxel):
        line = values[tuple(slice(None) if n == axis else i for n, i in enumerate(place))]
        others = np.flatnonzero(line != line[at])
        after = int(np.searchsorted(others, at))
        start = int(others[after - 1]) + 1 if after else 0
        stop = int(others[after]) if after < len(others) else len(line)
        place[axis] = (start + stop - 1) // 2
    return tuple(place)


def ras_affine(affine: np.ndarray, space: str | Sequence[str] | None) -> np.ndarray:
    """Return (4, 4) or (B, 4, 4) affines in RAS.

    Args:
        space: the space that they are written in, "RAS", "LPS" or None for RAS; a list of them,
            one for each item, as a collated batch has.
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


def check_affine(affine: np.ndarray, what: str) -> None:
    """Raise InputError unless `affine` is a finite, invertible (4, 4) matrix."""
    affine = np.asarray(affine)
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise InputError(f"{what} must be a finite 4x4 matrix, voxel -> mm; got\n{affine}")
    if abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise InputError(f"{what} cannot be inverted (two axes coincide or one is zero):\n{affine}")


def checked_affine(
    affine: npt.ArrayLike, name: str, error_class: type[InputError] = InputError
) -> npt.NDArray[np.float64]:
    """Return a (4, 4) float64 affine; an error that names its owner unless it can be inverted."""
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
    if not np.array_equal(matrix[3], [0, 0, 0, 1]):
        raise error_class(f"{name}: the affine's last row is {matrix[3].tolist()}. {repair}")
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


def _scale_and_shift(scale: Sequence[float], shift: Sequence[float]) -> np.ndarray:
    matrix = np.diag([*scale, 1.0]).astype(np.float64)
    matrix[:3, 3] = shift
    return matrix
