"""Regions: which voxels a target sums over.

A region is shown the `Prediction` of one class and answers with a mask (B, *S). The words
"predicted" and "volume" and plain masks are regions too, see `as_region`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import torch

from seg3dcam.errors import TargetError, nearest
from seg3dcam.targets.arguments import check_whole
from seg3dcam.targets.connected_components import components, listed_sizes
from seg3dcam.targets.masks import Mask, Move, OnItsGrid, nonzero, placed_mask

# ------------------------------------------------------------------------------- the prediction


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the network predicts of the class that a target is about.

    - `logits`: (B, K, *S), without a graph.
    - `index`: the class; None for any foreground.
    - `overlapping`: a sigmoid's classes may overlap, a softmax's exclude each other.
    """

    logits: torch.Tensor
    index: int | None
    overlapping: bool

    @property
    def grid(self) -> tuple[int, ...]:
        """(B, *S)."""
        return (len(self.logits), *self.logits.shape[2:])

    def mask(self) -> torch.Tensor:
        """Return where the class is predicted, (B, *S) bool: arg-max, or logit > 0 for sigmoid."""
        return torch.stack([self._mask(item) for item in self.logits])

    def _mask(self, logits: torch.Tensor) -> torch.Tensor:
        if self.overlapping:
            return (logits > 0).any(0) if self.index is None else logits[self.index] > 0
        return ~_is_largest(logits, 0) if self.index is None else _is_largest(logits, self.index)

    def described(self, item: int) -> str:
        """Say which classes are predicted in an item, and in how many voxels."""
        logits = self.logits[item]
        if self.overlapping:
            counts = [int((channel > 0).sum()) for channel in logits]
        else:
            counts = torch.bincount(logits.argmax(0).flatten()).tolist()
        listed = ", ".join(f"class {c} in {n} voxels" for c, n in enumerate(counts) if n)
        return f"Predicted: {listed or 'no class anywhere'}"

    def described_at(self, item: int, voxel: tuple[int, ...]) -> str:
        """Say which classes are predicted at a voxel."""
        logits = torch.stack([channel[voxel] for channel in self.logits[item]])
        here = [int(logits.argmax())]
        if self.overlapping:
            here = torch.nonzero(logits > 0).flatten().tolist()
        return " and ".join(f"class {c}" for c in here) or "no class"


def _is_largest(logits: torch.Tensor, index: int) -> torch.Tensor:
    """Return where the arg-max of logits (K, *S) is a class, (*S) bool; the first of equals wins.

    Many times faster than `argmax`, which is slow along the first axis, and needs less memory.
    """
    own = logits[index]
    largest = torch.ones_like(own, dtype=torch.bool)
    for other, rival in enumerate(logits):
        if other != index:  # negated, so that NaN is not left out unnoticed
            largest &= ~(rival >= own if other < index else rival > own)
    return largest


# ----------------------------------------------------------------------------------------- regions


class RegionKind:
    """What every region can do."""

    #: Whether ground truth chooses the voxels, so that labels leak into the map.
    uses_truth: ClassVar[bool] = False
    #: Whether other logits give other voxels.
    follows_prediction: ClassVar[bool] = False
    #: Whether it is one connected component of the predicted mask.
    is_component: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """What stands after "over" in a target's name."""
        return f"the {self}"

    def masks(self, prediction: Prediction) -> torch.Tensor:
        """Return the voxels, (B, *S) bool; an item's may be empty."""
        raise NotImplementedError

    def placed(self, move: Move) -> RegionKind:
        """Return the region with its mask or truth brought onto the network's grid."""
        return self

    def instead(self, prediction: Prediction, item: int) -> str:
        """Say, for an item whose mask is empty, what is predicted instead and what to do."""
        return (
            f"{prediction.described(item)}. To explain it all the same, give a region: 'volume', "
            "a mask, Box or Voxel"
        )


@dataclass(frozen=True)
class Predicted(RegionKind):
    """Where the class is predicted; for a classifier its one place, predicted or not."""

    follows_prediction = True

    def masks(self, prediction: Prediction) -> torch.Tensor:
        if len(prediction.grid) == 1:
            return torch.ones(prediction.grid, dtype=torch.bool, device=prediction.logits.device)
        return prediction.mask()

    def __str__(self) -> str:
        return "predicted mask"


@dataclass(frozen=True)
class Volume(RegionKind):
    """All voxels."""

    def masks(self, prediction: Prediction) -> torch.Tensor:
        return torch.ones(prediction.grid, dtype=torch.bool, device=prediction.logits.device)

    def __str__(self) -> str:
        return "whole volume"


