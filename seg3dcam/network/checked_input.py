"""Check and simplify what a caller gives: the input of a network, and masks on its grid."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from seg3dcam.checks import is_meta_tensor
from seg3dcam.errors import InputError, LayerError, ModelError, TargetError
from seg3dcam.geometry import ras_affine
from seg3dcam.network.ensemble import Member


def as_input(x: torch.Tensor) -> tuple[torch.Tensor, np.ndarray | None]:
    """Check the input of a network and return it as a plain tensor with its affine.

    Args:
        x: (B, C, *S), a tensor or a MONAI MetaTensor.

    Returns:
        The tensor in float32 or better, and the affine in RAS. That is (4, 4), or (B, 4, 4) if the
        items have different affines, and None if `x` is no MetaTensor.

    Raises:
        InputError: `x` is no dense floating point tensor of finite values on a real device.
    """
    if not isinstance(x, torch.Tensor):
        raise InputError(
            f"the input must be a tensor (B, C, *S), such as (1, 1, 96, 96, 96); got "
            f"{_described(x)}"
        )
    if x.ndim < 3:
        raise InputError(
            "the input must be a tensor (B, C, *S), such as (1, 1, 96, 96, 96), with a batch and a "
            f"channel axis; got the shape {tuple(x.shape)}"
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
    if is_meta_tensor(x):
        affine = ras_affine(x.affine.cpu().numpy(), x.meta.get("space"))
        if affine.ndim == 3 and (affine == affine[0]).all():  # all items have the same grid
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


def _described(x: Any) -> str:
    """Say what was given instead of a tensor, and how to make a tensor of it."""
    if isinstance(x, np.ndarray):
        return f"a numpy array {x.shape} of {x.dtype}: give torch.from_numpy(x)"
    if isinstance(x, str | os.PathLike) or hasattr(x, "spacing"):
        return f"a {type(x).__name__}: scans are explained by explain(scan, SegModel(network), ...)"
    if isinstance(x, list | tuple):
        return f"a {type(x).__name__} of {len(x)}: give torch.stack(x) for items of one shape"
    if isinstance(x, Mapping):
        return f"a {type(x).__name__} with the keys {', '.join(map(repr, x))}: give one of them"
    return f"a {type(x).__name__}"


#: Number of spatial axes -> the convolutions for that number.
_CONVOLUTIONS: Mapping[int, tuple[type[nn.Module], ...]] = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}


@contextmanager
def telling_axes(member: Member, x: torch.Tensor) -> Iterator[None]:
    """If a network fails, say whether its input lacks an axis, or is a volume for a 2D network.

    PyTorch takes an item without a batch axis for a batch, so the network's own error misleads. The
    axes cannot be checked beforehand, since a network may add some itself.

    Raises:
        InputError: instead of the network's own error, if the axes explain it.
    """
    try:
        yield
    except (LayerError, ModelError) as error:
        if advice := _axes_advice(member, tuple(x.shape)):
            raise InputError(advice) from error
        raise


def _axes_advice(member: Member, shape: tuple[int, ...]) -> str:
    """Return what is wrong with the axes of an input, judged by the network's convolutions.

    "" is returned if nothing is known to be wrong.
    """
    found = [
        (axes, getattr(module, "in_channels", None))
        for module in member.network.modules()
        for axes, kinds in _CONVOLUTIONS.items()
        if isinstance(module, kinds)
    ]
    if member.slices or len({axes for axes, _ in found}) != 1:
        return ""
    axes, channels = found[0]
    wanted = ", ".join(["B", "C", *"DHW"[-axes:]])
    said = f"the network is {axes}D and takes ({wanted}); the input {shape}"
    lacking = axes + 2 - len(shape)
    if lacking == 2:
        return f"{said} has neither a batch nor a channel axis: give x[None, None]"
    if lacking == 1 and shape[0] == channels:
        return f"{said} has no batch axis: give x[None]"
    if lacking == 1:
        return f"{said} lacks one axis: give x[None] without a batch, x[:, None] without channels"
    if lacking < 0 and axes == 2:
        return (
            f"{said} is a volume: give its slices as a batch, x[0].movedim(1, 0), or explain the "
            "network slice by slice: Ensemble([network], slices=True)"
        )
    return f"{said} has {-lacking} too many" if lacking < 0 else ""


def on_grid_of(mask: Any, affine: np.ndarray | None, shape: Sequence[int]) -> torch.Tensor:
    """Return the labels of a mask that has an affine, if it lies on the input's grid.

    Args:
        mask: a `Scan` or a MetaTensor.
        affine: the input's affine in RAS, None if it is not known.
        shape: spatial shape of the input.

    Raises:
        TargetError: the mask lies on another grid.
    """
    plain = mask.as_tensor() if is_meta_tensor(mask) else mask.data
    data = torch.as_tensor(plain, device="cpu")
    if affine is not None:
        own = ras_affine(np.asarray(mask.affine), getattr(mask, "meta", {}).get("space"))
        if not np.allclose(own, affine, atol=1e-4):  # compared with the affines of all items
            raise TargetError(
                f"the mask lies on another grid than the input: its affine is\n{own}\nand the "
                f"input's\n{affine}\nResample it, or use explain(), which does"
            )
    return data[0] if data.ndim == len(shape) + 1 and len(data) == 1 else data
