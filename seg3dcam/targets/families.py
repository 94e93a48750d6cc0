"""Families: descriptions that become several targets once the prediction is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeGuard, TypeVar, runtime_checkable

import torch

from seg3dcam.errors import EmptyRegionError, TargetError
from seg3dcam.targets.arguments import Activation, check_activation, check_index, check_whole
from seg3dcam.targets.base import changed
from seg3dcam.targets.combined import AnyTarget
from seg3dcam.targets.connected_components import components, listed_sizes
from seg3dcam.targets.regions import Component, FixedComponent
from seg3dcam.targets.scores import ClassLogit, ClassLogOdds, overlapping

Self = TypeVar("Self", bound="OwnFamily")


@runtime_checkable
class TargetFamily(Protocol):
    """Several targets, listed once the logits are known."""

    def expand(self, logits: torch.Tensor) -> Sequence[AnyTarget]:
        """Return the targets at logits (B, K, *S)."""
        ...


def is_family(given: object) -> TypeGuard[TargetFamily]:
    """Return whether something is a family; a tensor, which has an `expand` too, is none."""
    return isinstance(given, TargetFamily) and not isinstance(given, torch.Tensor)


#: Makes a target of a class: a class of this package or a `functools.partial` of one. It is called
#: with the index and, by name, activation and (for components) region.
MakeTarget = Callable[..., AnyTarget]


class OwnFamily:
    """What the families of this package share."""

    score: MakeTarget
    activation: Activation | None

    def __post_init__(self) -> None:
        check_activation(self.activation)
        if not (isinstance(self.score, type | partial) and callable(self.score)):
            raise TargetError(
                f"score {self.score!r}: give the class of a target, such as ClassLogit, or "
                "functools.partial of one"
            )

    def activated(self: Self, activation: Activation) -> Self:
        """Return the family with this activation, where none was given."""
        return self if self.activation else changed(self, activation=activation)


@dataclass(frozen=True)
class EveryComponent(OwnFamily):
    """One target for every connected component of a class's predicted mask, largest first.

    The targets are fixed at the logits that they were expanded at.

    Args:
        index: the class.
        score: which target, `ClassLogOdds` or another class target.
        min_voxels: smaller components are left out.
        connectivity: as of `Component`.

    Raises:
        EmptyRegionError: there is no component of this size.
        TargetError: the items of a batch have different numbers of components.

    >>> logits = torch.tensor([[[3.0, -1.0, 2.0, 2.0]]])
    >>> [target(logits).item() for target in EveryComponent(0).expand(logits)]
    [4.0, 3.0]
    """

    index: int
    score: MakeTarget = ClassLogOdds
    min_voxels: int = 1
    connectivity: int = 1
    activation: Activation | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_index(self.index)
        check_whole("min_voxels", self.min_voxels, 1)
        check_whole("connectivity", self.connectivity, 1)

    def expand(self, logits: torch.Tensor) -> list[AnyTarget]:
        """Return the targets at logits (B, K, *S)."""
        ranks, count = self._components(logits)
        wanted = [Component(rank, connectivity=self.connectivity) for rank in range(count)]
        return [
            self.score(self.index, region=FixedComponent(ranks, region), activation=self.activation)
            for region in wanted
        ]

    def _components(self, logits: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return ranks (B, *S) and the number of components, which all items must share."""
        looked_at = ClassLogit(self.index, activation=self.activation)
        looked_at.check(logits)
        prediction = looked_at.prediction(logits)
        found = [components(mask, self.connectivity) for mask in prediction.mask()]
        sizes = [of_item for _, of_item in found]
        counts = [sum(size >= self.min_voxels for size in of_item) for of_item in sizes]
        if len(set(counts)) > 1:
            raise TargetError(
                f"the items of this batch have {', '.join(map(str, counts))} components of class "
                f"{self.index}, and a target is about every item. Explain the items one by one"
            )
        if counts[0] == 0:
            small = ""
            if sizes[0]:
                small = (
                    f"The predicted mask has {listed_sizes(sizes[0])}, none of at least "
                    f"{self.min_voxels}. "
                )
            raise EmptyRegionError(
                f"every component of class {self.index}: there is none. {small}"
                f"{prediction.described(0)}. To explain why it was missed, give a region"
            )
        return torch.stack([ranks for ranks, _ in found]), counts[0]


@dataclass(frozen=True)
class EveryClass(OwnFamily):
    """One target for every predicted foreground class: all but channel 0 of a softmax.

    A classifier (B, K) has no background: all its channels count.

    Args:
        score: which target, `ClassLogOdds` or another class target.

    Raises:
        EmptyRegionError: no foreground class is predicted.
        TargetError: the items of a batch have different classes.

    >>> logits = torch.tensor([[[3.0, -1.0], [0.0, 0.0], [1.0, 1.0]]])
    >>> [target.index for target in EveryClass().expand(logits)]
    [2]
    """

    score: MakeTarget = ClassLogOdds
    activation: Activation | None = None

    def expand(self, logits: torch.Tensor) -> list[AnyTarget]:
        """Return the targets at logits (B, K, *S)."""
        found = [self._classes(item) for item in logits.detach()]
        if any(classes != found[0] for classes in found):
            raise TargetError(
                f"the items of this batch have the classes {', '.join(map(str, found))}, and a "
                "target is about every item. Explain the items one by one"
            )
        if not found[0]:
            raise EmptyRegionError(
                "the network predicts no foreground class anywhere, so there is nothing to "
                "explain. Do orientation, spacing and intensity of the model fit the scan? To "
                "explain why a class was missed, name it and give a region"
            )
        return [self.score(index, activation=self.activation) for index in found[0]]

    def _classes(self, logits: torch.Tensor) -> list[int]:
        if overlapping(logits[None], self.activation):
            return [c for c, channel in enumerate(logits) if (channel > 0).any()]
        predicted = logits.argmax(0).unique().tolist()
        return [c for c in predicted if c or logits.ndim == 1]
