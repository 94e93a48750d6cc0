"""Locks of networks: a thread waits until no other thread works on a part that it needs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from seg3dcam.errors import ModelError

#: (thread, ids of the modules, parameters and buffers that it works on), one for each network.
_held: list[tuple[int, frozenset[int]]] = []
#: Thread -> ids of the parts that it waits for.
_awaited: dict[int, frozenset[int]] = {}
_released = threading.Condition()


@contextlib.contextmanager
def alone_with(parts: frozenset[int]) -> Iterator[None]:
    """Wait until no other thread works on any of these parts; then hold all of them.

    Args:
        parts: ids of modules, parameters and buffers.

    Raises:
        ModelError: two threads wait for each other.
    """
    me = threading.get_ident()
    parts -= {id(None)}  # None stands for an absent parameter, such as a bias
    with _released:
        _awaited[me] = parts
        try:
            while _holders(me):
                if _waits_for_itself(me):
                    raise ModelError(
                        "two threads wait for each other: each explains a network inside a target "
                        "of the other's. Explain one after the other"
                    )
                _released.wait()
        finally:
            del _awaited[me]
        _held.append((me, parts))
    try:
        yield
    finally:
        with _released:
            _held.remove((me, parts))
            _released.notify_all()


def _holders(thread: int) -> set[int]:
    """Return the other threads that hold a part for which a thread waits."""
    awaited = _awaited.get(thread, frozenset())
    return {t for t, parts in _held if t != thread and not parts.isdisjoint(awaited)}


def _waits_for_itself(me: int) -> bool:
    """Tell whether a thread waits, directly or through other threads, for itself."""
    seen, next_ones = set[int](), _holders(me)
    while next_ones:
        seen |= next_ones
        next_ones = set().union(*map(_holders, next_ones)) - seen
    return me in seen
