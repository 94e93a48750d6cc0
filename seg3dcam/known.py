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
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.parameter import is_lazy

from seg3dcam.geometry import FeatureGrid
from seg3dcam.layers import LayerRef, Layout
from seg3dcam.layouts import Tokens, channels_first, channels_last


@dataclass
class Known:
    """What is known of one network.

    Layers are kept without their modules, which would keep the network alive.

    Attributes:
        structure: of the network when all this was found out.
        layouts: layer -> its layout, where that needed evidence.
        grids: (shape of the input, layer, its spatial shape, its layout) -> grid.
        gaps: (layer, its layout) -> which part of a change of the score its gradient misses.
        draws: the operation with which it draws random numbers, "" for none, None: not known yet.
    """

    structure: Hashable = None
    layouts: dict[LayerRef, Layout] = field(default_factory=dict)
    grids: dict[tuple, FeatureGrid] = field(default_factory=dict)
    gaps: dict[tuple, float] = field(default_factory=dict)
    draws: str | None = None


_known: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_open: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()
_tables = threading.RLock()


def known_of(network: nn.Module) -> Known:
    """Return what is known of a network as it is now."""
    structure = _structure(network)
    with _tables:
        known = _known.get(network)
        if known is None or known.structure != structure:
            known = _known[network] = Known(structure)
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
    """Let one thread at a time into a network, and into others that it shares modules with.

    Reentrant: a CAM may be asked for while another one of the same network is made. It sees the
    same knowledge, whatever a forward pass has written into the network's attributes meanwhile.
    """
    # In one order for all, or two networks that share two modules would wait for each other.
    modules = sorted(set(network.modules()), key=id)
    with _tables:
        locks = [_locks.setdefault(module, threading.RLock()) for module in modules]
    with contextlib.ExitStack() as stack:
        for lock in locks:
            stack.enter_context(lock)
        if network in _open:
            yield _open[network]
            return
        _open[network] = known_of(network)
        try:
            yield _open[network]
        finally:
            del _open[network]


def _structure(network: nn.Module) -> Hashable:
    """Return what places and layouts depend on: modules, plain settings, shapes of weights."""
    return tuple(
        (
            name,
            id(module),
            type(module),
            tuple((key, _shape(p)) for key, p in module._parameters.items()),
            tuple(
                (key, value)
                for key, value in vars(module).items()
                if key != "training" and _is_plain(value)
            ),
        )
        for name, module in network.named_modules(remove_duplicate=False)
    )


def _shape(parameter: Any) -> Hashable:
    return (
        None
        if parameter is None or is_lazy(parameter)
        else (tuple(parameter.shape), parameter.dtype)
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | None)
