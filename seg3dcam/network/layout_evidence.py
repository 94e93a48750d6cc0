"""Find out how layers lay out their tensors, if shapes alone do not tell it.

Modules of a known type give evidence without an extra pass: a convolution takes and gives tensors
with channels first, an activation function keeps the layout of its input. Such evidence counts if
it is about the output of the layer itself, or about a tensor of the same shape that was made inside
the layer. Without such evidence, the network is run on two inputs that differ in the length of
their last axis, to see which axis of the layer's tensor changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from seg3dcam.errors import LayerError, ModelError
from seg3dcam.network.layers import LayerRef, Layout
from seg3dcam.network.layouts import (
    certain_layout,
    channels_first,
    channels_last,
    keeps_layout,
    layout_by_change,
    possible_layouts,
    spatial_shape,
    takes_first,
    tells_layout,
)

_Shapes = Mapping[LayerRef, Sequence[int]]


def shows_layout(module: nn.Module) -> bool:
    """Tell whether a module's type is evidence of layouts.

    >>> shows_layout(nn.Conv3d(1, 1, 1)), shows_layout(nn.Flatten())
    (True, False)
    """
    return tells_layout(module) or keeps_layout(module)


class LayoutEvidence:
    """What the modules of a network show about the layouts of its tensors, in one forward pass.

    Args:
        input_shape: (B, C, *S).
    """

    def __init__(self, input_shape: Sequence[int]) -> None:
        self._input_shape = tuple(input_shape)
        self._made: list[tuple[nn.Module, tuple[int, ...], Layout]] = []
        # Tensor -> the layouts that modules showed for it. Tensors that are laid out alike share
        # one set.
        self._shown: MutableMapping[torch.Tensor, set[Layout]] = WeakTensorKeyDictionary()
        self._of_layer: dict[LayerRef, set[Layout]] = {}

    def look(self, module: nn.Module, args: Any, output: Any) -> None:
        """Note the evidence from a module of a known type; this is called as a forward hook."""
        if not isinstance(output, torch.Tensor):
            return
        taken = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if taken is not None and takes_first(module, taken.shape, self._input_shape):
            self._about(taken).add(channels_first)
        layout = certain_layout(module, output.shape, self._input_shape)
        if layout is not None:
            self._about(output).add(layout)
            self._made.append((module, tuple(output.shape), layout))
        elif taken is not None and keeps_layout(module) and taken.shape == output.shape:
            self.alike(taken, output)

    def alike(self, known: torch.Tensor, new: torch.Tensor) -> None:
        """Note that a tensor is laid out like another one."""
        self._shown.setdefault(new, self._about(known))

    def gave(self, layer: LayerRef, tensor: torch.Tensor) -> None:
        """Note the output of a layer."""
        self._of_layer[layer] = self._about(tensor)

    def layout_of(self, layer: LayerRef, shape: Sequence[int]) -> Layout | None:
        """Return the layout of a layer's output, None if there is no evidence.

        None is returned as well if the evidence contradicts itself.
        """
        said = set(self._of_layer.get(layer, ()))
        if not said and len(set(shape[1:])) > 1:  # otherwise a permutation would keep the shape
            parts = set(layer.module.modules())
            said = {
                layout
                for module, made, layout in self._made
                if made == tuple(shape) and module in parts
            }
        return said.pop() if len(said) == 1 else None

    def _about(self, tensor: torch.Tensor) -> set[Layout]:
        return self._shown.setdefault(tensor, set())


def settle_layouts(
    shapes: _Shapes,
    x: torch.Tensor,
    evidence: LayoutEvidence,
    settled: dict[LayerRef, Layout],
    run: Callable[[torch.Tensor], Any],
) -> tuple[dict[LayerRef, Layout], dict[LayerRef, LayerError]]:
    """Return how layers lay out their tensors, and why others have no layout.

    Args:
        shapes: layer -> shape of its output for `x`.
        evidence: the evidence from that pass.
        settled: layer -> the layout that is known from earlier evidence; it is filled in.
        run: runs the network on an input.
    """
    found: dict[LayerRef, Layout] = {}
    refused: dict[LayerRef, LayerError] = {}
    open_: dict[LayerRef, list[Layout]] = {}
    for layer, shape in shapes.items():
        try:
            choices = possible_layouts(layer, shape, x.shape)
        except LayerError as error:
            refused[layer] = error
            continue
        if len(choices) == 1:
            found[layer] = choices[0]
        else:
            open_[layer] = choices
    for layer in open_:
        layout = evidence.layout_of(layer, shapes[layer])
        if layout is not None:
            settled.setdefault(_bare(layer), layout)
    unknown = {layer: shapes[layer] for layer in open_ if layer not in settled}
    if unknown:
        settled |= {_bare(la): layout for la, layout in _seen_changing(unknown, x, run).items()}
    for layer, choices in open_.items():
        first = settled.get(layer) is channels_first
        fitting = [choice for choice in choices if (choice is channels_first) == first]
        if layer in settled and len(fitting) == 1:
            found[layer] = fitting[0]
        else:
            refused[layer] = _undecided(layer, shapes[layer], x.shape)
    return found, refused


def _bare(layer: LayerRef) -> LayerRef:
    """Return a layer without its module: what is remembered must not keep the network alive."""
    return LayerRef(layer.name, layer.element)


def _seen_changing(
    shapes: _Shapes, x: torch.Tensor, run: Callable[[torch.Tensor], Any]
) -> dict[LayerRef, Layout]:
    """Run the network on inputs that differ along their last axis.

    Returns:
        Layer -> its layout, for the layers in whose tensor one axis changed.
    """
    *rest, last = x.shape[2:]
    # Sizes are changed by multiples of 32, which are multiples of most strides.
    *small, least = [32 + n % 32 for n in x.shape[2:]]
    found: dict[LayerRef, Layout] = {}
    for before, after in (
        ([*small, least], [*small, least + 32]),
        ([*rest, last], [*rest, least if least != last else last + 32]),
        ([*rest, last], [*rest, 2 * last]),
    ):
        try:
            first = shapes if before == [*rest, last] else _shapes_at(before, shapes, x, run)
            second = _shapes_at(after, shapes, x, run)
        except (ModelError, torch.OutOfMemoryError):
            continue  # some networks accept only one size
        for layer in shapes:
            layout = layout_by_change(first.get(layer, ()), second.get(layer, ()))
            if layout is not None:
                found.setdefault(layer, layout)
        if len(found) == len(shapes):
            break
    return found


def _shapes_at(
    size: Sequence[int], layers: _Shapes, like: torch.Tensor, run: Callable[[torch.Tensor], Any]
) -> _Shapes:
    """Return the shapes of layers' outputs for an input of another size."""
    shapes: dict[LayerRef, Sequence[int]] = {}

    def look(layer: LayerRef, module: nn.Module, args: Any, output: Any) -> None:
        shapes[layer] = layer.pick(output).shape

    with torch.no_grad(), ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.module.register_forward_hook(partial(look, layer)).remove)
        run(like.new_zeros(1, like.shape[1], *size))
    return shapes


def _undecided(layer: LayerRef, shape: Sequence[int], input_shape: Sequence[int]) -> LayerError:
    first, last = spatial_shape(channels_first, shape), spatial_shape(channels_last, shape)
    return LayerError(
        f"layer '{layer}' gives {tuple(shape)} for an input {tuple(input_shape)}: {shape[1]} "
        f"channels first, on a grid {first}, or {shape[-1]} channels last, on a grid {last}, or no "
        "image. Inputs of other sizes, which would tell, the network refuses or they do not show "
        "it. Say which with reshape_transform=channels_first or channels_last "
        "(of seg3dcam.network.layouts), or choose another layer"
    )
