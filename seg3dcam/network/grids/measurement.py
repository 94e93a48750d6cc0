"""Measure, in two ways and on the network itself, where a layer's voxels lie in the input.

A strided 3x3x3 convolution centres feature voxel `u` on input voxel `2u`, while pooling centres it
on `2u + 0.5`. Over several levels the difference adds up to several voxels, and an interpolation
that assumes the wrong places shifts the map. So the places are measured. Every kernel is reduced to
its central taps and normalisation is switched off, so that the network passes a linear ramp on. The
value of the ramp at a feature voxel gives the input position at which the voxel looks. The ramp is
sent in both directions, since max pooling picks the larger value. A token gets the place of its
patch, without what attention adds from elsewhere.

This is exact if every operation that moves values is known. A second measurement on the true
network checks that (`seg3dcam.network.grids.agreement`). If the two do not agree, the grid does not
count as measured.
"""

from __future__ import annotations

import itertools
import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from seg3dcam.errors import LayerError, ModelError
from seg3dcam.geometry import FeatureGrid
from seg3dcam.network.capture import Capture, capturing
from seg3dcam.network.ensemble import unwrap
from seg3dcam.network.facts import key_of, opened
from seg3dcam.network.grids.agreement import agreeing
from seg3dcam.network.grids.operations import PlainOperations
from seg3dcam.network.grids.sample_inputs import LONG, handy_shape
from seg3dcam.network.layers import LayerRef
from seg3dcam.network.module_class import takes_hooks
from seg3dcam.network.untouched import check_explainable

# The ramp is positive and far above zero, where ReLU, GELU and SiLU are the identity and sigmoid
# gates are 1.
_LOW, _HIGH = 1e4, 2e4

# If a layer passes no ramp on, the second measurement alone gives the stride, and centres may be
# pulled to the middle by at most this fraction.
_PULLED = 0.2

# Positions lie on a line if their distance from it is below the first number, in input voxels. They
# form a curve, as after a logarithm, if it is above the second number times the sum of a layer's
# voxel and an input voxel.
_ON_A_LINE, _NO_CURVE = 0.02, 0.1


class _Sizes(NamedTuple):
    """Sizes along one axis of a layer and of the input that is measured, and both in full size."""

    size: int
    length: int
    full_size: int
    full_length: int


def measure_grids(
    model: nn.Module, x: torch.Tensor, shapes: Mapping[LayerRef, tuple[int, ...]]
) -> dict[LayerRef, FeatureGrid]:
    """Measure stride and offset of each layer's grid, for inputs shaped like `x`.

    The measurement takes three small forward passes per axis, up to the layers, and four or more
    to check it. The result is remembered with the network. A layer may have no regular grid, for
    example because of attention over all tokens, or the two measurements may not agree. Then it
    gets the usual grid, whose voxels fill the input evenly, with `measured=False`.

    Args:
        x: (B, C, *S), of which only shape, dtype and device matter.
        shapes: layer -> its spatial shape for this input.

    Returns:
        Layer -> its grid, in voxels of the input.
    """
    model = unwrap(model)
    check_explainable(model)
    keys = {la: _key(la, x, shape) for la, shape in shapes.items()}
    with opened(model) as known:
        grids = {la: known.grids[key] for la, key in keys.items() if key in known.grids}
        new = {layer: shape for layer, shape in shapes.items() if layer not in grids}
        if new:
            # Every layer is required here. Otherwise a layer might be dropped for good because its
            # tokens have no grid in an input of another size.
            with capturing(model, [replace(layer, required=True) for layer in new]) as capture:
                grids |= _measured_twice(capture, x, new)
            # Stored at the end, so that a measurement that fails leaves nothing behind.
            for layer in new:
                if (key := keys[layer]) is not None:
                    known.keep_grid(key, grids[layer])
    return {layer: grids[layer] for layer in shapes}


