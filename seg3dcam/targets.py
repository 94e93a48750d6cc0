"""Which scalar is explained: a target maps logits (B, K, *S) to one score per item, (B,).

Any callable of that form is a target. Those of this file sum a value per voxel over a region:

| target         | value at a voxel                                    |
|----------------|-----------------------------------------------------|
| `ClassLogOdds` | z_c - log sum of exp z_d over the other classes d    |
| `ClassLogit`   | z_c (Seg-Grad-CAM)                                  |
| `ClassProbability` | softmax or sigmoid of z at c: explains the boundary |
| `MaskOutput`   | sum of all z: the original recipe, no single class  |

and the regions are

| region             | voxels                                                          |
|--------------------|-----------------------------------------------------------------|
| `"predicted"`      | where the class is predicted: arg-max, or logit > 0 for sigmoid |
| `"volume"`         | all                                                             |
| a tensor or array  | where it is nonzero: (*S), (B, *S) or (B, 1, *S)                |
| `Box(start, stop)` | start <= index < stop along each axis                           |
| `Voxel(index)`     | one voxel                                                       |

Indices are voxels of the network's input. Whether classes exclude each other (softmax) or may
overlap (sigmoid) a target takes from the model, unless it is given; on its own it means softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from monai.data import MetaTensor

from seg3dcam.errors import EmptyRegionError, TargetError, nearest

Activation = Literal["softmax", "sigmoid"]


@runtime_checkable
class Target(Protocol):
    """What is explained: call it with logits (B, K, *S), get a score (B,)."""

    name: str

    def __call__(self, logits: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Box:
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
        mask = torch.zeros(tuple(shape), dtype=torch.bool)
        mask[tuple(map(slice, self.start, self.stop))] = True
        return mask

    def __str__(self) -> str:
        return f"box {list(self.start)} to {list(self.stop)}"


def Voxel(index: Sequence[int]) -> Box:  # noqa: N802 (reads as the region that it is)
    """Return the region of one voxel.

    >>> Voxel((1, 0)).mask((2, 2)).tolist()
    [[False, False], [True, False]]
    """
    return Box(tuple(index), tuple(i + 1 for i in index))


Region = Literal["predicted", "volume"] | Box | torch.Tensor | np.ndarray


class _RegionTarget:
    """A value per voxel, summed over a region."""

    region: Region
    activation: Activation | None

    def __post_init__(self) -> None:
        if self.activation not in ("softmax", "sigmoid", None):
            raise TargetError(f"activation {self.activation!r}: legal are 'softmax' and 'sigmoid'")
        if isinstance(self.region, str) and self.region not in ("predicted", "volume"):
            raise TargetError(
                f"region {self.region!r}: {nearest(self.region, ('predicted', 'volume'))} "
                "A mask, Box or Voxel works too"
            )
        if not isinstance(self.region, str | Box | torch.Tensor | np.ndarray):
            raise TargetError(
                f"region {self.region!r}: legal are 'predicted', 'volume', a mask as tensor or "
                "array, Box and Voxel"
            )

    @property
    def name(self) -> str:
        raise NotImplementedError

    def values(self, logits: torch.Tensor) -> torch.Tensor:
        """Return one value per voxel, (n,), of the logits (K, n) of n voxels."""
        raise NotImplementedError

    def predicted(self, logits: torch.Tensor) -> torch.Tensor:
        """Return where one item's logits (K, *S) predict what this target is about."""
        raise NotImplementedError

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the score (B,) of logits (B, K, *S)."""
        if isinstance(self.region, str) and self.region == "volume":  # no mask: less memory
            return torch.stack([self.values(item.reshape(len(item), -1)).sum() for item in logits])
        masks = self.regions(logits)
        return torch.stack(
            [
                self.values(item[:, mask]).sum()
                for item, mask in zip(logits, masks.to(logits.device), strict=True)
            ]
        )

    def regions(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the voxels that are summed over, (B, *S) bool.

        Raises:
            TargetError: the region does not fit the logits' shape.
            EmptyRegionError: an item's region holds no voxel.
        """
        batch, _, *shape = logits.shape
        if isinstance(self.region, Box):
            mask = self.region.mask(shape).expand(batch, *shape)
        elif not isinstance(self.region, str):
            mask = _given_mask(self.region, batch, shape)
        elif self.region == "volume" or not shape:  # a classifier has but one place
            mask = torch.ones(batch, *shape, dtype=torch.bool)
        else:
            mask = torch.stack([self.predicted(item) for item in logits.detach()])
        for item in range(batch):
            if not mask[item].any():
                raise EmptyRegionError(
                    f"{self.name}: the region is empty"
                    + (f" in item {item} of the batch" if batch > 1 else "")
                    + f". {self._what_is_predicted(logits[item].detach())}. To explain it all the "
                    "same, give a region: 'volume', a mask, Box or Voxel"
                )
        return mask

    def _what_is_predicted(self, logits: torch.Tensor) -> str:
        if len(logits) == 1 or self.activation == "sigmoid":
            present = [(c, int((logits[c] > 0).sum())) for c in range(len(logits))]
        else:
            counts = torch.bincount(logits.argmax(0).flatten(), minlength=len(logits))
            present = list(enumerate(counts.tolist()))
        listed = ", ".join(f"class {c} in {n} voxels" for c, n in present if n)
        return f"Predicted: {listed or 'no class anywhere'}"

    def _region_name(self) -> str:
        if isinstance(self.region, str):
            return {"predicted": "predicted mask", "volume": "whole volume"}[self.region]
        return str(self.region) if isinstance(self.region, Box) else "given mask"


