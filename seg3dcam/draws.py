"""Random numbers that a network draws while it predicts: the same in every pass, and given back.

A network with dropout that stays on (Monte Carlo dropout) draws anew in every forward pass, so a
prediction and a gradient of two passes would belong to two networks. Each pass is therefore started
from the same random state, the caller's, and the state is put back after it.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class RandomState(NamedTuple):
    """The state of every global generator that a network may use.

    Attributes:
        torch: of the CPU.
        devices: of each GPU in use, by its index.
        numpy, python: of the libraries' own generators.
    """

    torch: torch.Tensor
    devices: tuple[tuple[int, torch.Tensor], ...]
    numpy: Any
    python: Any

    def equals(self, other: RandomState) -> bool:
        """Tell whether nothing was drawn between the two."""
        tensors = [(self.torch, other.torch)]
        tensors += [(a, b) for (_, a), (_, b) in zip(self.devices, other.devices, strict=False)]
        same = all(torch.equal(a, b) for a, b in tensors) and self.python == other.python
        return same and all(map(np.array_equal, self.numpy, other.numpy))


#: Generators belong to the whole process: networks that draw go one after the other.
_generators = threading.RLock()


def random_state() -> RandomState:
    """Return the present state."""
    with _generators:  # never in the middle of another network's draws
        return RandomState(
            torch.get_rng_state(),
            tuple((index, torch.cuda.get_rng_state(index)) for index in gpus()),
            np.random.get_state(),
            random.getstate(),
        )


def set_random_state(state: RandomState) -> None:
    """Put a state back."""
    torch.set_rng_state(state.torch)
    for index, of_device in state.devices:
        torch.cuda.set_rng_state(of_device, index)
    np.random.set_state(state.numpy)
    random.setstate(state.python)


@contextlib.contextmanager
def drawing_from(state: RandomState) -> Iterator[None]:
    """Start from a random state; afterwards the process's is as it was."""
    with _generators:
        before = random_state()
        set_random_state(state)
        try:
            yield
        finally:
            set_random_state(before)


class Drawn(TorchDispatchMode):
    """Notes the first operation that draws random numbers, in this thread alone.

    Attributes:
        operation: its name, "" while there is none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operation = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.operation and torch.Tag.nondeterministic_seeded in func.tags:
            self.operation = func.overloadpacket.__name__
        return func(*args, **(kwargs or {}))


def gpus() -> list[int]:
    """Return the indices of all GPUs in use: a network may draw where its input lies."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
