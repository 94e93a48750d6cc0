"""Voxel grids of layers, in voxels of the network's input, and interpolation between grids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from seg3dcam.geometry.affines import scale_and_shift


@dataclass(frozen=True)
class FeatureGrid:
    """The voxel grid of a layer, in voxels of the network's input.

    Attributes:
        shape: feature voxels along each spatial axis.
        stride: input voxels from one feature voxel to the next.
        offset: position of the centre of feature voxel 0, in input voxels.
        measured: False if the offset could not be measured; it is then the usual
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
        """Return the grid of the input itself, with stride 1 and offset 0."""
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
        return np.asarray(input_affine, dtype=np.float64) @ scale_and_shift(
            self.stride, self.offset
        )


def interpolate(values: torch.Tensor, source: FeatureGrid, target: FeatureGrid) -> torch.Tensor:
    """Interpolate linearly from one feature grid to another of the same input.

    Beyond the outermost source voxels, the value of the nearest one is used.

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
    """Leave out the voxels of a map that the interpolation to the volume does not need.

    Args:
        values: (..., *grid.shape).
        shape: size of the volume in voxels; its first voxel is at 0.
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
