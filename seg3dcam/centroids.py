"""A second measurement of where a layer's voxels lie: the middle of what they really look at.

A ramp through a network of plain kernels (`seg3dcam.probe`) tells a place exactly, if everything
that moves things is known to it. This one needs no such knowledge: it looks at the true network,
how a layer answers to small changes of its input. With J the derivative of a layer's value with
respect to input voxel p, and z independent noise of one voxel,

    E[(sum_p J z)(sum_p J z p)] / E[(sum_p J z)^2] = sum_p J^2 p / sum_p J^2,

the centre of the receptive field. So two small changes of the input, z and z times a coordinate,
show the centres of all voxels of all layers at once, averaged over channels and over the other
axes. Kernels pull the centre to one side or the other; mirrored ones pull back as much.

What a voxel sees of the whole image (attention, InstanceNorm) and the image's rim pull all centres
towards the middle of the image, in proportion to their distance from it. So a line is fitted, and
what counts is by how much the centres are off in the middle.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from seg3dcam.capture import Capture
from seg3dcam.errors import LayerError, ModelError
from seg3dcam.geometry import FeatureGrid
from seg3dcam.layers import LayerRef
from seg3dcam.operations import MirroredOperations

#: Two measurements agree within this part of a layer's voxel, and this part of an input voxel.
AGREE = 0.15

#: A centre is known well enough where its error is below this part of a layer's and an input voxel.
HALF = 0.2

#: How much of its distance from the middle of the image a centre may be pulled there, or away.
PULLED, PUSHED = 0.6, 0.08

#: Centres lie this many input voxels off a line at most, root mean square, or a layer's voxel.
STEPS = 4.0

#: Voxels along the axis that is looked at and at most along the others, and draws of noise. The
#: first is enough for most networks; those that leave a doubt are looked at again.
LOOKS = ((64, 32, 1), (128, 32, 2), (128, 32, 6))

#: Parts that each draw's places are divided into, whose spread tells how sure a centre is. Other
#: channels see the same noise, so they tell nothing of that; neither do few parts.
PARTS, FEW_PARTS = 8, 4


class _Line(NamedTuple):
    """How far centres are from where they should be: by `shift` in the middle, `pull` towards it.

    Attributes:
        shift: in input voxels.
        error: its standard error.
        pull: part of the distance from the middle.
        rest: what is left, root mean square.
        voxels: how many were looked at.
        draws: of noise.
    """

    shift: float
    error: float
    pull: float
    rest: float
    voxels: int
    draws: int


def agreeing(
    capture: Capture, x: torch.Tensor, grids: Mapping[LayerRef, FeatureGrid]
) -> set[LayerRef]:
    """Return the layers whose voxels see what lies where their grids say.

    Args:
        capture: of the network with these layers.
        x: (B, C, *S); its shape, dtype and device count, its values do not.
        grids: layer -> its grid in an input of this shape.
    """
    left = set(grids)
    for axis in range(x.ndim - 2):
        open_, seen = set(left), set[LayerRef]()
        full = tuple(x.shape[2:])
        for shape, noise in _looks(full, axis):
            # Of fractional strides only the input's own size has the grid; it may be large, so it
            # is left out where another one will do.
            asked = {
                layer
                for layer in open_
                if (layer not in seen if shape == full else grids[layer].stride[axis].is_integer())
            }
            if not asked:
                continue
            try:
                lines = _lines(capture, x, shape, axis, {la: grids[la] for la in asked}, noise)
            except (ModelError, LayerError, torch.OutOfMemoryError):
                continue  # some networks take one size only
            seen |= lines.keys() if shape != full else set()
            for layer, line in lines.items():
                verdict = _verdict(line, grids[layer], axis)
                if verdict is not None:
                    open_.discard(layer)
                if verdict is False:
                    left.discard(layer)
            if not open_:
                break
        left -= open_  # what stays in doubt is not measured
        if not left:
            break
    return left


def _looks(full: tuple[int, ...], axis: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yield shapes of inputs and how much noise to draw, the cheapest first."""
    for (length, others, noise), own in itertools.product(LOOKS, (False, True)):
        handy = (
            length + n % 32 if a == axis else min(n, others + n % 32) for a, n in enumerate(full)
        )
        yield (full, 2 * noise) if own else (tuple(handy), noise)


def _verdict(line: _Line, grid: FeatureGrid, axis: int) -> bool | None:
    """Tell whether centres lie where the grid says; None: not seen well enough to tell."""
    stride = max(1.0, grid.stride[axis])
    tolerance = AGREE * (1 + stride)
    # Within one draw, places that see the same noise make it look surer than it is.
    known = line.voxels > 2 and line.draws >= FEW_PARTS
    if known and abs(line.shift) > tolerance + 4 * line.error:
        return False
    # Transposed convolutions see in steps, as wide as the strides that they undo.
    straight = -PUSHED <= line.pull <= PULLED and line.rest <= max(stride, STEPS)
    alone = grid.shape[axis] == 1
    # Of several draws the error is known, and small channels are seen no better than that: enough
    # if half a layer's voxel, as between a convolution and a pooling, is told apart.
    slack, limit = (2 * line.error, HALF * (1 + stride)) if line.draws > 1 else (0.0, tolerance)
    sure = line.error <= limit and (line.voxels > 1 or alone)
    near = sure and abs(line.shift) <= tolerance + slack
    return True if near and (straight or alone) else None


