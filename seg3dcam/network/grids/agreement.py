"""Check measured grids by a second measurement: the centres of what voxels really look at.

A ramp through a network of plain kernels (`measurement`) gives exact places, but only if every
operation that moves values is known. The second measurement needs no such knowledge, since it uses
the true network. If J is the derivative of a layer's value with respect to input voxel p, the
centre of what the value looks at is sum_p J^2 p / sum_p J^2. It is found by noise (`by_noise`). For
layers that are still in doubt, it is found by gradients of a network of the same structure with
random signs (`by_gradients`), unless the true network has already contradicted the grid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch

from seg3dcam.geometry import FeatureGrid
from seg3dcam.network.capture import Capture
from seg3dcam.network.grids.by_gradients import by_gradients
from seg3dcam.network.grids.by_noise import by_noise
from seg3dcam.network.grids.centre_line import FEW_PARTS, PULLED, CentreLine, Lines
from seg3dcam.network.grids.sample_inputs import Grids
from seg3dcam.network.layers import LayerRef

#: Two measurements agree if they differ by less than this fraction of the sum of a layer's voxel
#: and an input voxel.
AGREE = 0.15

#: A centre may be pushed away from the middle of the image by this fraction of its distance from
#: it.
PUSHED = 0.08

#: Kernels may pull a centre to one side by this fraction of the sum of a layer's voxel and an input
#: voxel. A causal or shifting convolution pulls it by one voxel, since the layer does not look at
#: the middle of its kernel.
LEANING = 0.4

#: Kernels, such as those of a large dilation, may pull it by more if at least this fraction of what
#: a voxel looks at lies beyond its place on each side.
EITHER_SIDE = 0.1

#: The largest root mean square distance of centres from a line, in input voxels, unless a voxel of
#: the layer is larger.
STEPS = 4.0

#: A place is suspected if, in the true network, it is further off than two measurements may be by
#: this many standard errors.
SUSPECTED = 4


def agreeing(
    capture: Capture, x: torch.Tensor, grids: Grids, *, pulled: float = PULLED
) -> set[LayerRef]:
    """Return the layers whose voxels look at the places that their grids give.

    Args:
        capture: of the network with these layers.
        x: (B, C, *S), of which only shape, dtype and device matter.
        grids: layer -> its grid in an input of this shape.
        pulled: by what fraction centres may be pulled to the middle of the image. True strides that
            are smaller than those of a grid look like such a pull, too.
    """
    wrong: set[LayerRef] = set()
    suspected: set[tuple[LayerRef, int]] = set()
    doubts = set(itertools.product(grids, range(x.ndim - 2)))
    for look, draws in LOOKS:
        # If the true network contradicts a grid, another network of its structure proves nothing.
        asked = doubts - suspected if look is by_gradients else doubts
        lines = look(capture, x, grids, asked, draws) if asked else {}
        for (layer, axis), line in lines.items():
            verdict = _verdict(line, grids[layer], axis, pulled)
            if verdict is not None:
                doubts.discard((layer, axis))
            elif look is not by_gradients and _seems_off(line, grids[layer], axis):
                suspected.add((layer, axis))
            if verdict is False:
                wrong.add(layer)
        doubts = {(layer, axis) for layer, axis in doubts if layer not in wrong}
    # Layers that stay in doubt do not count as measured.
    return set(grids) - wrong - {layer for layer, _ in doubts}


def _verdict(line: CentreLine, grid: FeatureGrid, axis: int, pulled: float = PULLED) -> bool | None:
    """Tell whether centres lie where the grid says; None if the measurement is not exact enough."""
    stride, tolerance = _tolerance(grid, axis)
    leaning = LEANING * (1 + stride) if line.side < EITHER_SIDE else math.inf
    off = max(abs(line.shift) - tolerance, abs(line.lean) - leaning)
    alone = grid.shape[axis] == 1
    seen = line.pull <= line.bears and (line.voxels > 1 or alone)
    # All places see the same noise of a draw, so one draw underestimates its error.
    if seen and off > 4 * line.error and line.voxels > 1 and line.draws >= FEW_PARTS:
        return False
    # What transposed convolutions see moves in steps as wide as their strides.
    straight = -PUSHED <= line.pull <= pulled and line.rest <= max(stride, STEPS)
    near = off <= 0 and line.error <= tolerance / 2
    return True if seen and near and (straight or alone) else None


def _seems_off(line: CentreLine, grid: FeatureGrid, axis: int) -> bool:
    """Tell whether centres seem to lie elsewhere than the grid says."""
    _, tolerance = _tolerance(grid, axis)
    return line.pull <= line.bears and abs(line.shift) - tolerance > SUSPECTED * line.error


def _tolerance(grid: FeatureGrid, axis: int) -> tuple[float, float]:
    """Return the width of a layer's voxel, at least 1, and how much measurements may differ."""
    stride = max(1.0, grid.stride[axis])
    return stride, AGREE * (1 + stride)


#: The measurements, the cheapest first, with their numbers of draws. Each one is made for the
#: layers that the earlier ones left in doubt.
LOOKS: tuple[tuple[Callable[..., Lines], int], ...] = (
    (by_noise, 1),
    (by_gradients, 3),
    (by_gradients, 12),
    (by_noise, 6),
)
