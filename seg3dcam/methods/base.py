"""What every formula says of itself, and the formulas that work window by window.

A formula of activations and gradients is written in steps, which are the same for one window as
for a volume of a thousand:

    survey    sums over the activations of all windows            (many formulas: none)
    weigh     sums over the gradients of the windows that have one (many formulas: none)
    weights   the channel weights that follow from both
    map       the map of one window, with these weights
    finish    what is done to the complete map

The gradient of a window carries the window's share in the volume. So whatever contains a gradient
is summed over windows, and a map of activations alone is blended by the shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch

Self = TypeVar("Self", bound="Formula")

#: The way of a formula through the engine, see `seg3dcam.engine.run`.
Route = Literal["gradients", "curvature", "rescoring", "full_gradients", "input"]

#: Numbers in a block of voxels that is copied in double precision: 16 MB.
BLOCK = 1 << 21

#: Named sums over voxels, which add up over windows.
Sums = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Weights:
    """Channel weights.

    Attributes:
        values: (B, C), or (B, C, *S') with S' being 1 or S along each axis.
        ceiling: the weights if no contributions cancelled each other; shaped as `values`.
        degenerate: (B,) bool, True where the method is undefined.
    """

    values: torch.Tensor
    ceiling: torch.Tensor
    degenerate: torch.Tensor | None = None


@dataclass(frozen=True)
class Formula:
    """Base of all formulas. A formula's fields are its settings.

    Attributes:
        route: the way that it goes through the engine.
        explains: whether its maps lie on the target layers, or on the input.
        gradients_at: where the gradients are taken that the map is made of.
        own_logits: True where, for one member of an ensemble, it needs the logits of that member,
            and not those of the ensemble alone.
    """

    route: ClassVar[Route]
    explains: ClassVar[Literal["layers", "input"]] = "layers"
    own_logits: ClassVar[bool] = False

    @property
    def gradients_at(self) -> Literal["layers", "input", "nothing"]:
        return "nothing"

    @property
    def own_settings(self) -> dict[str, str]:
        """The settings that a caller may give: the name of each and the field that holds it."""
        return {field.name: field.name for field in fields(self)}

    def with_settings(self: Self, settings: Mapping[str, Any]) -> Self:
        """Return this formula with some settings changed; `own_settings` lists the legal names."""
        return replace(self, **{self.own_settings[name]: v for name, v in settings.items()})

    def needs_activations(self, weights_are_shared: bool) -> bool:
        """Tell whether activations are needed apart from gradients.

        Args:
            weights_are_shared: True where several windows have their channel weights in common.
        """
        return False

    def whole_axes(self, ndim: int) -> tuple[int, ...]:
        """Return the spatial axes, of `ndim`, along which all windows share their weights."""
        return ()


class StepwiseFormula(Formula):
    """Base of the formulas of activations and gradients (B, C, *S); a raw map (B, *S) comes out.

    Attributes:
        order: derivatives of the score that are needed: 0, 1 or 2.
        nonnegative: True where the formula is meant for activations that are not negative.
        agnostic: True where the map is the same for every target.
    """

    route: ClassVar[Route] = "gradients"
    order: ClassVar[int] = 1
    nonnegative: ClassVar[bool] = False

    @property
    def agnostic(self) -> bool:
        return self.order == 0

    @property
    def gradients_at(self) -> Literal["layers", "input", "nothing"]:
        return "layers" if self.order else "nothing"

    def needs_activations(self, weights_are_shared: bool) -> bool:
        return weights_are_shared or not self.order

    def __call__(
        self, activations: torch.Tensor, gradients: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the raw map (B, *S)."""
        if gradients is None and self.order:
            raise TypeError(f"{type(self).__name__} needs gradients, (B, C, *S) as the activations")
        weights = self.weights_of_all(activations, gradients)
        return self.finish(self.map(activations, gradients, weights), weights)

    def weights_of_all(self, activations: torch.Tensor, gradients: torch.Tensor | None) -> Any:
        """Return the weights, given all voxels of the layer."""
        shape = activations.shape[2:]
        survey = self.survey(activations, activations.new_ones(shape))
        weighed = {} if gradients is None else self.weigh(activations, gradients, survey)
        voxels = float(torch.Size(shape[a] for a in self.whole_axes(len(shape))).numel())
        return self.weights(survey, weighed, voxels, missing=False)

    def whole_axes(self, ndim: int) -> tuple[int, ...]:
        return tuple(range(ndim))

    @property
    def surveys(self) -> bool:
        """Whether the activations of all windows are needed before any map can be made."""
        return type(self).survey is not StepwiseFormula.survey

    @property
    def finishes(self) -> bool:
        """Whether something is done to the complete map."""
        return type(self).finish is not StepwiseFormula.finish

    def maps_gradients(self, ndim: int) -> bool:
        """Whether a window's map contains the window's own gradient."""
        return False

    def survey(self, a: torch.Tensor, shares: torch.Tensor) -> Sums:
        """Return sums over the activations of a window, whose voxels count by `shares` (*S)."""
        return {}

    def weigh(self, a: torch.Tensor, g: torch.Tensor, survey: Sums) -> Sums:
        """Return sums over the gradients of a window."""
        return {}

    def join(self, sums: Sums, more: Sums) -> Sums:
        """Return the sums of two windows, or groups of windows, taken together."""
        return {name: sums[name] + more[name] for name in sums}

    def weights(self, survey: Sums, weighed: Sums, voxels: float, *, missing: bool) -> Any:
        """Return the weights of all windows that share them.

        Args:
            voxels: how many the volume's feature grid has along the axes that are pooled whole.
            missing: True where some of these windows have no gradient.
        """
        return None

    def features(self, a: torch.Tensor, g: torch.Tensor | None) -> torch.Tensor:
        """Return what is weighted and summed over channels, (B, C, *S)."""
        return a

    def map(self, a: torch.Tensor, g: torch.Tensor | None, weights: Any) -> torch.Tensor:
        """Return a window's map (B, *S)."""
        return weighted_sum(self.features(a, g), weights.values)

    def ceiling(self, a: torch.Tensor, g: torch.Tensor | None, weights: Any) -> torch.Tensor:
        """Return the map if no contributions cancelled each other.

        A map far below it is rounding noise.
        """
        return weighted_size(self.features(a, g), weights.ceiling)

    def finish(self, values: torch.Tensor, weights: Any) -> torch.Tensor:
        """Return the map (B, *S), given the complete one of the volume."""
        return values


def weighted_sum(activations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the sum over channels of weights x activations: (B, *S).

    Args:
        activations: (B, C, *S).
        weights: (B, C), or (B, C, *S') with S' being 1 or S along each axis.
    """
    return torch.einsum("bc...,bc...->b...", activations, weights.to(activations))


def weighted_size(activations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return `weighted_sum` of the absolute activations.

    With one weight per channel it goes block by block, so that no second copy of the activations
    is held in memory.
    """
    if weights.ndim > 2:
        return weighted_sum(activations.abs(), weights)
    parts = [weighted_sum(block.abs(), weights) for (block,) in in_blocks([activations.flatten(2)])]
    return torch.cat(parts, -1).reshape(len(activations), *activations.shape[2:])


def positive_part(values: torch.Tensor) -> torch.Tensor:
    """Return ReLU of the values, with NaN where they are minus infinity, which 0 would hide.

    >>> positive_part(torch.tensor([2.0, -3.0, float("-inf")])).tolist()
    [2.0, 0.0, nan]
    """
    kept = values.relu()
    if not values.numel() or values.amin() > -torch.inf:
        return kept
    return kept.masked_fill_(values.isneginf(), float("nan"))


def positive_side_up(values: torch.Tensor) -> torch.Tensor:
    """Return each item (B, *S) with the sign that makes its largest deviation from 0 positive.

    >>> positive_side_up(torch.tensor([[1.0, -3.0], [2.0, -1.0]])).tolist()
    [[-1.0, 3.0], [2.0, -1.0]]
    """
    flat = values.flatten(1)
    flip = torch.where(flat.amin(1).abs() > flat.amax(1).abs(), -1, 1).to(values)
    return values * for_each_item(flip, values.ndim)


def for_each_item(numbers: torch.Tensor, ndim: int) -> torch.Tensor:
    """Return (B,) or (B, C) numbers with as many axes of length 1 as make `ndim`."""
    return numbers.reshape(*numbers.shape, *[1] * (ndim - numbers.ndim))


def exact_dtype(values: torch.Tensor) -> torch.dtype:
    """Return the dtype in which long sums are taken: float64, except on MPS, which has none."""
    return values.dtype if values.device.type == "mps" else torch.float64


def in_blocks(values: Sequence[torch.Tensor]) -> Any:
    """Yield tensors (..., N) in blocks of voxels, so that copies of them stay small."""
    size = max(1, BLOCK // max(1, values[0][..., 0].numel()))
    return zip(*(v.split(size, dim=-1) for v in values), strict=True)
