"""Feature maps: what the channels of a layer hold, in one slice of it.

found = feature_maps(model, x, "encoder.2", target=1)
found.values                       # (C, h, w)
found.order                        # channels, those that speak most for class 1 first
save_features("features", found)   # of seg3dcam.review: pictures and a mosaic

Through windows only the slice is blended: the channels of the whole volume are never in memory
together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from seg3dcam.engine.gradients import gradient_pass
from seg3dcam.engine.memory import BatchLimit
from seg3dcam.engine.passes import FirstPass, activation_pass, predict, wide
from seg3dcam.engine.seed import Seed
from seg3dcam.errors import InputError, LayerError
from seg3dcam.geometry import FeatureGrid, spacing_of
from seg3dcam.methods.base import weighted_sum
from seg3dcam.methods.pooled import PooledGradient
from seg3dcam.network.capture import Capture, begun_again, capturing
from seg3dcam.network.checked_input import as_input, on_grid_of, telling_axes
from seg3dcam.network.ensemble import members_of
from seg3dcam.network.grids.measurement import measured_in_window
from seg3dcam.network.layers import LayerRef, LayerSpec, Layout, resolve_layers
from seg3dcam.network.outputs import OutputSelection
from seg3dcam.network.suggest import auto_layer
from seg3dcam.progress import Progress, silent
from seg3dcam.targets import Activation, as_target, name_of, placed, score_and_seed
from seg3dcam.windows import (
    WindowPlan,
    Windows,
    blend_onto,
    grid_over_volume,
    part_in_window,
    plan_windows,
)


@dataclass(frozen=True, eq=False)
class FeatureMaps:
    """The channels of a layer: the whole of a 2D layer, one slice of a 3D layer.

    Attributes:
        values: (C, h, w) as the layer gave them, at least float32; rows and columns are the grid's
            axes that are left, in their order. Of a 1D layer h is 1.
        layer: its name.
        grid: where its voxels lie in the network's input; through windows, the layer's grid
            continued over the volume.
        axis: the axis of the network's array that the slice was cut from; None for 2D.
        index: the slice's place along it, in voxels of the layer.
        weights: (C,) Grad-CAM's channel weights, the mean of dS/dA over the layer; None without
            a target.
        target: the target's name.
        affine: (4, 4) voxel of `grid` -> RAS mm, of a 3D input that knows where it lies.
    """

    values: NDArray[Any]
    layer: str
    grid: FeatureGrid
    axis: int | None = None
    index: int | None = None
    weights: NDArray[Any] | None = None
    target: str | None = None
    affine: NDArray[np.float64] | None = None

    @property
    def order(self) -> NDArray[np.intp]:
        """Channel numbers (C,), the highest weight first; without weights 0, 1, 2, ..."""
        if self.weights is None:
            return np.arange(len(self.values))
        return np.argsort(-self.weights, kind="stable")

    @property
    def pixel_size(self) -> tuple[float, float]:
        """Height and width of a voxel of the slice: mm with an affine, else input voxels."""
        sizes = self.grid.stride if self.affine is None else spacing_of(self.affine)
        left = [size for axis, size in enumerate(sizes) if axis != self.axis]
        return left[0], left[-1]


@begun_again
def feature_maps(
    model: nn.Module,
    x: torch.Tensor,
    layer: LayerSpec = "auto",
    *,
    sliding_window: WindowPlan | None = None,
    target: Any = None,
    index: int | None = None,
    axis: int = 0,
    item: int = 0,
    output: OutputSelection = None,
    activation: Activation = "softmax",
    reshape_transform: Layout | None = None,
    progress: Progress | None = None,
) -> FeatureMaps:
    """Return what the channels of a layer hold.

    Without a target the network runs only as far as the layer, and only in the windows that the
    slice goes through. The model is afterwards exactly as it was.

    Args:
        model: any network with a channel-first input (B, C, *S); of an `Ensemble` the first.
        x: (B, C, *S) tensor or MetaTensor, with one to three spatial axes.
        layer: one layer, see `BaseCAM`; "auto" is the bottleneck, see `suggest_layers`.
        sliding_window: a `WindowPlan`; None takes the input as one window. Values are blended by
            the windows' shares; windows that do not start on the layer's grid are interpolated.
        target: a class index or a target, see `BaseCAM`: the channels get Grad-CAM's weights.
        index: of the slice, in voxels of the layer. None: the one where the channels' weighted
            sum is highest if there is a target, else the middle one.
        axis: the spatial axis that slices are counted along, for a 3D layer.
        item: the item of the batch; the others are not looked at.
        output, activation, reshape_transform, progress: see `BaseCAM`.

    Raises:
        InputError: an item, axis or index that does not exist.
        LayerError: no such layer, several, or one whose values have no place in the image.
        TargetError: the target does not fit the network's output.

    Example:
        >>> network = nn.Sequential(nn.Conv3d(1, 4, 3, stride=2, padding=1), nn.ReLU())
        >>> found = feature_maps(network, torch.rand(1, 1, 8, 8, 12), "0", index=1)
        >>> found.values.shape, found.grid.shape
        ((4, 4, 6), (4, 4, 6))
    """
    chosen = None if target is None else as_target(target, activation)
    x, affine = as_input(x)
    if not 0 <= item < len(x):
        raise InputError(f"item {item}: legal are 0 to {len(x) - 1} in this batch")
    if affine is not None:
        affine = affine[item] if affine.ndim == 3 else affine
    x, progress = x[item : item + 1], progress or silent
    windows = plan_windows(sliding_window, x.shape[2:])
    member = members_of(model)[0]
    with telling_axes(member, x):
        ref = _one_layer(model, layer, reshape_transform, x, windows, output)
    with telling_axes(member, x), capturing(model, [ref], output) as capture:
        x = x.to(torch.promote_types(x.dtype, capture.dtype))
        first = _first_pass(capture, x, windows, chosen is not None, progress)
        example = capture.to_model(x.new_empty(1, x.shape[1], *windows.roi))
        grid = measured_in_window(capture, example, first.shapes)[ref]
        whole = grid_over_volume(grid, windows)
        cut = _checked_cut(ref, whole, axis, index)
        weights = None
        if chosen is not None:
            chosen = placed(chosen, lambda mask: on_grid_of(mask, affine, x.shape[2:]))
            weights = _channel_weights(first, ref, grid, chosen, progress)
        if cut is not None and index is None:
            index = _peak(first, ref, grid, whole, weights, cut)
        target_grid = whole if cut is None else _slice_of(whole, cut, index)
        values = blend_onto(
            target_grid, grid, windows, _windows_at(first, ref, grid, target_grid, progress)
        )
    if values is None:
        raise LayerError(
            f"slice {index} of layer '{ref}' lies between the windows: choose more overlap"
        )
    values = values.squeeze(1 + cut) if cut is not None else values
    return FeatureMaps(
        values=values.reshape(len(values), -1, values.shape[-1]).cpu().numpy(),
        layer=str(ref),
        grid=whole,
        axis=cut,
        index=None if cut is None else index,
        weights=None if weights is None else weights.cpu().numpy(),
        target=None if chosen is None else name_of(chosen),
        affine=None if affine is None or cut is None else whole.affine(affine),
    )


def _one_layer(
    model: nn.Module,
    spec: LayerSpec,
    reshape_transform: Layout | None,
    x: torch.Tensor,
    windows: Windows,
    output: OutputSelection,
) -> LayerRef:
    """Return the one layer that is meant."""
    if isinstance(spec, str) and spec == "auto":
        return auto_layer(model, (1, x.shape[1], *windows.roi), output)
    layers = resolve_layers(model, spec, reshape_transform)
    if len(layers) > 1:
        shown = ", ".join(f"'{layer}'" for layer in layers[:6])
        more = f" and {len(layers) - 6} more" if len(layers) > 6 else ""
        raise LayerError(
            f"{spec!r} stands for {len(layers)} layers, and feature maps are those of one: name "
            f"one of {shown}{more}"
        )
    return layers[0]


def _first_pass(
    capture: Capture,
    x: torch.Tensor,
    windows: Windows,
    with_logits: bool,
    progress: Progress,
) -> FirstPass:
    """Predict the volume; if its logits are not needed, run the first window alone."""
    if with_logits:
        return predict(capture, x, windows, graph=True, keep=True, progress=progress)
    at_once = BatchLimit(windows.plan.sw_batch_size)
    return FirstPass.of_first_window(capture, windows, x, at_once)


def _checked_cut(layer: LayerRef, grid: FeatureGrid, axis: int, index: int | None) -> int | None:
    """Return the axis that the slice is cut from, None where there is nothing to cut."""
    ndim = len(grid.shape)
    if ndim > 3:
        raise LayerError(f"layer '{layer}' has {ndim} spatial axes: slices are cut from up to 3")
    if ndim < 3:
        if index is not None:
            raise InputError(f"layer '{layer}' is {ndim}D and shown whole: leave out the slice")
        return None
    if axis not in range(ndim):
        raise InputError(f"axis {axis!r}: legal are 0, 1 and 2, the axes of the network's array")
    if index is not None and index not in range(grid.shape[axis]):
        raise InputError(
            f"slice {index!r} of layer '{layer}' along axis {axis}: legal are 0 to "
            f"{grid.shape[axis] - 1}, in voxels of the layer"
        )
    return int(axis)


# ---------------------------------------------------------------- weights


def _channel_weights(
    first: FirstPass,
    layer: LayerRef,
    grid: FeatureGrid,
    target: Callable[[torch.Tensor], torch.Tensor],
    progress: Progress,
) -> torch.Tensor:
    """Return Grad-CAM's weights, (C,): the mean gradient over the volume's layer."""
    _, seed = score_and_seed(target, first.logits)
    method = PooledGradient(block=None)
    sums = None
    for found in gradient_pass(first, [0], [Seed.of(seed)], progress):
        for _, a, g in found.each(layer):
            more = method.weigh(a, wide(g), {})
            sums = more if sums is None else method.join(sums, more)
    first.release_graph()
    if sums is None:  # the score's gradient is zero everywhere
        _, found_once = next(activation_pass(first, [0], [0]))
        return wide(found_once[layer]).new_zeros(found_once[layer].shape[1])
    axes = range(len(grid.shape))
    voxels = math.prod(grid.shape) * first.windows.lengths(axes)
    return method.weights({}, sums, voxels, missing=False).values.flatten()


def _peak(
    first: FirstPass,
    layer: LayerRef,
    grid: FeatureGrid,
    whole: FeatureGrid,
    weights: torch.Tensor | None,
    axis: int,
) -> int:
    """Return the slice where Grad-CAM's map is highest; the middle one if nothing is positive."""
    middle = whole.shape[axis] // 2
    if weights is None:
        return middle
    every = range(len(first.windows))
    maps = (
        (window, weighted_sum(wide(found[layer]), weights[None]))
        for window, found in activation_pass(first, [0], every)
    )
    total = blend_onto(whole, grid, first.windows, maps)
    if total is None:
        return middle
    along = total[0].amax([a for a in range(total.ndim - 1) if a != axis])
    best = int(along.argmax())
    return best if along[best] > 0 else middle


# ---------------------------------------------------------------- grids and windows


def _slice_of(grid: FeatureGrid, axis: int, index: int | None) -> FeatureGrid:
    """Return the grid of one slice."""
    shape, offset = list(grid.shape), list(grid.offset)
    shape[axis] = 1
    offset[axis] += grid.stride[axis] * (index or 0)
    return FeatureGrid(tuple(shape), grid.stride, tuple(offset), grid.measured)


def _windows_at(
    first: FirstPass, layer: LayerRef, grid: FeatureGrid, target: FeatureGrid, progress: Progress
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (window, activations (C, *s)) of every window that covers a part of the target."""
    which = [
        window
        for window in range(len(first.windows))
        if all(part_in_window(target, grid, first.windows, window)[1].shape)
    ]
    for done, (window, found) in enumerate(activation_pass(first, [0], which), 1):
        yield window, wide(found[layer])[0]
        progress("features", done, len(which))
