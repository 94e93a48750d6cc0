"""Attributions of the input's own voxels, computed by captum: what CAMs are compared with.

They look at no layer. Through windows, captum sees one window at a time, with the score replaced
by its slope at the prediction, sum of dS/dL . L: exact for gradients, and for every method where
the score is linear in the logits, as a class's logit is.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from seg3dcam import targets as score
from seg3dcam.checks import check_number, check_whole_number, is_whole
from seg3dcam.engine.layer_map import LayerMap, joined
from seg3dcam.engine.passes import (
    FirstPass,
    Progress,
    Seed,
    scored_alone,
    seeded_windows,
    upstream_of,
)
from seg3dcam.errors import ConfigError, MissingExtraError
from seg3dcam.geometry import FeatureGrid, cropped
from seg3dcam.network.capture import Capture, capturing
from seg3dcam.network.outputs import OutputSelection
from seg3dcam.network.random_draws import drawing_from, random_state
from seg3dcam.windows import Blend

Target = Callable[[torch.Tensor], torch.Tensor]

#: Batch of inputs (n, C, *S) -> scores (n,).
Score = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Comparator:
    """A method of captum.

    Attributes:
        kind: which one. It looks at the settings that name it alone.
        baseline: the value of a voxel that says nothing (integrated gradients, occlusion).
        steps: points on the way from the baseline (integrated gradients).
        samples, noise: noisy copies, and the noise's standard deviation as a fraction of the
            input's range (SmoothGrad).
        block: input voxels that are hidden together, one number or one for each axis (occlusion):
            it must be larger than what the network looks for.
        batch: inputs that go through the network at once (integrated gradients, SmoothGrad,
            occlusion).

    Raises:
        ConfigError: a value that is not legal.
    """

    kind: Literal[
        "gradient",
        "gradient_x_input",
        "smooth_grad",
        "integrated_gradients",
        "guided_backprop",
        "occlusion",
    ] = "gradient"
    baseline: float = 0.0
    steps: int = 50
    samples: int = 16
    noise: float = 0.1
    block: int | tuple[int, ...] | list[int] = 8
    batch: int = 4

    def __post_init__(self) -> None:
        check_number("baseline", self.baseline)
        check_whole_number("steps", self.steps)
        check_whole_number("samples", self.samples)
        check_number("noise", self.noise, least=0)
        check_whole_number("batch", self.batch)
        sizes = self.block if isinstance(self.block, list | tuple) else [self.block]
        if not sizes or not all(is_whole(size) and size > 0 for size in sizes):
            raise ConfigError(
                f"block {self.block!r}: a whole number of voxels from 1 up, or one for each axis"
            )


def compare_map(
    first: FirstPass,
    target: Target,
    seed: Seed,
    comparator: Comparator,
    output: OutputSelection,
    progress: Progress,
) -> LayerMap:
    """Return the map of one target, on the input's voxels.

    Gradients are summed over channels by their size, everything else with its sign.

    Raises:
        MissingExtraError: captum is not installed.
    """
    random = random_state()
    with capturing(first.capture.member, [], output) as capture, drawing_from(random):
        items = range(len(first.x))
        return joined(
            [_map(first, item, target, seed, comparator, capture, progress) for item in items]
        )


def _map(
    first: FirstPass,
    item: int,
    target: Target,
    seed: Seed,
    comparator: Comparator,
    capture: Capture,
    progress: Progress,
) -> LayerMap:
    windows = first.windows
    voxels = FeatureGrid.of_voxels(windows.roi)
    blend = Blend(windows, voxels, first.x.new_zeros(first.x.shape[1]))
    which = seeded_windows(first, [item], seed)
    attribute = ATTRIBUTIONS[comparator.kind]
    for done, window in enumerate(which, 1):
        # In the input's precision: captum adds noise, or small steps, which half of it would lose.
        x = windows.cut(first.padded[item : item + 1], [window]).clone().to(capture.device)
        if len(windows) == 1:
            score_of = _of_all(first, item, target)
        else:
            score_of = _slope(upstream_of(first, seed, [item], [window]))
        scored = _Scored(capture, score_of, first.logits)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # captum's, on hooks and gradients that it sets
            (found,) = attribute(scored, x, comparator).detach()
        blend.add_alone(window, found.to(first.x))
        progress("comparing", done, len(which))
    channels, grid = cropped(blend.total, blend.grid, windows.shape)
    values = (channels.abs() if comparator.kind in UNSIGNED else channels).sum(0, keepdim=True)
    ceiling = values.abs().amax().reshape(1)
    flags: tuple[str, ...] = ()
    if comparator.kind == "guided_backprop":
        flags = _unguided(capture.model)
    return LayerMap(values, grid, voxels, ceiling, capture.dtype, None, flags)


def _of_all(first: FirstPass, item: int, target: Target) -> Score:
    """Return the score as a function of the logits of the one window that there is."""
    alone = scored_alone(score.fixed(target, first.logits), first.logits, item)
    return lambda logits: alone(first.windows.crop(logits))


def _slope(upstream: torch.Tensor) -> Score:
    """Return the part of one window in the score's slope, as a function of its logits."""
    return lambda logits: (logits * upstream).sum().reshape(1)


