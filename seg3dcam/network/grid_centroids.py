"""A second measurement of where a layer's voxels lie: the middle of what they really look at.

A ramp through a network of plain kernels (`grid_measurement`) tells a place exactly, if everything
that moves things is known to it. This one needs no such knowledge: it looks at the true network.
With J the derivative of a layer's value with respect to input voxel p, the centre of what the value
looks at is sum_p J^2 p / sum_p J^2. It is found in two ways.

By noise: with z independent noise of one voxel,

    E[(sum_p J z)(sum_p J z p)] / E[(sum_p J z)^2] = sum_p J^2 p / sum_p J^2,

so two small changes of the input, z and z times a coordinate, show the centres of all voxels of all
layers at once, averaged over channels and over the other axes. That takes a few forward passes, and
is exact enough where a layer has many voxels.

By gradients: those of two voxels of a layer, in a random mixture of its channels, give all of J at
once. That takes a backward pass for each, and is exact enough for coarse layers, whose few voxels
look at thousands. One path that the image closes, or that trained weights cancel, would hide what
others show. So weights of kernels get random signs there, and activation functions are straight: it
is told what a network of this structure, and of as strong weights, looks at. Where the first look
at the network as it is shows something else, that one is believed.

Kernels pull the centre to one side or the other; mirrored ones pull back as much. What a voxel sees
of the whole image (attention, InstanceNorm) and the image's rim pull all centres towards a middle,
in proportion to their distance from it. Of many voxels a line is fitted, which tells by how much
the centres are off there if little is pulled. Of two voxels the difference of what they see tells
it, whatever both see alike.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch

from seg3dcam.errors import LayerError, ModelError
from seg3dcam.geometry import FeatureGrid
from seg3dcam.network.capture import Capture, capturing
from seg3dcam.network.layers import LayerRef
from seg3dcam.network.layouts import INPUT
from seg3dcam.network.operations import MirroredOperations, RandomOperations

#: Two measurements agree within this part of a layer's voxel, and this part of an input voxel.
AGREE = 0.15

#: How much of its distance from the middle of the image a centre may be pulled there, or away. What
#: is left of a distance is what is left of a shift, too.
PULLED, PUSHED = 0.95, 0.08

#: What is pulled more sees more of the whole image than of its place. Where the middle of that lies
#: (of the image, or of the layer's voxels in it) nobody knows, so the place of a line is not known.
LITTLE = 0.5

#: By how much kernels may pull a centre to one side, as part of a layer's and of an input voxel. A
#: causal or a shifting convolution pulls it by one voxel; then the middle of its kernel is not
#: where the layer looks.
LEANING = 0.4

#: They may pull by more, as those of a large dilation do, where so much of what a voxel looks at
#: lies beyond its place on either side.
EITHER_SIDE = 0.1

#: Centres lie this many input voxels off a line at most, root mean square, or a layer's voxel.
STEPS = 4.0

#: Parts that each draw's places are divided into, whose spread tells how sure a centre is. Other
#: channels see the same noise, so they tell nothing of that; neither do few parts.
PARTS, FEW_PARTS = 8, 4

#: Places that one look at the network as it is shows so many standard errors further off than two
#: measurements may be are suspected.
SUSPECTED = 4

#: Voxels of an input that noise is sent through: along the axis, and at most along the others.
LONG, OTHERS = 64, 32

#: Where gradients are taken: so many voxels of the layer, in at least and at most so many of the
#: input.
VOXELS, SHORTEST, LONGEST = 10, 96, 160

#: So many voxels make one look; of smaller inputs more draws are taken, up to so many times.
ENOUGH, TIMES = LONG * OTHERS**2, 4

Grids = Mapping[LayerRef, FeatureGrid]
Doubts = Collection[tuple[LayerRef, int]]


class _Line(NamedTuple):
    """How far centres are from where they should be: by `shift` in the middle, `pull` towards it.

    Attributes:
        shift: of the layer's places, in input voxels.
        error: its standard error.
        pull: part of the distance from the middle.
        rest: what is left, root mean square.
        voxels: how many were looked at.
        draws: of noise, or of signs and mixtures of channels.
        lean: by how much the kernels as they are pull the centres to one side.
        bears: how much may be pulled for the shift to be known.
        side: part of what a voxel looks at that lies beyond its place, on the side where less does,
            but for what it sees of the whole image; 0 if not known.
    """

    shift: float
    error: float
    pull: float
    rest: float
    voxels: int
    draws: int
    lean: float
    bears: float
    side: float = 0.0


Lines = dict[tuple[LayerRef, int], _Line]


def agreeing(
    capture: Capture, x: torch.Tensor, grids: Grids, *, pulled: float = PULLED
) -> set[LayerRef]:
    """Return the layers whose voxels see what lies where their grids say.

    Args:
        capture: of the network with these layers.
        x: (B, C, *S); its shape, dtype and device count, its values do not.
        grids: layer -> its grid in an input of this shape.
        pulled: how much centres may be pulled to the middle of the image. Strides that are smaller
            than a grid's pull them, too.
    """
    wrong: set[LayerRef] = set()
    suspected: set[tuple[LayerRef, int]] = set()
    doubts = set(itertools.product(grids, range(x.ndim - 2)))
    for look, draws in LOOKS:
        # Where the network as it is seems to be off, others of its structure do not clear it.
        asked = doubts - suspected if look is _by_gradients else doubts
        lines = look(capture, x, grids, asked, draws) if asked else {}
        for (layer, axis), line in lines.items():
            verdict = _verdict(line, grids[layer], axis, pulled)
            if verdict is not None:
                doubts.discard((layer, axis))
            elif look is not _by_gradients and _seems_off(line, grids[layer], axis):
                suspected.add((layer, axis))
            if verdict is False:
                wrong.add(layer)
        doubts = {(layer, axis) for layer, axis in doubts if layer not in wrong}
    # What stays in doubt is not measured.
    return set(grids) - wrong - {layer for layer, _ in doubts}


def _verdict(line: _Line, grid: FeatureGrid, axis: int, pulled: float = PULLED) -> bool | None:
    """Tell whether centres lie where the grid says; None: not seen well enough to tell."""
    stride, tolerance = _tolerance(grid, axis)
    leaning = LEANING * (1 + stride) if line.side < EITHER_SIDE else math.inf
    off = max(abs(line.shift) - tolerance, abs(line.lean) - leaning)
    alone = grid.shape[axis] == 1
    seen = line.pull <= line.bears and (line.voxels > 1 or alone)
    # Within one draw, places that see the same noise make it look surer than it is.
    if seen and off > 4 * line.error and line.voxels > 1 and line.draws >= FEW_PARTS:
        return False
    # Transposed convolutions see in steps, as wide as the strides that they undo.
    straight = -PUSHED <= line.pull <= pulled and line.rest <= max(stride, STEPS)
    near = off <= 0 and line.error <= tolerance / 2
    return True if seen and near and (straight or alone) else None


def _seems_off(line: _Line, grid: FeatureGrid, axis: int) -> bool:
    """Tell whether centres do not lie where the grid says, as far as one look can tell."""
    _, tolerance = _tolerance(grid, axis)
    return line.pull <= line.bears and abs(line.shift) - tolerance > SUSPECTED * line.error


def _tolerance(grid: FeatureGrid, axis: int) -> tuple[float, float]:
    """Return the width of a layer's voxel, or of an input voxel, and what two measurements may."""
    stride = max(1.0, grid.stride[axis])
    return stride, AGREE * (1 + stride)