@dataclass(frozen=True, eq=False)
class MaskRegion(RegionKind):
    """Where a given mask is not zero."""

    mask: Mask

    def masks(self, prediction: Prediction) -> torch.Tensor:
        return nonzero(self.mask, prediction.grid)

    def __str__(self) -> str:
        return "given mask"


@dataclass(frozen=True)
class Box(RegionKind):
    """The voxels with start <= index < stop along each axis."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def mask(self, shape: Sequence[int]) -> torch.Tensor:
        """Return the box as a boolean mask of `shape`."""
        fits = len(self.start) == len(self.stop) == len(shape) and all(
            0 <= low < high <= size
            for low, high, size in zip(self.start, self.stop, shape, strict=False)
        )
        if not fits:
            raise TargetError(
                f"box {list(self.start)} to {list(self.stop)} (exclusive) does not lie in a "
                f"volume of {tuple(shape)} voxels"
            )
        mask = torch.zeros(tuple(shape), dtype=torch.bool, device="cpu")
        mask[tuple(map(slice, self.start, self.stop))] = True
        return mask

    def masks(self, prediction: Prediction) -> torch.Tensor:
        return self.mask(prediction.grid[1:]).expand(prediction.grid)

    def __str__(self) -> str:
        return f"box {list(self.start)} to {list(self.stop)}"


def Voxel(index: Sequence[int]) -> Box:  # noqa: N802 (reads as the region that it is)
    """Return the region of one voxel.

    >>> Voxel((1, 0)).mask((2, 2)).tolist()
    [[False, False], [True, False]]
    """
    return Box(tuple(index), tuple(i + 1 for i in index))


@dataclass(frozen=True)
class Component(RegionKind):
    """One connected component of the predicted mask: one lesion.

    Args:
        rank: the component by size, 0 is the largest; of two equal ones the first in memory leads.
        voxel: instead of a rank, a voxel in the component.
        connectivity: along how many axes at once neighbours may differ: 1 joins across faces, 2
            across edges, 3 across corners.

    >>> from seg3dcam.targets import ClassLogit
    >>> logits = torch.tensor([[[3.0, -1.0, 1.0, 2.0]]])  # predicted in voxel 0, and in 2 and 3
    >>> ClassLogit(0, Component(0))(logits), ClassLogit(0, Component(voxel=(0,)))(logits)
    (tensor([3.]), tensor([3.]))
    """

    rank: int | None = None
    voxel: tuple[int, ...] | None = None
    connectivity: int = 1

    follows_prediction = True
    is_component = True

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.voxel is None):
            given = "neither" if self.rank is None else "both"
            raise TargetError(
                f"a component is named by its rank or by a voxel in it; {given} given. Write "
                "Component(rank=0) for the largest one or Component(voxel=(z, y, x))"
            )
        if self.rank is not None:
            check_whole("a component's rank", self.rank, 0)
        if self.voxel is not None:
            voxel = np.asarray(self.voxel)
            if voxel.ndim != 1 or (voxel.size and voxel.dtype.kind not in "iu"):
                raise TargetError(f"voxel {self.voxel!r}: legal is a whole number per axis")
            object.__setattr__(self, "voxel", tuple(voxel.astype(int).tolist()))
        check_whole("connectivity", self.connectivity, 1)

    def masks(self, prediction: Prediction) -> torch.Tensor:
        if self.voxel is not None:
            Voxel(self.voxel).mask(prediction.grid[1:])  # refuses what lies outside of the volume
        return torch.stack([self._mask(item) for item in prediction.mask()])

    def _mask(self, predicted: torch.Tensor) -> torch.Tensor:
        ranks, _ = components(predicted, self.connectivity)
        rank = int(ranks[self.voxel]) if self.rank is None else self.rank
        return ranks.eq(rank) if rank != -1 else torch.zeros_like(ranks, dtype=torch.bool)

    def instead(self, prediction: Prediction, item: int) -> str:
        ranks, sizes = components(prediction.mask()[item], self.connectivity)
        if not sizes:
            return super().instead(prediction, item)
        if self.voxel is None:
            return (
                f"The predicted mask has {listed_sizes(sizes)}, so ranks 0 to {len(sizes) - 1} are "
                f"legal. {prediction.described(item)}"
            )
        places = torch.nonzero(ranks >= 0)
        away = (places - places.new_tensor(self.voxel)).double().norm(dim=1)
        near = tuple(places[int(away.argmin())].tolist())
        rank = int(ranks[near])
        here = prediction.described_at(item, self.voxel)
        return (
            f"At voxel {list(self.voxel)} {here} is predicted; the "
            f"nearest component has rank {rank} and {sizes[rank]} voxels, the nearest of them is "
            f"{list(near)}, {float(away.min()):.3g} voxels away. {prediction.described(item)}"
        )

    @property
    def name(self) -> str:
        joined = f" (connectivity {self.connectivity})" if self.connectivity > 1 else ""
        if self.voxel is None:
            return f"component {self.rank}{joined} of the predicted mask"
        return f"the component{joined} of the predicted mask at voxel {list(self.voxel)}"


@dataclass(frozen=True)
class Boundary(RegionKind):
    """The shell of the predicted mask: voxels within `thickness` steps on either side of its edge.

    It is the dilated mask without the eroded one, both by steps across the faces of voxels. Where
    the mask meets the border of the volume there is no edge.

    >>> from seg3dcam.targets import ClassLogit
    >>> logits = torch.tensor([[[-1.0, -1.0, 1.0, 1.0, 1.0]]])
    >>> ClassLogit(0, Boundary()).regions(logits)
    tensor([[False,  True,  True, False, False]])
    """

    thickness: int = 1

    follows_prediction = True

    def __post_init__(self) -> None:
        check_whole("a boundary's thickness", self.thickness, 1)

    def masks(self, prediction: Prediction) -> torch.Tensor:
        inside = prediction.mask()
        # An erosion is a growth of what is outside; both grow only within the volume.
        return _grown(inside, self.thickness) & _grown(~inside, self.thickness)

    def instead(self, prediction: Prediction, item: int) -> str:
        if prediction.mask()[item].all():
            return (
                "The mask fills the whole volume, so it has no boundary. "
                f"{super().instead(prediction, item)}"
            )
        return super().instead(prediction, item)

    def __str__(self) -> str:
        return f"boundary (thickness {self.thickness}) of the predicted mask"


def _grown(mask: torch.Tensor, steps: int) -> torch.Tensor:
    """Return a mask (B, *S) grown by some steps across the faces of voxels."""
    for _ in range(steps):
        grown = mask.clone()
        for axis in range(1, mask.ndim):
            last = mask.shape[axis] - 1
            grown.narrow(axis, 1, last).logical_or_(mask.narrow(axis, 0, last))
            grown.narrow(axis, 0, last).logical_or_(mask.narrow(axis, 1, last))
        mask = grown
    return mask


@dataclass(frozen=True, eq=False)
class FixedRegion(RegionKind):
    """The voxels that a region had at given logits; it keeps the region's name."""

    fixed: torch.Tensor
    origin: RegionKind

    @property
    def uses_truth(self) -> bool:  # type: ignore[override]
        return self.origin.uses_truth

    @property
    def is_component(self) -> bool:  # type: ignore[override]
        return self.origin.is_component

    @property
    def name(self) -> str:
        return self.origin.name

    def masks(self, prediction: Prediction) -> torch.Tensor:
        if self.fixed.shape != prediction.grid:
            raise TargetError(
                f"the region was fixed for logits of {len(self.fixed)} items of "
                f"{tuple(self.fixed.shape[1:])} voxels; these have {prediction.grid[0]} of "
                f"{prediction.grid[1:]}. Fix the target at logits of this shape"
            )
        return self.fixed


