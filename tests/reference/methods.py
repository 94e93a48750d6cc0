"""Maps of the other methods, from their papers: loops and decompositions in float64.

A, G = dS/dA are (B, C, *S) tensors, u is a voxel of the N on the layer's grid, and
S_k = sum_u A_k(u). Every map is a (B, *S) array: raw, before ReLU and resizing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from torch import nn

#: Below this share of sum_u |A_k(u)|, the sum S_k is nothing but rounding.
CANCELS = 1e-5


def grad_cam_plus_plus(activations: torch.Tensor, gradients: torch.Tensor) -> np.ndarray:
    """w_k = sum_u g / (2 + S_k g), g = ReLU(G_k(u)) (Chattopadhyay et al. 2018, simplified).

    See `grad_cam_plus_plus_alpha`: G^2 cancels in alpha, and where G <= 0 its factor is zero.
    """
    a, g = _arrays(activations, gradients)
    weights = np.zeros(a.shape[:2])
    for b, k in np.ndindex(weights.shape):
        total = math.fsum(a[b, k].flat)
        terms = [max(value, 0.0) for value in g[b, k].flat]
        weights[b, k] = math.fsum(value / (2 + total * value) for value in terms)
    return weighted(weights, a)


def grad_cam_plus_plus_alpha(activations: torch.Tensor, gradients: torch.Tensor) -> np.ndarray:
    """alpha(u) = G^2 / (2 G^2 + S_k G^3), w_k = sum_u alpha(u) ReLU(G(u)), equations 10 and 19.

    They assume a score Y = exp(S), so that Y's derivatives are Y G, Y G^2 and Y G^3; the constant Y
    drops out of alpha, and scales every weight of an item alike. Alpha is not defined where G = 0;
    such a voxel adds nothing.
    """
    a, g = _arrays(activations, gradients)
    weights = np.zeros(a.shape[:2])
    for b, k in np.ndindex(weights.shape):
        total = math.fsum(a[b, k].flat)
        for value in g[b, k].flat:
            if value != 0:
                alpha = value**2 / (2 * value**2 + total * value**3)
                weights[b, k] += alpha * max(value, 0.0)
    return weighted(weights, a)


def xgrad_cam(activations: torch.Tensor, gradients: torch.Tensor) -> tuple[np.ndarray, list[bool]]:
    """w_k = sum_u G_k(u) A_k(u) / S_k (Fu et al. 2020).

    A channel whose S_k is zero but for rounding has no such weight: it gets 0.

    Returns:
        The maps, and for each item whether a channel that is not zero everywhere lost its weight.
    """
    a, g = _arrays(activations, gradients)
    weights = np.zeros(a.shape[:2])
    degenerate = [False] * len(a)
    for b, k in np.ndindex(weights.shape):
        total = math.fsum(a[b, k].flat)
        size = math.fsum(abs(a[b, k]).flat)
        if abs(total) > CANCELS * size:
            weights[b, k] = math.fsum((g[b, k] * a[b, k]).flat) / total
        elif size > 0:
            degenerate[b] = True
    return weighted(weights, a), degenerate


def layer_cam(activations: torch.Tensor, gradients: torch.Tensor) -> np.ndarray:
    """map(u) = sum_k ReLU(G_k(u)) A_k(u) (Jiang et al. 2021)."""
    a, g = _arrays(activations, gradients)
    result = np.zeros((len(a), *a.shape[2:]))
    for b, k, *u in np.ndindex(a.shape):
        result[(b, *u)] += max(g[(b, k, *u)], 0.0) * a[(b, k, *u)]
    return result


def grad_cam_elementwise(activations: torch.Tensor, gradients: torch.Tensor) -> np.ndarray:
    """map(u) = sum_k ReLU(G_k(u) A_k(u)) (Pillai & Pirsiavash 2021)."""
    a, g = _arrays(activations, gradients)
    result = np.zeros((len(a), *a.shape[2:]))
    for b, k, *u in np.ndindex(a.shape):
        result[(b, *u)] += max(g[(b, k, *u)] * a[(b, k, *u)], 0.0)
    return result


# --------------------------------------------------------------------------- principal components


def eigen_cam(activations: torch.Tensor, gradients: torch.Tensor | None = None) -> np.ndarray:
    """First principal component of the voxels' activations (Muhammad & Yeasin 2020).

    The N x C matrix of an item is centred channel by channel and projected on its first right
    singular vector. The sign is chosen so that the largest absolute value is positive.
    """
    (a,) = _arrays(activations)
    return np.stack([_largest_positive(_first_component(item)) for item in a])


def eigen_grad_cam(activations: torch.Tensor, gradients: torch.Tensor) -> np.ndarray:
    """The same of G * A, with the sign that agrees with sum_k G_k A_k."""
    a, g = _arrays(activations, gradients)
    result = []
    for product in a * g:
        component = _first_component(product)
        hires = product.sum(0)
        agreement = ((component - component.mean()) * (hires - hires.mean())).sum()
        result.append(-component if agreement < 0 else component)
    return np.stack(result)


def seg_eigen_cam(activations: torch.Tensor, gradients: torch.Tensor) -> np.ndarray:
    """The same of |G| * A, with the sign of `eigen_cam` (Chung & Ying 2025)."""
    a, g = _arrays(activations, gradients)
    return np.stack([_largest_positive(_first_component(item)) for item in abs(g) * a])


def kpca_cam(
    activations: torch.Tensor,
    gradients: torch.Tensor | None = None,
    kernel: Literal["sigmoid", "rbf"] = "sigmoid",
) -> np.ndarray:
    """First kernel principal component of the voxels' activations (Karmani et al. 2024).

    With x, y the centred activations of two voxels and gamma = 1 / C, the kernel is
    tanh(gamma x.y + 1) or exp(-gamma |x - y|^2). Of its centred N x N matrix the largest
    eigenvalue's unit eigenvector, times the root of that eigenvalue, is the map. Sign: `eigen_cam`.
    """
    (a,) = _arrays(activations)
    return np.stack([_largest_positive(_first_kernel_component(item, kernel)) for item in a])


def spectral_gap(matrix: torch.Tensor) -> float:
    """Return (s_1 - s_2) / s_1 of an item's (C, *S) centred matrix: how well its map is defined."""
    values = np.linalg.svd(_centred(_arrays(matrix)[0]), compute_uv=False)
    return 1.0 if len(values) == 1 else float((values[0] - values[1]) / values[0])


