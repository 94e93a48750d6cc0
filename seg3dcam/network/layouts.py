"""How a layer lays out its activations: with channels first, channels last, or as tokens.

A layout is a function from the output of a layer to channel-first activations (B, C, *s). It moves
values and may leave some out, such as a class token, but computes nothing. So it works for
activations and gradients alike. Layouts are found by shapes and types of modules. If these do not
tell, there may be other evidence (see `seg3dcam.network.layout_evidence`); otherwise the layer is
refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from seg3dcam.errors import LayerError
from seg3dcam.network.layers import LayerRef, Layout
from seg3dcam.network.module_class import class_of

Shape = Sequence[int]


def channels_first(raw: torch.Tensor) -> torch.Tensor:
    """Return (B, C, *s) as it is.

    >>> channels_first(torch.zeros(1, 8, 2, 3, 4)).shape
    torch.Size([1, 8, 2, 3, 4])
    """
    return raw


def channels_last(raw: torch.Tensor) -> torch.Tensor:
    """Turn (B, *s, C) into (B, C, *s).

    >>> channels_last(torch.zeros(1, 2, 3, 4, 8)).shape
    torch.Size([1, 8, 2, 3, 4])
    """
    return raw.movedim(-1, 1)


@dataclass(frozen=True)
class Tokens:
    """Turns tokens (B, N, C) into (B, C, *grid); the last axis of the grid runs fastest.

    Use it as `reshape_transform` if the grid cannot be found from the number of tokens.

    Attributes:
        grid: number of tokens along each spatial axis.
        class_token: whether the first token has no place in the image and is to be left out.

    >>> Tokens((6, 6, 6), class_token=True)(torch.zeros(2, 217, 32)).shape
    torch.Size([2, 32, 6, 6, 6])
    """

    grid: tuple[int, ...]
    class_token: bool = False

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        expected = math.prod(self.grid) + self.class_token
        if raw.ndim != 3 or raw.shape[1] != expected:
            raise LayerError(f"{self} takes (B, {expected}, C), not {tuple(raw.shape)}")
        return raw[:, int(self.class_token) :].transpose(1, 2).unflatten(2, tuple(self.grid))


#: The network's own input as a target layer, for methods that need the gradient there.
INPUT = LayerRef("<input>", layout=channels_first)


def possible_layouts(layer: LayerRef, shape: Shape, input_shape: Shape) -> list[Layout]:
    """Return the layouts that a layer's tensor may have, judged by shapes and the module's type.

    There is more than one if only the network itself can show where the channels are.

    Args:
        shape: shape of the layer's output.
        input_shape: (B, C, *S) of the network's input.

    Raises:
        LayerError: the tensor has no place in the image, its tokens fit several grids, or the
            user's layout does not fit it.
    """
    given = f"layer '{layer}' gives {tuple(shape)} for an input {tuple(input_shape)}"
    if layer.layout is not None:
        _check_users(layer.layout, given, shape, input_shape)
        return [layer.layout]
    if not shape or shape[0] != input_shape[0] or 0 in shape:
        raise LayerError(
            f"{given}: the first axis is not the batch's, as in attention inside windows, so its "
            "values have no known place in the image. Choose the block around it"
        )
    certain = None if layer.element else certain_layout(layer.module, shape, input_shape)
    if certain is not None:
        return [certain]
    choices = _fitting(shape, input_shape)
    if len(shape) == 3 and channels_last not in choices and not _is_first(layer.module):
        choices += _token_grid(shape[1], input_shape[2:], given)
    if choices and (len(choices) > 1 or isinstance(choices[0], Tokens)):
        return choices
    if choices and _even(choices[0], shape, input_shape):
        return choices
    if len(shape) == len(input_shape):
        return [channels_first, channels_last]  # convolutions without padding give such odd sizes
    if len(shape) == 3:
        n = shape[1]
        given += f": {n} tokens, or {n - 1} and a class token, are no grid of whole strides"
    raise LayerError(
        f"{given}. A map needs (B, C, *s) or (B, *s, C) with "
        f"{len(input_shape) - 2} spatial axes, or tokens (B, N, C); pooled vectors have no place "
        "in the image. Choose another layer, or pass reshape_transform, a function from this "
        "tensor to (B, C, *s)"
    )


def tells_layout(module: nn.Module) -> bool:
    """Tell whether a module is of a type that always gives the same layout."""
    return _is_first(module) or _is_last(module)


def takes_first(module: nn.Module, shape: Shape, input_shape: Shape) -> bool:
    """Tell whether a module expects an input of this shape to have its channels first."""
    fits = len(shape) == len(input_shape) and shape[0] == input_shape[0]
    return fits and _is_first_kind(module)


def keeps_layout(module: nn.Module) -> bool:
    """Tell whether a module's type leaves every value at its place in the tensor.

    >>> keeps_layout(nn.LeakyReLU()), keeps_layout(nn.MultiheadAttention(4, 1))
    (True, False)
    """
    kind = class_of(module)
    elementwise = _is_elementwise(module) and not issubclass(kind, nn.MultiheadAttention)
    # A derived class may do anything.
    return elementwise and kind.__module__.startswith("torch.nn.modules.")


def certain_layout(module: nn.Module, shape: Shape, input_shape: Shape) -> Layout | None:
    """Return the layout of a module's output if the module's type leaves no doubt, else None.

    >>> certain_layout(nn.Conv2d(1, 4, 3), (1, 4, 8, 8), (1, 1, 10, 10)).__name__
    'channels_first'
    """
    if len(shape) != len(input_shape) or shape[0] != input_shape[0]:
        return None
    if _is_first(module):
        return channels_first
    # This holds for (B, *s, C), but not for windows (B, n, N, C), whose "strides" would differ.
    fits = _is_last(module) and channels_last in _fitting(shape, input_shape)
    return channels_last if fits and _even(channels_last, shape, input_shape) else None


def layout_by_change(before: Shape, after: Shape) -> Layout | None:
    """Return the layout of a tensor whose shape changed together with the input's last axis.

    Args:
        before: shape of the tensor.
        after: its shape when the last axis of the input has another length.

    Returns:
        None if anything but one axis changed.

    >>> layout_by_change((1, 16, 16, 16), (1, 16, 16, 24)).__name__
    'channels_first'
    """
    if len(before) != len(after):
        return None
    changed = [axis for axis in range(1 - len(after), 0) if before[axis] != after[axis]]
    if changed == [-1]:
        return channels_first
    return channels_last if changed == [-2] else None


def spatial_shape(layout: Layout, shape: Shape) -> tuple[int, ...]:
    """Return the spatial shape of the channel-first activations in a tensor of some shape.

    >>> spatial_shape(channels_last, (1, 2, 3, 4, 8))
    (2, 3, 4)
    """
    return tuple(layout(torch.zeros((), device="cpu").expand(*shape)).shape[2:])


def pulled_back(layout: Layout, values: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Move channel-first values back to where a layout takes them from; elsewhere return zero.

    Args:
        values: (B, C, *s), or a tensor that broadcasts to it.
        shape: shape of the layer's own tensor.

    >>> pulled_back(Tokens((2,), class_token=True), torch.ones(1, 1, 1), (1, 3, 1)).flatten()
    tensor([0., 1., 1.])
    """
    with torch.enable_grad():
        raw = values.new_zeros(shape).requires_grad_()
        moved = layout(raw)
        return torch.autograd.grad(moved, raw, values.expand_as(moved))[0]