def _key(layer: LayerRef, x: torch.Tensor, shape: tuple[int, ...]) -> tuple | None:
    """Return the key under which a grid is remembered, None if it must not be."""
    of_layer = key_of(layer)
    return None if of_layer is None else (of_layer, tuple(x.shape[1:]), tuple(shape))


def _measured_twice(
    capture: Capture, x: torch.Tensor, shapes: Mapping[LayerRef, tuple[int, ...]]
) -> dict[LayerRef, FeatureGrid]:
    """Measure the grids by a ramp, and keep those that agree with the true network."""
    with _any_size(capture.model):
        with _plain_levels(capture.model, x.ndim), PlainOperations(_LOW):
            by_axis = [_measure_axis(capture, x, axis, shapes) for axis in range(x.ndim - 2)]
        grids, guessed = {}, {}
        for layer, shape in shapes.items():
            found = [fits[layer] for fits in by_axis]
            if all(found):
                strides, offsets = zip(*found, strict=True)
                grids[layer] = FeatureGrid(shape, strides, offsets)
            elif tuple(shape) == tuple(x.shape[2:]):
                # A sigmoid, for example, passes no ramp on. If the layer is as fine as the input,
                # its voxels most likely are the input's, which the second measurement can confirm.
                guessed[layer] = FeatureGrid(shape, (1.0,) * len(shape), (0.0,) * len(shape))
        sure = agreeing(capture, x, grids) | agreeing(capture, x, guessed, pulled=_PULLED)
    return {
        layer: (grids | guessed)[layer] if layer in sure else _convention(shape, x.shape[2:])
        for layer, shape in shapes.items()
    }


def measured_in_window(
    capture: Capture, x: torch.Tensor, shapes: Mapping[LayerRef, tuple[int, ...]]
) -> dict[LayerRef, FeatureGrid]:
    """Measure the grids of a captured network's layers in the window of the volume.

    Args:
        x: a window (B, C, *S), see `measure_grids`.
        shapes: `capture.shapes`.
    """
    member = capture.member
    grids = measure_grids(member.network, member.into(x), shapes)
    return {layer: member.grid(grid, x.shape[2:]) for layer, grid in grids.items()}


def _measure_axis(
    capture: Capture,
    x: torch.Tensor,
    axis: int,
    shapes: Mapping[LayerRef, tuple[int, ...]],
) -> dict[LayerRef, tuple[float, float] | None]:
    """Return (stride, offset) of each layer along one axis, None if it does not pass the ramp on.

    An input of a handy shape is tried first, then one of full shape, for networks that accept only
    that.
    """
    full = tuple(x.shape[2:])
    fits: dict[LayerRef, tuple[float, float] | None] = dict.fromkeys(shapes)
    # Single precision is more exact than half precision, if the network can compute in it.
    dtypes = dict.fromkeys((torch.promote_types(x.dtype, torch.float32), x.dtype))
    for shape, dtype in itertools.product(
        dict.fromkeys((handy_shape(full, axis, LONG), full)), dtypes
    ):
        try:
            # In pairs, since layers of many channels at full resolution need much memory. The low
            # one comes first in each: plain operations scale upsampled paths by it.
            low, *others = _ramps(x.to(dtype), shape, axis)
            pairs = [torch.stack([low, other]) for other in others]
            shown = [_means(capture.observe_layers(pair)) for pair in pairs]
        except (ModelError, LayerError):
            continue
        for layer, means in shown[0].items():
            ramps = (*means, *(other[layer][1] for other in shown[1:]))
            fit = _fit(ramps, axis, shape[axis], shapes[layer][axis], full[axis])
            fits[layer] = fits[layer] or fit
        if all(fits.values()):
            break
    return fits


def _means(activations: Mapping[LayerRef, torch.Tensor]) -> dict[LayerRef, torch.Tensor]:
    """Return each layer's mean over channels, (B, *s)."""
    return {
        layer: torch.cat([item.cpu().double().mean(1) for item in a.split(1)])
        for layer, a in activations.items()
    }


