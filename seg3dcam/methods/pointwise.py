"""Methods that look at one voxel at a time: LayerCAM and element-wise Grad-CAM."""

from __future__ import annotations

from typing import Any

import torch

from seg3dcam.methods.base import Method, positive_part, weighted_sum


class LayerCAM(Method):
    """Only gradients that speak for the score: sum_k ReLU(G_k) A_k.

    >>> A, G = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, -4.0]]])
    >>> LayerCAM()(A, G).tolist()
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


class ElementWise(LayerCAM):
    """Only products that speak for the score: sum_k ReLU(G_k A_k).

    >>> A, G = torch.tensor([[[1.0, -2.0]]]), torch.tensor([[[3.0, -4.0]]])
    >>> ElementWise()(A, G).tolist()
    [[3.0, 8.0]]
    """

    def map(self, a: torch.Tensor, g: torch.Tensor | None, weights: Any) -> torch.Tensor:
        return positive_part(g * a).sum(1)  # type: ignore[operator]

    def ceiling(self, a: torch.Tensor, g: torch.Tensor | None, weights: Any) -> torch.Tensor:
        return weighted_sum(a.abs(), g.abs())  # type: ignore[union-attr]
