"""What a target is, and what the package's own targets have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
import torch

from seg3dcam.errors import TargetError
from seg3dcam.targets.arguments import Activation
from seg3dcam.targets.masks import Move
from seg3dcam.targets.regions import Predicted, RegionKind, Volume, as_region


@runtime_checkable
class Target(Protocol):
    """What is explained: call it with logits (B, K, *S), get a score (B,)."""

    name: str

    def __call__(self, logits: torch.Tensor) -> torch.Tensor: ...


Self = TypeVar("Self", bound="OwnTarget")
T = TypeVar("T")


class OwnTarget:
    """What the package's own targets can do beyond being called.

    Its class and region are read from the fields `index`, `against` and `region`, if it has them.
    """

    @property
    def name(self) -> str:
        """What is explained, in words."""
        raise NotImplementedError

    @property
    def class_index(self) -> int | None:
        """The class that the score is about, None if it is not about one class by its number."""
        index = self._field("index")
        return int(index) if isinstance(index, int | np.integer) else None

    @property
    def other_class_index(self) -> int | None:
        """The class that it is compared with, None if there is none."""
        index: int | None = self._field("against")
        return index

    @property
    def region_kind(self) -> RegionKind | None:
        """The region that the score sums over, None if it does not sum over one."""
        region = self._field("region")
        return None if region is None else as_region(region)

    @property
    def is_sum(self) -> bool:
        """Whether the score is a sum over the voxels of its region; a Dice, say, is not."""
        return False

    @property
    def uses_truth(self) -> bool:
        """Whether ground truth chose the voxels."""
        return False

    @property
    def over_mask(self) -> bool:
        """Whether the score sums over the predicted mask."""
        return isinstance(self.region_kind, Predicted)

    @property
    def over_special_region(self) -> bool:
        """Whether it sums over anything but the predicted mask and the whole volume."""
        kind = self.region_kind
        return kind is not None and not isinstance(kind, Predicted | Volume)

    @property
    def of_component(self) -> bool:
        """Whether it sums over one connected component of the predicted mask."""
        return self.region_kind is not None and self.region_kind.is_component

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the score (B,) of logits (B, K, *S)."""
        raise NotImplementedError

    def activated(self: Self, activation: Activation) -> Self:
        """Return the target with this activation, where none was given."""
        return self

    def fixed(self: Self, logits: torch.Tensor) -> Self:
        """Return the target with all that depends on the prediction fixed at these logits."""
        return self

    def placed(self: Self, move: Move) -> Self:
        """Return the target with its masks brought onto the network's grid."""
        return self

    def _field(self, name: str) -> Any:
        """Return a field, None if there is no such field."""
        return getattr(self, name, None)


@dataclass(frozen=True, eq=False)
class UserTarget(OwnTarget):
    """A function of the user's own, which is asked like the package's own targets.

    It answers by attributes named as the fields of `OwnTarget`, and by `uses_truth`.
    """

    function: Callable[[torch.Tensor], torch.Tensor]

    @property
    def name(self) -> str:
        """What is explained, in words."""
        return name_of(self.function)

    @property
    def uses_truth(self) -> bool:
        """Whether ground truth chose the voxels, as far as the function tells."""
        return bool(self._field("uses_truth"))

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the score (B,) of logits (B, K, *S)."""
        return self.function(logits)

    def _field(self, name: str) -> Any:
        """Return an attribute of the function, None if there is no such attribute."""
        return getattr(self.function, name, None)


def as_own_target(target: Callable[[torch.Tensor], torch.Tensor]) -> OwnTarget:
    """Return a target that can be asked which class and region it is about, whoever wrote it.

    >>> def total(logits):
    ...     return logits.flatten(1).sum(1)
    >>> as_own_target(total).name, as_own_target(total).class_index
    ('total', None)
    """
    return target if isinstance(target, OwnTarget) else UserTarget(target)


def changed(target: T, **fields: Any) -> T:
    """Return a copy of a frozen dataclass with other values in some of its fields."""
    return replace(cast(Any, target), **fields)


def name_of(target: Any) -> str:
    """Return the name under which a target is recorded."""
    return str(getattr(target, "name", None) or getattr(target, "__name__", type(target).__name__))


def checked_score(target: Any, logits: torch.Tensor) -> torch.Tensor:
    """Return a target's score, which must be (B,).

    Raises:
        TargetError: it is something else.
    """
    score = target(logits)
    if not isinstance(score, torch.Tensor) or score.shape != logits.shape[:1]:
        found = tuple(score.shape) if isinstance(score, torch.Tensor) else type(score).__name__
        raise TargetError(
            f"target '{name_of(target)}' must return one score per item, shape "
            f"{tuple(logits.shape[:1])}; it returned {found}"
        )
    if score.is_complex():
        raise TargetError(
            f"target '{name_of(target)}' returned complex scores; a score is a real number, such "
            "as its .real or .abs()"
        )
    return score