class FixedComponent(FixedRegion):
    """A component at given logits; all components share one map of ranks, (B, *S) int."""

    origin: Component

    def masks(self, prediction: Prediction) -> torch.Tensor:
        return super().masks(prediction).eq(self.origin.rank or 0)


#: What may be given as a region.
Region: TypeAlias = Literal["predicted", "volume"] | RegionKind | Mask

_WORDS: dict[str, RegionKind] = {"predicted": Predicted(), "volume": Volume()}


def as_region(given: Region) -> RegionKind:
    """Return the region that a word or a mask stands for; a region as it is.

    Raises:
        TargetError: it is none of these.
    """
    if isinstance(given, RegionKind):
        return given
    if isinstance(given, str):
        if given not in _WORDS:
            raise TargetError(
                f"region {given!r}: {nearest(given, _WORDS)} A mask, Box, Voxel, Component, "
                "Boundary, FalseNegatives, FalsePositives or TruePositives works too"
            )
        return _WORDS[given]
    if isinstance(given, torch.Tensor | np.ndarray | OnItsGrid):
        return MaskRegion(given)
    raise TargetError(
        f"region {given!r}: legal are 'predicted', 'volume', a mask as tensor, array or Scan, Box, "
        "Voxel, Component, Boundary, FalseNegatives, FalsePositives and TruePositives"
    )


def placed_region(region: Region, move: Move) -> Region:
    """Return the region with its mask or truth brought onto the network's grid."""
    if isinstance(region, RegionKind):
        return region.placed(move)
    return region if isinstance(region, str) else placed_mask(region, move)
