"""FullGrad through windows: contributions of the input and of every bias, on the input's voxels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from seg3dcam.engine.gradients import gradient_pass
from seg3dcam.engine.layer_map import LayerMap, joined
from seg3dcam.engine.passes import FirstPass, wide
from seg3dcam.engine.seed import Seed
from seg3dcam.errors import ModelError
from seg3dcam.geometry import FeatureGrid, cropped, interpolate
from seg3dcam.methods.base import for_each_item
from seg3dcam.methods.full_grad import FullGradient
from seg3dcam.network.capture import Capture, capturing
from seg3dcam.network.grids.measurement import measured_in_window
from seg3dcam.network.layers import LayerRef
from seg3dcam.network.layouts import INPUT
from seg3dcam.network.outputs import OutputSelection
from seg3dcam.progress import Progress
from seg3dcam.windows import Blend

#: A map that misses more than this fraction of the score is flagged.
COMPLETE = 1e-3


def full_gradient_map(
    first: FirstPass,
    score: torch.Tensor,
    seed: Seed,
    method: FullGradient,
    output: OutputSelection,
    progress: Progress,
) -> LayerMap:
    """Return the map of one target, on the input's voxels.

    It takes apart seed . logits: for a target that is linear in the logits, the score.

    Args:
        score: (B,) of the target.
    """
    layers = [INPUT, *_with_places(first, _biased_layers(first.capture.model), output)]
    with capturing(first.capture.member, layers, output) as capture:
        second = FirstPass(
            capture, first.windows, first.x, first.logits, {}, own=first.own, at_once=first.at_once
        )
        grids: dict[LayerRef, FeatureGrid] = {}
        maps = [
            _map(second, items, score[list(items)], seed, method, grids, progress)
            for items in first.items
        ]
    return joined(maps)


def _map(
    first: FirstPass,
    items: Sequence[int],
    score: torch.Tensor,
    seed: Seed,
    method: FullGradient,
    grids: dict[LayerRef, FeatureGrid],
    progress: Progress,
) -> LayerMap:
    voxels = FeatureGrid.of_voxels(first.windows.roi)
    blend = Blend(first.windows, voxels, first.x.new_zeros(len(items)))
    ceiling = first.x.new_zeros(len(items))
    biases = _biases(first.capture)
    for found in gradient_pass(first, items, [seed], progress):
        if not grids:
            inner = {k: shape for k, shape in first.capture.shapes.items() if k != INPUT}
            grids[INPUT] = voxels
            grids.update(measured_in_window(first.capture, found.activations[INPUT][:1], inner))
        for layer, grid in grids.items():
            for window, a, gradient in found.each(layer):
                g = wide(gradient)
                values = a if layer == INPUT else for_each_item(biases[layer][None], g.ndim)
                values = values.to(g)
                part = method.contribution(values, g)
                spread = _spread if method.psi == "signed" else interpolate
                blend.add_alone(window, spread(part, grid, voxels))
                highest = method.contribution(values.abs(), g.abs()).flatten(1).amax(1)
                ceiling = torch.maximum(ceiling, highest.to(ceiling))
    flags = [*_not_linear(first, items, score, seed)]
    if method.psi == "signed":
        flags += _incomplete(first, items, seed, blend.total)
    values, grid = cropped(blend.total, blend.grid, first.windows.shape)
    return LayerMap(values, grid, voxels, ceiling, first.capture.dtype, None, tuple(flags))


def _slope(logits: torch.Tensor, items: Sequence[int], seed: Seed) -> torch.Tensor:
    """Return seed . logits of some items."""
    dense = seed.cut(items, (0,) * len(seed.shape[2:]), seed.shape[2:])
    return (dense * logits[list(items)]).flatten(1).sum(1)


def _not_linear(
    first: FirstPass, items: Sequence[int], score: torch.Tensor, seed: Seed
) -> Iterator[str]:
    """Yield a warning for each item whose score is not linear in the logits."""
    for slope, whole in zip(
        _slope(first.logits, items, seed).tolist(), score.tolist(), strict=True
    ):
        if _differ(slope, whole, first.capture.dtype):
            yield (
                f"the score, {whole:.4g}, is not linear in the logits: full_grad takes apart its "
                f"slope there, dS/dlogits . logits = {slope:.4g}. ClassLogit is linear"
            )


def _incomplete(
    first: FirstPass, items: Sequence[int], seed: Seed, total: torch.Tensor
) -> Iterator[str]:
    """Yield a warning for each item whose contributions do not sum to what was to be explained.

    Contributions that lie in padding count, too.
    """
    # Layers that the score does not depend on contribute nothing, so nothing is lost.
    silent = first.capture.shapes
    lost = [str(layer) for layer in first.capture.dropped if layer not in silent]
    why = (
        f"The biases of {', '.join(lost[:5])}{' and more' * (len(lost) > 5)} are left out: "
        + next(reason for layer, reason in first.capture.dropped.items() if str(layer) in lost)
        if lost
        else "InstanceNorm, GroupNorm, LayerNorm, attention and activations other than ReLU and "
        "LeakyReLU share out what no bias accounts for, and so do biases outside of layers"
    )
    summed = total.flatten(1).sum(1)
    logits = first.logits if first.own is None else first.own  # of an ensemble's member
    for slope, found in zip(_slope(logits, items, seed).tolist(), summed.tolist(), strict=True):
        if _differ(slope, found, first.capture.dtype):
            yield (
                f"full_grad is not complete here: the map sums to {found:.4g}, what it takes apart "
                f"to {slope:.4g}. {why}"
            )


def _differ(one: float, other: float, precision: torch.dtype) -> bool:
    tolerance = max(COMPLETE, 20 * torch.finfo(precision).eps)
    return abs(one - other) > tolerance * max(abs(one), abs(other))


def _spread(values: torch.Tensor, grid: FeatureGrid, voxels: FeatureGrid) -> torch.Tensor:
    """Distribute every feature voxel's value over the voxels around it; the sum stays the same."""
    first = values.ndim - len(grid.shape)
    for axis, (size, length) in enumerate(zip(grid.shape, voxels.shape, strict=True)):
        line = grid.line(axis)
        unit = torch.eye(size, dtype=torch.float64, device="cpu")
        weights = interpolate(unit, line, voxels.line(axis))
        nowhere = weights.sum(1) == 0  # outside of the voxels, in padding: to the nearest one
        nearest = line.positions(0).round().long().clamp(0, length - 1)
        weights[nowhere, nearest[nowhere]] = 1
        weights = (weights / weights.sum(1, keepdim=True)).to(values)
        values = (values.movedim(first + axis, -1) @ weights).movedim(-1, first + axis)
    return values