def _centred(item: np.ndarray) -> np.ndarray:
    rows = item.reshape(len(item), -1).T
    return rows - rows.mean(0)


def _first_component(item: np.ndarray) -> np.ndarray:
    matrix = _centred(item)
    _, _, right = np.linalg.svd(matrix, full_matrices=False)
    return (matrix @ right[0]).reshape(item.shape[1:])


def _first_kernel_component(item: np.ndarray, kernel: str) -> np.ndarray:
    voxels = _centred(item)
    count, channels = voxels.shape
    if kernel == "sigmoid":
        matrix = np.tanh(voxels @ voxels.T / channels + 1)
    else:
        differences = voxels[:, None] - voxels[None]
        matrix = np.exp(-(differences**2).sum(-1) / channels)
    centring = np.eye(count) - 1 / count
    values, vectors = np.linalg.eigh(centring @ matrix @ centring)
    return (vectors[:, -1] * math.sqrt(max(values[-1], 0.0))).reshape(item.shape[1:])


def _largest_positive(component: np.ndarray) -> np.ndarray:
    return -component if abs(component.min()) > abs(component.max()) else component


# ------------------------------------------------------------------------------ without gradients


def fem(activations: torch.Tensor, gradients: torch.Tensor | None = None) -> np.ndarray:
    """map(u) = sum_k mu_k 1[A_k(u) > mu_k + 2 sigma_k] (Fuad et al. 2020).

    mu and sigma are the mean and the standard deviation (divided by N) over the channel's voxels.
    Whether a voxel stands out is decided in exact fractions, so rounding makes none of a constant.
    """
    (a,) = _arrays(activations)
    result = np.zeros((len(a), *a.shape[2:]))
    for b, k in np.ndindex(a.shape[:2]):
        exact = [Fraction(value) for value in a[b, k].flat]
        mean = sum(exact) / len(exact)
        variance = sum((value - mean) ** 2 for value in exact) / len(exact)
        for u, value in zip(np.ndindex(a.shape[2:]), exact, strict=True):
            if value > mean and (value - mean) ** 2 > 4 * variance:
                result[b][u] += float(mean)
    return result


def score_cam(activations: torch.Tensor, scores: np.ndarray) -> np.ndarray:
    """Softmax over channels of the scores (B, C) is w; map = sum_k w_k A_k (Wang et al. 2020).

    s_k is the score of the input times M_k, see `masks`. Subtracting a baseline's score changes
    nothing under a softmax.
    """
    (a,) = _arrays(activations)
    weights = np.zeros(a.shape[:2])
    for b in range(len(a)):
        powers = [math.exp(value - max(scores[b])) for value in scores[b]]
        weights[b] = [power / math.fsum(powers) for power in powers]
    return weighted(weights, a)


