"""Formulas that look at one voxel at a time: those of LayerCAM and element-wise Grad-CAM."""

from __future__ import annotations

from typing import Any

import torch

from seg3dcam.methods.base import StepwiseFormula, positive_part, weighted_sum


class PositiveGradients(StepwiseFormula):
    """sum_k ReLU(G_k) A_k: only gradients that speak for the score count.

    >>> A, G = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, -4.0]]])
    >>> PositiveGradients()(A, G).tolist()
    [[3.0, 0.0]]
    """

    def whole_axes(self, ndim: int) -> tuple[int, ...]:
        return ()

    def maps_gradients(self, ndim: int) -> bool:
        return True

    def map(self, a: torch.Tensor, g: torch.Tensor | None, weights: Any) -> torch.Tensor:
        return weighted_sum(a, positive_part(g))  # type: ignore[arg-type]

    def ceiling(self, a: torch.Tensor, g: torch.Tensor | None, weights: Any) -> torch.Tensor:
        return weighted_sum(a.abs(), positive_part(g))  # type: ignore[arg-type]


class PositiveProducts(PositiveGradients):
    """sum_k ReLU(G_k A_k): only products that speak for the score count.

    >>> A, G = torch.tensor([[[1.0, -2.0]]]), torch.tensor([[[3.0, -4.0]]])
    >>> PositiveProducts()(A, G).tolist()
    [[3.0, 8.0]]
    """

    def map(self, a: torch.Tensor, g: torch.Tensor | None, weights: Any) -> torch.Tensor:
        return positive_part(g * a).sum(1)  # type: ignore[operator]

    def ceiling(self, a: torch.Tensor, g: torch.Tensor | None, weights: Any) -> torch.Tensor:
        return weighted_sum(a.abs(), g.abs())  # type: ignore[union-attr]
