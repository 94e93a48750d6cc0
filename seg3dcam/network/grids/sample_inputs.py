"""The inputs with which grids are measured, and the grids of layers in these inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from seg3dcam.geometry import FeatureGrid
from seg3dcam.network.layers import LayerRef

#: Voxels of an input along the measured axis, and the most voxels along the other axes.
LONG, OTHERS = 64, 32

#: So many voxels are enough for one measurement. Smaller inputs are drawn several times, up to
#: TIMES.
ENOUGH, TIMES = LONG * OTHERS**2, 4

Grids = Mapping[LayerRef, FeatureGrid]


def handy_shape(full: Sequence[int], axis: int, length: int) -> tuple[int, ...]:
    """Return a small shape that differs from the full one by multiples of 32.

    Most networks that accept the full shape accept such a shape as well.

    Args:
        full: spatial shape of the input.
        axis: the axis that gets at least `length` voxels, and up to 31 more.

    >>> handy_shape((200, 100, 20), 0, 64)
    (72, 36, 20)
    """
    return tuple(
        length + n % 32 if a == axis else min(n, OTHERS + n % 32) for a, n in enumerate(full)
    )


def unchanged_grids(
    shape: Sequence[int], full: Sequence[int], grids: Grids
) -> dict[LayerRef, FeatureGrid]:
    """Return the grids that are the same in an input of this shape.

    A fractional stride comes from resampling and depends on the size of the input.
    """
    return {
        layer: grid
        for layer, grid in grids.items()
        if shape == full or all(float(stride).is_integer() for stride in grid.stride)
    }


def times_drawn(shape: Sequence[int]) -> int:
    """Return how many inputs of a shape are needed for one measurement."""
    return min(TIMES, max(1, ENOUGH // math.prod(shape)))


def has_grid(grid: FeatureGrid, axis: int, size: int, length: int, full: int) -> bool:
    """Tell whether a layer has the same grid in an input of another length."""
    return abs(size - grid.shape[axis] - (length - full) / grid.stride[axis]) <= 1


def places(grid: FeatureGrid, axis: int, size: int) -> torch.Tensor:
    """Return the places of a layer's first `size` voxels along an axis of the input."""
    index = torch.arange(size, dtype=torch.float64, device="cpu")
    return grid.stride[axis] * index + grid.offset[axis]