# ------------------------------------------------------------------------------- by noise


def _by_noise(capture: Capture, x: torch.Tensor, grids: Grids, doubts: Doubts, draws: int) -> Lines:
    """Look axis by axis, in an input of a handy shape, or of its own where that is taken alone."""
    found: Lines = {}
    full = tuple(x.shape[2:])
    for axis in range(x.ndim - 2):
        open_ = {layer for layer in grids if (layer, axis) in doubts}
        for shape in dict.fromkeys((_handy(full, axis, LONG), full)):
            asked = _same_at(shape, full, {layer: grids[layer] for layer in open_})
            if not asked:
                continue
            try:
                lines = _lines(capture, x, shape, axis, asked, draws * _times(shape))
            except (ModelError, LayerError, torch.OutOfMemoryError):
                continue  # some networks take one size only
            found |= {(layer, axis): line for layer, line in lines.items()}
            open_ -= lines.keys()
    return found


def _handy(full: Sequence[int], axis: int, length: int) -> tuple[int, ...]:
    """Return a shape that differs by multiples of 32, which most networks take as well."""
    return tuple(
        length + n % 32 if a == axis else min(n, OTHERS + n % 32) for a, n in enumerate(full)
    )


def _same_at(
    shape: Sequence[int], full: Sequence[int], grids: Grids
) -> dict[LayerRef, FeatureGrid]:
    """Return the grids that are the same in an input of this shape, of fractional strides none."""
    return {
        layer: grid
        for layer, grid in grids.items()
        if shape == full or all(float(stride).is_integer() for stride in grid.stride)
    }


