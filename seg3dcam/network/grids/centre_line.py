"""Compare the centres of what a layer's voxels look at with the places in its grid.

Kernels may pull a centre to one side; mirrored kernels pull it back by the same distance. If voxels
also see the whole image (by attention or InstanceNorm), or near the rim of the image, all centres
are pulled towards a middle, in proportion to their distance from it. If there are many voxels, a
line is fitted to their centres, which gives their distance from the grid in the middle, where there
is no pull. If there are only two voxels, the difference of what they see gives it, since everything
that both see in the same way cancels.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import torch

from seg3dcam.network.layers import LayerRef

#: A centre may be pulled to the middle of the image by at most this fraction of its distance from
#: it. The pull makes a shift smaller by the same fraction.
PULLED = 0.95

#: If the centres are pulled by more than this, voxels see more of the whole image than of their own
#: places. It is not known where the middle of that lies (of the image, or of the layer's voxels),
#: so the shift is not known either.
LITTLE = 0.5

#: A standard error can be estimated from the spread of at least so many parts of a measurement.
FEW_PARTS = 4


class CentreLine(NamedTuple):
    """How far centres are from their places in the grid.

    Attributes:
        shift: distance from the grid in the middle of the image, in input voxels.
        error: standard error of the shift.
        pull: fraction of their distance from the middle by which centres are pulled towards it.
        rest: root mean square of the distances that shift and pull do not explain.
        voxels: number of voxels that were measured.
        draws: number of draws of noise, or of signs and mixtures of channels.
        lean: distance by which the unmirrored kernels pull the centres to one side.
        bears: the largest pull for which the shift is known.
        side: fraction of what a voxel looks at that lies beyond its place, on the side where it is
            less, not counting what it sees of the whole image; 0 if that is not known.
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


#: (layer, axis) -> its line; and the pairs (layer, axis) that are still to be measured.
Lines = dict[tuple[LayerRef, int], CentreLine]
Doubts = Collection[tuple[LayerRef, int]]


def line_of_many_voxels(
    moment: torch.Tensor, weight: torch.Tensor, place: torch.Tensor, draws: int
) -> CentreLine:
    """Fit a line to the distances of centres from their places in the grid.

    Args:
        moment: (kinds, parts, size), sums of J^2 times the place, for plain and mirrored kernels.
            J is the derivative of a layer's value with respect to the input.
        weight: the same for sums of J^2.
        place: (size,), places of the voxels in the grid. All places are counted from the middle of
            the image.
        draws: number of draws that the sums come from.
    """
    seen = weight.sum(1) > 0
    if not seen.all() or not seen.numel() or not torch.isfinite(moment).all():
        return CentreLine(0.0, math.inf, 0.0, 0.0, 0, draws, 0.0, LITTLE)

    def distances(moment: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the distance of each voxel's centre from its place."""
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
    """Return how far two voxels are off, even if both also see the whole image.

    What both see alike, and how widely each looks, adds the same to the moments of both, so it
    cancels in their differences. With the centres a and b, the difference of the first moments is
    b - a, that of the second is b^2 - a^2, and (b^2 - a^2) / (b - a) is twice the middle between
    them.

    Args:
        moments: (plain and mirrored, draws, voxels, 5), see `by_gradients.moments`.
        place: (voxels,), places of the one or two voxels in the grid.
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
    # Plain and mirrored kernels of a draw belong together, since their difference is no error.
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
    # With mirrored kernels, what lies beyond a place lies before it. What is seen of the whole
    # image lies on both sides, half of it on each.
    beside = (sides[0, :, 3:] + sides[1, :, 3:].flip(-1)).mean(0) / (2 * moments.shape[1])
    whole = min(1.0, max(0.0, float(pull)))
    side = (float(beside.min()) - whole / 2) / (1 - whole) if two and whole < 1 else 0.0
    return CentreLine(float(shift), error, float(pull), 0.0, len(place), count, lean, PULLED, side)