def _biased_layers(model: nn.Module) -> list[LayerRef]:
    """Return every layer that adds a bias; one that does not run is left out later.

    Raises:
        ModelError: an exported program, whose modules do not say what they add.
    """
    if isinstance(model, torch.export.UnflattenedModule):
        raise ModelError(
            "full_grad adds up the biases of every module, which an exported program does not tell "
            "apart: build the network in Python and load the program's weights into it "
            "(network.load_state_dict(program.state_dict)), or take another method"
        )
    return [
        LayerRef(name, (), module, required=False)
        for name, module in model.named_modules()
        if _bias(module) is not None
    ]


def _with_places(
    first: FirstPass, layers: list[LayerRef], output: OutputSelection
) -> list[LayerRef]:
    """Give linear layers, whose vectors have no place in the image, the whole image as theirs."""
    if not any(isinstance(layer.module, nn.Linear) for layer in layers):
        return layers
    axes = len(first.windows.roi)
    with capturing(first.capture.member, layers, output) as capture:
        capture.observe(first.cut([0], [0]), copy=False)
        dropped = capture.dropped
    return [
        replace(layer, layout=partial(_everywhere, axes=axes))
        if layer in dropped and isinstance(layer.module, nn.Linear)
        else layer
        for layer in layers
    ]


def _everywhere(vector: torch.Tensor, axes: int) -> torch.Tensor:
    """Return (B, C) as one voxel that is as large as the image."""
    return vector.reshape(*vector.shape, *[1] * axes)


def _biases(capture: Capture) -> dict[LayerRef, torch.Tensor]:
    found = {layer: _bias(layer.module) for layer in _biased_layers(capture.model)}
    return {layer: bias for layer, bias in found.items() if bias is not None}


def _bias(module: nn.Module) -> torch.Tensor | None:
    """Return what a module adds to each channel, None if nothing."""
    bias = getattr(module, "bias", None)
    if isinstance(module, _BatchNorm) and module.running_mean is not None:
        scale = (module.running_var + module.eps).rsqrt()  # type: ignore[operator, union-attr]
        scale = scale if module.weight is None else scale * module.weight.detach()
        shift = -module.running_mean * scale
        return shift if bias is None else bias.detach() + shift
    known = isinstance(module, _ConvNd | nn.Linear) or "Norm" in type(module).__name__
    if known and isinstance(bias, torch.Tensor):
        return bias.detach()
    return None