def masks(resized: torch.Tensor) -> torch.Tensor:
    """Return M_k of activations on the input's grid: min-max scaled; a constant channel is 0."""
    (a,) = _arrays(resized)
    result = np.zeros_like(a)
    for b, k in np.ndindex(a.shape[:2]):
        low, high = a[b, k].min(), a[b, k].max()
        if high > low:
            result[b, k] = (a[b, k] - low) / (high - low)
    return torch.as_tensor(result)


def ablation_cam(activations: torch.Tensor, scores: np.ndarray, score: np.ndarray) -> np.ndarray:
    """w_k = (S - S_k) / |S|; map = sum_k w_k A_k (Desai & Ramaswamy 2020).

    S_k (B, C) is the score with A_k set to zero. The paper divides by S, which it takes to be
    positive: for a negative score that turns the map round.
    """
    (a,) = _arrays(activations)
    weights = np.zeros(a.shape[:2])
    for b, k in np.ndindex(weights.shape):
        weights[b, k] = (score[b] - scores[b, k]) / abs(score[b])
    return weighted(weights, a)


# --------------------------------------------------------------------------- of a network's scores


def shapley_cam(
    activations: torch.Tensor, gradients: torch.Tensor, curvature: torch.Tensor
) -> np.ndarray:
    """w_k = (1 / N) sum_u [G_k - (H A)_k / 2](u), H the Hessian of S (Cai 2025): `curvature`."""
    a, g, ha = _arrays(activations, gradients, curvature)
    weights = np.zeros(a.shape[:2])
    for b, k in np.ndindex(weights.shape):
        weights[b, k] = math.fsum((g[b, k] - ha[b, k] / 2).flat) / g[b, k].size
    return weighted(weights, a)


def curvature(
    score: Callable[[torch.Tensor], torch.Tensor], activations: torch.Tensor
) -> torch.Tensor:
    """Return H A (B, C, *S): the Hessian of each item's score, written out whole, times A.

    Args:
        score: activations (1, C, *S) -> a scalar; twice differentiable.
        activations: (B, C, *S).
    """
    result = torch.zeros_like(activations)
    for b, item in enumerate(activations.detach()):
        hessian = torch.autograd.functional.hessian(lambda a: score(a[None]), item)
        result[b] = (hessian.reshape(item.numel(), -1) @ item.flatten()).reshape(item.shape)
    return result


def full_grad(
    network: nn.Sequential,
    x: torch.Tensor,
    score: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, np.ndarray]:
    """S(x) = sum x dS/dx + sum over layers of b dS/dz, z = W . + b (Srinivas & Fleuret 2019).

    It holds for networks of affine layers and ReLU, where S is piecewise linear. An eval BatchNorm
    is an affine layer whose bias is beta - gamma mean / sqrt(var + eps).

    Args:
        network: layers with a bias, and others without.
        x: (B, C, *S).
        score: output of the network -> (B,).

    Returns:
        "input" and the name of each layer with a bias -> the products, (B, C, *S_layer).
    """
    x = x.detach().requires_grad_()
    outputs: dict[str, torch.Tensor] = {"input": x}
    factors: dict[str, torch.Tensor] = {"input": x}
    value = x
    for name, layer in network.named_children():
        value = layer(value.clone())
        bias = _bias(layer)
        if bias is not None:
            outputs[name] = value
            factors[name] = bias.reshape(1, -1, *[1] * (value.ndim - 2))
    gradients = torch.autograd.grad(score(value).sum(), list(outputs.values()))
    return {
        name: (factors[name] * gradient).detach().numpy()
        for name, gradient in zip(outputs, gradients, strict=True)
    }


def _bias(layer: nn.Module) -> torch.Tensor | None:
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        slope = layer.weight / torch.sqrt(layer.running_var + layer.eps)
        return layer.bias - slope * layer.running_mean
    return getattr(layer, "bias", None)


# ----------------------------------------------------------------------------------------- shared


def weighted(weights: np.ndarray, activations: np.ndarray) -> np.ndarray:
    """Return sum_k w_k A_k of weights (B, C)."""
    result = np.zeros((len(activations), *activations.shape[2:]))
    for b, k in np.ndindex(weights.shape):
        result[b] += weights[b, k] * activations[b, k]
    return result


def _arrays(*tensors: torch.Tensor) -> tuple[np.ndarray, ...]:
    assert all(tensor.shape == tensors[0].shape for tensor in tensors)
    return tuple(tensor.detach().double().numpy() for tensor in tensors)
