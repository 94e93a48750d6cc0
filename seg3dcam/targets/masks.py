"""Masks and label maps that a caller gives, as tensors on the grid of the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch

from seg3dcam.checks import is_meta_tensor
from seg3dcam.errors import TargetError


@runtime_checkable
class OnItsGrid(Protocol):
    """A mask that knows where it lies: a `Scan`, or a MONAI MetaTensor."""

    @property
    def data(self) -> torch.Tensor: ...
    @property
    def affine(self) -> Any: ...


#: Zero and nonzero, or labels: (*S), (B, *S) or (B, 1, *S) on the network's grid, or a scan.
Mask: TypeAlias = torch.Tensor | np.ndarray | OnItsGrid

#: Brings a mask onto the network's grid: a plain tensor (*S) with the same labels.
Move: TypeAlias = Callable[[Any], torch.Tensor]


def nonzero(mask: Mask, grid: Sequence[int]) -> torch.Tensor:
    """Return a given mask as (B, *S) bool."""
    values = _plain(mask, "mask")
    if values.is_floating_point() and not torch.isfinite(values).all():
        raise TargetError("the mask holds values that are NaN or infinite; legal are numbers")
    return _fitted(values != 0, grid, "mask")


def labels(truth: Mask, grid: Sequence[int]) -> torch.Tensor:
    """Return a label map as (B, *S): bool, or whole numbers."""
    values = _plain(truth, "truth")
    check_labels(values)
    return _fitted(values, grid, "truth")


def check_labels(values: torch.Tensor) -> None:
    """Refuse a label map that holds anything but whole numbers."""
    if not values.is_floating_point():
        return
    whole = (values == values.round()) & torch.isfinite(values)
    if not whole.all():
        raise TargetError(
            f"the truth holds {int((~whole).sum())} values that are no whole numbers, such as "
            f"{values[~whole].flatten()[0].item():g}; legal are labels or a boolean mask. Was a "
            "label map interpolated? Resample it with the nearest neighbour"
        )


def _plain(mask: Mask, what: str) -> torch.Tensor:
    if isinstance(mask, np.ndarray):
        if mask.dtype.kind not in "biuf":
            raise TargetError(f"the {what} is an array of {mask.dtype}; legal are numbers or bool")
        # torch wants native byte order and cannot compare wide unsigned integers.
        wide = mask.dtype.kind == "u" and mask.dtype.itemsize > 1
        native = np.int64 if wide else mask.dtype.newbyteorder("=")
        return torch.from_numpy(np.array(mask, dtype=native))
    if not isinstance(mask, torch.Tensor):
        raise TargetError(
            f"the {what} is a {type(mask).__name__} on a grid of its own. explain() brings it onto "
            "the network's grid; without explain(), give a tensor or array on that grid, (*S)"
        )
    values = mask.as_tensor() if is_meta_tensor(mask) else mask
    if values.is_complex():
        raise TargetError(f"the {what} is a tensor of {values.dtype}; legal are numbers or bool")
    wide = values.dtype in (torch.uint16, torch.uint32, torch.uint64)
    return values.detach().to(torch.int64) if wide else values.detach()


def _fitted(values: torch.Tensor, grid: Sequence[int], what: str) -> torch.Tensor:
    batch, *shape = grid
    full = (batch, *shape)
    fitted = values
    if values.shape == (batch, 1, *shape):
        fitted = values[:, 0]
    elif values.shape == tuple(shape):
        fitted = values.expand(full)
    if fitted.shape != full:
        raise TargetError(
            f"the {what} has shape {tuple(values.shape)}; legal for these logits are "
            f"{tuple(shape)}, {full} and {(batch, 1, *shape)}"
        )
    return fitted


def placed_mask(mask: Mask, move: Move) -> Mask:
    """Return a mask brought onto the network's grid, if it knows where it lies."""
    return move(mask) if isinstance(mask, OnItsGrid) else mask
