"""Check measured grids by a second measurement: the middle of what voxels really look at.

A ramp through a network of plain kernels (`measurement`) tells a place exactly, if it knows
everything that moves things. This measurement needs no such knowledge, since it looks at the true
network. With J the derivative of a layer's value with respect to input voxel p, the centre of what
the value looks at is sum_p J^2 p / sum_p J^2. It is found by noise (`by_noise`) and, for layers
that this leaves in doubt, by gradients of a network of the same structure with random signs
(`by_gradients`). Where the first look at the network as it is contradicts a grid, gradients of that
other network are not asked.
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

#: Two measurements agree if they differ by less than this part of a layer's voxel and of an input
#: voxel together.
AGREE = 0.15

#: By which part of its distance from the middle of the image a centre may be pushed away from it.
PUSHED = 0.08

#: By how much kernels may pull a centre to one side, as part of a layer's and of an input voxel. A
#: causal or a shifting convolution pulls it by one voxel: the middle of its kernel is not where the
#: layer looks.
LEANING = 0.4

#: They may pull it by more, as kernels of a large dilation do, if at least this part of what a
#: voxel looks at lies beyond its place on either side.
EITHER_SIDE = 0.1

#: Centres lie at most this many input voxels off a line, or one voxel of the layer, root mean
#: square.
STEPS = 4.0

#: A place is suspected if the network as it is shows it this many standard errors further off than
#: two measurements may be.
SUSPECTED = 4


def agreeing(
    capture: Capture, x: torch.Tensor, grids: Grids, *, pulled: float = PULLED
) -> set[LayerRef]:
    """Return the layers whose voxels look at the places that their grids give.

    Args:
        capture: of the network with these layers.
        x: (B, C, *S); its shape, dtype and device count, its values do not.
        grids: layer -> its grid in an input of this shape.
        pulled: by how much centres may be pulled to the middle of the image. If the true strides
            are smaller than a grid's, that pulls the centres, too.
    """
    wrong: set[LayerRef] = set()
    suspected: set[tuple[LayerRef, int]] = set()
    doubts = set(itertools.product(grids, range(x.ndim - 2)))
    for look, draws in LOOKS:
        # If the network as it is seems to be off, another one of its structure proves nothing.
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
    # What stays in doubt is not measured.
    return set(grids) - wrong - {layer for layer, _ in doubts}


def _verdict(line: CentreLine, grid: FeatureGrid, axis: int, pulled: float = PULLED) -> bool | None:
    """Tell whether centres lie where the grid says; None if that is not seen well enough."""
    stride, tolerance = _tolerance(grid, axis)
    leaning = LEANING * (1 + stride) if line.side < EITHER_SIDE else math.inf
    off = max(abs(line.shift) - tolerance, abs(line.lean) - leaning)
    alone = grid.shape[axis] == 1
    seen = line.pull <= line.bears and (line.voxels > 1 or alone)
    # Places of one draw see the same noise, so that its error looks smaller than it is.
    if seen and off > 4 * line.error and line.voxels > 1 and line.draws >= FEW_PARTS:
        return False
    # What transposed convolutions see moves in steps, as wide as the strides that they undo.
    straight = -PUSHED <= line.pull <= pulled and line.rest <= max(stride, STEPS)
    near = off <= 0 and line.error <= tolerance / 2
    return True if seen and near and (straight or alone) else None


def _seems_off(line: CentreLine, grid: FeatureGrid, axis: int) -> bool:
    """Tell whether centres do not lie where the grid says, as far as one look can tell."""
    _, tolerance = _tolerance(grid, axis)
    return line.pull <= line.bears and abs(line.shift) - tolerance > SUSPECTED * line.error


def _tolerance(grid: FeatureGrid, axis: int) -> tuple[float, float]:
    """Return the width of a layer's voxel, at least 1, and how much measurements may differ."""
    stride = max(1.0, grid.stride[axis])
    return stride, AGREE * (1 + stride)


#: The looks that are taken, the cheapest first, with their numbers of draws. Each is at the layers
#: that the looks before it left in doubt.
LOOKS: tuple[tuple[Callable[..., Lines], int], ...] = (
    (by_noise, 1),
    (by_gradients, 3),
    (by_gradients, 12),
    (by_noise, 6),
)
