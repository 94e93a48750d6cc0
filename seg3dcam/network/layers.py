"""Target layers, and how they are named.

A layer is written as its dotted name in the model. If it returns a tuple, list or dict, the wanted
element follows in brackets: `encoder.layers.3[0]`, `backbone[out]`. In a name, `*` stands for any
text without a dot, and `**` for any text.
"""

from __future__ import annotations

import copy
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from seg3dcam.errors import LayerError, ModelError, nearest
from seg3dcam.network.ensemble import unwrap
from seg3dcam.network.module_class import class_of
from seg3dcam.network.outputs import item_of, tensors_in

LayerSpec = str | nn.Module | Sequence[str | nn.Module]

#: A function from the tensor that a layer gives to channel-first activations (B, C, *s), see
#: `seg3dcam.network.layouts`.
Layout = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LayerRef:
    """A module of the network and, where it returns several tensors, the wanted one.

    Attributes:
        name: dotted name of the module.
        element: keys to the wanted tensor among several.
        module: the module itself.
        layout: how its tensor becomes channel-first activations; None if that must be found out.
        required: False for one of many layers ("all", `decoder.*`), which is left out if it gives
            no map.

    >>> str(LayerRef("encoder.layers.3", (0,), nn.Identity()))
    'encoder.layers.3[0]'
    """

    name: str
    element: tuple[int | str, ...] = ()
    module: nn.Module = field(default_factory=nn.Identity, compare=False, repr=False)
    layout: Layout | None = field(default=None, compare=False, repr=False)
    required: bool = field(default=True, compare=False, repr=False)

    def __str__(self) -> str:
        return self.name + "".join(f"[{key}]" for key in self.element)

    def pick(self, output: Any) -> torch.Tensor:
        """Return this layer's tensor from the output of its module.

        Raises:
            LayerError: there is no such element, or it is no tensor of floating point numbers.
        """
        tensor = output
        for key in self.element:
            if isinstance(tensor, torch.Tensor):
                raise self._refusal(output, f"there is no element [{key}] in a tensor")
            try:
                tensor = item_of(tensor, key)
            except (KeyError, IndexError, TypeError) as error:
                raise self._refusal(output, f"there is no element [{key}]") from error
        if not isinstance(tensor, torch.Tensor):
            raise self._refusal(output, f"that is a {type(tensor).__name__}, not a tensor")
        if not tensor.is_floating_point():
            raise self._refusal(output, f"its dtype is {tensor.dtype}, which has no gradient")
        return tensor

    def put(self, output: Any, tensor: torch.Tensor) -> Any:
        """Return a copy of the module's output with this layer's tensor replaced."""
        return _replaced(output, self.element, tensor)

    def _refusal(self, output: Any, reason: str) -> LayerError:
        found = [
            f"'{LayerRef(self.name, path)}' {tuple(tensor.shape)}"
            for path, tensor in tensors_in(output)
        ]
        choices = ", ".join(found) or "no tensor at all"
        return LayerError(f"target layer '{self}': {reason}. The layer gives {choices}")


def _replaced(output: Any, path: tuple[int | str, ...], tensor: torch.Tensor) -> Any:
    """Return a copy of nested containers with the tensor at a path replaced."""
    if not path:
        return tensor
    key = path[0]
    inner = _replaced(item_of(output, key), path[1:], tensor)
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        changed[key] = inner
        return changed
    if is_dataclass(output) and not isinstance(output, type):
        return replace(output, **{str(key): inner})
    if isinstance(key, str):  # namedtuple
        return output._replace(**{key: inner})
    items = list(output)
    items[key] = inner
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


