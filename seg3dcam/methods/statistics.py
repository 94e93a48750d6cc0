"""Formulas with one number per channel: those of Grad-CAM++, XGrad-CAM, FEM and random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from seg3dcam.checks import is_whole
from seg3dcam.errors import ConfigError
from seg3dcam.methods.base import (
    StepwiseFormula,
    Sums,
    Weights,
    exact_dtype,
    for_each_item,
    in_blocks,
    positive_part,
)

#: A sum of A below this fraction of the sum of |A| is rounding noise, and no divisor.
CANCELLED = 1e-5


def summed(
    values: torch.Tensor, shares: torch.Tensor | None = None, power: int = 1
) -> torch.Tensor:
    """Return the sum over voxels (B, C) of the power of (B, C, *S), in double precision."""
    shares = values.new_ones(values.shape[2:]) if shares is None else shares.to(values)
    dtype = exact_dtype(values)
    total = torch.zeros(values.shape[:2], dtype=dtype, device=values.device)
    for block, share in in_blocks([values.flatten(2), shares.flatten()]):
        wide = block.to(dtype)
        total += (wide if power == 1 else wide.pow(power)) @ share.to(dtype)
    return total


class AlphaWeights(StepwiseFormula):
    """w_k = sum_u g / (2 + S_k g), with g = ReLU(G_k) and S_k = sum_u A_k.

    This is alpha of the paper on Grad-CAM++, G^2 / (2 G^2 + S_k G^3), times ReLU(G). G^2 is
    cancelled, so that the division needs no epsilon.

    >>> A, G = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, -1.0]]])
    >>> AlphaWeights()(A, G).tolist()  # S = 3, w = 1 / (2 + 3)
    [[0.20000000298023224, 0.4000000059604645]]
    """

    nonnegative = True

    def survey(self, a: torch.Tensor, shares: torch.Tensor) -> Sums:
        return {"sum": summed(a, shares)}

    def weigh(self, a: torch.Tensor, g: torch.Tensor, survey: Sums) -> Sums:
        g = positive_part(g)
        scale = for_each_item(survey["sum"].to(g), g.ndim)
        return {"weight": summed(g / (2 + scale * g))}

    def weights(self, survey: Sums, weighed: Sums, voxels: float, *, missing: bool) -> Weights:
        return Weights(weighed["weight"], weighed["weight"])


class ActivationWeightedGradient(StepwiseFormula):
    """w_k = sum_u G_k A_k / S_k, with S_k = sum_u A_k.

    After InstanceNorm S_k is 0. Such channels get the weight 0, and the map's status is
    "degenerate".
    """

    def survey(self, a: torch.Tensor, shares: torch.Tensor) -> Sums:
        return {"sum": summed(a, shares), "absolute": summed(a.abs(), shares)}

    def weigh(self, a: torch.Tensor, g: torch.Tensor, survey: Sums) -> Sums:
        return {"product": summed(g * a), "absolute": summed((g * a).abs())}

    def weights(self, survey: Sums, weighed: Sums, voxels: float, *, missing: bool) -> Weights:
        undefined = survey["sum"].abs() <= CANCELLED * survey["absolute"]
        divisor = survey["sum"].masked_fill(undefined, 1)
        counts = undefined & (weighed["absolute"] > 0)
        return Weights(
            (weighed["product"] / divisor).masked_fill(undefined, 0),
            (weighed["absolute"] / divisor.abs()).masked_fill(undefined, 0),
            counts.any(1),
        )


@dataclass(frozen=True)
class _Thresholds(Weights):
    threshold: torch.Tensor | None = None


class FarAboveMean(StepwiseFormula):
    """sum_k mean(A_k) [A_k > mu_k + 2 sigma_k]: where channels are far above their mean."""

    order = 0

    def survey(self, a: torch.Tensor, shares: torch.Tensor) -> Sums:
        count = shares.sum(dtype=exact_dtype(a)).expand(len(a), 1)
        return {"count": count, "sum": summed(a, shares), "squares": summed(a, shares, power=2)}

    def weights(self, survey: Sums, weighed: Sums, voxels: float, *, missing: bool) -> Weights:
        mean = survey["sum"] / survey["count"]
        deviation = (survey["squares"] / survey["count"] - mean * mean).clamp(min=0).sqrt()
        # The mean of a constant channel is rounded, and no voxel may stand out by that.
        rounding = 1e4 * torch.finfo(mean.dtype).eps * mean.abs()
        return _Thresholds(mean, mean.abs(), None, mean + 2 * deviation + rounding)

    def map(self, a: torch.Tensor, g: torch.Tensor | None, weights: Any) -> torch.Tensor:
        far_above = a > for_each_item(weights.threshold, a.ndim)
        return (far_above * for_each_item(weights.values.to(a), a.ndim)).sum(1)

    def ceiling(self, a: torch.Tensor, g: torch.Tensor | None, weights: Any) -> torch.Tensor:
        return self.map(a, g, weights).abs()


@dataclass(frozen=True)
class RandomWeights(StepwiseFormula):
    """Channel weights drawn evenly from -1 to 1: the control that every method must beat.

    Attributes:
        seed: of the drawing; every item and every window gets the same weights.
    """

    seed: int = 0
    order = 0

    def __post_init__(self) -> None:
        if not is_whole(self.seed) or not -(2**63) <= self.seed < 2**64:
            raise ConfigError(f"seed {self.seed!r}: a whole number of 64 bits")

    def map(self, a: torch.Tensor, g: torch.Tensor | None, weights: Any) -> torch.Tensor:
        return torch.einsum("bc...,c->b...", a, self._drawn(a))

    def ceiling(self, a: torch.Tensor, g: torch.Tensor | None, weights: Any) -> torch.Tensor:
        return torch.einsum("bc...,c->b...", a.abs(), self._drawn(a).abs())

    def _drawn(self, a: torch.Tensor) -> torch.Tensor:
        # On the CPU, so that a seed means the same weights on every device.
        generator = torch.Generator("cpu").manual_seed(int(self.seed))
        drawn = torch.rand(a.shape[1], generator=generator, dtype=torch.float64, device="cpu")
        return (drawn * 2 - 1).to(a)