@dataclass(frozen=True, eq=False)
class _ClassTarget(_RegionTarget):
    index: int
    region: Region = "predicted"
    activation: Activation | None = None
    title: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.index, bool) or not isinstance(self.index, int | np.integer):
            raise TargetError(f"a class is given by its index, a whole number; got {self.index!r}")

    @property
    def name(self) -> str:
        return f"{self.title} of class {self.index} over the {self._region_name()}"

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the score (B,) of logits (B, K, *S)."""
        classes = logits.shape[1]
        if not 0 <= self.index < classes:
            raise TargetError(
                f"class {self.index} does not exist: the network's output has {classes} "
                f"channel{'s' * (classes > 1)}, so classes 0 to {classes - 1} are legal"
            )
        return super().__call__(logits)

    def predicted(self, logits: torch.Tensor) -> torch.Tensor:
        if self._is_binary(logits):
            return logits[self.index] > 0
        return logits.argmax(0) == self.index

    def _is_binary(self, logits: torch.Tensor) -> bool:
        return self.activation == "sigmoid" or len(logits) == 1


class ClassLogOdds(_ClassTarget):
    """The log-odds of a class against all others, summed over a region.

    z_c - log sum_{d != c} exp z_d; for sigmoid outputs z_c. Unlike a logit it does not change
    when one function is added to every logit, which changes no prediction. Default for a class.

    >>> logits = torch.tensor([[[2.0, -1.0], [0.0, 3.0]]])  # one item, two classes, two voxels
    >>> ClassLogOdds(0)(logits)
    tensor([2.])
    """

    title = "log-odds"

    def values(self, logits: torch.Tensor) -> torch.Tensor:
        if self._is_binary(logits):
            return logits[self.index]
        others = [c for c in range(len(logits)) if c != self.index]
        return logits[self.index] - logits[others].logsumexp(0)


class ClassLogit(_ClassTarget):
    """The logit of a class, summed over a region: Seg-Grad-CAM (Vinogradova et al. 2020).

    >>> logits = torch.tensor([[[2.0, -1.0], [0.0, 3.0]]])
    >>> ClassLogit(1, region="volume")(logits)
    tensor([3.])
    """

    title = "logit"

    def values(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[self.index]


class ClassProbability(_ClassTarget):
    """The probability of a class, summed over a region; its gradient sits at the boundary.

    Where the network is sure the gradient of a probability vanishes, so this explains where the
    mask ends rather than why it is there.

    >>> ClassProbability(0, region="volume")(torch.zeros(1, 2, 3))
    tensor([1.5000])
    """

    title = "probability"

    def values(self, logits: torch.Tensor) -> torch.Tensor:
        if self._is_binary(logits):
            return logits[self.index].sigmoid()
        return logits.softmax(0)[self.index]


@dataclass(frozen=True, eq=False)
class MaskOutput(_RegionTarget):
    """The whole mask output, backpropagated with ones: the original recipe.

    All channels are summed, background included, so the map is not specific to a class.

    >>> MaskOutput()(torch.ones(1, 2, 4))
    tensor([8.])
    """

    region: Region = "volume"
    activation: Activation | None = None

    @property
    def name(self) -> str:
        return f"mask output (all channels) over the {self._region_name()}"

    def values(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sum(0)

    def predicted(self, logits: torch.Tensor) -> torch.Tensor:
        if len(logits) == 1 or self.activation == "sigmoid":
            return (logits > 0).any(0)
        return logits.argmax(0) != 0


def as_target(given: Any, activation: Activation = "softmax") -> Callable[..., torch.Tensor]:
    """Return a target: an int means `ClassLogOdds`, None the original recipe.

    Raises:
        TargetError: neither a class index nor callable.
    """
    if given is None:
        return MaskOutput(activation=activation)
    if isinstance(given, int | np.integer) and not isinstance(given, bool):
        return ClassLogOdds(int(given), activation=activation)
    if isinstance(given, _RegionTarget) and given.activation is None:
        return replace(given, activation=activation)  # type: ignore[type-var]
    if callable(given):
        return given
    raise TargetError(
        f"target {given!r}: give a class index, a target such as targets.ClassLogit(1), or a "
        "function of logits (B, K, *S) that returns (B,)"
    )


def name_of(target: Callable[..., torch.Tensor]) -> str:
    """Return the name under which a target is recorded."""
    return str(getattr(target, "name", None) or getattr(target, "__name__", type(target).__name__))


def score_and_seed(
    target: Callable[..., torch.Tensor], logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the score (B,) and its gradient with respect to the logits (B, K, *S).

    Raises:
        TargetError: the target is not a differentiable function (B, K, *S) -> (B,) of the logits.
    """
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        score = target(leaf)
        total = score.sum() if isinstance(score, torch.Tensor) else None
    if not isinstance(score, torch.Tensor) or score.shape != leaf.shape[:1]:
        found = tuple(score.shape) if isinstance(score, torch.Tensor) else type(score).__name__
        raise TargetError(
            f"target '{name_of(target)}' must return one score per item, shape "
            f"{tuple(leaf.shape[:1])}; it returned {found}"
        )
    seed = None
    if score.requires_grad:
        (seed,) = torch.autograd.grad(total, leaf, allow_unused=True)
    if seed is None:
        raise TargetError(
            f"target '{name_of(target)}' does not depend on the logits through a gradient "
            "(a comparison, argmax or detach() cuts it)"
        )
    return score.detach(), seed.contiguous()  # an expanded one cannot be changed in place


def _given_mask(mask: torch.Tensor | np.ndarray, batch: int, shape: Sequence[int]) -> torch.Tensor:
    given = torch.as_tensor(mask).detach().cpu()
    if isinstance(given, MetaTensor):
        given = given.as_tensor()
    if given.is_floating_point() and not torch.isfinite(given).all():
        raise TargetError("the mask holds values that are NaN or infinite; legal are numbers")
    given = given != 0
    full = (batch, *shape)
    if given.shape == (batch, 1, *shape):
        given = given[:, 0]
    if given.shape == tuple(shape):
        given = given.expand(full)
    if given.shape != full:
        raise TargetError(
            f"the mask has shape {tuple(torch.as_tensor(mask).shape)}; legal for these logits are "
            f"{tuple(shape)}, {full} and {(batch, 1, *shape)}"
        )
    return given
