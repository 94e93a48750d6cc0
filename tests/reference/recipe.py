"""The original 3D recipe, step by step, for maps (B, Z, Y, X).

The model's mask output is backpropagated with ones. Gradients are averaged over axes 3 and 4,
activations are weighted and summed over channels, negative values are cut, the result is scaled
to [0, 1] and resized to the input. Several layers are averaged and scaled again. Either the whole
volume or one slice is taken, and a slice is taken before anything is scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

EPSILON = 1e-7  # of the recipe's denominator


def backpropagated(
    front: Callable[[torch.Tensor], torch.Tensor],
    back: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
) -> tuple[np.ndarray, np.ndarray]:
    """Return a layer's activations and gradients, (B, C, Z, Y, X)."""
    activations = front(x).detach().clone().requires_grad_()
    output = back(activations.clone())
    (gradients,) = torch.autograd.grad(output, activations, torch.ones_like(output))
    return activations.detach().numpy(), gradients.numpy()


def weighted(activations: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """Weight, sum over channels, cut negative values: (B, Z, Y, X)."""
    items, channels, depth, height, width = activations.shape
    weights = np.zeros((items, channels, depth, 1, 1))
    cam = np.zeros((items, depth, height, width))
    for b, k, z in np.ndindex(items, channels, depth):
        weights[b, k, z, 0, 0] = sum(gradients[b, k, z].ravel()) / (height * width)
        for y, x in np.ndindex(height, width):
            cam[b, z, y, x] += weights[b, k, z, 0, 0] * activations[b, k, z, y, x]
    return np.maximum(cam, 0)


def scaled(cam: np.ndarray, epsilon: float = EPSILON) -> np.ndarray:
    """Scale each item to [0, 1]."""
    items = []
    for item in cam:
        item = item - item.min()
        items.append(item / (epsilon + item.max()))
    return np.stack(items)


def fused(cams: Sequence[np.ndarray], epsilon: float = EPSILON) -> np.ndarray:
    """Average the layers' scaled cams and scale again."""
    return scaled(sum(np.maximum(cam, 0) for cam in cams) / len(cams), epsilon)


def resized(cam: np.ndarray, stride: int) -> np.ndarray:
    """Interpolate linearly onto voxels `stride` times finer, block centre on block centre."""
    for axis in range(1, cam.ndim):
        lines = np.moveaxis(cam, axis, -1)
        size = lines.shape[-1]
        fine = np.zeros((*lines.shape[:-1], size * stride))
        for i in range(size * stride):
            position = min(max((i + 0.5) / stride - 0.5, 0), size - 1)
            low = int(position)
            high = min(low + 1, size - 1)
            part = position - low
            fine[..., i] = (1 - part) * lines[..., low] + part * lines[..., high]
        cam = np.moveaxis(fine, -1, axis)
    return cam
