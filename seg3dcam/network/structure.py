"""The structure of a network, on which the places and layouts of its layers depend.

It consists of modules, their plain settings, and the shapes of weights. Two structures are compared
to see whether the facts about a network still hold.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from seg3dcam.network.attributes import OF_EVERY_MODULE, container_kind, inside

#: A container with more items than this is a log or a table and holds no settings; and the number
#: of levels of containers that are searched.
MOST_ITEMS, DEEPEST = 64, 3

#: Settings of modules on which places and layouts do not depend.
MOVES_NOTHING = ("training", "inplace")

#: Types of settings that are compared as they are.
_PLAIN = (bool, int, float, str, type(None))

#: Name of a module -> name of a setting or parameter -> its value or shape.
Structure = dict[str, dict[str, Hashable]]


def structure_of(network: nn.Module) -> Structure:
    """Return the modules, plain settings and shapes of weights of a network.

    >>> structure_of(nn.Sequential(nn.ReLU(), nn.Conv1d(1, 2, 3)))["1"]["kernel_size"]
    (3,)
    """
    found: Structure = {}
    seen: set[int] = set()
    for name, module in network.named_modules(remove_duplicate=False):
        own: dict[str, Hashable] = {"": (id(module), type(module))}
        for key, parameter in module._parameters.items():
            own[key] = _shape(parameter)
        for key, value in vars(module).items():
            if key in OF_EVERY_MODULE or key in MOVES_NOTHING:
                continue
            if _is_plain(value):
                own[key] = value
            else:
                own.update(_settings(key, value, seen, DEEPEST))
        found[name] = own
    return found


def differences(one: Structure, other: Structure) -> set[tuple[str, str]]:
    """Return where two structures differ: (name of a module, name of a setting)."""
    changed: set[tuple[str, str]] = set()
    for name in one.keys() | other.keys():
        ones, others = one.get(name, {}), other.get(name, {})
        if ones != others:
            keys = ones.keys() | others.keys()
            changed |= {(name, key) for key in keys if ones.get(key) != others.get(key)}
    return changed


def without_identity(structure: Structure) -> Structure:
    """Return a structure as its copy has it, whose modules are others of the same types."""
    return {
        name: {key: value[1] if key == "" else value for key, value in own.items()}  # type: ignore[index]
        for name, own in structure.items()
    }


def is_number(value: Any) -> bool:
    """Tell whether a setting is a number or a tuple of numbers: a list may be a log."""
    return all(map(is_number, value)) if type(value) is tuple else isinstance(value, int | float)


def _settings(path: str, value: Any, seen: set[int], depth: int) -> Iterator[tuple[str, Hashable]]:
    """Yield the plain settings in dicts, lists and objects of a user's own classes, each once.

    Those of a dict or an object are yielded one by one under their names, since one of them may be
    a counter of passes. A list is one setting.
    """
    held = None if issubclass(type(value), torch.Tensor) else inside(value)
    if held is None or id(value) in seen:
        return
    seen.add(id(value))
    items, kind = list(held), container_kind(value)
    if len(items) > MOST_ITEMS:
        return
    if (kind is not None and not issubclass(kind, dict)) or issubclass(type(value), tuple):
        plain = filter(_is_plain, items)
        yield path, frozenset(plain) if kind is set else tuple(plain)
        names = [str(number) for number in range(len(items))]
    else:
        names = [*map(str, vars(value) if kind is None else kind.keys(value))]
        yield from ((f"{path}.{n}", i) for n, i in zip(names, items, strict=True) if _is_plain(i))
    if depth > 1:
        for name, item in zip(names, items, strict=True):
            if not _is_plain(item):
                yield from _settings(f"{path}.{name}", item, seen, depth - 1)


def _shape(parameter: Any) -> Hashable:
    """Return a parameter's shape and dtype, None if it is absent or has no shape yet."""
    if parameter is None or is_lazy(parameter):
        return None
    return tuple(parameter.shape), parameter.dtype


def _is_plain(value: Any) -> bool:
    kind = type(value)  # isinstance would ask the object behind a weak proxy, which may be gone
    if issubclass(kind, tuple):
        return all(map(_is_plain, value))
    return kind in _PLAIN or issubclass(kind, _PLAIN)
