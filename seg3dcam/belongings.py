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
from collections import deque
from collections.abc import Iterable
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

#: How many things are looked at, the nearest first, and how far inside each other.
MOST, DEEPEST = 2_000, 5

#: Random generators that a network may own.
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)

#: Attributes of every module: hooks, submodules, parameters, buffers.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

_SINGLE = (torch.Tensor, np.ndarray, *GENERATORS)
_PLAIN = frozenset({int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device})
_LOCKS: tuple[type, ...] = (type(threading.Lock()), type(threading.RLock()), threading.Condition)
_THREADS: tuple[type, ...] = (threading.Thread, threading.Event, queue.Queue, *_LOCKS)
_NEVER = (nn.Module, torch.optim.Optimizer, Dataset, DataLoader, io.IOBase, *_THREADS)
_LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy", "seg3dcam"}
_LIBRARIES |= {"lightning", "pytorch_lightning", "ignite"}


def attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's own attributes; a script has none that can be read."""
    if isinstance(module, torch.jit.ScriptModule):
        return {}
    own = vars(module)
    return {name: own[name] for name in own.keys() - _OF_EVERY_MODULE}


def belongings(model: nn.Module) -> list[Any]:
    """Return the tensors, arrays, generators, containers and objects that modules keep.

    Each once, the nearest first.
    """
    found: dict[int, Any] = {}
    waiting: deque[tuple[Any, int]] = deque()
    for module in model.modules():
        waiting.extend((v, 0) for v in attributes(module).values() if not _is_plain(v))
    for _ in range(MOST):
        if not waiting:
            break
        value, depth = waiting.popleft()
        # By its type: a proxy's __class__ would run code of the user's.
        if issubclass(type(value), _SINGLE):
            found[id(value)] = value
            continue
        items = _inside(value)
        if items is None or id(value) in found:
            continue
        if not isinstance(value, tuple):
            found[id(value)] = value
        if depth < DEEPEST and len(waiting) < MOST:
            waiting.extend((i, depth + 1) for i in islice(items, MOST) if not _is_plain(i))
    return list(found.values())


def _is_plain(value: Any) -> bool:
    """Tell a number, a text, or a tuple of some: nothing can change inside of it."""
    if type(value) is tuple:
        return all(type(item) in _PLAIN for item in value)
    return type(value) in _PLAIN


def _inside(value: Any) -> Iterable[Any] | None:
    """Return what a container or an object of a user's own class holds; None: not gone into."""
    kind = type(value)
    if issubclass(kind, dict):
        return value.values()
    if issubclass(kind, list | tuple | set | deque):
        return value
    library = str(kind.__module__).partition(".")[0]
    if (library in _LIBRARIES and kind is not SimpleNamespace) or issubclass(kind, _NEVER):
        return None
    own = getattr(value, "__dict__", None)
    if type(own) is not dict or any(issubclass(type(v), _NEVER) for v in own.values()):
        return None
    return own.values()