def _lines(
    capture: Capture,
    like: torch.Tensor,
    shape: Sequence[int],
    axis: int,
    grids: Mapping[LayerRef, FeatureGrid],
    noise: int,
) -> dict[LayerRef, _Line]:
    """Fit a line to the centres of each layer along one axis, for inputs of a shape."""
    length = shape[axis]
    place = torch.linspace(-1, 1, length, dtype=like.dtype, device=like.device)
    place = place.view([-1 if a == axis + 2 else 1 for a in range(like.ndim)])
    sums: dict[tuple[LayerRef, int], torch.Tensor] = {}
    for seed, mirrored in itertools.product(range(noise), (False, True)):
        generator = torch.Generator("cpu").manual_seed(seed)
        image, z = (
            torch.randn(1, like.shape[1], *shape, generator=generator, device="cpu").to(like)
            for _ in range(2)
        )
        z *= _step(like.dtype)
        with MirroredOperations(mirrored):
            # From both sides, so that the two have no rounding error in common.
            plain = _slope(capture, image, z)
            weighed = _slope(capture, image, z * place)
            for layer in grids:
                one, two = plain[layer], weighed[layer]
                # Both kinds of kernels count alike, however strong they are.
                whole = one.square().sum() + torch.finfo(torch.float64).tiny
                new = torch.stack([_in_parts(one * two, axis), _in_parts(one * one, axis)]) / whole
                sums[layer, seed] = sums.get((layer, seed), torch.zeros((), device="cpu")) + new
    lines = {}
    for layer, grid in grids.items():
        moment, weight = torch.cat([sums[layer, seed] for seed in range(noise)], dim=1)
        if _has_grid(grid, axis, weight.shape[1], length, like.shape[2 + axis]):
            half = (length - 1) / 2
            lines[layer] = _fitted(moment * half, weight, grid, axis, length, noise)
    return lines


def _has_grid(grid: FeatureGrid, axis: int, size: int, length: int, full: int) -> bool:
    """Tell whether a layer has the same grid in an input of another length."""
    return abs(size - grid.shape[axis] - (length - full) / grid.stride[axis]) <= 1


def _slope(capture: Capture, x: torch.Tensor, step: torch.Tensor) -> dict[LayerRef, torch.Tensor]:
    """Return twice the change of each layer's activations for a small step."""
    before = {layer: a.clone() for layer, a in capture.observe_layers(x - step).items()}
    after = capture.observe_layers(x + step)
    return {layer: (after[layer] - a).double() for layer, a in before.items()}


def _step(dtype: torch.dtype) -> float:
    """Return the size of a change that is small, and well above rounding."""
    return 1e-2 if torch.finfo(dtype).eps < 1e-5 else 0.25


def _in_parts(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Sum (B, C, *s) over all but one axis, in parts of the others: (parts, size)."""
    flat = values.sum((0, 1)).movedim(axis, -1).reshape(-1, values.shape[2 + axis])
    parts = min(PARTS, len(flat))
    return torch.stack([part.sum(0) for part in flat.tensor_split(parts)]).cpu()


def _fitted(
    moment: torch.Tensor,
    weight: torch.Tensor,
    grid: FeatureGrid,
    axis: int,
    length: int,
    draws: int,
) -> _Line:
    """Fit a line to the distances of centres from the grid's places.

    Args:
        moment, weight: (parts, size): sums of J^2 times the place, from the middle of the image
            on, and of J^2.
        draws: of noise that they come from.
    """
    stride, size = grid.stride[axis], weight.shape[1]
    place = (
        stride * torch.arange(size, dtype=torch.float64, device="cpu")
        + grid.offset[axis]
        - (length - 1) / 2
    )
    inner = place.abs() <= max(length / 4, stride / 2) + stride / 2
    moment, weight, place = moment[:, inner], weight[:, inner], place[inner]
    seen = weight.sum(0) > 0
    if not seen.all() or not seen.numel() or not torch.isfinite(moment).all():
        return _Line(0.0, math.inf, 0.0, 0.0, 0, draws)

    def distances(left_out: int | None) -> torch.Tensor:
        """Return how far each voxel's centre is from its place, without one of the parts."""
        kept = [part for part in range(len(weight)) if part != left_out]
        return moment[kept].sum(0) / weight[kept].sum(0) - place

    # All voxels count alike: those of a transposed convolution see their input unequally well.
    found, from_middle = distances(None), place - place.mean()
    spread = from_middle.square().sum()
    pull = -float((from_middle * found).sum() / spread) if spread > 0 else 0.0
    pulled_back = found + pull * place
    others = torch.stack([(distances(part) + pull * place).mean() for part in range(len(weight))])
    shift = pulled_back.mean()
    parts = len(weight)
    spread_of_parts = (parts - 1) / parts * float((others - shift).square().sum())
    error = math.sqrt(spread_of_parts) if parts >= FEW_PARTS else math.inf
    rest = pulled_back.std(correction=0)
    return _Line(float(shift), error, pull, float(rest), len(place), draws)
