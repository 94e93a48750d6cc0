"""Find the centres of what voxels look at by gradients, for coarse layers of few voxels.

The gradients of two voxels of a layer, in a random mixture of its channels, give the derivative J
with respect to all input voxels at once. This takes a backward pass for each voxel.

A path would be hidden if an activation function closed it, or if trained weights cancelled it. So
the weights of kernels get random signs, and activation functions are replaced by the identity. The
result shows where a network of this structure, with equally strong weights, looks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from seg3dcam.errors import LayerError, ModelError
from seg3dcam.geometry import FeatureGrid
from seg3dcam.network.capture import Capture, capturing
from seg3dcam.network.grids.centre_line import Doubts, Lines, line_of_two_voxels
from seg3dcam.network.grids.operations import MirroredOperations, RandomOperations
from seg3dcam.network.grids.sample_inputs import (
    Grids,
    handy_shape,
    has_grid,
    places,
    times_drawn,
    unchanged_grids,
)
from seg3dcam.network.layers import LayerRef
from seg3dcam.network.layouts import INPUT

#: Length of the input in voxels of the layer, and its least and greatest length in input voxels.
VOXELS, SHORTEST, LONGEST = 10, 96, 160


def by_gradients(
    capture: Capture, x: torch.Tensor, grids: Grids, doubts: Doubts, draws: int
) -> Lines:
    """Measure axis by axis in an input of a handy shape, or all axes in an input of full shape.

    The arguments are those of `by_noise.by_noise`.
    """
    found: Lines = {}
    full = tuple(x.shape[2:])
    for axis in range(len(full)):
        open_ = {layer: grids[layer] for layer in grids if (layer, axis) in doubts}
        # Long enough for most of what two voxels see, but no longer, since the graph is kept.
        coarsest = max((grid.stride[axis] for grid in open_.values()), default=1)
        length = min(LONGEST, max(SHORTEST, 32 * math.ceil(VOXELS * coarsest / 32)))
        for shape in dict.fromkeys((handy_shape(full, axis, length), full)):
            asked = unchanged_grids(shape, full, open_)
            asked = {layer: grid for layer, grid in asked.items() if (layer, axis) not in found}
            if not asked:
                continue
            # A second look, with another number of draws, has other seeds.
            seeds = range(1000 * draws, 1000 * draws + draws * times_drawn(shape))
            try:
                with capturing(capture.member, [*asked, INPUT]) as traced:
                    lines = _lines(traced, x, shape, asked, seeds)
            except (ModelError, LayerError, RuntimeError):
                continue  # some networks accept only one size, others have no gradients
            found |= {key: line for key, line in lines.items() if key[1] == axis or shape == full}
    return found


def _lines(
    traced: Capture, like: torch.Tensor, shape: Sequence[int], grids: Grids, seeds: Sequence[int]
) -> Lines:
    """Return how far two voxels of each layer are off, along every axis.

    Args:
        traced: of the network, with these layers and `INPUT`.
        like: an input of the network's own shape; its values do not matter.
        shape: spatial shape of the input to look at.
        seeds: one for each draw.
    """
    centres: dict[LayerRef, list[list[torch.Tensor]]] = {layer: [[], []] for layer in grids}
    sizes: dict[LayerRef, torch.Size] = {}
    voxels: dict[LayerRef, list[tuple[int, ...]]] = {}
    for seed, mirrored in itertools.product(seeds, (False, True)):
        generator = torch.Generator("cpu").manual_seed(seed)
        image = torch.randn(1, like.shape[1], *shape, generator=generator, device="cpu").to(like)
        with MirroredOperations(mirrored), RandomOperations(seed):
            activations = traced.traced(image)
            for layer, grid in grids.items():
                a = activations[layer][0]
                mixture = torch.randn(len(a), generator=generator, device="cpu").to(a)
                voxels[layer] = _two_voxels(grid, a.shape[1:], shape)
                seen = []
                for u in voxels[layer]:
                    derivative = traced.derivative(mixture @ a.movedim(0, -1)[u], INPUT)[0]
                    seen.append(moments(derivative, _extents(u, grid, a.shape[1:], shape)))
                centres[layer][mirrored].append(torch.stack(seen))
                sizes[layer] = a.shape[1:]
    lines: Lines = {}
    for layer, grid in grids.items():
        found = torch.stack([torch.stack(kind) for kind in centres[layer]])
        for axis, (length, full) in enumerate(zip(shape, like.shape[2:], strict=True)):
            size = sizes[layer][axis]
            if has_grid(grid, axis, size, length, full):
                from_middle = places(grid, axis, size) - (length - 1) / 2
                place = from_middle[[u[axis] for u in voxels[layer]]]
                lines[layer, axis] = line_of_two_voxels(found[..., axis, :], place)
    return lines


def _two_voxels(
    grid: FeatureGrid, sizes: Sequence[int], shape: Sequence[int]
) -> list[tuple[int, ...]]:
    """Return two voxels on either side of the middle, at the same distance, which see equally much.

    If the layer has only one voxel, it is returned alone.
    """
    pairs = []
    for axis, (size, length) in enumerate(zip(sizes, shape, strict=True)):
        place = places(grid, axis, size) - (length - 1) / 2
        low = int((place + length / 7).abs().argmin())
        pairs.append((low, int((place + place[low]).abs().argmin())))
    return list(dict.fromkeys(zip(*pairs, strict=True)))


def _extents(
    voxel: Sequence[int], grid: FeatureGrid, sizes: Sequence[int], shape: Sequence[int]
) -> list[tuple[float, float]]:
    """Return where a voxel begins and ends along each axis, counted from the image's middle."""
    extents = []
    for axis, (u, size, length) in enumerate(zip(voxel, sizes, shape, strict=True)):
        place = float(places(grid, axis, size)[u]) - (length - 1) / 2
        half = max(1.0, grid.stride[axis]) / 2
        extents.append((place - half, place + half))
    return extents


def moments(derivative: torch.Tensor, extents: Sequence[tuple[float, float]]) -> torch.Tensor:
    """Return five numbers for each axis, (axes, 5), that describe where J^2 lies.

    These are its moments 0, 1 and 2, and the fractions of it before and beyond an extent. Places
    are counted from the middle. J^2 is divided by its sum, so moment 0 is 1, or 0 if J is 0.

    Args:
        derivative: J, (C, *S).
        extents: where a voxel begins and ends along each axis.
    """
    square = derivative.double().square().sum(0).cpu()
    whole = square.sum()
    square /= whole if whole > 0 else 1
    found = []
    for axis, (n, (low, high)) in enumerate(zip(square.shape, extents, strict=True)):
        place = torch.arange(n, dtype=square.dtype, device="cpu") - (n - 1) / 2
        before, beyond = (low - place + 0.5).clamp(0, 1), (place - high + 0.5).clamp(0, 1)
        weights = torch.stack([*(place**power for power in range(3)), before, beyond])
        found.append(weights @ square.movedim(axis, -1).reshape(-1, n).sum(0))
    return torch.stack(found)
