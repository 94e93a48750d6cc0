"""How unsure are the members of an ensemble about each lesion?

A lesion is a connected part of what the mean of the members draws. Of each member it has what that
member draws there: all its connected parts that touch the lesion.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from seg3dcam.explaining.certainty import NEAR, lesion_confidence
from seg3dcam.geometry import to_world, voxel_ml
from seg3dcam.targets.connected_components import components

#: So many lesions of a class are measured, the largest ones.
MOST = 50


@dataclass(frozen=True)
class LesionUncertainty:
    """How unsure the members are about one lesion.

    Attributes:
        class_name: of its class.
        rank: 0 for the largest one of the class, as `Component` counts them.
        centre_mm: its centre of mass, RAS.
        ml: its volume. It is counted on the network's grid, as the masks are.
        confidence: the soft Dice with the mean of the members' probabilities, see
            `lesion_confidence`.
        mean_entropy, mutual_information: the means over it; None for the last with one member.
        drawn_by: how many members draw something there.
        pairwise_dice: the mean Dice of what each two members draw there, of those two of whom at
            least one does; None with one member, and where none does.
    """

    class_name: str
    rank: int
    centre_mm: tuple[float, ...]
    ml: float
    confidence: float | None
    mean_entropy: float
    mutual_information: float | None
    drawn_by: int
    pairwise_dice: float | None


def lesions_of(
    class_name: str,
    probability: torch.Tensor,
    mask: torch.Tensor,
    of_members: Sequence[torch.Tensor],
    entropy: torch.Tensor,
    shared: torch.Tensor | None,
    affine: NDArray[np.float64],
) -> list[LesionUncertainty]:
    """Return the lesions of a class, the largest first.

    Args:
        class_name: of the class.
        probability: (*S), the mean of the members' probabilities.
        mask: (*S) bool, what it draws.
        of_members: what each member draws, (*S) bool.
        entropy, shared: (*S), entropy and mutual information; None for the last with one member.
        affine: (4, 4), voxel -> RAS mm.
    """
    ranks, sizes = components(mask)
    lesions = _Parts(torch.where(ranks < MOST, ranks, -1), sizes[:MOST])
    members = [_Parts(*components(member)) for member in of_members]
    drawn = [lesions.touched(member) for member in members]
    pairs = list(itertools.combinations(range(len(members)), 2))
    overlaps = {(a, b): members[a].overlaps(members[b]) for a, b in pairs}
    boxes = ndimage.find_objects((ranks + 1).numpy())
    found = []
    for rank, size in enumerate(lesions.sizes):
        dice = [
            _dice(members[a], members[b], drawn[a][rank], drawn[b][rank], overlaps[a, b])
            for a, b in pairs
            if drawn[a][rank] or drawn[b][rank]
        ]
        box = tuple(slice(max(0, part.start - NEAR), part.stop + NEAR) for part in boxes[rank])
        found.append(
            LesionUncertainty(
                class_name,
                rank,
                to_world(affine, lesions.centre(rank)),
                size * voxel_ml(affine),
                lesion_confidence(probability[box], mask[box], ranks[box] == rank),
                lesions.mean(entropy, rank),
                None if shared is None else lesions.mean(shared, rank),
                sum(bool(parts[rank]) for parts in drawn),
                float(np.mean(dice)) if dice else None,
            )
        )
    return found


class _Parts:
    """The connected parts of a mask (*S): where its voxels are, and of which part each one is.

    Args:
        ranks: (*S), the number of each voxel's part, -1 outside of all.
        sizes: of the parts, in voxels.
    """

    def __init__(self, ranks: torch.Tensor, sizes: Sequence[int]) -> None:
        self.sizes, self._shape, flat = list(sizes), tuple(ranks.shape), ranks.numpy().ravel()
        self._voxels = np.flatnonzero(flat >= 0)
        self._ranks = flat[self._voxels]

    def centre(self, rank: int) -> list[float]:
        """Return the centre of mass of a part, in voxels."""
        where = np.unravel_index(self._voxels[self._ranks == rank], self._shape)
        return [float(axis.mean()) for axis in where]

    def mean(self, values: torch.Tensor, rank: int) -> float:
        """Return the mean of values (*S) over a part."""
        inside = self._voxels[self._ranks == rank]
        return float(values.numpy().ravel()[inside].mean(dtype=np.float64))

    def overlaps(self, other: _Parts) -> dict[tuple[int, int], int]:
        """Return (a part, a part of the other) -> the voxels that both have."""
        _, here, there = np.intersect1d(
            self._voxels, other._voxels, assume_unique=True, return_indices=True
        )
        pairs = self._ranks[here].astype(np.int64) * len(other.sizes) + other._ranks[there]
        numbers, counts = np.unique(pairs, return_counts=True)
        of_pairs = zip(numbers.tolist(), counts.tolist(), strict=True)
        return {divmod(number, len(other.sizes)): count for number, count in of_pairs}

    def touched(self, other: _Parts) -> list[set[int]]:
        """Return for each part the parts of the other that share a voxel with it."""
        found: list[set[int]] = [set() for _ in self.sizes]
        for part, part_of_other in self.overlaps(other):
            found[part].add(part_of_other)
        return found


def _dice(
    one: _Parts,
    other: _Parts,
    of_one: set[int],
    of_other: set[int],
    overlaps: Mapping[tuple[int, int], int],
) -> float:
    """Return the Dice of some parts of one mask with some of another; not both are empty."""
    if len(of_one) * len(of_other) < len(overlaps):
        both = sum(overlaps.get(pair, 0) for pair in itertools.product(of_one, of_other))
    else:
        both = sum(n for (a, b), n in overlaps.items() if a in of_one and b in of_other)
    sizes = sum(one.sizes[part] for part in of_one) + sum(other.sizes[part] for part in of_other)
    return 2 * both / sizes
