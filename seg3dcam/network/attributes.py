"""Find what the modules of a network keep in their own attributes, besides weights and submodules.

The search looks into lists, tuples, dicts, sets and deques, and into objects of a user's own
classes. It does not look into other networks, optimisers, data sets, files, locks and threads, nor
into objects that hold one of these, such as a trainer. It does not look into objects of Python,
PyTorch or NumPy either, such as functions and loggers.
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

#: The search looks at so many values, the nearest first, and goes so many levels deep.
MOST, DEEPEST = 2_000, 5

#: Random generators that a network may own.
GENERATORS = (
    torch.Generator,
    np.random.Generator,
    np.random.BitGenerator,
    np.random.RandomState,
    random.Random,
)

#: Attributes that every module has: tables of hooks, submodules, parameters and buffers.
OF_EVERY_MODULE = frozenset(vars(nn.Module()))

#: Types of containers. Their methods are called directly, in case a subclass has overridden them.
CONTAINERS = (OrderedDict, dict, list, set, deque)

_SINGLE = (torch.Tensor, np.ndarray, *GENERATORS)
_PLAIN = frozenset({int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device})
_LOCKS: tuple[type, ...] = (type(threading.Lock()), type(threading.RLock()), threading.Condition)
_THREADS: tuple[type, ...] = (threading.Thread, threading.Event, queue.Queue, *_LOCKS)
_NEVER = (nn.Module, torch.optim.Optimizer, Dataset, DataLoader, io.IOBase, *_THREADS)
_LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy", "seg3dcam"}
_LIBRARIES |= {"lightning", "pytorch_lightning", "ignite"}


class AttributeValue(NamedTuple):
    """A value that a module keeps in an attribute, or somewhere inside of one.

    Attributes:
        value: a tensor, an array, a random generator, a container or an object.
        place: the module and its attribute, in words.
    """

    value: Any
    place: str


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's own attributes, none for a TorchScript module, which cannot be read.

    >>> module = nn.ReLU()
    >>> module.note = "a"
    >>> own_attributes(module)["note"]
    'a'
    """
    if isinstance(module, torch.jit.ScriptModule):
        return {}
    own = vars(module)
    return {name: own[name] for name in own.keys() - OF_EVERY_MODULE}


def in_words(name: str, module: nn.Module) -> str:
    """Return the words for a module in messages.

    >>> in_words("2", nn.ReLU()), in_words("", nn.ReLU())
    ("module '2' (ReLU)", 'the network itself')
    """
    return f"module '{name}' ({type(module).__name__})" if name else "the network itself"


def attribute_values(model: nn.Module) -> list[AttributeValue]:
    """Return the tensors, arrays, generators, containers and objects that modules keep.

    Each is returned once, the nearest first.
    """
    found: dict[int, AttributeValue] = {}
    waiting: deque[tuple[Any, int, tuple[str, nn.Module, str]]] = deque()
    for name, module in model.named_modules():
        own = own_attributes(module)
        waiting.extend((v, 0, (name, module, key)) for key, v in own.items() if not _is_plain(v))
    for _ in range(MOST):
        if not waiting:
            break
        value, depth, place = waiting.popleft()
        # For a proxy, isinstance would ask for its __class__, which runs the user's code.
        single = issubclass(type(value), _SINGLE)
        items = None if single else inside(value)
        if id(value) in found or (items is None and not single):
            continue
        if not isinstance(value, tuple):
            name, module, key = place
            found[id(value)] = AttributeValue(value, f"{in_words(name, module)}: its '{key}'")
        if items is not None and depth < DEEPEST and len(waiting) < MOST:
            more = islice(items, MOST)
            waiting.extend((i, depth + 1, place) for i in more if not _is_plain(i))
    return list(found.values())


def _is_plain(value: Any) -> bool:
    """Tell whether nothing can change inside a value: numbers, texts, and tuples of these."""
    if type(value) is tuple:
        return all(type(item) in _PLAIN for item in value)
    return type(value) in _PLAIN


def inside(value: Any) -> Iterable[Any] | None:
    """Return what a container or an object of a user's class holds; None for anything else."""
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
    """Return the one of `CONTAINERS` that a value is an instance of, None if it is no container."""
    own = type(value)
    return own if own in CONTAINERS else next((k for k in CONTAINERS if issubclass(own, k)), None)


def memory_of(tensor: torch.Tensor) -> int:
    """Return a number that tensors have in common if they share memory.

    A tensor that is not strided, such as a sparse one, is taken to share its memory with no other.
    """
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
