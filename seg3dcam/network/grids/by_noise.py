"""Find the centres of what voxels look at by noise, for layers of many voxels.

If z is independent noise at each voxel and J the derivative of a layer's value,

    E[(sum_p J z)(sum_p J z p)] / E[(sum_p J z)^2] = sum_p J^2 p / sum_p J^2,

so two small changes of the input, z and z times a coordinate, show the centres of all voxels of all
layers at once, averaged over channels and over the other axes. This takes a few forward passes, and
is exact enough where a layer has many voxels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from seg3dcam.errors import LayerError, ModelError
from seg3dcam.network.capture import Capture
from seg3dcam.network.grids.centre_line import (
    FEW_PARTS,
    CentreLine,
    Doubts,
    Lines,
    line_of_many_voxels,
)
from seg3dcam.network.grids.operations import MirroredOperations
from seg3dcam.network.grids.sample_inputs import (
    ENOUGH,
    LONG,
    Grids,
    handy_shape,
    has_grid,
    places,
    times_drawn,
    unchanged_grids,
)
from seg3dcam.network.layers import LayerRef

#: The places of each draw are divided into so many parts, whose spread gives the standard error of
#: a centre. The spread of channels would not, since all channels see the same noise.
PARTS = 8


def by_noise(capture: Capture, x: torch.Tensor, grids: Grids, doubts: Doubts, draws: int) -> Lines:
    """Measure axis by axis in an input of a handy shape, or of full shape if that is refused.

    Args:
        capture: of the network with these layers.
        x: (B, C, *S), of which only shape, dtype and device matter.
        grids: layer -> its grid in an input of this shape.
        doubts: the pairs (layer, axis) to measure.
        draws: number of draws of noise.
    """
    found: Lines = {}
    full = tuple(x.shape[2:])
    for axis in range(x.ndim - 2):
        open_ = {layer for layer in grids if (layer, axis) in doubts}
        for shape in dict.fromkeys((handy_shape(full, axis, LONG), full)):
            asked = unchanged_grids(shape, full, {layer: grids[layer] for layer in open_})
            if not asked:
                continue
            try:
                lines = _lines(capture, x, shape, axis, asked, draws * times_drawn(shape))
            except (ModelError, LayerError, torch.OutOfMemoryError):
                continue  # some networks accept only one size
            found |= {(layer, axis): line for layer, line in lines.items()}
            open_ -= lines.keys()
    return found


def _lines(
    capture: Capture,
    like: torch.Tensor,
    shape: Sequence[int],
    axis: int,
    grids: Grids,
    draws: int,
) -> dict[LayerRef, CentreLine]:
    """Fit a line to the centres of each layer along one axis, for inputs of a shape."""
    length, at_once = shape[axis], max(1, ENOUGH // math.prod(shape))
    place = torch.linspace(-1, 1, length, dtype=like.dtype, device=like.device)
    place = place.view([-1 if a == axis + 2 else 1 for a in range(like.ndim)])
    sums: dict[LayerRef, list[list[torch.Tensor]]] = {layer: [[], []] for layer in grids}
    passes = _Passes(capture, batches=math.prod(shape) <= 2 * ENOUGH)
    seeds = [range(draws)[first : first + at_once] for first in range(0, draws, at_once)]
    for some, mirrored in itertools.product(seeds, (False, True)):
        inputs = torch.cat([_inputs(like, shape, place, seed) for seed in some])
        with MirroredOperations(mirrored):
            # Both are differences of two passes of their own, so they share no rounding error.
            slopes = passes.slopes(inputs)
            for plain, weighed in zip(slopes, slopes, strict=True):  # two at a time
                for layer in grids:
                    one, two = plain[layer], weighed[layer]
                    # Plain and mirrored kernels get the same weight, even if their gains differ.
                    whole = one.square().sum() + torch.finfo(torch.float64).tiny
                    new = [_in_parts(one * two, axis), _in_parts(one * one, axis)]
                    sums[layer][mirrored].append(torch.stack(new) / whole)
    lines = {}
    for layer, grid in grids.items():
        # (moment and weight, plain and mirrored, draws, parts, places)
        sums_of = torch.stack([torch.stack(kind, dim=1) for kind in sums[layer]], dim=1)
        # The spread of several draws gives the best error; otherwise that of their parts is used.
        moment, weight = sums_of.sum(3) if draws >= FEW_PARTS else sums_of.flatten(2, 3)
        size = weight.shape[-1]
        if has_grid(grid, axis, size, length, like.shape[2 + axis]):
            half, stride = (length - 1) / 2, grid.stride[axis]
            from_middle = places(grid, axis, size) - half
            inner = from_middle.abs() <= max(length / 4, stride / 2) + stride / 2
            seen = moment[..., inner] * half, weight[..., inner], from_middle[inner]
            lines[layer] = line_of_many_voxels(*seen, draws)
    return lines


def _inputs(
    like: torch.Tensor, shape: Sequence[int], place: torch.Tensor, seed: int
) -> torch.Tensor:
    """Return four inputs, (4, C, *shape): an image with noise subtracted and added, twice.

    The second time, the noise is multiplied by the place.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    image, z = (
        torch.randn(1, like.shape[1], *shape, generator=generator, device="cpu").to(like)
        for _ in range(2)
    )
    z *= _step(like.dtype)
    return torch.cat([image - z, image + z, image - z * place, image + z * place])


