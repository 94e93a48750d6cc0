"""Targets that sum a value per voxel over a region, and the soft Dice of the whole volume."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from seg3dcam.errors import EmptyRegionError, TargetError
from seg3dcam.targets.arguments import (
    Activation,
    check_activation,
    check_exists,
    check_has_others,
    check_index,
    check_number,
)
from seg3dcam.targets.base import OwnTarget, changed
from seg3dcam.targets.masks import Mask, Move, OnItsGrid, nonzero, placed_mask
from seg3dcam.targets.regions import (
    FixedRegion,
    Prediction,
    Region,
    RegionKind,
    Volume,
    as_region,
    placed_region,
)


def overlapping(logits: torch.Tensor, activation: Activation | None) -> bool:
    """Return whether the classes of logits (B, K, *S) may overlap: a sigmoid, or one channel."""
    return activation == "sigmoid" or logits.shape[1] == 1


Self = TypeVar("Self", bound="SumOverRegion")


class SumOverRegion(OwnTarget):
    """A value per voxel, summed over a region."""

    region: Region
    activation: Activation | None

    def __post_init__(self) -> None:
        check_activation(self.activation)
        as_region(self.region)

    def check(self, logits: torch.Tensor) -> None:
        """Refuse logits (B, K, *S) that the target does not fit."""

    def values(self, logits: torch.Tensor, item: int) -> torch.Tensor:
        """Return one value per voxel, (n,), of the logits (K, n) of an item's n voxels."""
        raise NotImplementedError

    def prediction(self, logits: torch.Tensor) -> Prediction:
        """Return what a region may look at; here the prediction of any foreground."""
        return Prediction(logits.detach(), None, overlapping(logits, self.activation))

    @property
    def region_kind(self) -> RegionKind:
        """The region that the score sums over."""
        return as_region(self.region)

    @property
    def is_sum(self) -> bool:
        """Whether the score is a sum over the voxels of its region: always."""
        return True

    @property
    def uses_truth(self) -> bool:
        """Whether ground truth chose the voxels."""
        return self.region_kind.uses_truth

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the score (B,) of logits (B, K, *S)."""
        voxels = self.voxels(logits)
        return torch.stack([self.values(of_item, item).sum() for item, of_item in voxels])

    def voxels(self, logits: torch.Tensor) -> Any:
        """Yield (item, the logits (K, n) of its region's voxels)."""
        self.check(logits)
        if isinstance(self.region_kind, Volume):  # no mask: less memory
            yield from ((item, one.reshape(len(one), -1)) for item, one in enumerate(logits))
            return
        masks = self.regions(logits).to(logits.device)
        yield from ((item, one[:, masks[item]]) for item, one in enumerate(logits))

    def regions(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the voxels that are summed over, (B, *S) bool.

        Raises:
            TargetError: the region or the class does not fit the logits.
            EmptyRegionError: an item's region holds no voxel.
        """
        self.check(logits)
        region, prediction = self.region_kind, self.prediction(logits)
        masks = region.masks(prediction)
        for item, mask in enumerate(masks):
            if not mask.any():
                raise EmptyRegionError(
                    f"{self.name}: the region is empty"
                    + (f" in item {item} of the batch" if len(masks) > 1 else "")
                    + f". {region.instead(prediction, item)}"
                )
        return masks

    def activated(self: Self, activation: Activation) -> Self:
        """Return the target with this activation, where none was given."""
        return self if self.activation else changed(self, activation=activation)

    def fixed(self: Self, logits: torch.Tensor) -> Self:
        """Return the target over the voxels that its region has at these logits."""
        region = self.region_kind
        if not region.follows_prediction:
            return self
        return changed(self, region=FixedRegion(self.regions(logits), region))

    def placed(self: Self, move: Move) -> Self:
        """Return the target with its mask or truth brought onto the network's grid."""
        return changed(self, region=placed_region(self.region, move))


class ClassTarget(SumOverRegion):
    """A value of one class, summed over a region."""

    index: int
    title: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_index(self.index)

    @property
    def name(self) -> str:
        """What is explained, in words."""
        return f"{self.title} of class {self.index} over {self.region_kind.name}"

    def check(self, logits: torch.Tensor) -> None:
        """Refuse logits (B, K, *S) without the class."""
        check_exists(self.index, logits)

    def prediction(self, logits: torch.Tensor) -> Prediction:
        """Return what a region may look at: the prediction of the class."""
        return Prediction(logits.detach(), self.index, overlapping(logits, self.activation))

    def others(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits (K - 1, n) of the other classes."""
        return torch.cat([logits[: self.index], logits[self.index + 1 :]])


@dataclass(frozen=True, eq=False)
class ClassLogOdds(ClassTarget):
    """The log-odds of a class against all others, summed over a region.

    z_c - log sum_{d != c} exp z_d; for sigmoid outputs z_c. Unlike a logit it does not change
    when one function is added to every logit, which changes no prediction. Default for a class.

    >>> logits = torch.tensor([[[2.0, -1.0], [0.0, 3.0]]])  # one item, two classes, two voxels
    >>> ClassLogOdds(0)(logits)
    tensor([2.])
    """

    index: int
    region: Region = "predicted"
    activation: Activation | None = None
    title = "log-odds"

    def values(self, logits: torch.Tensor, item: int) -> torch.Tensor:
        if overlapping(logits[None], self.activation):
            return logits[self.index]
        return logits[self.index] - self.others(logits).logsumexp(0)


@dataclass(frozen=True, eq=False)
class ClassLogit(ClassTarget):
    """The logit of a class, summed over a region: Seg-Grad-CAM (Vinogradova et al. 2020).

    >>> logits = torch.tensor([[[2.0, -1.0], [0.0, 3.0]]])
    >>> ClassLogit(1, region="volume")(logits)
    tensor([3.])
    """

    index: int
    region: Region = "predicted"
    activation: Activation | None = None
    title = "logit"

    def values(self, logits: torch.Tensor, item: int) -> torch.Tensor:
        return logits[self.index]


@dataclass(frozen=True, eq=False)
class ClassProbability(ClassTarget):
    """The probability of a class, summed over a region; its gradient sits at the boundary.

    Where the network is sure the gradient of a probability vanishes, so this explains where the
    mask ends rather than why it is there.

    >>> ClassProbability(0, region="volume")(torch.zeros(1, 2, 3))
    tensor([1.5000])
    """

    index: int
    region: Region = "predicted"
    activation: Activation | None = None
    title = "probability"

    def values(self, logits: torch.Tensor, item: int) -> torch.Tensor:
        return probability(logits, self.index, self.activation)


def probability(logits: torch.Tensor, index: int, activation: Activation | None) -> torch.Tensor:
    """Return the probability (n,) of a class of logits (K, n)."""
    if overlapping(logits[None], activation):
        return logits[index].sigmoid()
    return logits.softmax(0)[index]


@dataclass(frozen=True, eq=False)
class Contrast(ClassTarget):
    """What speaks for a class against one other: z_c - z_d, summed over a region.

    The region follows the prediction of c. Of a softmax it is the log-odds within the pair.

    Args:
        index: the class c.
        against: the class d.

    Raises:
        TargetError: one of them does not exist, or both are the same.

    >>> logits = torch.tensor([[[2.0, -1.0], [0.0, 3.0], [1.0, 1.0]]])
    >>> Contrast(0, 2)(logits)  # class 0 is predicted in the first voxel
    tensor([1.])
    """

    index: int
    against: int
    region: Region = "predicted"
    activation: Activation | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_index(self.against)
        if self.index == self.against:
            raise TargetError(f"class {self.index} against itself: give two different classes")

    @property
    def name(self) -> str:
        """What is explained, in words."""
        return (
            f"logit of class {self.index} against class {self.against} over {self.region_kind.name}"
        )

    def check(self, logits: torch.Tensor) -> None:
        """Refuse logits (B, K, *S) without the two classes."""
        check_has_others(self.index, logits, "A contrast")
        check_exists(self.index, logits)
        check_exists(self.against, logits)

    def values(self, logits: torch.Tensor, item: int) -> torch.Tensor:
        return logits[self.index] - logits[self.against]


@dataclass(frozen=True, eq=False)
class Finer(ClassTarget):
    """What sets a class apart from those it is mistaken for: Finer-CAM (Zhang et al. 2025).

    sum_d p_d (z_c - alpha z_d) / sum_d p_d over the other classes d, summed over a region, with
    the probabilities p (softmax, or a sigmoid's own) taken as constants. The region follows the
    prediction of c.

    Args:
        index: the class c.
        alpha: how much of the others is taken off; 0 leaves the logit.

    Raises:
        TargetError: the class does not exist, or there is no other.

    >>> logits = torch.tensor([[[2.0], [1.0], [1.0]]])  # two rivals of equal weight
    >>> Finer(0)(logits), Finer(0, alpha=0.5)(logits)
    (tensor([1.]), tensor([1.5000]))
    """

    index: int
    alpha: float = 1.0
    region: Region = "predicted"
    activation: Activation | None = None
    _shares: tuple[torch.Tensor, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha)

    @property
    def name(self) -> str:
        """What is explained, in words."""
        return (
            f"logit of class {self.index} less {self.alpha:g} x its rivals over "
            f"{self.region_kind.name}"
        )

    def check(self, logits: torch.Tensor) -> None:
        """Refuse logits (B, K, *S) without the class, or without another."""
        check_has_others(self.index, logits, "Finer-CAM")
        super().check(logits)

    def values(self, logits: torch.Tensor, item: int) -> torch.Tensor:
        rivals = self.others(logits)
        shares = self.shares(logits) if self._shares is None else self._shares[item]
        return logits[self.index] - self.alpha * (shares * rivals).sum(0)

    def shares(self, logits: torch.Tensor) -> torch.Tensor:
        """Return p_d / sum of p_d, (K - 1, n): also where every p_d rounds to zero."""
        rivals = self.others(logits.detach())
        if overlapping(logits[None], self.activation):
            rivals = torch.nn.functional.logsigmoid(rivals)
        return rivals.softmax(0)

    def fixed(self, logits: torch.Tensor) -> Finer:
        """Return the target over the voxels and with the probabilities of these logits."""
        target = super().fixed(logits)
        shares = tuple(self.shares(voxels) for _, voxels in target.voxels(logits))
        return replace(target, _shares=shares)


@dataclass(frozen=True, eq=False)
class MaskOutput(SumOverRegion):
    """The whole mask output, backpropagated with ones: the original recipe.

    All channels are summed, background included, so the map is not specific to a class.

    >>> MaskOutput()(torch.ones(1, 2, 4))
    tensor([8.])
    """

    region: Region = "volume"
    activation: Activation | None = None

    @property
    def name(self) -> str:
        """What is explained, in words."""
        return f"mask output (all channels) over {self.region_kind.name}"

    def values(self, logits: torch.Tensor, item: int) -> torch.Tensor:
        return logits.sum(0)


@dataclass(frozen=True, eq=False)
class SoftDice(OwnTarget):
    """The soft Dice of a class's probability p with a mask m: 2 sum(p m) / (sum p + sum m).

    Over the whole volume: what makes the network agree with this mask? (V-Net, Milletari et al.
    2016, with p instead of p squared in the denominator.)

    Args:
        index: the class.
        mask: zero and nonzero, as for a region.

    Raises:
        TargetError: the class does not exist, or the mask does not fit.
        EmptyRegionError: the mask is empty.

    >>> logits = torch.tensor([[[0.0, 0.0]]])  # p is a half in both voxels
    >>> SoftDice(0, torch.tensor([1, 0]))(logits)
    tensor([0.5000])
    """

    index: int
    mask: Mask
    activation: Activation | None = None

    def __post_init__(self) -> None:
        check_index(self.index)
        check_activation(self.activation)
        if not isinstance(self.mask, torch.Tensor | np.ndarray | OnItsGrid):
            raise TargetError(f"mask {self.mask!r}: legal are a tensor, an array or a Scan")

    @property
    def name(self) -> str:
        """What is explained, in words."""
        return f"soft Dice of class {self.index} with the given mask"

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the Dice (B,) of logits (B, K, *S)."""
        check_exists(self.index, logits)
        masks = nonzero(self.mask, (len(logits), *logits.shape[2:])).to(logits.device)
        return torch.stack([self._dice(*pair) for pair in zip(logits, masks, strict=True)])

    def _dice(self, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if not mask.any():
            raise EmptyRegionError(
                f"{self.name}: the mask is empty, so every prediction has a Dice of 0. Give a "
                "mask with a voxel in it"
            )
        p = probability(logits.reshape(len(logits), -1), self.index, self.activation)
        return 2 * p[mask.flatten()].sum() / (p.sum() + mask.sum())

    def regions(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the whole volume, (B, *S) bool."""
        return logits.new_ones(len(logits), *logits.shape[2:], dtype=torch.bool)

    def activated(self, activation: Activation) -> SoftDice:
        """Return the target with this activation, where none was given."""
        return self if self.activation else replace(self, activation=activation)

    def placed(self, move: Move) -> SoftDice:
        """Return the target with its mask brought onto the network's grid."""
        return replace(self, mask=placed_mask(self.mask, move))