def _ramps(x: torch.Tensor, shape: Sequence[int], axis: int) -> torch.Tensor:
    """Return a batch of four inputs: all low, all high, rising and falling along `axis`."""
    rising = torch.linspace(_LOW, _HIGH, shape[axis], dtype=x.dtype, device=x.device)
    low, high = (torch.full_like(rising, value) for value in (_LOW, _HIGH))
    lines = torch.stack([low, high, rising, rising.flip(0)])
    view = [1] * (2 + len(shape))
    view[0], view[2 + axis] = 4, -1
    return lines.view(view).expand(4, x.shape[1], *shape).contiguous()


def _fit(
    shown: Sequence[torch.Tensor], axis: int, length: int, full_size: int, full_length: int
) -> tuple[float, float] | None:
    """Fit position = stride * u + offset to a layer's means over channels for the four inputs.

    The ramps are read relative to the layer's values for the lowest and the highest input. So it
    does not matter if the network scales its input, or adds something to it.

    Args:
        shown: the layer's means, (*s) each, for the inputs of `_ramps`.
        axis: the axis of the ramps.
        length: size of these inputs along the axis.
        full_size: size of the layer along the axis for the network's own input.
        full_length: size of that input along the axis.
    """
    low, high, rising, falling = shown
    others = [a for a in range(low.ndim) if a != axis]
    lit = high != low  # voxels that see only padding show nothing
    line = (rising - falling) / (high - low)  # from -1 to 1 along the ramp
    line = torch.where(lit, line, 0)
    if not torch.isfinite(line).all():
        return None
    count = lit.sum(others) if others else lit
    position = ((line.sum(others) if others else line) / count + 1) * (length - 1) / 2
    size = len(position)
    index, position = _steps(torch.arange(size, dtype=torch.float64, device="cpu"), position)
    # Padding and transposed convolutions distort the ends. Of few voxels more are needed.
    trim = math.ceil(len(index) / 4) if len(index) >= 8 else len(index) // 4
    inner = slice(trim, len(index) - trim)
    seen = count[index[inner].long()] > 0
    index, position = index[inner][seen], position[inner][seen]
    if len(index) < min(2, size):
        return None
    stride = _stride(index, position, _Sizes(size, length, full_size, full_length))
    if stride is None or not (float(stride).is_integer() or length == full_length):
        return None  # the stride of a resampled grid depends on the size of the input
    offset = round(float((position - stride * index).mean()), 3) + 0.0
    centre = offset + stride * (size - 1) / 2
    return (stride, offset) if abs(centre - (length - 1) / 2) <= max(length / 4, stride) else None