def _times(shape: Sequence[int]) -> int:
    return min(TIMES, max(1, ENOUGH // math.prod(shape)))


def _lines(
    capture: Capture,
    like: torch.Tensor,
    shape: Sequence[int],
    axis: int,
    grids: Grids,
    draws: int,
) -> dict[LayerRef, _Line]:
    """Fit a line to the centres of each layer along one axis, for inputs of a shape."""
    length = shape[axis]
    place = torch.linspace(-1, 1, length, dtype=like.dtype, device=like.device)
    place = place.view([-1 if a == axis + 2 else 1 for a in range(like.ndim)])
    sums: dict[LayerRef, list[list[torch.Tensor]]] = {layer: [[], []] for layer in grids}
    for seed, mirrored in itertools.product(range(draws), (False, True)):
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
                sums[layer][mirrored].append(new)
    lines = {}
    for layer, grid in grids.items():
        # (moment and weight, plain and mirrored, draws, parts, places)
        sums_of = torch.stack([torch.stack(kind, dim=1) for kind in sums[layer]], dim=1)
        # Other draws tell best how sure a centre is.
        moment, weight = sums_of.sum(3) if draws >= FEW_PARTS else sums_of.flatten(2, 3)
        size = weight.shape[-1]
        if _has_grid(grid, axis, size, length, like.shape[2 + axis]):
            half, stride = (length - 1) / 2, grid.stride[axis]
            from_middle = _places(grid, axis, size) - half
            inner = from_middle.abs() <= max(length / 4, stride / 2) + stride / 2
            seen = moment[..., inner] * half, weight[..., inner], from_middle[inner]
            lines[layer] = _fitted(*seen, draws)
    return lines


def _has_grid(grid: FeatureGrid, axis: int, size: int, length: int, full: int) -> bool:
    """Tell whether a layer has the same grid in an input of another length."""
    return abs(size - grid.shape[axis] - (length - full) / grid.stride[axis]) <= 1


def _places(grid: FeatureGrid, axis: int, size: int) -> torch.Tensor:
    """Return where so many voxels of a layer lie along an axis of the input."""
    index = torch.arange(size, dtype=torch.float64, device="cpu")
    return grid.stride[axis] * index + grid.offset[axis]


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


# ------------------------------------------------------------------------------- by gradients


def _by_gradients(
    capture: Capture, x: torch.Tensor, grids: Grids, doubts: Doubts, draws: int
) -> Lines:
    """Look axis by axis, in an input of a handy shape, or along all axes in one of its own."""
    found: Lines = {}
    full = tuple(x.shape[2:])
    for axis in range(len(full)):
        open_ = {layer: grids[layer] for layer in grids if (layer, axis) in doubts}
        # Long enough for most of what two voxels see. The graph is kept, so no longer.
        coarsest = max((grid.stride[axis] for grid in open_.values()), default=1)
        length = min(LONGEST, max(SHORTEST, 32 * math.ceil(VOXELS * coarsest / 32)))
        for shape in dict.fromkeys((_handy(full, axis, length), full)):
            asked = _same_at(shape, full, open_)
            asked = {layer: grid for layer, grid in asked.items() if (layer, axis) not in found}
            if not asked:
                continue
            # Another look has draws of its own.
            seeds = range(1000 * draws, 1000 * draws + draws * _times(shape))
            try:
                with capturing(capture.member, [*asked, INPUT]) as traced:
                    lines = _lines_by_gradients(traced, x, shape, asked, seeds)
            except (ModelError, LayerError, RuntimeError):
                continue  # some networks take one size only, some have no gradients
            found |= {key: line for key, line in lines.items() if key[1] == axis or shape == full}
    return found


def _lines_by_gradients(
    traced: Capture, like: torch.Tensor, shape: Sequence[int], grids: Grids, seeds: Sequence[int]
) -> Lines:
    """Return how far two voxels of each layer are off, along every axis.

    Args:
        traced: of the network with these layers and its input.
        seeds: of the draws.
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
                    seen.append(_moments(derivative, _extents(u, grid, a.shape[1:], shape)))
                centres[layer][mirrored].append(torch.stack(seen))
                sizes[layer] = a.shape[1:]
    lines: Lines = {}
    for layer, grid in grids.items():
        found = torch.stack([torch.stack(kind) for kind in centres[layer]])
        for axis, (length, full) in enumerate(zip(shape, like.shape[2:], strict=True)):
            size = sizes[layer][axis]
            if _has_grid(grid, axis, size, length, full):
                from_middle = _places(grid, axis, size) - (length - 1) / 2
                place = from_middle[[u[axis] for u in voxels[layer]]]
                lines[layer, axis] = _told_apart(found[..., axis, :], place)
    return lines


def _two_voxels(
    grid: FeatureGrid, sizes: Sequence[int], shape: Sequence[int]
) -> list[tuple[int, ...]]:
    """Return two voxels, as far on either side of the image's middle, so that both see as much.

    One where there is but one.
    """
    pairs = []
    for axis, (size, length) in enumerate(zip(sizes, shape, strict=True)):
        place = _places(grid, axis, size) - (length - 1) / 2
        low = int((place + length / 7).abs().argmin())
        pairs.append((low, int((place + place[low]).abs().argmin())))
    return list(dict.fromkeys(zip(*pairs, strict=True)))


def _extents(
    voxel: Sequence[int], grid: FeatureGrid, sizes: Sequence[int], shape: Sequence[int]
) -> list[tuple[float, float]]:
    """Return between what places each axis of a voxel lies, from the middle of the image on."""
    extents = []
    for axis, (u, size, length) in enumerate(zip(voxel, sizes, shape, strict=True)):
        place = float(_places(grid, axis, size)[u]) - (length - 1) / 2
        half = max(1.0, grid.stride[axis]) / 2
        extents.append((place - half, place + half))
    return extents


def _moments(derivative: torch.Tensor, extents: Sequence[tuple[float, float]]) -> torch.Tensor:
    """Return what J (C, *S) shows along each axis: five numbers.

    Moments 0, 1 and 2 of J^2, and what of it lies before and beyond an extent. All places count
    from the middle. They are divided by moment 0, which is 1 then, or 0 where all of J is.
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


def _told_apart(moments: torch.Tensor, place: torch.Tensor) -> _Line:
    """Return how far two voxels are off, whatever both see of the whole image.

    That, and how widely a voxel looks, is in the moments M of both. In their differences it is not:
    M1 has that of their centres a and b, M2 that of their squares, and (b^2 - a^2) / (b - a) is
    twice the middle between them.

    Args:
        moments: (plain and mirrored, draws, voxels, 5), see `_moments`.
        place: (voxels,), where the grid says that they lie.
    """
    two = len(place) > 1 and place[0] != place[-1]
    nothing = _Line(0.0, math.inf, 0.0, 0.0, 0, moments.shape[1], 0.0, PULLED)

    def pull_and_shift(parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight, first, second = parts.sum(0)[..., :3].unbind(-1)
        centre, square = first / weight, second / weight
        if not two:
            return torch.zeros_like(place[0]), (centre - place).mean()
        apart = centre[-1] - centre[0]
        middle = (square[-1] - square[0]) / (2 * apart)
        return 1 - apart / (place[-1] - place[0]), middle - place.mean()

    if not (moments[..., 0].sum(1) > 0).all():
        return nothing
    # What mirrored kernels pull back is no error: both kinds of one draw belong together.
    pairs = moments.sum(0)
    pull, shift = pull_and_shift(pairs)
    error, count = math.inf, len(pairs)
    if count > 1:
        kept = [[other for other in range(count) if other != part] for part in range(count)]
        others = torch.stack([pull_and_shift(pairs[k])[1] for k in kept])
        error = math.sqrt((count - 1) / count * float((others - shift).square().sum()))
    sides = moments.sum(1)
    lean = float((sides[0] - sides[1])[:, 1].mean()) / (2 * moments.shape[1])
    if not math.isfinite(float(shift) + float(pull)):
        return nothing
    # Mirrored kernels have before a place what was beyond it. What is seen of the whole image is on
    # both sides, half of it on each.
    beside = (sides[0, :, 3:] + sides[1, :, 3:].flip(-1)).mean(0) / (2 * moments.shape[1])
    whole = min(1.0, max(0.0, float(pull)))
    side = (float(beside.min()) - whole / 2) / (1 - whole) if two and whole < 1 else 0.0
    return _Line(float(shift), error, float(pull), 0.0, len(place), count, lean, PULLED, side)


# ------------------------------------------------------------------------------- a line


def _fitted(moment: torch.Tensor, weight: torch.Tensor, place: torch.Tensor, draws: int) -> _Line:
    """Fit a line to the distances of centres from the grid's places.

    Args:
        moment, weight: (kinds, parts, size), of plain and of mirrored kernels: sums of J^2 times
            the place and of J^2.
        place: (size,), where the grid says that the voxels lie. All places count from the middle
            of the image.
        draws: that they come from.
    """
    seen = weight.sum(1) > 0
    if not seen.all() or not seen.numel() or not torch.isfinite(moment).all():
        return _Line(0.0, math.inf, 0.0, 0.0, 0, draws, 0.0, LITTLE)

    def distances(moment: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return how far each voxel's centre is from its place."""
        return moment.sum((0, 1)) / weight.sum((0, 1)) - place

    # All voxels count alike: those of a transposed convolution see their input unequally well.
    found, from_middle = distances(moment, weight), place - place.mean()
    spread = from_middle.square().sum()
    pull = -float((from_middle * found).sum() / spread) if spread > 0 else 0.0
    pulled_back = found + pull * place
    shift, rest = pulled_back.mean(), pulled_back.std(correction=0)
    parts, error = weight.shape[1], math.inf
    if parts >= FEW_PARTS:
        kept = [[other for other in range(parts) if other != part] for part in range(parts)]
        without = torch.stack([distances(moment[:, k], weight[:, k]) for k in kept])
        others = (without + pull * place).mean(1)
        error = math.sqrt((parts - 1) / parts * float((others - shift).square().sum()))
    plain, mirrored = distances(moment[:1], weight[:1]), distances(moment[1:], weight[1:])
    lean = float((plain - mirrored).mean()) / 2
    left = max(1 - pull, 1 - PULLED)
    return _Line(
        float(shift) / left, error / left, pull, float(rest), len(place), draws, lean, LITTLE
    )


#: How it is looked, the cheapest first, and how many draws; layers that leave a doubt again.
LOOKS: tuple[tuple[Callable[..., Lines], int], ...] = (
    (_by_noise, 1),
    (_by_gradients, 3),
    (_by_gradients, 12),
    (_by_noise, 6),
)
