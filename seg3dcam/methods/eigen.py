"""Principal components over channels: EigenCAM and its relatives, and the kernel version.

The N voxels are points in channel space, X (N, C). The map is their projection on the first
principal component, which is computed from the C x C matrix of second moments, summed in blocks and
over windows, so that nothing of size N x N is ever made. The sign of a component is a convention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from seg3dcam.checks import check_number
from seg3dcam.errors import ConfigError
from seg3dcam.methods.base import (
    StepwiseFormula,
    Sums,
    Weights,
    exact_dtype,
    for_each_item,
    in_blocks,
    positive_side_up,
)
from seg3dcam.methods.statistics import summed

#: Kernel PCA compares every voxel with every other: 16^3 of them need 128 MB, 64^3 need 512 GB.
KERNEL_VOXELS = 16**3


@dataclass(frozen=True)
class _Component(Weights):
    """A principal component, and the mean (B, C) of the points that it belongs to."""

    mean: torch.Tensor | None = None


class PrincipalComponent(StepwiseFormula):
    """The first principal component of the activations: what varies most, whatever the class.

    >>> A = torch.tensor([[[0.0, 0.0, 3.0], [1.0, 1.0, 1.0]]])
    >>> PrincipalComponent()(A).tolist()
    [[-1.0, -1.0, 2.0]]
    """

    order = 0

    def survey(self, a: torch.Tensor, shares: torch.Tensor) -> Sums:
        return self._moments(a, None, shares)

    def weights(self, survey: Sums, weighed: Sums, voxels: float, *, missing: bool) -> Weights:
        return self._component(survey, voxels)

    def map(self, a: torch.Tensor, g: torch.Tensor | None, weights: Any) -> torch.Tensor:
        """Centre and project in double precision: the mean may be much larger than what varies."""
        mean, first = weights.mean[..., None], weights.values[:, None]
        points = self.features(a, g).flatten(2)
        parts = [first @ (block.to(mean) - mean) for (block,) in in_blocks([points])]
        return torch.cat(parts, -1)[:, 0].reshape(len(a), *a.shape[2:]).to(a.dtype)

    def finish(self, values: torch.Tensor, weights: Any) -> torch.Tensor:
        return positive_side_up(values)

    def _moments(
        self, a: torch.Tensor, g: torch.Tensor | None, shares: torch.Tensor | None
    ) -> Sums:
        """Return sums of the points and of their products, block by block."""
        dtype = exact_dtype(a)
        points, matrix = self.features(a, g).flatten(2), 0.0
        weights = points.new_ones(points.shape[2]) if shares is None else shares.to(a).flatten()
        for block, share in in_blocks([points, weights]):
            block = block.to(dtype)
            matrix = matrix + (block * share.to(dtype)) @ block.mT
        return {"matrix": matrix, "sum": summed(points, weights)}  # type: ignore[dict-item]

    def _component(self, sums: Sums, voxels: float) -> _Component:
        mean = sums["sum"] / voxels
        covariance = sums["matrix"] / voxels - mean[:, :, None] * mean[:, None, :]
        first = _eigen(covariance)[1][..., -1]
        first = first * for_each_item(self._sign(first, covariance), 2)
        return _Component(first, first.abs(), None, mean)

    def _sign(self, first: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(first[:, 0])


class SizedComponent(PrincipalComponent):
    """The first principal component of |G| A, the activations weighted by how much they matter."""

    order = 1

    def features(self, a: torch.Tensor, g: torch.Tensor | None) -> torch.Tensor:
        return g.abs() * a  # type: ignore[union-attr]

    @property
    def surveys(self) -> bool:
        return False

    def survey(self, a: torch.Tensor, shares: torch.Tensor) -> Sums:
        return {}

    def weigh(self, a: torch.Tensor, g: torch.Tensor, survey: Sums) -> Sums:
        return self._moments(a, g, None)

    def weights(self, survey: Sums, weighed: Sums, voxels: float, *, missing: bool) -> Weights:
        return self._component(weighed, voxels)

    def maps_gradients(self, ndim: int) -> bool:
        return True

    def map(self, a: torch.Tensor, g: torch.Tensor | None, weights: Any) -> torch.Tensor:
        return StepwiseFormula.map(
            self, a, g, weights
        )  # summed over windows: centred when complete

    def finish(self, values: torch.Tensor, weights: Any) -> torch.Tensor:
        return positive_side_up(centred(values, weights))


class ProductComponent(SizedComponent):
    """The first principal component of the products G A, signed to agree with HiResCAM."""

    def features(self, a: torch.Tensor, g: torch.Tensor | None) -> torch.Tensor:
        return g * a  # type: ignore[operator]

    def finish(self, values: torch.Tensor, weights: Any) -> torch.Tensor:
        return centred(values, weights)

    def _sign(self, first: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
        """Return the sign with which the component correlates with the sum over channels."""
        correlation = (first * covariance.sum(2)).sum(1)
        return torch.where(correlation < 0, -1, 1).to(first)


@dataclass(frozen=True)
class KernelComponent(StepwiseFormula):
    """The first kernel principal component of the centred activations, whatever the class.

    Attributes:
        kernel: "sigmoid", tanh(gamma x.y + 1), or "rbf", exp(-gamma |x - y|^2).
        gamma: default 1 / C.
    """

    kernel: Literal["sigmoid", "rbf"] = "sigmoid"
    gamma: float | None = None
    order = 0

    def __post_init__(self) -> None:
        if self.kernel not in ("sigmoid", "rbf"):
            raise ConfigError(f"kernel {self.kernel!r}: legal are 'sigmoid' and 'rbf'")
        if self.gamma is not None:
            check_number("gamma", self.gamma, above=0)

    def survey(self, a: torch.Tensor, shares: torch.Tensor) -> Sums:
        points = a.flatten(2).mT
        self._check(points.shape[1])
        return {"points": points.to(exact_dtype(a))}

    def join(self, sums: Sums, more: Sums) -> Sums:
        points = torch.cat([sums["points"], more["points"]], 1)
        self._check(points.shape[1])
        return {"points": points}

    def weights(self, survey: Sums, weighed: Sums, voxels: float, *, missing: bool) -> Any:
        mean = survey["points"].mean(1, keepdim=True)
        points = survey["points"] - mean
        kernel = self._kernel(points, points)
        values, vectors = _eigen(_doubly_centred(kernel, kernel))
        largest = values[:, -1].clamp(min=0)
        scale = torch.where(largest > 1e-12 * points.shape[1], largest, torch.inf).rsqrt()
        return _KernelWeights(points, mean, kernel, vectors[..., -1] * scale[:, None])

    def map(self, a: torch.Tensor, g: torch.Tensor | None, weights: Any) -> torch.Tensor:
        here = a.flatten(2).mT.to(weights.points) - weights.mean
        kernel = _doubly_centred(self._kernel(here, weights.points), weights.kernel)
        return (kernel @ weights.vector[..., None])[..., 0].reshape(len(a), *a.shape[2:]).to(a)

    def ceiling(self, a: torch.Tensor, g: torch.Tensor | None, weights: Any) -> torch.Tensor:
        return self.map(a, g, weights).abs()

    def finish(self, values: torch.Tensor, weights: Any) -> torch.Tensor:
        return positive_side_up(values)

    def _kernel(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        gamma = 1 / x.shape[2] if self.gamma is None else self.gamma
        if self.kernel == "sigmoid":
            return (gamma * x @ y.mT + 1).tanh()
        return (-gamma * torch.cdist(x, y).square()).exp()

    def _check(self, voxels: int) -> None:
        if voxels > KERNEL_VOXELS:
            raise ConfigError(
                "kpca_cam compares every feature voxel with every other, of all windows together; "
                f"the layer has {voxels} or more, and {KERNEL_VOXELS} (16 x 16 x 16) is the limit. "
                "Take a coarser layer, or eigen_cam"
            )


@dataclass(frozen=True)
class _KernelWeights:
    """The centred points that make the component, their mean, their kernel, and the component."""

    points: torch.Tensor
    mean: torch.Tensor
    kernel: torch.Tensor
    vector: torch.Tensor
    degenerate: torch.Tensor | None = None


def centred(values: torch.Tensor, weights: Any) -> torch.Tensor:
    """Return a projection (B, *S) less that of the mean."""
    offset = (weights.mean * weights.values).sum(1)
    return values - for_each_item(offset.to(values), values.ndim)


def _eigen(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eigenvalues and eigenvectors of (B, n, n), NaN for an item that is not finite.

    For such an item, torch refuses the whole batch or gives numbers that mean nothing.
    """
    broken = ~matrices.isfinite().flatten(1).all(1)
    values, vectors = torch.linalg.eigh(matrices.masked_fill(broken[:, None, None], 0))
    nan = float("nan")
    return values.masked_fill(broken[:, None], nan), vectors.masked_fill(broken[:, None, None], nan)


def _doubly_centred(kernel: torch.Tensor, of_all: torch.Tensor) -> torch.Tensor:
    """Centre a kernel (B, n, N) in feature space, where `of_all` (B, N, N) has its mean at 0."""
    columns = of_all.mean(1, keepdim=True)
    return kernel - kernel.mean(2, keepdim=True) - columns + columns.mean(2, keepdim=True)
