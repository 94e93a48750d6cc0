"""Where a layer's feature voxels lie in the input, measured on the network itself.

A strided 3x3x3 convolution centres feature voxel `u` on input voxel `2u`, pooling on `2u + 0.5`;
through several levels the difference reaches several voxels, and interpolation that assumes one
of them shifts the map. So it is measured: with every kernel reduced to its central taps and
normalisation switched off, the network passes a linear ramp on, and what a feature voxel shows of
it is the input position that it looks at. The ramp runs both ways, since max pooling picks the
larger end of each. A token stands for its patch, whatever attention adds to it from elsewhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (its usual name)
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from seg3dcam.capture import Capture, capturing
from seg3dcam.errors import LayerError, ModelError
from seg3dcam.geometry import FeatureGrid
from seg3dcam.layers import LayerRef, Layout, unwrap

# Positive and well above zero, where ReLU, GELU or SiLU are the identity and sigmoid gates are 1.
_LOW, _HIGH = 1e4, 2e4

# Where an upsampled path meets a skip connection, the skip connection knows the place. Residual
# blocks double what goes through them, so that the coarse levels would drown it.
_UPSAMPLED = 1e-3 * _LOW


def measure_grids(
    model: nn.Module,
    x: torch.Tensor,
    shapes: Mapping[LayerRef, tuple[int, ...]],
    settled: dict[LayerRef, Layout] | None = None,
) -> dict[LayerRef, FeatureGrid]:
    """Measure stride and offset of each layer's grid, for inputs shaped like `x`.

    Costs two small forward passes per axis, up to the layers. A layer whose grid is no regular
    image of the input (attention over all tokens, say) gets the usual convention, `measured=False`,
    and so do all layers where a kernel is computed from other parameters (weight normalisation).

    Args:
        x: (B, C, *S); its shape, dtype and device count, its values do not.
        shapes: layer -> its spatial shape for this input.
        settled: layouts known by evidence, see `seg3dcam.capture.capturing`.
    """
    model = unwrap(model)
    if isinstance(model, torch.export.UnflattenedModule):
        return _measured(model, x, shapes, settled, {}, _plain_program(model))
    convolutions = [module for module in model.modules() if isinstance(module, _ConvNd)]
    if any("weight" not in module._parameters for module in convolutions):
        return {layer: _convention(shape, x.shape[2:]) for layer, shape in shapes.items()}
    plain = _plain_levels(model, x.ndim)
    return _measured(model, x, shapes, settled, _central_taps(model), plain)


def _measured(
    model: nn.Module,
    x: torch.Tensor,
    shapes: Mapping[LayerRef, tuple[int, ...]],
    settled: dict[LayerRef, Layout] | None,
    weights: dict[str, torch.Tensor],
    plain: Any,
) -> dict[LayerRef, FeatureGrid]:
    """Measure the grids with other weights, inside a context that makes the network plain."""
    # None may be dropped: at another size than the input's, tokens may have no readable grid.
    layers = [replace(layer, required=True) for layer in shapes]
    with capturing(model, layers, None, settled) as capture, plain:
        by_axis = [_measure_axis(capture, weights, x, axis, shapes) for axis in range(x.ndim - 2)]
    grids = {}
    for layer, shape in shapes.items():
        found = [fits[layer] for fits in by_axis]
        if all(found):
            strides, offsets = zip(*found, strict=True)
            grids[layer] = FeatureGrid(shape, strides, offsets)
        else:
            grids[layer] = _convention(shape, x.shape[2:])
    return grids


def measured_in_window(
    capture: Capture,
    x: torch.Tensor,
    shapes: Mapping[LayerRef, tuple[int, ...]],
    settled: dict[LayerRef, Layout] | None = None,
) -> dict[LayerRef, FeatureGrid]:
    """Measure the grids of a captured network's layers in the volume's window.

    Args:
        x: a window (B, C, *S), see `measure_grids`.
        shapes: `capture.shapes`.
    """
    member = capture.member
    grids = measure_grids(member.network, member.into(x), shapes, settled)
    return {layer: member.grid(grid, x.shape[2:]) for layer, grid in grids.items()}


def _measure_axis(
    capture: Capture,
    weights: dict[str, torch.Tensor],
    x: torch.Tensor,
    axis: int,
    shapes: Mapping[LayerRef, tuple[int, ...]],
) -> dict[LayerRef, tuple[float, float] | None]:
    """Return (stride, offset) of each layer along one axis, None where the ramp is not passed on.

    A handy input is tried first; networks of fixed input size get their own.
    """
    full = tuple(x.shape[2:])
    fits: dict[LayerRef, tuple[float, float] | None] = dict.fromkeys(shapes)
    for shape in dict.fromkeys((_handy(full, axis), full)):
        try:
            # Not all at once: a layer of many channels at full resolution takes much memory.
            flat, rising, falling = _ramps(x, shape, axis)
            pairs = [torch.stack([flat, ramp]) for ramp in (rising, falling)]
            shown = [_means(capture.observe_layers(pair, weights)) for pair in pairs]
        except (ModelError, LayerError):
            continue
        for layer, means in shown[0].items():
            ramps = (*means, shown[1][layer][1])
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


def _handy(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    """Change an input shape by multiples of 32, to 64-95 voxels along `axis`, at most 63 elsewhere.

    Enough voxels to fit a line to, and no more than needed.
    """
    return tuple(64 + n % 32 if a == axis else min(n, 32 + n % 32) for a, n in enumerate(shape))


def _ramps(x: torch.Tensor, shape: Sequence[int], axis: int) -> torch.Tensor:
    """Return a batch of three inputs: constant, rising and falling along `axis`."""
    rising = torch.linspace(_LOW, _HIGH, shape[axis], dtype=x.dtype, device=x.device)
    lines = torch.stack([torch.full_like(rising, _LOW), rising, rising.flip(0)])
    view = [1] * (2 + len(shape))
    view[0], view[2 + axis] = 3, -1
    return lines.view(view).expand(3, x.shape[1], *shape).contiguous()


def _fit(
    shown: Sequence[torch.Tensor], axis: int, length: int, full_size: int, full_length: int
) -> tuple[float, float] | None:
    """Fit position = stride * u + offset to what a layer showed of the three ramps, (*s) each."""
    flat, rising, falling = shown
    others = [a for a in range(flat.ndim) if a != axis]
    lit = flat != 0  # what sees nothing but padding shows nothing
    line = (rising - falling) * _LOW / flat / (_HIGH - _LOW)  # -1 ... 1 along the ramp
    line = torch.where(lit, line, 0)
    if not torch.isfinite(line).all():
        return None
    count = lit.sum(others) if others else lit
    position = ((line.sum(others) if others else line) / count + 1) * (length - 1) / 2
    size = len(position)
    trim = size // 4  # padding and transposed convolutions show at the ends
    index = torch.arange(trim, size - trim, device="cpu")
    index = index[count[index] > 0]
    if len(index) < min(2, size):
        return None
    position = position[index]
    stride = _stride(index.double(), position, full_size, full_length)
    if stride is None or abs(full_size - size - (full_length - length) / stride) > 0.01 * full_size:
        return None  # the handy input has another grid than the full-sized one
    offset = round(float((position - stride * index).mean()), 3) + 0.0
    centre = offset + stride * (size - 1) / 2
    return (stride, offset) if abs(centre - (length - 1) / 2) <= max(length / 4, stride) else None


def _stride(
    index: torch.Tensor, position: torch.Tensor, full_size: int, full_length: int
) -> float | None:
    """Return the stride that the layer's size says, if the positions agree; else theirs."""
    exact = full_length / full_size
    if len(position) == 1:
        return exact
    centred = index - index.mean()
    fitted = float((centred * position).sum() / (centred * centred).sum())
    # The fit is rough on few voxels and on the staircase of a transposed convolution.
    choices = [r for r in (math.floor(exact), math.ceil(exact)) if abs(fitted - r) < 0.4 * r]
    if not exact.is_integer() and abs(fitted - round(fitted)) < 0.05:
        choices = [round(fitted)]
    if choices and choices[0]:
        return float(min(choices, key=lambda r: abs(fitted - r)))
    covers = 0.5 * full_length <= fitted * full_size <= full_length + fitted
    return fitted if fitted > 0 and covers else None


