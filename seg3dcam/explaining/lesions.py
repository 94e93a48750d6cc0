"""How unsure are the members of an ensemble about each lesion?

A lesion is a connected part of what the mean of the members draws. Of each member it has what that
member draws there: all its connected parts that touch the lesion.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from seg3dcam.explaining.certainty import lesion_confidence
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
        ml: its volume.
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
    parts = [_Parts(member) for member in of_members]
    found = []
    for rank, size in enumerate(sizes[:MOST]):
        lesion = ranks == rank
        drawn = [part.touching(lesion) for part in parts]
        dice = [_dice(*pair) for pair in itertools.combinations(drawn, 2) if any(map(len, pair))]
        found.append(
            LesionUncertainty(
                class_name,
                rank,
                to_world(affine, lesion.nonzero().double().mean(0).tolist()),
                size * voxel_ml(affine),
                lesion_confidence(probability, mask, lesion),
                float(entropy[lesion].mean()),
                None if shared is None else float(shared[lesion].mean()),
                sum(bool(len(one)) for one in drawn),
                float(np.mean(dice)) if dice else None,
            )
        )
    return found


class _Parts:
    """The connected parts of a member's mask (*S), as the numbers of their voxels."""

    def __init__(self, mask: torch.Tensor) -> None:
        ranks = components(mask)[0].numpy().ravel()
        self._voxels = np.flatnonzero(ranks >= 0)
        self._ranks = ranks[self._voxels]

    def touching(self, lesion: torch.Tensor) -> NDArray[np.intp]:
        """Return the voxels of all parts that touch a lesion (*S)."""
        inside = lesion.numpy().ravel()[self._voxels]
        parts = np.unique(self._ranks[inside])
        return self._voxels[np.isin(self._ranks, parts)]


def _dice(one: NDArray[np.intp], other: NDArray[np.intp]) -> float:
    both = np.intersect1d(one, other, assume_unique=True)
    return 2 * len(both) / (len(one) + len(other))
