"""Stitch windows' logits, and blend windows' maps by the windows' shares."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from seg3dcam.geometry import FeatureGrid, interpolate
from seg3dcam.windows.plan import Windows, box_of


def stitched(
    windows: Windows, x: torch.Tensor, predictor: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return the logits (B, K, *S) of a volume, whatever the windows' convention.

    Weighted values are summed and then divided by all the weights, in nnU-Net's order, so that
    the prediction is the one that its own predictor gives.

    Args:
        x: (B, C, *S).
        predictor: a batch of windows (n, C, *roi) -> logits (n, K, *roi), item by item in the
            windows' order.
    """
    padded, total = windows.pad(x), x.new_empty(0)
    for item in range(len(x)):
        for which in windows.batches(range(len(windows))):
            logits = predictor(windows.cut(padded[item : item + 1], which)).to(x)
            if not len(total):
                total = x.new_zeros(len(x), logits.shape[1], *windows.padded_shape)
            for window, part in zip(which, logits, strict=True):
                total[item][box_of(windows.starts[window], windows.roi)] += part * (
                    windows.importance.to(part)
                )
    return windows.crop(total / windows.total_importance(x))


def continued(grid: FeatureGrid, windows: Windows, axis: int) -> FeatureGrid:
    """Return a window's grid continued over the padded volume, along one axis."""
    stride = grid.stride[axis]
    last = max(start[axis] for start in windows.starts)
    size = math.floor(round(last / stride, 9)) + grid.shape[axis]
    return FeatureGrid((size,), (stride,), (grid.offset[axis] - windows.before[axis],))


class Blend:
    """Blends windows' maps into one map of the volume.

    Along an axis where every window starts on the layer's own grid, the result lies on that grid
    continued over the volume, so that nothing is interpolated yet; else on the volume's voxels.

    Args:
        windows: the windows.
        grid: the layer's grid in one window.
        like: batch size, dtype and device of the result.

    Attributes:
        grid: the grid of the result, in voxels of the volume.
        total: the result so far, (B, *grid.shape).
    """

    def __init__(self, windows: Windows, grid: FeatureGrid, like: torch.Tensor) -> None:
        self._windows = windows
        self.window_grid = grid
        self._aligned = [
            all(start[axis] % stride == 0 for start in windows.starts)
            for axis, stride in enumerate(grid.stride)
        ]
        lines = [self._continued(axis) for axis in range(len(grid.shape))]
        self.grid = FeatureGrid(
            tuple(line.shape[0] for line in lines),
            tuple(line.stride[0] for line in lines),
            tuple(line.offset[0] for line in lines),
            grid.measured,
        )
        self.total = torch.zeros(len(like), *self.grid.shape, dtype=like.dtype, device=like.device)

    def _continued(self, axis: int) -> FeatureGrid:
        """Return the grid of the result along one axis."""
        if not self._aligned[axis]:
            return FeatureGrid.of_voxels(self._windows.shape[axis : axis + 1])
        return continued(self.window_grid, self._windows, axis)

    def group(self) -> GroupBlend:
        """Start a group of windows that are blended by their shares within the group."""
        return GroupBlend(self)

    def add_alone(self, window: int, values: torch.Tensor) -> None:
        """Add one window that is a group of its own: its share is 1."""
        place, target = self.place(window)
        self.total[place] += interpolate(values.to(self.total), self.window_grid, target)

    def place(self, window: int) -> tuple[tuple, FeatureGrid]:
        """Return where a window lies in the result, and the result's grid in window voxels."""
        place, lines = zip(
            *(self._place(window, axis) for axis in range(len(self.grid.shape))), strict=True
        )
        shape, stride, offset = zip(*lines, strict=True)
        return (..., *place), FeatureGrid(shape, stride, offset)

    def _place(self, window: int, axis: int) -> tuple[slice, tuple[int, float, float]]:
        """Return the same along one axis, the grid as (shape, stride, offset)."""
        windows, grid = self._windows, self.window_grid
        start = windows.starts[window][axis]
        if self._aligned[axis]:
            first = round(start / grid.stride[axis])
            line = (grid.shape[axis], grid.stride[axis], grid.offset[axis])
            return slice(first, first + grid.shape[axis]), line
        first = start - windows.before[axis]
        low, high = max(0, first), min(first + windows.roi[axis], windows.shape[axis])
        return slice(low, high), (high - low, 1.0, float(low - first))

    def importance(self, target: FeatureGrid) -> torch.Tensor:
        """Return how much a window counts at the places of a grid in it."""
        return self._at(self._windows.importance.to(self.total), target)

    def shares(self, window: int, total_importance: torch.Tensor) -> torch.Tensor:
        """Return a window's share at each voxel of the layer's grid in it."""
        total = self._windows.cut(total_importance[None, None], [window])[0, 0]
        return self.importance(self.window_grid) / self._at(total, self.window_grid)

    def _at(self, values: torch.Tensor, target: FeatureGrid) -> torch.Tensor:
        return interpolate(values, FeatureGrid.of_voxels(self._windows.roi), target)


class GroupBlend:
    """Blends a group of windows by their shares within the group; `finish` adds it to the blend."""

    def __init__(self, blend: Blend) -> None:
        self._blend = blend
        self._sums = torch.zeros_like(blend.total)
        self._importances = torch.zeros_like(blend.total[0])

    def add(self, window: int, values: torch.Tensor) -> None:
        """Add the map (B, *grid.shape) of one window."""
        place, target = self._blend.place(window)
        importance = self._blend.importance(target)
        values = interpolate(values.to(self._sums), self._blend.window_grid, target)
        self._sums[place] += values * importance
        self._importances[place] += importance

    def finish(self) -> None:
        """Divide by the importance there is, and add to the blend."""
        nowhere = self._importances == 0
        self._blend.total += self._sums.div_(self._importances.masked_fill_(nowhere, 1))