def _convention(shape: Sequence[int], input_shape: Sequence[int]) -> FeatureGrid:
    strides = tuple(float(length / size) for size, length in zip(shape, input_shape, strict=True))
    offsets = tuple((stride - 1) / 2 for stride in strides)
    return FeatureGrid(tuple(shape), strides, offsets, measured=False)


def _central_taps(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return weights that average over input channels and look straight ahead in space."""
    weights: dict[str, torch.Tensor] = {}
    keys = {parameter: key for key, parameter in model.named_parameters()}  # tied ones once
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            key = keys[parameter]
            if isinstance(module, _ConvNd) and name == "weight":
                weights[key] = _kernel(parameter, transposed=isinstance(module, _ConvTransposeNd))
            elif isinstance(module, nn.Linear) and name == "weight":
                weights[key] = torch.full_like(parameter, 1 / parameter.shape[1])
            elif isinstance(module, _ConvNd | nn.Linear) and name == "bias":
                weights[key] = torch.zeros_like(parameter)
    return weights


def _kernel(weight: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    # A transposed kernel keeps all its taps: with the central one alone it would leave gaps.
    kernel = torch.zeros_like(weight)
    taps: list[Any] = [slice(None), slice(None)]
    if not transposed:
        taps += [slice((size - 1) // 2, size // 2 + 1) for size in weight.shape[2:]]
    kernel[tuple(taps)] = 1
    return kernel / kernel[0].sum()


@contextmanager
def _plain_levels(model: nn.Module, ndim: int) -> Iterator[None]:
    """Switch normalisation and attention among tokens off; let upsampled paths count little."""

    def pass_on(module: nn.Module, args: Any, output: Any) -> Any:
        same = isinstance(output, torch.Tensor) and args and args[0].shape == output.shape
        return args[0] if same else None

    def fade(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        level = output[0].mean()  # of the constant ramp
        return output * (_UPSAMPLED / level) if level else output

    def add_nothing(module: nn.Module, args: Any, output: Any) -> Any:
        tokens = isinstance(output, torch.Tensor) and output.ndim == 3 < ndim
        return torch.zeros_like(output) if tokens else None

    with ExitStack() as stack:
        for module in model.modules():
            if re.search("attention|sablock", type(module).__name__, re.IGNORECASE):
                stack.callback(module.register_forward_hook(add_nothing).remove)
            if isinstance(module, nn.Upsample | _ConvTransposeNd):
                stack.callback(module.register_forward_hook(fade).remove)
            is_norm = re.search("norm", type(module).__name__, re.IGNORECASE)
            if is_norm and not any(module.children()):
                stack.callback(module.register_forward_hook(pass_on).remove)
        stack.enter_context(_WithoutNorms())
        yield


@contextmanager
def _plain_program(program: torch.export.UnflattenedModule) -> Iterator[None]:
    """Do the same in an exported program, and let it take inputs of any size."""
    checked = program.check_input_constraints
    program.check_input_constraints = False
    try:
        with _PlainOperations():
            yield
    finally:
        program.check_input_constraints = checked


class _WithoutNorms(TorchFunctionMode):
    """Switches normalisation off where a network calls it as a function."""

    _NORMS = (F.layer_norm, F.group_norm, F.instance_norm, F.batch_norm)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return args[0] if args and func in self._NORMS else func(*args, **(kwargs or {}))


class _PlainOperations(TorchFunctionMode):
    """Makes an exported program plain: its modules have no types, so its operations are changed."""

    _NORMS = ("batch_norm", "instance_norm", "group_norm", "layer_norm")
    # As `run_decompositions` names them; they return (output, statistics ...).
    _CORE_NORMS = (
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "native_group_norm",
        "native_layer_norm",
    )
    _UPSAMPLED = ("upsample", "_upsample")
    _ATTENTION = ("scaled_dot_product_attention",)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        packet = getattr(func, "overloadpacket", None)
        name = "" if packet is None else packet.__name__
        if name in self._NORMS:
            return args[0]
        if name in self._CORE_NORMS:
            return args[0], *func(*args, **kwargs)[1:]
        transposed = name.startswith("conv_transpose") or (name == "convolution" and args[6])
        if name.startswith("conv"):
            args = (args[0], _kernel(args[1], transposed=transposed), None, *args[3:])
            kwargs.pop("bias", None)
        elif name == "linear":
            args = (args[0], torch.full_like(args[1], 1 / args[1].shape[1]))
            kwargs.pop("bias", None)
        output = func(*args, **kwargs)
        if name in self._ATTENTION:
            return torch.zeros_like(output)
        if transposed or name.startswith(self._UPSAMPLED):
            level = output[0].mean()  # of the constant ramp
            return output * (_UPSAMPLED / level) if level else output
        return output
