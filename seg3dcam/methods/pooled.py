"""The pooled-gradient family: Grad-CAM, the per-slice recipe, HiResCAM and XRes-CAM in one.

The gradient is pooled over blocks of the feature grid, multiplied with the activations, and summed
over channels. Only the block differs: the whole grid is Grad-CAM (Selvaraju et al. 2017), a slice
is the recipe that averages over axes 3 and 4, a single voxel is HiResCAM (Draelos & Carin 2020),
anything between is Seg-XRes-CAM (Hasany et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from seg3dcam.errors import ConfigError

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


def weighted_sum(activations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the sum over channels of weights x activations: (B, *S).

    Args:
        activations: (B, C, *S).
        weights: (B, C, *S'), S' being 1 or S along each axis.
    """
    return torch.einsum("bc...,bc...->b...", activations, weights)


@dataclass(frozen=True)
class PooledGradient:
    """A member of the family: call it with activations and gradients (B, C, *S), get (B, *S).

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

    def __call__(self, activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Return the raw map (B, *S)."""
        return weighted_sum(activations, self.weights(gradients))

    def weights(self, gradients: torch.Tensor) -> torch.Tensor:
        """Return the channel weights (B, C, *S'), S' being 1 along the axes pooled whole."""
        return pool(gradients, self.block, self.mode)

    def join(
        self, weights: Sequence[torch.Tensor], lengths: float, *, missing: bool
    ) -> torch.Tensor:
        """Return the weights of a group of windows that are pooled together.

        Args:
            weights: the weights of each window that has a gradient.
            lengths: how many windows' lengths the volume measures along the axes pooled whole,
                multiplied: the mean is over the volume, where windows overlap too.
            missing: True where the group has windows without a gradient.
        """
        stacked = torch.stack(list(weights))
        if self.mode == "mean":
            return stacked.sum(0) / lengths
        return stacked.amax(0).clamp(min=0) if missing else stacked.amax(0)

    def whole_axes(self, ndim: int) -> tuple[int, ...]:
        """Return the spatial axes that are pooled whole, of `ndim`."""
        return tuple(a for a, size in enumerate(as_block(self.block, ndim)) if size is None)


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
