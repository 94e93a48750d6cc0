"""Target layers: names, selections of an element, and the layout of what they give.

A layer is written as its dotted name in the model; where it returns a tuple, list or dict, the
wanted element follows in brackets: `encoder.layers.3[0]`, `backbone[out]`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from seg3dcam.errors import LayerError, ModelError, nearest
from seg3dcam.outputs import tensors_in

LayerSpec = str | nn.Module | Sequence[str | nn.Module]


@dataclass(frozen=True)
class LayerRef:
    """A module of the network and, where it returns several tensors, the wanted one.

    >>> str(LayerRef("encoder.layers.3", (0,), nn.Identity()))
    'encoder.layers.3[0]'
    """

    name: str
    element: tuple[int | str, ...] = ()
    module: nn.Module = field(default_factory=nn.Identity, compare=False, repr=False)

    def __str__(self) -> str:
        return self.name + "".join(f"[{key}]" for key in self.element)

    def pick(self, output: Any) -> torch.Tensor:
        """Return this layer's tensor among what its module returned."""
        tensor = output
        for key in self.element:
            if isinstance(tensor, torch.Tensor):
                raise self._refusal(output, f"there is no element [{key}] in a tensor")
            try:
                tensor = tensor[key]
            except (KeyError, IndexError, TypeError) as error:
                raise self._refusal(output, f"there is no element [{key}]") from error
        if not isinstance(tensor, torch.Tensor):
            raise self._refusal(output, f"that is a {type(tensor).__name__}, not a tensor")
        if not tensor.is_floating_point():
            raise self._refusal(output, f"its dtype is {tensor.dtype}, which has no gradient")
        return tensor

    def put(self, output: Any, tensor: torch.Tensor) -> Any:
        """Return the module's output with this layer's tensor replaced; nothing is changed."""
        return _replaced(output, self.element, tensor)

    def _refusal(self, output: Any, reason: str) -> LayerError:
        found = [
            f"'{LayerRef(self.name, path)}' {tuple(tensor.shape)}"
            for path, tensor in tensors_in(output)
        ]
        choices = ", ".join(found) or "no tensor at all"
        return LayerError(f"target layer '{self}': {reason}. The layer gives {choices}")


def _replaced(output: Any, path: tuple[int | str, ...], tensor: torch.Tensor) -> Any:
    if not path:
        return tensor
    key, rest = path[0], path[1:]
    if isinstance(output, Mapping):
        kind: Any = type(output)
        copy = kind(output)
        copy[key] = _replaced(output[key], rest, tensor)
        return copy
    items = list(output)
    items[key] = _replaced(output[key], rest, tensor)  # type: ignore[index]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)  # namedtuple


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside DataParallel, DistributedDataParallel and torch.compile.

    Raises:
        ModelError: not an `nn.Module`, or TorchScript, which takes no hooks.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "a TorchScript model takes no hooks: build the network in Python and load the "
            "script's weights into it (network.load_state_dict(script.state_dict()))"
        )
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def resolve_layers(model: nn.Module, spec: LayerSpec) -> list[LayerRef]:
    """Find the layers that a user named.

    Args:
        spec: a dotted name ("model.1", "encoder[0]"), a module of the network, "all" (every
            convolution), or a list of names and modules.

    Raises:
        LayerError: an unknown name (the nearest ones are named), a module of another network.

    >>> network = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU())
    >>> [str(layer) for layer in resolve_layers(network, "0")]
    ['0']
    """
    model = unwrap(model)
    if isinstance(spec, str) and spec == "all":
        spec = [name for name, module in model.named_modules() if isinstance(module, _ConvNd)]
    entries = [spec] if isinstance(spec, str | nn.Module) else spec
    legal = isinstance(entries, Sequence) and all(isinstance(e, str | nn.Module) for e in entries)
    if not legal:
        raise LayerError(
            f"target layers {spec!r}: give a dotted name, a module of the network, a list of "
            "these, 'auto' or 'all'"
        )
    if not entries:
        raise LayerError("no target layer given: name one, or use target_layers='auto'")
    found = [_resolve_one(model, entry) for entry in entries]
    return list(dict.fromkeys(found))


def _resolve_one(model: nn.Module, entry: str | nn.Module) -> LayerRef:
    modules = dict(model.named_modules())
    if isinstance(entry, nn.Module):
        inner = unwrap(entry)
        names = [name for name, module in modules.items() if module is inner]
        if names == [""]:
            raise LayerError("the target layer is the network itself: name a layer inside of it")
        if not names:
            raise LayerError(
                f"the target layer {type(entry).__name__} given as a module is no part of the model"
            )
        return LayerRef(names[0], (), inner)
    match = re.fullmatch(r"(?P<name>[^\[\]]*)(?P<element>(\[[^\[\]]+\])*)", str(entry))
    name = match["name"] if match else str(entry)
    if not match or not name or name not in modules:
        raise LayerError(
            f"no layer '{entry}' in {type(model).__name__}: {nearest(name, filter(None, modules))}"
        )
    keys = re.findall(r"\[([^\[\]]+)\]", match["element"])
    element = tuple(int(key) if re.fullmatch(r"-?\d+", key) else key for key in keys)
    return LayerRef(name, element, modules[name])


def check_layout(layer: LayerRef, shape: Sequence[int], input_shape: Sequence[int]) -> None:
    """Raise LayerError unless activations look channel-first, (B, C, *s).

    Args:
        shape: of the activations.
        input_shape: (B, C, *S) of the input.
    """
    if len(shape) != len(input_shape):
        raise LayerError(
            f"layer '{layer}' gives {tuple(shape)} for an input {tuple(input_shape)}: a map needs "
            f"channel-first activations (B, C, *s) with {len(input_shape) - 2} spatial axes. "
            "Tokens and pooled vectors have no place in the image: choose another layer"
        )
    ratios = [large / small for small, large in zip(shape[2:], input_shape[2:], strict=True)]
    uneven = max(ratios) > 1.4 * min(ratios)  # unlike a convolution's without padding
    first = stride_of(shape[2:], input_shape[2:])
    if first is None and uneven and stride_of(shape[1:-1], input_shape[2:]):
        raise LayerError(
            f"layer '{layer}' gives {tuple(shape)} for an input {tuple(input_shape)}: that is "
            "channels-last, (B, *s, C). Choose a layer whose activations are channel-first"
        )


def stride_of(size: Sequence[int], input_size: Sequence[int]) -> tuple[int, ...] | None:
    """Return the whole-number stride of a layer's grid, None where there is none.

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
