"""Maps of activations A and gradients G = dS/dA, both (B, C, *S) tensors; every map is (B, *S)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch


def grad_cam(activations: torch.Tensor, gradients: torch.Tensor) -> np.ndarray:
    """w_k = (1 / N) sum_u G_k(u), map(u) = sum_k w_k A_k(u) (Selvaraju et al. 2017)."""
    a, g, result = _arrays(activations, gradients)
    voxels = list(np.ndindex(a.shape[2:]))
    for b in range(a.shape[0]):
        for k in range(a.shape[1]):
            weight = sum(g[b, k][u] for u in voxels) / len(voxels)
            for u in voxels:
                result[b][u] += weight * a[b, k][u]
    return result


def slice_grad_cam(activations: torch.Tensor, gradients: torch.Tensor) -> np.ndarray:
    """w_kz = (1 / HW) sum_yx G_k(z, y, x), map(z, y, x) = sum_k w_kz A_k(z, y, x).

    The last two axes are averaged; what stands before them is the slice.
    """
    a, g, result = _arrays(activations, gradients)
    plane = a.shape[2:][-2:]
    for b in range(a.shape[0]):
        for k in range(a.shape[1]):
            for z in np.ndindex(a.shape[2 : a.ndim - len(plane)]):
                weight = 0.0
                for yx in np.ndindex(plane):
                    weight += g[b, k][z + yx] / np.prod(plane)
                for yx in np.ndindex(plane):
                    result[b][z + yx] += weight * a[b, k][z + yx]
    return result


def hires_cam(activations: torch.Tensor, gradients: torch.Tensor) -> np.ndarray:
    """map(u) = sum_k G_k(u) A_k(u) (Draelos & Carin 2020)."""
    a, g, result = _arrays(activations, gradients)
    for b in range(a.shape[0]):
        for k in range(a.shape[1]):
            for u in np.ndindex(a.shape[2:]):
                result[b][u] += g[b, k][u] * a[b, k][u]
    return result


def xres_cam(
    activations: torch.Tensor,
    gradients: torch.Tensor,
    size: int | Sequence[int | None],
    mode: str,
) -> np.ndarray:
    """map(u) = sum_k pool(G_k over the block of u) A_k(u) (Hasany et al. 2023).

    Blocks of `size` voxels (for each axis) start at voxel 0; the last one along an axis holds the
    voxels that are left. None is a block as long as the axis.
    """
    a, g, result = _arrays(activations, gradients)
    pool: Callable[[list[float]], float] = {"mean": lambda v: sum(v) / len(v), "max": max}[mode]
    sizes = [size] * (a.ndim - 2) if isinstance(size, int) else list(size)
    sizes = [n if size is None else size for size, n in zip(sizes, a.shape[2:], strict=True)]
    for u in np.ndindex(a.shape[2:]):
        starts = [i // size * size for i, size in zip(u, sizes, strict=True)]
        stops = [
            min(start + size, n) for start, size, n in zip(starts, sizes, a.shape[2:], strict=True)
        ]
        lengths = [stop - start for start, stop in zip(starts, stops, strict=True)]
        block = [tuple(np.add(starts, step)) for step in np.ndindex(*lengths)]
        for b in range(a.shape[0]):
            for k in range(a.shape[1]):
                result[b][u] += pool([g[b, k][v] for v in block]) * a[b, k][u]
    return result


def _arrays(
    activations: torch.Tensor, gradients: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    assert activations.shape == gradients.shape
    a = activations.detach().double().numpy()
    g = gradients.detach().double().numpy()
    return a, g, np.zeros((a.shape[0], *a.shape[2:]))
