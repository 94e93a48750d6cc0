"""What the modules of a network keep in attributes of their own, beside weights and submodules.

Gone into are lists, tuples, dicts, sets and deques, and objects of a user's own classes. Not gone
into are other networks, optimisers, data sets, files, locks, threads, whatever holds one of these
(a trainer, a writer of logs), and what Python, PyTorch or NumPy made (functions, loggers).
"""

from __future__ import annotations

import io
import queue
import random
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable
from itertools import islice
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

#: How many things are looked at, the nearest first, and how far inside each other.
MOST, DEEPEST = 2_000, 5

#: Random generators that a network may own.
GENERATORS = (
    torch.Generator,
    np.random.Generator,
    np.random.BitGenerator,
    np.random.RandomState,
    random.Random,
)

#: Attributes of every module: hooks, submodules, parameters, buffers.
OF_EVERY_MODULE = frozenset(vars(nn.Module()))

#: Kinds of containers: their own methods are used, whatever a subclass makes of these.
CONTAINERS = (OrderedDict, dict, list, set, deque)

_SINGLE = (torch.Tensor, np.ndarray, *GENERATORS)
_PLAIN = frozenset({int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device})
_LOCKS: tuple[type, ...] = (type(threading.Lock()), type(threading.RLock()), threading.Condition)
_THREADS: tuple[type, ...] = (threading.Thread, threading.Event, queue.Queue, *_LOCKS)
_NEVER = (nn.Module, torch.optim.Optimizer, Dataset, DataLoader, io.IOBase, *_THREADS)
_LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy", "seg3dcam"}
_LIBRARIES |= {"lightning", "pytorch_lightning", "ignite"}


class Kept(NamedTuple):
    """A thing that a module keeps.

    Attributes:
        thing: a tensor, an array, a generator, a container or an object.
        where: the module and its attribute, in words.
    """

    thing: Any
    where: str


def attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's own attributes; a script has none that can be read."""
    if isinstance(module, torch.jit.ScriptModule):
        return {}
    own = vars(module)
    return {name: own[name] for name in own.keys() - OF_EVERY_MODULE}


def called(name: str, module: nn.Module) -> str:
    """Return what to call a module of a network."""
    return f"module '{name}' ({type(module).__name__})" if name else "the network itself"


def kept(model: nn.Module) -> list[Kept]:
    """Return the tensors, arrays, generators, containers and objects that modules keep.

    Each once, the nearest first.
    """
    found: dict[int, Kept] = {}
    waiting: deque[tuple[Any, int, tuple[str, nn.Module, str]]] = deque()
    for name, module in model.named_modules():
        own = attributes(module)
        waiting.extend((v, 0, (name, module, key)) for key, v in own.items() if not _is_plain(v))
    for _ in range(MOST):
        if not waiting:
            break
        value, depth, place = waiting.popleft()
        # By its type: a proxy's __class__ would run code of the user's.
        single = issubclass(type(value), _SINGLE)
        items = None if single else inside(value)
        if id(value) in found or (items is None and not single):
            continue
        if not isinstance(value, tuple):
            name, module, key = place
            found[id(value)] = Kept(value, f"{called(name, module)}: its '{key}'")
        if items is not None and depth < DEEPEST and len(waiting) < MOST:
            more = islice(items, MOST)
            waiting.extend((i, depth + 1, place) for i in more if not _is_plain(i))
    return list(found.values())


def belongings(model: nn.Module) -> list[Any]:
    """Return the things of `kept`."""
    return [thing for thing, _ in kept(model)]


def _is_plain(value: Any) -> bool:
    """Tell a number, a text, or a tuple of some: nothing can change inside of it."""
    if type(value) is tuple:
        return all(type(item) in _PLAIN for item in value)
    return type(value) in _PLAIN


def inside(value: Any) -> Iterable[Any] | None:
    """Return what a container or an object of a user's own class holds; None: not gone into."""
    kind = type(value)
    if issubclass(kind, tuple):
        return value
    of = container_kind(value)
    if of is not None:
        return of.values(value) if issubclass(of, dict) else list(of.__iter__(value))
    library = str(kind.__module__).partition(".")[0]
    if (library in _LIBRARIES and kind is not SimpleNamespace) or issubclass(kind, _NEVER):
        return None
    own = getattr(value, "__dict__", None)
    if type(own) is not dict or any(issubclass(type(v), _NEVER) for v in own.values()):
        return None
    return own.values()


def container_kind(value: Any) -> Any:
    """Return which of `CONTAINERS` something is, None for none."""
    own = type(value)
    return own if own in CONTAINERS else next((k for k in CONTAINERS if issubclass(own, k)), None)


def memory_of(tensor: torch.Tensor) -> int:
    """Return what tensors in one memory have in common; one that is not strided has its own."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
