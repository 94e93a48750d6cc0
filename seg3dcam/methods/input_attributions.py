"""Formulas that attribute the score to the input's own voxels, computed by captum.

They look at no layer. Each takes the network with the score behind it, (n, C, *S) -> (n,), and one
input x (1, C, *S), and returns attributions of that shape.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from seg3dcam.checks import check_number, check_whole_number, is_whole
from seg3dcam.errors import ConfigError, MissingExtraError
from seg3dcam.methods.base import Formula

#: Activations that guided backpropagation would cut, too, if they were nn.ReLU; class names.
UNGUIDED = (
    "CELU",
    "ELU",
    "GELU",
    "Hardswish",
    "LeakyReLU",
    "MemoryEfficientSwish",
    "Mish",
    "PReLU",
    "RReLU",
    "ReLU6",
    "SELU",
    "SiLU",
    "Softplus",
    "Swish",
)


class InputFormula(Formula):
    """Base of the attributions of the input.

    Attributes:
        unsigned: True where the map sums the absolute values of the channels, and not the values.
    """

    route = "input"
    explains = "input"
    unsigned: ClassVar[bool] = False

    @property
    def gradients_at(self) -> Literal["layers", "input", "nothing"]:
        return "input"

    def attribute(self, scored: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Return the attributions (1, C, *S) of the input x.

        Raises:
            MissingExtraError: captum is not installed.
        """
        raise NotImplementedError

    def flags(self, model: nn.Module) -> tuple[str, ...]:
        """Return what the reader of a map of this network must know."""
        return ()


class PlainGradient(InputFormula):
    """dS/dx."""

    unsigned = True

    def attribute(self, scored: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return _captum().Saliency(scored).attribute(x, abs=False)


class GradientTimesInput(InputFormula):
    """x dS/dx."""

    def attribute(self, scored: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return _captum().InputXGradient(scored).attribute(x)


@dataclass(frozen=True)
class NoisyGradients(InputFormula):
    """The mean of dS/dx over noisy copies of x.

    Attributes:
        samples: how many copies.
        noise: the standard deviation of the noise, as a fraction of the input's range.
        batch: how many copies go through the network at once.
    """

    samples: int = 16
    noise: float = 0.1
    batch: int = 4
    unsigned = True

    def __post_init__(self) -> None:
        check_whole_number("samples", self.samples)
        check_number("noise", self.noise, least=0)
        check_whole_number("batch", self.batch)

    def attribute(self, scored: nn.Module, x: torch.Tensor) -> torch.Tensor:
        captum = _captum()
        return captum.NoiseTunnel(captum.Saliency(scored)).attribute(
            x,
            nt_type="smoothgrad",
            nt_samples=self.samples,
            nt_samples_batch_size=self.batch,
            stdevs=float(x.max() - x.min()) * self.noise,
            abs=False,
        )


@dataclass(frozen=True)
class PathGradients(InputFormula):
    """(x - x0) times the mean of dS/dx along the straight way from a baseline x0 to x.

    Attributes:
        baseline: the value of a voxel that says nothing.
        steps: how many points there are on the way.
        batch: how many points go through the network at once.
    """

    baseline: float = 0.0
    steps: int = 50
    batch: int = 4

    def __post_init__(self) -> None:
        check_number("baseline", self.baseline)
        check_whole_number("steps", self.steps)
        check_whole_number("batch", self.batch)

    def attribute(self, scored: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return (
            _captum()
            .IntegratedGradients(scored)
            .attribute(
                x,
                baselines=self.baseline,
                n_steps=self.steps,
                internal_batch_size=self.batch,
            )
        )


class GuidedGradient(InputFormula):
    """dS/dx, with the negative part of the gradient cut at every nn.ReLU."""

    def attribute(self, scored: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return _captum().GuidedBackprop(scored).attribute(x)

    def flags(self, model: nn.Module) -> tuple[str, ...]:
        """Return which activations keep their plain gradient; functional ones cannot be seen."""
        guided = sum(isinstance(module, nn.ReLU) for module in model.modules())
        left = Counter(type(module).__name__ for module in model.modules())
        others = ", ".join(f"{left[name]} {name}" for name in UNGUIDED if left[name])
        if not guided:
            inside = f" ({others} in this one)" if others else ""
            return (
                f"guided_backprop changes nn.ReLU only; without any{inside}, this is the plain "
                "gradient",
            )
        if others:
            return (
                f"guided_backprop changes nn.ReLU only: {guided} of them here; {others} keep their "
                "plain gradient",
            )
        return ()


@dataclass(frozen=True)
class HiddenBlocks(InputFormula):
    """S(x) - S(x with a block of voxels at the baseline); blocks overlap by half.

    Attributes:
        baseline: the value of a voxel that says nothing.
        block: input voxels that are hidden together, one number or one for each axis. A block must
            be larger than what the network looks for.
        batch: how many changed inputs go through the network at once.
    """

    baseline: float = 0.0
    block: int | tuple[int, ...] | list[int] = 8
    batch: int = 4

    def __post_init__(self) -> None:
        check_number("baseline", self.baseline)
        check_whole_number("batch", self.batch)
        sizes = self.block if isinstance(self.block, list | tuple) else [self.block]
        if not sizes or not all(is_whole(size) and size > 0 for size in sizes):
            raise ConfigError(
                f"block {self.block!r}: a whole number of voxels from 1 up, or one for each axis"
            )

    @property
    def gradients_at(self) -> Literal["layers", "input", "nothing"]:
        return "nothing"

    def attribute(self, scored: nn.Module, x: torch.Tensor) -> torch.Tensor:
        sizes = self._sizes(x.shape[2:])
        channels = x.shape[1]
        found = (
            _captum()
            .Occlusion(scored)
            .attribute(
                x,
                sliding_window_shapes=(channels, *sizes),
                strides=(channels, *(max(1, size // 2) for size in sizes)),
                baselines=self.baseline,
                perturbations_per_eval=self.batch,
            )
        )
        return found / channels  # all channels are hidden together: each holds the whole change

    def _sizes(self, shape: torch.Size) -> tuple[int, ...]:
        """Return the voxels of a block along each axis, at most those of the input."""
        block, axes = self.block, len(shape)
        sizes = tuple(block) if isinstance(block, list | tuple) else (block,) * axes
        if len(sizes) != axes:
            raise ConfigError(
                f"block {block!r} has {len(sizes)} numbers; the input has {axes} axes: give one "
                "number for each, or one for all"
            )
        return tuple(min(int(size), length) for size, length in zip(sizes, shape, strict=True))


def _captum() -> Any:
    try:
        from captum import attr
    except ImportError as error:
        raise MissingExtraError(
            "gradients, SmoothGrad, integrated gradients, guided backprop and occlusion are "
            "captum's: pip install 'seg3dcam[captum]'"
        ) from error
    return attr