def stride_of(size: Shape, input_size: Shape) -> tuple[int, ...] | None:
    """Return the whole-number stride of a layer's grid along each axis, None if there is none.

    >>> stride_of((12, 13), (96, 99))
    (8, 8)
    """
    stride = []
    for small, large in zip(size, input_size, strict=True):
        step = max(1, round(large / small)) if small else 0
        if not step or not large // step <= small <= -(-large // step):
            return None
        stride.append(step)
    return tuple(stride)


def _is_first(module: nn.Module) -> bool:
    return _is_first_kind(_last_part(module)) or _is_exported_convolution(module)


def _is_exported_convolution(module: nn.Module) -> bool:
    """Tell whether a module of an exported program convolves and moves no axes."""
    if type(module).__name__ != "InterpreterModule":
        return False
    operations = {
        getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
        for part in module.modules()
        for node in getattr(part, "graph", torch.fx.Graph()).nodes
    }
    moves = {"permute", "transpose", "movedim", "reshape", "view", "flatten", "unflatten"}
    return any(name.startswith("conv") for name in operations) and not operations & moves


def _is_first_kind(module: nn.Module) -> bool:
    kinds = (_ConvNd, _NormBase, nn.GroupNorm, nn.Upsample)
    kind = class_of(module)
    return issubclass(kind, kinds) or kind.__module__ == "torch.nn.modules.pooling"


def _is_last(module: nn.Module) -> bool:
    module = _last_part(module)
    norm = isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1
    return norm or issubclass(class_of(module), nn.Linear)