def _steps(index: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the middles of equally wide steps and their positions, if positions form a staircase.

    A transposed convolution of size 2 and stride 2 gives two voxels the same position. A line
    through the middles of such steps is exact, while a line through a part of a staircase is too
    steep or too flat. The first and the last step may be cut off. Positions that form no staircase
    are returned as they are.
    """
    size = len(position)
    for width in range(size // 2, 1, -1):
        for cut_off in range(width):
            whole = slice(cut_off, size - (size - cut_off) % width)
            steps = position[whole].view(-1, width)
            trim = len(steps) // 4
            inner = steps[trim : len(steps) - trim]
            flat = float((inner.amax(1) - inner.amin(1)).max()) <= _ON_A_LINE
            if flat and len(steps) > 1:
                return index[whole].view(-1, width).mean(1), steps.mean(1)
    return index, position


def _stride(index: torch.Tensor, position: torch.Tensor, sizes: _Sizes) -> float | None:
    """Return the whole-number stride that fits the layer's size, if it fits the positions.

    Otherwise return the stride of a resampled grid: the ratio of the lengths or, with aligned
    corners, the ratio of the lengths minus one. If that does not fit either, return the fitted
    stride, or None if it makes no sense.

    Args:
        index: voxels of the layer, or middles of steps.
        position: their positions in the input.
        sizes: of the layer and of the input.
    """
    exact = sizes.full_length / sizes.full_size
    if len(position) == 1:  # in an input of another size it might be elsewhere
        return exact if sizes.length == sizes.full_length else None
    centred = index - index.mean()
    fitted = float((centred * position).sum() / (centred * centred).sum())
    whole = [float(r) for r in (math.floor(exact), math.ceil(exact), round(fitted)) if r > 0]
    corners = (sizes.full_length - 1) / max(1, sizes.full_size - 1)
    # The fit is rough if there are few voxels, and on a staircase with distorted ends, which no
    # line fits well. In both cases a whole stride fits about as well, most likely the one that
    # fits the layer's size.
    limit = max(1.25 * _rest(fitted, centred, position), _ON_A_LINE)
    for choices in ([exact] if exact.is_integer() else [], whole, [exact, corners]):
        fitting = [
            r
            for r in choices
            if abs(fitted - r) < 0.4 * r
            and _rest(r, centred, position) <= limit
            and _fits_sizes(r, sizes)
        ]
        if fitting:
            return min(fitting, key=lambda r: abs(fitted - r))
    covers = 0.5 * sizes.full_length <= fitted * sizes.full_size <= sizes.full_length + fitted
    straight = _rest(fitted, centred, position) <= _NO_CURVE * (1 + fitted)
    fits = fitted > 0 and covers and straight and _fits_sizes(fitted, sizes)
    return fitted if fits else None


def _fits_sizes(stride: float, sizes: _Sizes) -> bool:
    """Tell whether a layer with this stride has its two sizes in the two sizes of input.

    Where the sizes of input do not differ by a multiple of the stride, the layer's sizes may differ
    by one voxel more or less. If there is only one size of input, it contradicts no stride.
    """
    longer = (sizes.full_length - sizes.length) / stride
    larger = sizes.full_size - sizes.size
    return abs(larger - longer) < (max(1e-6, 0.01 * sizes.full_size) if longer.is_integer() else 1)


def _rest(stride: float, centred: torch.Tensor, position: torch.Tensor) -> float:
    """Return the root mean square distance of positions from a line with a given stride."""
    return float((position - stride * centred).std(correction=0))


def _convention(shape: Sequence[int], input_shape: Sequence[int]) -> FeatureGrid:
    """Return the usual grid, whose voxels fill the input evenly, as not measured."""
    strides = tuple(float(length / size) for size, length in zip(shape, input_shape, strict=True))
    offsets = tuple((stride - 1) / 2 for stride in strides)
    return FeatureGrid(tuple(shape), strides, offsets, measured=False)


@contextmanager
def _plain_levels(model: nn.Module, ndim: int) -> Iterator[None]:
    """Switch off modules that normalise or mix tokens, in case `operations` misses some of them."""
    thread = threading.get_ident()  # other threads may predict with the network meanwhile

    def pass_on(module: nn.Module, args: Any, output: Any) -> Any:
        if threading.get_ident() != thread:
            return None
        same = isinstance(output, torch.Tensor) and args and args[0].shape == output.shape
        return args[0] if same else None

    def add_nothing(module: nn.Module, args: Any, output: Any) -> Any:
        if threading.get_ident() != thread:
            return None
        tokens = isinstance(output, torch.Tensor) and output.ndim == 3 < ndim
        return torch.zeros_like(output) if tokens else None

    with ExitStack() as stack:
        for module in filter(takes_hooks, model.modules()):
            if re.search("attention|sablock", type(module).__name__, re.IGNORECASE):
                stack.callback(module.register_forward_hook(add_nothing).remove)
            is_norm = re.search("norm", type(module).__name__, re.IGNORECASE)
            if is_norm and not any(module.children()):
                stack.callback(module.register_forward_hook(pass_on).remove)
        yield


@contextmanager
def _any_size(model: nn.Module) -> Iterator[None]:
    """Let an exported program take inputs of other sizes than it was exported with."""
    if not isinstance(model, torch.export.UnflattenedModule):
        yield
        return
    checked = model.check_input_constraints
    model.check_input_constraints = False
    try:
        yield
    finally:
        model.check_input_constraints = checked