class _Passes:
    """Passes of inputs in batches, as long as the network gives each what it gets alone.

    Some networks take one input at a time, others draw random numbers, normalise over the batch, or
    look at its other items.

    Args:
        batches: False to take one input at a time from the beginning.
    """

    def __init__(self, capture: Capture, *, batches: bool) -> None:
        self._capture = capture
        self._batches = batches
        self._checked = False

    def slopes(self, inputs: torch.Tensor) -> Iterator[dict[LayerRef, torch.Tensor]]:
        """Yield, for every two inputs, how each layer's activations differ, (1, C, *s)."""
        found = self._of_batch(inputs) if self._batches else None
        self._batches = found is not None
        for first in range(0, len(inputs), 2):
            if found is not None:
                low, high = (
                    {la: a[n : n + 1] for la, a in found.items()} for n in (first, first + 1)
                )
            else:
                self._batches = False
                low = {la: a.clone() for la, a in self._alone(inputs, first).items()}
                high = self._alone(inputs, first + 1)
            yield {layer: (high[layer] - a).double() for layer, a in low.items()}

    def _alone(self, inputs: torch.Tensor, number: int) -> dict[LayerRef, torch.Tensor]:
        return self._capture.observe_layers(inputs[number : number + 1])

    def _of_batch(self, inputs: torch.Tensor) -> dict[LayerRef, torch.Tensor] | None:
        """Return the activations of a batch, None if they are not those of its items alone."""
        try:
            found = {la: a.clone() for la, a in self._capture.observe_layers(inputs).items()}
        except (ModelError, LayerError, torch.OutOfMemoryError):
            return None
        for number in () if self._checked else (0, len(inputs) - 1):
            for layer, a in self._alone(inputs, number).items():
                limit = 1e-4 * float(a.abs().max())
                own = found[layer][number : number + 1]
                if own.shape != a.shape or not torch.allclose(own, a, rtol=1e-3, atol=limit):
                    return None
        self._checked = True
        return found


def _step(dtype: torch.dtype) -> float:
    """Return the size of a change that is small, but well above rounding errors."""
    return 1e-2 if torch.finfo(dtype).eps < 1e-5 else 0.25


def _in_parts(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Sum (B, C, *s) over all but one axis, in parts of the others: (parts, size)."""
    flat = values.sum((0, 1)).movedim(axis, -1).reshape(-1, values.shape[2 + axis])
    parts = min(PARTS, len(flat))
    return torch.stack([part.sum(0) for part in flat.tensor_split(parts)]).cpu()
