"""What a target is, and what the package's own targets have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch

from seg3dcam.errors import TargetError
from seg3dcam.targets.arguments import Activation
from seg3dcam.targets.masks import Move


@runtime_checkable
class Target(Protocol):
    """What is explained: call it with logits (B, K, *S), get a score (B,)."""

    name: str

    def __call__(self, logits: torch.Tensor) -> torch.Tensor: ...


Own = TypeVar("Own", bound="OwnTarget")
Made = TypeVar("Made")


class OwnTarget:
    """What the package's own targets can do beyond being called."""

    @property
    def name(self) -> str:
        """What is explained, in words."""
        raise NotImplementedError

    @property
    def uses_truth(self) -> bool:
        """Whether ground truth chose the voxels."""
        return False

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the score (B,) of logits (B, K, *S)."""
        raise NotImplementedError

    def activated(self: Own, activation: Activation) -> Own:
        """Return the target with this activation, where none was given."""
        return self

    def fixed(self: Own, logits: torch.Tensor) -> Own:
        """Return the target with all that depends on the prediction fixed at these logits."""
        return self

    def placed(self: Own, move: Move) -> Own:
        """Return the target with its masks brought onto the network's grid."""
        return self


def changed(target: Made, **fields: Any) -> Made:
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