def _last_part(module: nn.Module) -> nn.Module:
    """Return the last part of a sequence that is not elementwise, which decides the layout."""
    # A scripted nn.Sequential has another forward(), and its parts cannot be read.
    while isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        parts = [part for part in module.children() if not _is_elementwise(part)]
        if not parts:
            break
        module = parts[-1]
    return module


def _is_elementwise(module: nn.Module) -> bool:
    names = ("torch.nn.modules.activation", "torch.nn.modules.dropout")
    kind = class_of(module)
    return kind.__module__ in names or issubclass(kind, nn.Identity)


def _fitting(shape: Shape, input_shape: Shape) -> list[Layout]:
    """Return those of `channels_first` and `channels_last` that give whole-number strides."""
    if len(shape) != len(input_shape):
        return []
    both: tuple[Layout, Layout] = (channels_first, channels_last)
    return [each for each in both if stride_of(spatial_shape(each, shape), input_shape[2:])]


def _even(layout: Layout, shape: Shape, input_shape: Shape) -> bool:
    """Tell whether the strides along all axes are whole numbers and the same."""
    return len(set(stride_of(spatial_shape(layout, shape), input_shape[2:]) or (0, 1))) == 1


def _token_grid(count: int, size: Shape, given: str) -> list[Layout]:
    """Return the grids of tokens with equal strides, or else with any whole strides: one or none.

    Args:
        count: number of tokens.
        size: spatial shape of the network's input.
        given: the output of the layer in words, for the error.

    Raises:
        LayerError: there are several grids.
    """
    rounded = (math.floor, math.ceil)
    strides = range(1, max(size) + 1)
    even = {tuple(max(1, r(n / stride)) for n in size) for stride in strides for r in rounded}
    counts = [(n, class_token) for n, class_token in ((count, False), (count - 1, True)) if n > 1]
    found = [Tokens(g, token) for n, token in counts for g in sorted(even) if math.prod(g) == n]
    found = found or [Tokens(grid, token) for n, token in counts for grid in _grids(n, size)]
    if len(found) > 1:
        shown = ", ".join(map(str, found[:6])) + (", ..." if len(found) > 6 else "")
        raise LayerError(
            f"{given}: these tokens fit more than one grid. Say which with reshape_transform=, "
            f"one of {shown} (of seg3dcam.network.layouts)"
        )
    return list(found)


def _grids(count: int, size: Shape) -> Iterator[tuple[int, ...]]:
    """Yield all grids of `count` voxels with whole-number strides."""
    if not size:
        if count == 1:
            yield ()
        return
    for length in range(1, min(count, size[0]) + 1):
        if count % length == 0 and stride_of((length,), size[:1]):
            for rest in _grids(count // length, size[1:]):
                yield (length, *rest)


def _check_users(layout: Layout, given: str, shape: Shape, input_shape: Shape) -> None:
    """Raise LayerError unless a user's layout moves values to (B, C, *s) of a possible size.

    The layout is tried on numbers that are all different, so that each can be recognised in the
    result.
    """
    numbers = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64, device="cpu")
    places = numbers.neg_().view(*shape)
    try:
        moved = layout(places)
    except Exception as error:
        raise LayerError(f"{given}, and reshape_transform fails on it: {error}") from error
    fits = (
        isinstance(moved, torch.Tensor)
        and moved.ndim == len(input_shape)
        and moved.shape[0] == input_shape[0]
        and all(1 <= n <= most for n, most in zip(moved.shape[2:], input_shape[2:], strict=True))
    )
    if not fits:
        got = tuple(moved.shape) if isinstance(moved, torch.Tensor) else type(moved).__name__
        raise LayerError(
            f"{given}, and reshape_transform turns that into {got}; a map needs (B, C, *s) with "
            f"B = {input_shape[0]} and s at most {tuple(input_shape[2:])}"
        )
    if isinstance(layout, Tokens) or layout in (channels_first, channels_last):
        return
    # Each value is recognised by its number. It must lie in its own item of the batch, only once.
    index = moved.neg().sub(1)
    per_item = math.prod(shape[1:])
    known = (index == index.round()) & (index >= 0) & (index < len(places) * per_item)
    taken = torch.zeros(places.numel(), dtype=torch.bool, device="cpu")
    taken[index[known].long()] = True
    item = torch.arange(len(moved), device="cpu").view(-1, *[1] * (moved.ndim - 1))
    if not known.all() or taken.sum() != index.numel() or (index // per_item != item).any():
        raise LayerError(
            "reshape_transform must only move values, each to one place within its own item of "
            f"the batch, since gradients go through it too: {given}"
        )
