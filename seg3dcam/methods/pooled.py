"""The pooled gradient: Grad-CAM, the per-slice recipe, HiResCAM, XRes-CAM and ShapleyCAM.

The gradient is pooled over blocks of the feature grid, multiplied with the activations, and summed
over channels. Only the block differs: the whole grid is Grad-CAM (Selvaraju et al. 2017), a slice
is the recipe that averages over axes 3 and 4, a single voxel is HiResCAM (Draelos & Carin 2020),
anything between is Seg-XRes-CAM (Hasany et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from seg3dcam.errors import ConfigError
from seg3dcam.methods.base import StepwiseFormula, Sums, Weights

#: Feature voxels of a block along each axis; None is the whole axis. An int serves all axes,
#: "slice" is one index of the first axes and the whole of the last two.
Block = int | Sequence[int | None] | Literal["slice"] | None
Mode = Literal["mean", "max"]


def pool(gradients: torch.Tensor, block: Block, mode: Mode = "mean") -> torch.Tensor:
    """Pool (B, C, *S) over blocks and repeat each block's value over its voxels.

    A last block that is cut short pools the voxels that it has.

    Returns:
        (B, C, *S'), where S' is 1 along an axis pooled whole and S elsewhere: it broadcasts.

    >>> pool(torch.tensor([[[1.0, 3.0, 5.0]]]), 2).tolist()
    [[[2.0, 2.0, 5.0]]]
    """
    for axis, size in enumerate(as_block(block, gradients.ndim - 2)):
        if size != 1:
            gradients = _pool_axis(gradients, axis + 2, size, mode)
    return gradients


@dataclass(frozen=True)
class PooledGradient(StepwiseFormula):
    """The gradient pooled over blocks, times the activations, summed over channels.

    The block makes the method what it is, so that a caller has no setting to give; `BlockGradient`
    lets the caller choose.

    Attributes:
        block: see `Block`.
        mode: "mean" or "max" over each block.

    >>> grad_cam = PooledGradient(None)
    >>> A, G = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, 4.0]]])
    >>> grad_cam(A, G).tolist()
    [[2.0, 4.0]]
    """

    block: Block = None
    mode: Mode = "mean"

    def __post_init__(self) -> None:
        if self.mode not in ("mean", "max"):
            raise ConfigError(f"mode {self.mode!r} of the pooled gradient: legal are 'mean', 'max'")
        if self.block == "slice":
            return
        if isinstance(self.block, Sequence):
            object.__setattr__(self, "block", tuple(self.block))
        sizes = self.block if isinstance(self.block, tuple) else (self.block,)
        if not all(size is None or (isinstance(size, int) and size > 0) for size in sizes):
            raise ConfigError(
                f"window {self.block!r}: feature voxels along each axis, a whole number from 1 "
                "up, or None for the whole axis"
            )

    @property
    def own_settings(self) -> dict[str, str]:
        return {}

    def whole_axes(self, ndim: int) -> tuple[int, ...]:
        return tuple(a for a, size in enumerate(as_block(self.block, ndim)) if size is None)

    def maps_gradients(self, ndim: int) -> bool:
        return not self.whole_axes(ndim)

    def weigh(self, a: torch.Tensor, g: torch.Tensor, survey: Sums) -> Sums:
        """Pool the gradient.

        Along the axes that are pooled whole, a mean stays a sum until all windows have come.
        """
        axes = self.whole_axes(g.ndim - 2)
        voxels = float(np.prod([g.shape[2 + axis] for axis in axes]))
        scale = voxels if self.mode == "mean" else 1.0
        return {
            "signed": pool(g, self.block, self.mode) * scale,
            "absolute": pool(g.abs(), self.block, self.mode) * scale,
        }

    def join(self, sums: Sums, more: Sums) -> Sums:
        if self.mode == "mean":
            return super().join(sums, more)
        return {name: torch.maximum(sums[name], more[name]) for name in sums}

    def weights(self, survey: Sums, weighed: Sums, voxels: float, *, missing: bool) -> Weights:
        if self.mode == "mean":
            return Weights(weighed["signed"] / voxels, weighed["absolute"] / voxels)
        signed = weighed["signed"].clamp(min=0) if missing else weighed["signed"]
        # The largest value of a block would hide a gradient of minus infinity.
        signed = signed.masked_fill(weighed["absolute"].isinf(), float("nan"))
        return Weights(signed, weighed["absolute"])


@dataclass(frozen=True)
class BlockGradient(PooledGradient):
    """The pooled gradient whose block the caller chooses, under the name "window"."""

    block: Block = 2

    @property
    def own_settings(self) -> dict[str, str]:
        return {"window": "block", "mode": "mode"}


class CorrectedGradient(PooledGradient):
    """The gradient corrected for curvature, pooled over the whole grid: mean over u of G - HA / 2.

    H is the Hessian of the score with respect to the activations, HA its product with them.
    """

    route = "curvature"
    order = 2

    def __call__(  # type: ignore[override]
        self, activations: torch.Tensor, gradients: torch.Tensor, curvature: torch.Tensor
    ) -> torch.Tensor:
        """Return the raw map (B, *S), given the curvature HA (B, C, *S)."""
        return super().__call__(activations, corrected(gradients, curvature))


def corrected(gradients: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
    """Return G - HA / 2, the gradient halfway between no activations and all of them."""
    return gradients - curvature / 2


def as_block(block: Block, ndim: int) -> tuple[int | None, ...]:
    """Return the block's size along each of `ndim` axes.

    Raises:
        ConfigError: the block is written for another number of axes.
    """
    if block == "slice":
        return (1,) * (ndim - 2) + (None,) * min(ndim, 2)
    if block is None or isinstance(block, int):
        return (block,) * ndim
    if len(block) != ndim:
        raise ConfigError(
            f"window {tuple(block)} has {len(block)} numbers, the layer has {ndim} spatial axes"
        )
    return tuple(block)


def _pool_axis(values: torch.Tensor, dim: int, size: int | None, mode: Mode) -> torch.Tensor:
    length = values.shape[dim]
    if size is None:
        return values.mean(dim, keepdim=True) if mode == "mean" else values.amax(dim, keepdim=True)
    blocks = values.split(min(size, length), dim)
    pooled = [_pool_axis(block, dim, None, mode).expand_as(block) for block in blocks]
    return torch.cat(pooled, dim)
