"""The formula of FullGrad: the score, taken apart into what the input and the biases contribute."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from seg3dcam.errors import ConfigError
from seg3dcam.methods.base import Formula


@dataclass(frozen=True)
class FullGradient(Formula):
    """sum_c x_c dS/dx_c + sum over layers of sum_k b_k dS/dz_k, brought to the input's grid.

    b are the biases of convolutions and of normalisation layers in eval mode; z is what they are
    added to.

    Attributes:
        psi: "signed" spreads each contribution evenly over the input voxels of its feature voxel,
            so that the map sums to the score; "paper" takes absolute values and scales every
            layer to [0, 1] first, as the paper does for pictures.
    """

    psi: Literal["signed", "paper"] = "signed"
    route = "full_gradients"
    explains = "input"
    own_logits = True

    @property
    def gradients_at(self) -> Literal["layers", "input", "nothing"]:
        return "input"

    def __post_init__(self) -> None:
        if self.psi not in ("signed", "paper"):
            raise ConfigError(f"psi {self.psi!r}: legal are 'signed' and 'paper'")

    def __call__(self, terms: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
        """Return each term's contribution (B, *s) on its own grid.

        Args:
            terms: (values, gradients), (B, C, *s) each or values (1, C, 1, ...): the input and its
                gradient, and for every layer its biases and the gradient there.
        """
        return [self.contribution(values, gradients) for values, gradients in terms]

    def contribution(self, values: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Return one term's contribution (B, *s)."""
        product = values.to(gradients) * gradients
        if self.psi == "signed":
            return product.sum(1)
        magnitude = product.abs()
        low = magnitude.flatten(2).amin(2).reshape(*magnitude.shape[:2], *[1] * (product.ndim - 2))
        high = magnitude.flatten(2).amax(2).reshape(low.shape)
        height = torch.where(high > low, high - low, 1)
        return ((magnitude - low) / height).sum(1)
