"""What was found out about a network, kept as long as the network lives; and its locks.

Where a layer's voxels lie, how it lays out its tensors, whether gradients tell the truth there,
whether the network draws random numbers: each costs passes through the network, so it is found out
once, and again where the network's modules, their settings or the shapes of its weights changed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from seg3dcam.errors import ModelError
from seg3dcam.geometry import FeatureGrid
from seg3dcam.network.attributes import OF_EVERY_MODULE, container_kind, inside
from seg3dcam.network.layers import LayerRef, Layout
from seg3dcam.network.layouts import Tokens, channels_first, channels_last

#: A container of more things is a log or a table, and holds no settings; and how deep one may lie.
MANY, DEEPEST = 64, 3

#: Name of a module -> key -> what is there.
Structure = dict[str, dict[str, Hashable]]


@dataclass
class Known:
    """What is known of one network.

    Layers are kept without their modules, which would keep the network alive.

    Attributes:
        structure: of the network when all this was found out.
        restless: what of it the network's own forward pass changes, such as a counter: that says
            nothing about the structure.
        doubted: numbers that changed since the last knowledge, such as a step of a training.
        former: the grids of that knowledge: if they are the same, these numbers are restless, too.
        layouts: layer -> its layout, where that needed evidence.
        grids: (shape of the input, layer, its spatial shape, its layout) -> grid.
        gaps: (layer, its layout) -> which part of a change of the score its gradient misses.
        draws: the operation with which it draws random numbers, "" for none, None: not known yet.
        trials: how often it was run to find out whether it draws, or another thread.
        overwrites: whether it overwrites tensors, in place, that its gradient needs.
    """

    structure: Structure = field(default_factory=dict)
    restless: set[tuple[str, str]] = field(default_factory=set)
    doubted: set[tuple[str, str]] = field(default_factory=set)
    former: dict[tuple, FeatureGrid] = field(default_factory=dict)
    layouts: dict[LayerRef, Layout] = field(default_factory=dict)
    grids: dict[tuple, FeatureGrid] = field(default_factory=dict)
    gaps: dict[tuple, float] = field(default_factory=dict)
    draws: str | None = None
    overwrites: bool = False
    trials: int = 0

    def keep_grid(self, key: tuple, grid: FeatureGrid) -> None:
        """Remember a grid; where it is what it was before some numbers changed, forget these."""
        self.grids[key] = grid
        if self.former.get(key) == grid:
            self.restless |= self.doubted
            self.doubted = set()


_known: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()
#: Network -> what is known of it, and what it is made of.
_open: WeakKeyDictionary[nn.Module, tuple[Known, Structure]] = WeakKeyDictionary()
_watched: WeakSet[nn.Module] = WeakSet()
#: (thread, ids of the modules, parameters and buffers that it is at work on), one a network.
_held: list[tuple[int, frozenset[int]]] = []
#: Thread -> ids of those that it waits for.
_awaited: dict[int, frozenset[int]] = {}
_let_go = threading.Condition()
_tables = threading.RLock()


def known_of(network: nn.Module) -> Known:
    """Return what is known of a network as it is now."""
    return _known_of(network, _structure(network))


def _known_of(network: nn.Module, structure: Structure) -> Known:
    """Return what is known of a network of this structure."""
    with _tables:
        known = _known.get(network)
        if known is None:
            known = _known[network] = Known(structure)
        elif changed := _changed(known.structure, structure) - known.restless:
            new = Known(structure, restless=known.restless)
            if all(_is_number(structure.get(name, {}).get(key)) for name, key in changed):
                new.doubted, new.former = changed, known.grids
            known = _known[network] = new
        return known


def key_of(layer: LayerRef) -> tuple[str, tuple, Layout | None] | None:
    """Return what stands for a layer, None for one that must not be remembered.

    A user's own `reshape_transform` may hold the network, and so keep it alive for ever.
    """
    plain = isinstance(layer.layout, Tokens) or layer.layout in (
        None,
        channels_first,
        channels_last,
    )
    return (layer.name, layer.element, layer.layout) if plain else None


@contextlib.contextmanager
def opened(network: nn.Module) -> Iterator[Known]:
    """Let one thread at a time into a network, and into others that it shares anything with.

    What may be shared are modules, parameters and buffers. Reentrant: a CAM may be asked for while
    another one of the same network is made. It sees the same knowledge, whatever a forward pass has
    written into the network's attributes meanwhile.

    Raises:
        ModelError: two networks, each explained inside a target of the other's, in two threads.
    """
    parts = list(_parts(network))  # alive all the while, so that their ids are theirs
    with contextlib.ExitStack() as stack:
        stack.enter_context(_alone_with(frozenset(map(id, parts))))
        if network not in _open:
            structure = _structure(network)
            _open[network] = _known_of(network, structure), structure
            stack.callback(_open.__delitem__, network)
        yield _open[network][0]


@contextlib.contextmanager
def watched(network: nn.Module) -> Iterator[None]:
    """Note what an open network's own passes change of it, before that is put back; reentrant."""
    if network in _watched:
        yield
        return
    _watched.add(network)
    known, before = _open[network]
    try:
        yield
    finally:
        _watched.remove(network)
        known.restless |= _changed(before, _structure(network))