def resolve_layers(
    model: nn.Module, spec: LayerSpec, reshape_transform: Layout | None = None
) -> list[LayerRef]:
    """Find the layers that a user named.

    Layers found by "all" or by a name with `*` are not required: those that give no map are left
    out later. A layer that is also named in full is required.

    Args:
        spec: a dotted name ("model.1", "encoder[0]"), one with `*` ("decoder.*", "encoder.*[0]"),
            a module of the network, "all" (every convolution), or a list of names and modules.
        reshape_transform: a function from the output of these layers to (B, C, *s), such as
            `Tokens((6, 6, 6))` of `layouts`. It is needed if the layout cannot be found out. It may
            move values and leave some out, but not change them.

    Raises:
        LayerError: a name is unknown (the message lists the nearest ones), a module is no part of
            the network, or `spec` is none of the above.

    >>> network = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU())
    >>> [str(layer) for layer in resolve_layers(network, "0")]
    ['0']
    """
    if reshape_transform is not None and not callable(reshape_transform):
        raise LayerError(
            "reshape_transform must be a function from what the layer gives to (B, C, *s), such "
            f"as seg3dcam.network.layouts.Tokens((6, 6, 6)); got {reshape_transform!r}"
        )
    model = unwrap(model)
    entries = [spec] if isinstance(spec, str | nn.Module) else spec
    legal = isinstance(entries, Sequence) and all(isinstance(e, str | nn.Module) for e in entries)
    if not legal:
        raise LayerError(
            f"target layers {reprlib.repr(spec)}: give a dotted name, a module of the network, a "
            "list of these, 'auto' or 'all'"
        )
    if not entries:
        raise LayerError("no target layer given: name one, or use target_layers='auto'")
    modules = {name: module for name, module in model.named_modules() if name}
    if "auto" not in modules and any(isinstance(e, str) and e == "auto" for e in entries):
        raise LayerError(
            f"target layers {reprlib.repr(spec)}: 'auto' chooses one layer and stands alone. Give "
            "target_layers='auto', or name the layers"
        )
    found: dict[LayerRef, LayerRef] = {}
    for entry in entries:
        for layer in _matching(model, modules, entry):
            if layer.required or layer not in found:
                found[layer] = replace(layer, layout=reshape_transform)
    return list(found.values())


def moved_to(network: nn.Module, layers: Sequence[LayerRef]) -> list[LayerRef]:
    """Return the same layers of another network of the same architecture.

    Raises:
        ModelError: the other network has no layer of that name.
    """
    modules = dict(unwrap(network).named_modules())
    for layer in layers:
        if layer.name not in modules:
            raise ModelError(
                f"the networks of an ensemble must have the same layers; one has no '{layer}'"
            )
    return [replace(layer, module=modules[layer.name]) for layer in layers]


def _matching(
    model: nn.Module, modules: Mapping[str, nn.Module], entry: str | nn.Module
) -> Iterable[LayerRef]:
    """Return the layers that one entry of the user's list stands for."""
    if isinstance(entry, nn.Module):
        return [_of_module(model, modules, entry)]
    network = type(model).__name__
    if entry and entry in modules:  # whatever it holds, such as a "["
        return [LayerRef(entry, (), modules[entry])]
    if entry == "all":
        names = [name for name, m in modules.items() if issubclass(class_of(m), _ConvNd)]
        if not names:
            raise LayerError(f"{network} has no convolution, so 'all' is no target layer: name one")
        return [LayerRef(name, (), modules[name], required=False) for name in names]
    written = re.fullmatch(r"(?P<name>[^\[\]]*)(?P<element>(\[[^\[\]]+\])*)", str(entry))
    name = written["name"] if written else str(entry)
    if written and "*" in name:
        pattern = re.escape(name).replace(r"\*\*", ".*").replace(r"\*", r"[^.]*")
        names = [candidate for candidate in modules if re.fullmatch(pattern, candidate)]
    else:
        names = [name] if name in modules else []
    if not written or not names:
        raise LayerError(f"no layer '{entry}' in {network}: {nearest(name, modules)}")
    keys = re.findall(r"\[([^\[\]]+)\]", written["element"])
    element = tuple(int(key) if re.fullmatch(r"-?\d+", key) else key for key in keys)
    return [LayerRef(each, element, modules[each], required="*" not in name) for each in names]


def _of_module(model: nn.Module, modules: Mapping[str, nn.Module], entry: nn.Module) -> LayerRef:
    inner = unwrap(entry)
    if inner is model:
        raise LayerError("the target layer is the network itself: name a layer inside of it")
    for name, module in modules.items():
        if module is inner:
            return LayerRef(name, (), inner)
    raise LayerError(
        f"the target layer {type(entry).__name__} given as a module is no part of the model"
    )
