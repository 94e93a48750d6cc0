"""How far the centres of what a layer's voxels look at are from the places that its grid gives.

Kernels pull a centre to one side or the other; mirrored kernels pull it back by as much. What a
voxel sees of the whole image (by attention or InstanceNorm), and the rim of the image, pull all
centres towards a middle, in proportion to their distance from it. If there are many voxels, a line
is fitted to their centres: it tells how far the centres would be off in the middle, where nothing
is pulled. If there are two, the difference of what they see tells it, since whatever both see alike
cancels.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import torch

from seg3dcam.network.layers import LayerRef

#: By which part of its distance from the middle of the image a centre may be pulled there. The part
#: of a distance that is left is also the part of a shift that is left.
PULLED = 0.95

#: A line whose centres are pulled by more sees more of the whole image than of its place. Where the
#: middle of that lies (of the image, or of the layer's voxels in it) is not known, so the place of
#: the line is not known either.
LITTLE = 0.5

#: How many parts of the measurement it takes to estimate a standard error from their spread.
FEW_PARTS = 4


class CentreLine(NamedTuple):
    """How far centres are from where they should be: `shift` in the middle, `pull` towards it.

    Attributes:
        shift: distance from the layer's places, in input voxels.
        error: standard error of the shift.
        pull: part of the distance from the middle by which centres are pulled towards it.
        rest: distance that shift and pull do not explain, root mean square.
        voxels: number of voxels that were looked at.
        draws: number of draws of noise, or of signs and mixtures of channels.
        lean: by how much the kernels as they are pull the centres to one side.
        bears: up to which pull the shift is known.
        side: part of what a voxel looks at that lies beyond its place, on the side where this is
            less, without what it sees of the whole image; 0 if not known.
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


#: (layer, axis) -> its line, and those that are still to be looked at.
Lines = dict[tuple[LayerRef, int], CentreLine]
Doubts = Collection[tuple[LayerRef, int]]


def line_of_many_voxels(
    moment: torch.Tensor, weight: torch.Tensor, place: torch.Tensor, draws: int
) -> CentreLine:
    """Fit a line to the distances of centres from the grid's places.

    Args:
        moment: (kinds, parts, size), sums of J^2 times the place, for plain and mirrored kernels.
            J is the derivative of a layer's value with respect to the input.
        weight: the same for sums of J^2.
        place: (size,), where the grid says that the voxels lie. All places count from the middle
            of the image.
        draws: number of draws that the sums come from.
    """
    seen = weight.sum(1) > 0
    if not seen.all() or not seen.numel() or not torch.isfinite(moment).all():
        return CentreLine(0.0, math.inf, 0.0, 0.0, 0, draws, 0.0, LITTLE)

    def distances(moment: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return how far each voxel's centre is from its place."""
        return moment.sum((0, 1)) / weight.sum((0, 1)) - place

    # All voxels have the same weight, since voxels of a transposed convolution do not all see their
    # input equally well.
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
    return CentreLine(
        float(shift) / left, error / left, pull, float(rest), len(place), draws, lean, LITTLE
    )


def line_of_two_voxels(moments: torch.Tensor, place: torch.Tensor) -> CentreLine:
    """Return how far two voxels are off, whatever both see of the whole image.

    What both see, and how widely each looks, adds the same to the moments M of both, so it cancels
    in their differences. With the centres a and b, the difference of the first moments is b - a,
    that of the second is b^2 - a^2, and (b^2 - a^2) / (b - a) is twice the middle between them.

    Args:
        moments: (plain and mirrored, draws, voxels, 5), see `by_gradients.moments`.
        place: (voxels,), where the grid says that the one or two voxels lie.
    """
    two = len(place) > 1 and place[0] != place[-1]
    nothing = CentreLine(0.0, math.inf, 0.0, 0.0, 0, moments.shape[1], 0.0, PULLED)

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
    # Plain and mirrored kernels of one draw belong together: their difference is no error.
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
    # What lies beyond a place lies before it with mirrored kernels. What is seen of the whole image
    # lies on both sides, one half on each.
    beside = (sides[0, :, 3:] + sides[1, :, 3:].flip(-1)).mean(0) / (2 * moments.shape[1])
    whole = min(1.0, max(0.0, float(pull)))
    side = (float(beside.min()) - whole / 2) / (1 - whole) if two and whole < 1 else 0.0
    return CentreLine(float(shift), error, float(pull), 0.0, len(place), count, lean, PULLED, side)
