"""Remember what was found out about a network, as long as the network lives.

It takes passes through the network to find out where a layer's voxels lie, how it lays out its
tensors, whether its gradients can be trusted, and whether the network draws random numbers. So each
of these is found out only once, and again only if the network's modules, their settings or the
shapes of its weights have changed (see `seg3dcam.network.structure`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from seg3dcam.geometry import FeatureGrid
from seg3dcam.network.layers import LayerRef, Layout
from seg3dcam.network.layouts import Tokens, channels_first, channels_last
from seg3dcam.network.locks import alone_with
from seg3dcam.network.structure import (
    Structure,
    differences,
    is_number,
    structure_of,
    without_identity,
)


@dataclass
class NetworkFacts:
    """What is known about one network.

    Layers are stored without their modules, which would keep the network alive.

    Attributes:
        structure: the structure of the network when all this was found out.
        volatile: the parts of the structure that the network's own forward pass changes, such as a
            counter. If they change, the facts still hold.
        perhaps_volatile: numbers that changed since the previous facts, such as a training step or
            a counter of passes.
        former_grids: the grids of the previous facts. If a new grid is the same as before, the
            numbers in `perhaps_volatile` are volatile.
        layouts: layer -> its layout, for layers whose layout needed evidence.
        grids: (shape of the input, layer, its spatial shape, its layout) -> its grid.
        gaps: (layer, its layout) -> the part of a change of the score that its gradient misses.
        draws: name of the operation with which the network draws random numbers; "" if it draws
            none; None if that is not known yet.
        trials: how often the network was run to see whether it, or another thread, draws.
        overwrites: whether the network overwrites tensors that its gradient needs.
    """

    structure: Structure = field(default_factory=dict)
    volatile: set[tuple[str, str]] = field(default_factory=set)
    perhaps_volatile: set[tuple[str, str]] = field(default_factory=set)
    former_grids: dict[tuple, FeatureGrid] = field(default_factory=dict)
    layouts: dict[LayerRef, Layout] = field(default_factory=dict)
    grids: dict[tuple, FeatureGrid] = field(default_factory=dict)
    gaps: dict[tuple, float] = field(default_factory=dict)
    draws: str | None = None
    overwrites: bool = False
    trials: int = 0

    def keep_grid(self, key: tuple, grid: FeatureGrid) -> None:
        """Store a grid; if it is the same as before, the numbers that changed are volatile."""
        self.grids[key] = grid
        if self.former_grids.get(key) == grid:
            self.volatile |= self.perhaps_volatile
            self.perhaps_volatile = set()


_facts: WeakKeyDictionary[nn.Module, NetworkFacts] = WeakKeyDictionary()
#: Network that is being explained -> its facts, and its structure when that began.
_open: WeakKeyDictionary[nn.Module, tuple[NetworkFacts, Structure]] = WeakKeyDictionary()
_watched: WeakSet[nn.Module] = WeakSet()
_tables = threading.RLock()


def facts_of(network: nn.Module) -> NetworkFacts:
    """Return what is known about a network as it is now."""
    return _facts_of(network, structure_of(network))


def _facts_of(network: nn.Module, structure: Structure) -> NetworkFacts:
    """Return what is known about a network whose present structure is given."""
    with _tables:
        known = _facts.get(network)
        if known is None:
            known = _facts[network] = NetworkFacts(structure)
        elif changed := differences(known.structure, structure) - known.volatile:
            new = NetworkFacts(structure, volatile=known.volatile)
            if all(is_number(structure.get(name, {}).get(key)) for name, key in changed):
                new.perhaps_volatile, new.former_grids = changed, known.grids
            known = _facts[network] = new
        return known


def take_over(copied: nn.Module, network: nn.Module) -> None:
    """Let a copy of a network know what is known about the network itself.

    Nothing of it depends on the values of weights. If the copy has another structure, it is found
    out anew.
    """
    with _tables:
        known, structure = facts_of(network), structure_of(copied)
        changed = differences(without_identity(known.structure), without_identity(structure))
        if not changed - known.volatile:
            _facts[copied] = replace(
                known,
                structure=structure,
                volatile=set(known.volatile),
                layouts=dict(known.layouts),
                grids=dict(known.grids),
                gaps=dict(known.gaps),
            )


def key_of(layer: LayerRef) -> tuple[str, tuple, Layout | None] | None:
    """Return the key under which facts about a layer are stored, None if none may be stored.

    A user's own `reshape_transform` may refer to the network, and would keep it alive for ever.
    """
    plain = isinstance(layer.layout, Tokens) or layer.layout in (
        None,
        channels_first,
        channels_last,
    )
    return (layer.name, layer.element, layer.layout) if plain else None


@contextlib.contextmanager
def opened(network: nn.Module) -> Iterator[NetworkFacts]:
    """Yield what is known about a network, while no other thread can explain it.

    Networks that share modules, parameters or buffers with it are closed to other threads, too. The
    function is reentrant: while a CAM of a network is made, another CAM of it may be made. Both get
    the same facts, even if a forward pass has changed the network's attributes meanwhile.

    Raises:
        ModelError: two threads wait for each other's networks.
    """
    parts = list(_parts(network))  # they stay alive, so that no other object can get their ids
    with contextlib.ExitStack() as stack:
        stack.enter_context(alone_with(frozenset(map(id, parts))))
        if network not in _open:
            structure = structure_of(network)
            _open[network] = _facts_of(network, structure), structure
            stack.callback(_open.__delitem__, network)
        yield _open[network][0]


@contextlib.contextmanager
def watched(network: nn.Module) -> Iterator[None]:
    """Note what an open network's own passes change in its structure, before that is put back.

    The function is reentrant.
    """
    if network in _watched:
        yield
        return
    _watched.add(network)
    known, before = _open[network]
    try:
        yield
    finally:
        _watched.remove(network)
        known.volatile |= differences(before, structure_of(network))


def _parts(network: nn.Module) -> Iterator[Any]:
    """Yield the modules of a network, and their parameters and buffers (None for absent ones)."""
    for module in network.modules():
        yield module
        yield from module._parameters.values()
        yield from module._buffers.values()
