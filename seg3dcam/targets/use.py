"""What the rest of the package does with a target, the package's own or the user's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from seg3dcam.checks import is_whole
from seg3dcam.errors import TargetError
from seg3dcam.targets.arguments import Activation
from seg3dcam.targets.base import OwnTarget, as_own_target, checked_score, name_of
from seg3dcam.targets.combined import AnyTarget, WeightedSum
from seg3dcam.targets.families import OwnFamily, is_family
from seg3dcam.targets.masks import Move
from seg3dcam.targets.scores import ClassLogOdds, MaskOutput

_IN_PLACE = (
    "target '{}' changes the logits in place, which others read too: let it change a copy, "
    "logits.clone()"
)


def as_target(given: Any, activation: Activation = "softmax") -> AnyTarget:
    """Return a target: an int means `ClassLogOdds`, None the original recipe.

    Raises:
        TargetError: neither a class index nor callable, or a class where an instance is meant.
    """
    _refuse_class(given)
    if given is None:
        return MaskOutput(activation=activation)
    if is_whole(given):
        return ClassLogOdds(int(given), activation=activation)
    if isinstance(given, OwnTarget):
        return given.activated(activation)
    if is_family(given):
        raise TargetError(
            f"{given!r} stands for several targets: as_targets() lists them for given logits"
        )
    if callable(given):
        return given
    raise TargetError(
        f"target {given!r}: give a class index, a target such as targets.ClassLogit(1), or a "
        "function of logits (B, K, *S) that returns (B,)"
    )


def as_targets(
    given: Sequence[Any], logits: torch.Tensor, activation: Activation = "softmax"
) -> list[AnyTarget]:
    """Return a flat list of targets: families are expanded at these logits (B, K, *S).

    >>> from seg3dcam.targets import EveryComponent
    >>> logits = torch.tensor([[[3.0, -1.0, 2.0, 2.0]]])
    >>> [name_of(target) for target in as_targets([0, EveryComponent(0)], logits)]
    ... # doctest: +NORMALIZE_WHITESPACE
    ['log-odds of class 0 over the predicted mask',
     'log-odds of class 0 over component 0 of the predicted mask',
     'log-odds of class 0 over component 1 of the predicted mask']
    """
    flat: list[AnyTarget] = []
    for one in given:
        _refuse_class(one)
        if is_family(one):
            family = one.activated(activation) if isinstance(one, OwnFamily) else one
            flat += [as_target(target, activation) for target in family.expand(logits)]
        else:
            flat.append(as_target(one, activation))
    return flat


def _refuse_class(given: Any) -> None:
    """Refuse `ClassLogit` in the place of `ClassLogit(1)`."""
    if isinstance(given, type):
        name = given.__name__
        raise TargetError(f"target {name} is a class: give an instance, such as {name}(1)")


def fixed(target: AnyTarget, logits: torch.Tensor) -> AnyTarget:
    """Return the target with everything that depends on the prediction fixed at logits (B, K, *S).

    This fixes the voxels of its region, the probabilities of `Finer` and the best cells of
    `DetectionClass`. A method that changes the input uses the fixed target, so that every score is
    about the same voxels; it takes logits of the same shape. A function that does not come from
    this package is returned as it is.

    >>> from seg3dcam.targets import ClassLogit
    >>> target = fixed(ClassLogit(0), torch.tensor([[[1.0, -1.0]]]))  # the first voxel
    >>> target(torch.tensor([[[-5.0, 9.0]]]))
    tensor([-5.])
    """
    return target.fixed(logits.detach()) if isinstance(target, OwnTarget) else target


def placed(target: AnyTarget, move: Move) -> AnyTarget:
    """Return the target with every mask that knows where it lies brought to the network's grid.

    Such a mask has `data` and `affine`: a `Scan` or a MONAI MetaTensor. All others are on the
    network's grid already, and so is a MetaTensor of a target that is never placed.

    Args:
        move: called with such a mask; returns a plain tensor (*S) of the same labels (or bool).

    >>> from monai.data import MetaTensor
    >>> from seg3dcam.targets import ClassLogit
    >>> target = ClassLogit(0, MetaTensor(torch.tensor([1, 0])))
    >>> placed(target, lambda mask: mask.as_tensor().flip(0))(torch.tensor([[[3.0, 7.0]]]))
    tensor([7.])
    """
    return target.placed(move) if isinstance(target, OwnTarget) else target


def region_of(target: AnyTarget, logits: torch.Tensor) -> torch.Tensor | None:
    """Return the voxels that a target looks at, (B, *S) bool; None if it does not tell.

    A target of your own tells by a method `regions(logits)`. A sum looks at those of all its parts.
    """
    if isinstance(target, WeightedSum):
        found = [region_of(part, logits) for _, part in target.parts]
        if any(region is None for region in found):
            return None
        return torch.stack([region.cpu() for region in found if region is not None]).any(0)
    regions = getattr(target, "regions", None)
    return None if regions is None else regions(logits.detach())


def uses_truth(target: AnyTarget) -> bool:
    """Return whether ground truth chose the voxels, so that labels leak into the map.

    A mask that is given as it is may come from anywhere; it does not count.
    """
    return as_own_target(target).uses_truth


def score_and_seed(target: AnyTarget, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the score (B,) and its gradient with respect to the logits (B, K, *S).

    Raises:
        TargetError: the target is not a differentiable function (B, K, *S) -> (B,) of the logits.
    """
    leaf = logits.detach().requires_grad_()
    version = leaf._version
    try:
        with torch.enable_grad():
            score = checked_score(target, leaf)
            total = score.sum()
    except RuntimeError as error:
        if "in-place operation" not in str(error):
            raise
        raise TargetError(_IN_PLACE.format(name_of(target))) from error
    if leaf._version != version:  # of a detached view, or without gradients
        raise TargetError(_IN_PLACE.format(name_of(target)))
    seed = None
    if score.requires_grad:
        (seed,) = torch.autograd.grad(total, leaf, allow_unused=True)
    if seed is None:
        raise TargetError(
            f"target '{name_of(target)}' does not depend on the logits through a gradient "
            "(a comparison, argmax or detach() cuts it)"
        )
    return score.detach(), seed.contiguous()  # an expanded one cannot be changed in place
