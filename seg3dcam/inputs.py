"""What a caller gives, made plain: the input of a network, and masks on its grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch._subclasses.fake_tensor import FakeTensor

from seg3dcam.errors import InputError, TargetError
from seg3dcam.geometry import ras_affine


def as_input(x: torch.Tensor) -> tuple[torch.Tensor, np.ndarray | None]:
    """Return a plain tensor and, of a MetaTensor, its affine or the items' affines in RAS."""
    if not isinstance(x, torch.Tensor) or x.ndim < 3:
        given = tuple(x.shape) if hasattr(x, "shape") else type(x).__name__
        raise InputError(
            f"the input must be a tensor (B, C, *S), such as (1, 1, 96, 96, 96); got {given}"
        )
    if not x.is_floating_point():
        raise InputError(f"the input must be floating point, as the network is; got {x.dtype}")
    if x.layout != torch.strided or x.is_nested:
        found = (
            "nested: give items of one shape" if x.is_nested else f"{x.layout}: give x.to_dense()"
        )
        raise InputError(f"the input must be a dense tensor; got one that is {found}")
    if x.is_floating_point() and torch.finfo(x.dtype).bits < 16:
        raise InputError(f"the input is {x.dtype}, which nothing is computed in: give x.float()")
    if x.device.type == "meta" or isinstance(x, FakeTensor):
        raise InputError(
            "the input is a FakeTensor or on the meta device: it has a shape but no values. Give a "
            "tensor on a real device, outside of FakeTensorMode"
        )
    if 0 in x.shape:
        raise InputError(f"the input is empty: shape {tuple(x.shape)}")
    affine = None
    if isinstance(x, MetaTensor):
        affine = ras_affine(x.affine.cpu().numpy(), x.meta.get("space"))
        if affine.ndim == 3 and (affine == affine[0]).all():  # a batch from one grid
            affine = affine[0]
        x = x.as_tensor()
    # A tensor made in inference mode cannot enter a graph; its clone, made outside of it, can.
    with torch.inference_mode(False):
        x = x.clone() if x.is_inference() else x.detach()
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # sums in half precision overflow
    if not torch.isfinite(x).all():
        raise InputError(
            f"the input has {int((~torch.isfinite(x)).sum())} voxels that are NaN or infinite"
        )
    return x, affine


def on_grid_of(mask: Any, affine: np.ndarray | None, shape: Sequence[int]) -> torch.Tensor:
    """Return the labels of a mask that knows where it lies, if that is where the input lies."""
    plain = mask.as_tensor() if isinstance(mask, MetaTensor) else mask.data
    data = torch.as_tensor(plain, device="cpu")
    if affine is not None:
        own = ras_affine(np.asarray(mask.affine), getattr(mask, "meta", {}).get("space"))
        if not np.allclose(own, affine, atol=1e-4):  # those of all items
            raise TargetError(
                f"the mask lies on another grid than the input: its affine is\n{own}\nand the "
                f"input's\n{affine}\nResample it, or use explain(), which does"
            )
    return data[0] if data.ndim == len(shape) + 1 and len(data) == 1 else data
