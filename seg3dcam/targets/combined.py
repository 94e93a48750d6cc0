"""Several targets added up to one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from seg3dcam.errors import TargetError
from seg3dcam.targets.arguments import Activation, check_number
from seg3dcam.targets.base import OwnTarget, as_own_target, checked_score, name_of
from seg3dcam.targets.masks import Move

AnyTarget = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class WeightedSum(OwnTarget):
    """A weighted sum of targets: sum of w_i times score_i.

    Args:
        parts: (weight, target) pairs; a target is one of this package or a function of your own.

    Raises:
        TargetError: a weight is no finite number, a target cannot be called, there is no part.

    >>> from seg3dcam.targets import ClassLogit
    >>> both = WeightedSum([(1, ClassLogit(0, "volume")), (-0.5, ClassLogit(1, "volume"))])
    >>> both(torch.ones(1, 2, 4))
    tensor([2.])
    >>> both.name
    '1 x [logit of class 0 over the whole volume] - 0.5 x [logit of class 1 over the whole volume]'
    """

    parts: Sequence[tuple[float, AnyTarget]]

    def __post_init__(self) -> None:
        parts = tuple(self.parts)
        if not parts:
            raise TargetError("a sum of no targets: give at least one (weight, target)")
        for part in parts:
            if not isinstance(part, tuple | list) or len(part) != 2:
                raise TargetError(f"{part!r} in a sum of targets: legal are (weight, target) pairs")
            check_number("the weight of a target", part[0])
            if not callable(part[1]):
                raise TargetError(
                    f"{part[1]!r} in a sum of targets: give a target such as targets.ClassLogit(1) "
                    "or a function of logits; expand a family first"
                )
        object.__setattr__(self, "parts", tuple((weight, target) for weight, target in parts))

    @property
    def name(self) -> str:
        """What is explained, in words."""
        first, *rest = ((weight, f"[{name_of(target)}]") for weight, target in self.parts)
        signed = [f"{'-' if weight < 0 else '+'} {abs(weight):g} x {name}" for weight, name in rest]
        return " ".join([f"{first[0]:g} x {first[1]}", *signed])

    @property
    def is_sum(self) -> bool:
        """Whether every part is a sum over the voxels of its region."""
        return all(as_own_target(target).is_sum for _, target in self.parts)

    @property
    def uses_truth(self) -> bool:
        """Whether ground truth chose the voxels of a part."""
        return any(as_own_target(target).uses_truth for _, target in self.parts)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the score (B,) of logits (B, K, *S)."""
        scores = [weight * checked_score(target, logits) for weight, target in self.parts]
        return torch.stack(scores).sum(0)

    def activated(self, activation: Activation) -> WeightedSum:
        """Return the sum of the parts with this activation, where none was given."""
        return self._each(lambda part: part.activated(activation))

    def fixed(self, logits: torch.Tensor) -> WeightedSum:
        """Return the sum with everything that depends on the prediction fixed in its parts."""
        return self._each(lambda part: part.fixed(logits))

    def placed(self, move: Move) -> WeightedSum:
        """Return the sum of the parts with their masks on the network's grid."""
        return self._each(lambda part: part.placed(move))

    def _each(self, change: Callable[[OwnTarget], OwnTarget]) -> WeightedSum:
        return WeightedSum(
            [
                (weight, change(target) if isinstance(target, OwnTarget) else target)
                for weight, target in self.parts
            ]
        )