def _parts(network: nn.Module) -> Iterator[Any]:
    """Yield the modules of a network, and their parameters and buffers."""
    for module in network.modules():
        yield module
        yield from module._parameters.values()
        yield from module._buffers.values()


@contextlib.contextmanager
def _alone_with(parts: frozenset[int]) -> Iterator[None]:
    """Wait until no other thread is at work on any of these; all are taken at once."""
    me = threading.get_ident()
    parts -= {id(None)}  # of a layer without a bias
    with _let_go:
        _awaited[me] = parts
        try:
            while _holders(me):
                if _waits_for_itself(me):
                    raise ModelError(
                        "two threads wait for each other: each explains a network inside a target "
                        "of the other's. Explain one after the other"
                    )
                _let_go.wait()
        finally:
            del _awaited[me]
        _held.append((me, parts))
    try:
        yield
    finally:
        with _let_go:
            _held.remove((me, parts))
            _let_go.notify_all()


def _holders(thread: int) -> set[int]:
    """Return the other threads that hold something that a thread waits for."""
    awaited = _awaited.get(thread, frozenset())
    return {t for t, parts in _held if t != thread and not parts.isdisjoint(awaited)}


def _waits_for_itself(me: int) -> bool:
    """Tell whether those that a thread waits for wait, by others, for it."""
    seen, next_ones = set[int](), _holders(me)
    while next_ones:
        seen |= next_ones
        next_ones = set().union(*map(_holders, next_ones)) - seen
    return me in seen


#: Settings of modules that places and layouts do not depend on.
MOVES_NOTHING = ("training", "inplace")


def _structure(network: nn.Module) -> Structure:
    """Return what places and layouts depend on: modules, plain settings, shapes of weights."""
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


def _settings(path: str, value: Any, seen: set[int], depth: int) -> Iterator[tuple[str, Hashable]]:
    """Yield the plain settings in dicts, lists and objects of a user's own classes, each once.

    Those of a dict or an object by their names, since one of them may count passes; a list is one
    setting.
    """
    held = None if issubclass(type(value), torch.Tensor) else inside(value)
    if held is None or id(value) in seen:
        return
    seen.add(id(value))
    items, kind = list(held), container_kind(value)
    if len(items) > MANY:
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


def _changed(one: Structure, other: Structure) -> set[tuple[str, str]]:
    """Return where two structures differ: (name of a module, key)."""
    changed: set[tuple[str, str]] = set()
    for name in one.keys() | other.keys():
        ones, others = one.get(name, {}), other.get(name, {})
        if ones != others:
            keys = ones.keys() | others.keys()
            changed |= {(name, key) for key in keys if ones.get(key) != others.get(key)}
    return changed


def _shape(parameter: Any) -> Hashable:
    return (
        None
        if parameter is None or is_lazy(parameter)
        else (tuple(parameter.shape), parameter.dtype)
    )


def _is_number(value: Any) -> bool:
    """Tell a number, or some: a list may be a log."""
    return all(map(_is_number, value)) if type(value) is tuple else isinstance(value, int | float)


#: Types of settings that stand for themselves.
_PLAIN = (bool, int, float, str, type(None))


def _is_plain(value: Any) -> bool:
    kind = type(value)  # isinstance would ask a weak proxy's object, which may be gone
    if issubclass(kind, tuple):
        return all(map(_is_plain, value))
    return kind in _PLAIN or issubclass(kind, _PLAIN)
