"""Windows' values blended onto a part of the volume, such as one slice of all channels."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from seg3dcam.geometry import FeatureGrid, cropped, interpolate
from seg3dcam.windows.blend import continued
from seg3dcam.windows.plan import Windows


def grid_over_volume(grid: FeatureGrid, windows: Windows) -> FeatureGrid:
    """Return a window's grid continued over the volume, without voxels in padding alone.

    >>> from seg3dcam.windows import WindowPlan, plan_windows
    >>> windows = plan_windows(WindowPlan(4, overlap=0.5), (8,))
    >>> grid_over_volume(FeatureGrid((2,), (2.0,), (0.5,)), windows)
    FeatureGrid(shape=(4,), stride=(2.0,), offset=(0.5,), measured=True)
    """
    lines = [continued(grid, windows, axis) for axis in range(len(grid.shape))]
    shape = tuple(line.shape[0] for line in lines)
    offset = tuple(line.offset[0] for line in lines)
    padded = FeatureGrid(shape, grid.stride, offset, grid.measured)
    return cropped(torch.empty(shape, device="meta"), padded, windows.shape)[1]


def part_in_window(
    target: FeatureGrid, grid: FeatureGrid, windows: Windows, window: int
) -> tuple[tuple[slice, ...], FeatureGrid]:
    """Return which part of a grid of the volume a window covers, and that part in the window.

    Args:
        target: a grid of the volume with the strides of `grid`: all of it, or one slice.
        grid: the layer's grid in one window.

    Returns:
        The part as slices of `target`, along each axis, and as a grid in voxels of the window. It
        has no voxels where the window does not reach.
    """
    place, offset = [], []
    for axis, (start, before) in enumerate(
        zip(windows.starts[window], windows.before, strict=True)
    ):
        stride, own = grid.stride[axis], grid.offset[axis]
        # Where the window's first feature voxel lies in the target, counted in its voxels.
        shift = round((start - before + own - target.offset[axis]) / stride, 9)
        first = max(0, math.ceil(shift - 0.5))
        stop = min(target.shape[axis], math.floor(shift + grid.shape[axis] - 0.5) + 1)
        place.append(slice(first, max(first, stop)))
        offset.append(own + stride * (first - shift))
    shape = tuple(s.stop - s.start for s in place)
    return tuple(place), FeatureGrid(shape, grid.stride, tuple(offset))


def blend_onto(
    target: FeatureGrid,
    grid: FeatureGrid,
    windows: Windows,
    parts: Iterable[tuple[int, torch.Tensor]],
) -> torch.Tensor | None:
    """Blend values of windows by the windows' shares onto a part of the volume.

    `Blend` blends whole maps of the volume, and leaves a layer's grid where windows do not start on
    it. Here values stay on the layer's strides, so that they are those that the layer gave, and
    only the part that is asked for lies in memory: a layer may have hundreds of channels.

    Args:
        target: the part's grid, with the strides of `grid`.
        grid: the layer's grid in one window.
        parts: (window, values (n, *grid.shape)).

    Returns:
        (n, *target.shape); None if there is no window.
    """
    total = counted = None
    for window, values in parts:
        place, inside = part_in_window(target, grid, windows, window)
        here = _at(values, grid, inside)
        here = here if total is None else here.to(total)  # windows kept lie where the scan is
        if len(windows) == 1:
            share = here.new_ones(inside.shape)
        else:
            voxels = FeatureGrid.of_voxels(windows.roi)
            share = _at(windows.importance.to(here)[None], voxels, inside)[0]
        if total is None or counted is None:
            total = here.new_zeros(len(here), *target.shape)
            counted = here.new_zeros(target.shape)
        total[(slice(None), *place)] += here * share
        counted[place] += share
    if total is None or counted is None:
        return None
    return total / counted.masked_fill(counted == 0, 1)


def _at(values: torch.Tensor, source: FeatureGrid, target: FeatureGrid) -> torch.Tensor:
    """Interpolate (n, *source.shape), the shortest axis of the target first: it shrinks most."""
    for axis in sorted(range(len(target.shape)), key=lambda axis: target.shape[axis]):
        lines = source.line(axis), target.line(axis)
        values = interpolate(values.movedim(axis + 1, -1), *lines).movedim(-1, axis + 1)
    return values
