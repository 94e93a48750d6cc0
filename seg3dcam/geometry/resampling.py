"""Resample volumes and label maps onto another grid in patient space."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from seg3dcam.geometry.affines import checked_affine, scale_and_shift

#: Voxels that are resampled at a time. This limits the memory that is needed beside the result.
SLAB_VOXELS = 4_000_000


def resample(
    volume: torch.Tensor,
    affine: np.ndarray,
    to_affine: np.ndarray,
    to_shape: Sequence[int],
    *,
    seen_affine: np.ndarray | None = None,
    seen_shape: Sequence[int] | None = None,
) -> torch.Tensor:
    """Interpolate a 3-D volume linearly onto another grid in patient space.

    The work is done in slabs, so memory stays near that of the result.

    Args:
        volume: (X, Y, Z) on the grid of `affine`.
        affine: (4, 4) voxel -> mm of `volume`.
        to_affine, to_shape: the grid of the result.
        seen_affine, seen_shape: the grid that the network saw; by default that of `volume`. Outside
            of its outermost voxels the result is 0. Where `volume`, which may be coarser, ends
            inside of it, the nearest value is used.

    Returns:
        (X', Y', Z') on the CPU, in the dtype of `volume`.
    """
    affine = checked_affine(affine, "the map")
    to_affine = checked_affine(to_affine, "the grid to resample to")
    seen_affine = affine if seen_affine is None else seen_affine
    seen_shape = volume.shape if seen_shape is None else seen_shape
    to_shape = tuple(int(n) for n in to_shape)
    same = np.array_equal(affine, to_affine) and np.array_equal(affine, seen_affine)
    if same and to_shape == tuple(volume.shape) == tuple(seen_shape):
        return volume.detach().cpu().clone()
    result = torch.empty(to_shape, dtype=volume.dtype, device="cpu")
    source = volume.detach().cpu()
    thickness = max(1, SLAB_VOXELS // max(1, to_shape[1] * to_shape[2]))
    for start in range(0, to_shape[0], thickness):
        slab = (min(thickness, to_shape[0] - start), *to_shape[1:])
        slab_affine = to_affine @ scale_and_shift((1, 1, 1), (start, 0, 0))
        moved = _moved(source, affine, slab_affine, slab, mode="bilinear", padding_mode="border")
        seen = _inside(slab_affine, slab, seen_affine, seen_shape)
        # Not in place, since `moved` may share its memory with the volume.
        result[start : start + slab[0]] = moved.masked_fill(~seen, 0)
    return result


def resample_labels(
    labels: torch.Tensor, affine: np.ndarray, to_affine: np.ndarray, to_shape: Sequence[int]
) -> torch.Tensor:
    """Return each voxel's nearest label on another grid in patient space, 0 outside.

    Args:
        labels: (X, Y, Z) on the grid of `affine`. Values of any type are moved without rounding.
        to_affine, to_shape: the grid of the result.
    """
    affine = checked_affine(affine, "the labels")
    to_affine = checked_affine(to_affine, "the grid to resample to")
    source = labels.detach().cpu().double()
    moved = _moved(source, affine, to_affine, to_shape, mode="nearest", padding_mode="zeros")
    return moved.to(labels.dtype)


def _moved(
    volume: torch.Tensor,
    affine: np.ndarray,
    to_affine: np.ndarray,
    to_shape: Sequence[int],
    *,
    mode: str,
    padding_mode: str,
) -> torch.Tensor:
    """Return a volume (X, Y, Z), resampled onto another grid by MONAI on the CPU."""
    from monai.data import MetaTensor
    from monai.transforms import SpatialResample

    resampler = SpatialResample(mode=mode, padding_mode=padding_mode, dtype=volume.dtype)
    with torch.device("cpu"):  # MONAI works on the default device
        moved = resampler(
            MetaTensor(volume[None], affine=torch.as_tensor(affine)),
            dst_affine=torch.as_tensor(to_affine),
            spatial_size=tuple(to_shape),
        )
    return moved.as_tensor()[0].to(volume.dtype)


def _inside(
    affine: np.ndarray, shape: Sequence[int], seen_affine: np.ndarray, seen_shape: Sequence[int]
) -> torch.Tensor:
    """Tell which voxels of one grid have their centre inside the box of another grid."""
    to_seen = torch.as_tensor(np.linalg.inv(seen_affine) @ affine, device="cpu")
    axes = [torch.arange(n, dtype=torch.float64, device="cpu") for n in shape]
    inside = torch.ones(tuple(shape), dtype=torch.bool, device="cpu")
    tolerance = 1e-6
    for row, size in zip(to_seen[:3], seen_shape, strict=True):
        where = row[3] + (
            (row[0] * axes[0])[:, None, None]
            + (row[1] * axes[1])[None, :, None]
            + (row[2] * axes[2])[None, None, :]
        )
        inside &= (where >= -0.5 - tolerance) & (where <= size - 0.5 + tolerance)
    return inside