class _Scored(nn.Module):
    """The network with the score behind it, as captum wants it: (n, C, *S) -> (n,)."""

    def __init__(self, capture: Capture, score_of: Score, like: torch.Tensor) -> None:
        super().__init__()
        self.model = capture.model
        self._capture, self._score_of, self._like = capture, score_of, like

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        of_model = self._capture.to_model(x.clone())
        if x.requires_grad:
            logits = self._capture.forward(of_model)
        else:
            logits = self._capture.observe(of_model, copy=False)
        logits = logits.to(self._like)
        return torch.cat([self._score_of(logits[n : n + 1]) for n in range(len(x))])


def _gradient(scored: _Scored, x: torch.Tensor, comparator: Comparator) -> torch.Tensor:
    return _captum().Saliency(scored).attribute(x, abs=False)


def _gradient_x_input(scored: _Scored, x: torch.Tensor, comparator: Comparator) -> torch.Tensor:
    return _captum().InputXGradient(scored).attribute(x)


def _smooth_grad(scored: _Scored, x: torch.Tensor, comparator: Comparator) -> torch.Tensor:
    captum = _captum()
    spread = float(x.max() - x.min()) * comparator.noise
    return captum.NoiseTunnel(captum.Saliency(scored)).attribute(
        x,
        nt_type="smoothgrad",
        nt_samples=comparator.samples,
        nt_samples_batch_size=comparator.batch,
        stdevs=spread,
        abs=False,
    )


def _integrated_gradients(scored: _Scored, x: torch.Tensor, comparator: Comparator) -> torch.Tensor:
    return (
        _captum()
        .IntegratedGradients(scored)
        .attribute(
            x,
            baselines=comparator.baseline,
            n_steps=comparator.steps,
            internal_batch_size=comparator.batch,
        )
    )


def _guided_backprop(scored: _Scored, x: torch.Tensor, comparator: Comparator) -> torch.Tensor:
    return _captum().GuidedBackprop(scored).attribute(x)


def _occlusion(scored: _Scored, x: torch.Tensor, comparator: Comparator) -> torch.Tensor:
    block, axes = comparator.block, x.ndim - 2
    sizes = tuple(block) if isinstance(block, list | tuple) else (block,) * axes
    if len(sizes) != axes:
        raise ConfigError(
            f"block {block!r} has {len(sizes)} numbers; the input has {axes} axes: give one number "
            "for each, or one for all"
        )
    sizes = tuple(min(int(b), n) for b, n in zip(sizes, x.shape[2:], strict=True))
    found = (
        _captum()
        .Occlusion(scored)
        .attribute(
            x,
            sliding_window_shapes=(x.shape[1], *sizes),
            strides=(x.shape[1], *(max(1, b // 2) for b in sizes)),
            baselines=comparator.baseline,
            perturbations_per_eval=comparator.batch,
        )
    )
    return found / x.shape[1]  # all channels are hidden together: each holds the whole change


#: Kind -> (network with score, input (1, C, *S), settings) -> attributions (1, C, *S).
ATTRIBUTIONS: dict[str, Callable[[_Scored, torch.Tensor, Comparator], torch.Tensor]] = {
    "gradient": _gradient,
    "gradient_x_input": _gradient_x_input,
    "smooth_grad": _smooth_grad,
    "integrated_gradients": _integrated_gradients,
    "guided_backprop": _guided_backprop,
    "occlusion": _occlusion,
}


#: Of these, the channels' sizes are summed.
UNSIGNED = ("gradient", "smooth_grad")


#: Activations that guided backpropagation would cut too, were they nn.ReLU, by their class's name.
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


def _unguided(model: nn.Module) -> tuple[str, ...]:
    """Say what guided backpropagation left as it is; functional activations cannot be seen."""
    guided = sum(isinstance(module, nn.ReLU) for module in model.modules())
    left = Counter(type(module).__name__ for module in model.modules())
    others = ", ".join(f"{left[name]} {name}" for name in UNGUIDED if left[name])
    if not guided:
        said = f" ({others} in this one)" if others else ""
        return (
            f"guided_backprop changes nn.ReLU only; without any{said}, this is the plain gradient",
        )
    if others:
        return (
            f"guided_backprop changes nn.ReLU only: {guided} of them here; {others} keep their "
            "plain gradient",
        )
    return ()


def _captum() -> Any:
    try:
        from captum import attr
    except ImportError as error:
        raise MissingExtraError(
            "gradients, SmoothGrad, integrated gradients, guided backprop and occlusion are "
            "captum's: pip install 'seg3dcam[captum]'"
        ) from error
    return attr
