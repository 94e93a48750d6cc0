"""Read, set and compare random states, and detect operations that draw random numbers.

A network whose dropout stays on (Monte Carlo dropout) draws new numbers in every forward pass, so
the prediction of one pass and the gradient of another would belong to two different networks.
Therefore every pass starts from the same random state, that of the caller, which is put back
afterwards. The states of generators that the network owns are treated alike (see
`seg3dcam.network.attributes`).
"""

from __future__ import annotations

import contextlib
import functools
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from seg3dcam.network.attributes import GENERATORS, attribute_values, memory_of


class RandomState(NamedTuple):
    """The state of every generator that a network may use.

    Attributes:
        torch: state of PyTorch's generator on the CPU.
        devices: (index, state) of each GPU in use.
        numpy, python: states of the global generators of NumPy and Python.
        owned: (generator, its state) of each generator that the network owns.
    """

    torch: torch.Tensor
    devices: tuple[tuple[int, torch.Tensor], ...]
    numpy: Any
    python: Any
    owned: tuple[tuple[Any, Any], ...] = ()

    def equals(self, other: RandomState) -> bool:
        """Tell whether nothing was drawn between two states."""
        tensors = [(self.torch, other.torch)]
        tensors += [(a, b) for (_, a), (_, b) in zip(self.devices, other.devices, strict=False)]
        same = all(torch.equal(a, b) for a, b in tensors)
        return same and self.equals_in_libraries(other) and self.owned_equals(other)

    def equals_in_libraries(self, other: RandomState) -> bool:
        """Tell whether nothing was drawn from NumPy and Python between two states."""
        same = all(map(np.array_equal, self.numpy, other.numpy))
        return same and self.python == other.python

    def seeded(self, seed: int) -> RandomState:
        """Return a copy in which NumPy's and Python's generators have just been seeded."""
        numpy, python = np.random.RandomState(seed).get_state(), random.Random(seed).getstate()
        return self._replace(numpy=numpy, python=python)

    def owned_equals(self, other: RandomState) -> bool:
        """Tell whether nothing was drawn from the network's own generators between two states."""
        pairs = zip(self.owned, other.owned, strict=True)
        return all(_same(one, two) for (_, one), (_, two) in pairs)


#: Generators belong to the whole process, so networks that draw must run one after the other.
_generators = threading.RLock()


def owned_generators(model: nn.Module) -> list[Any]:
    """Return the random generators that the modules of a network keep in attributes.

    `random.SystemRandom` is left out: it takes the operating system's numbers and has no state.
    """
    return [
        value
        for value, _ in attribute_values(model)
        if isinstance(value, GENERATORS) and not isinstance(value, random.SystemRandom)
    ]


def random_state(owned: Sequence[Any] = ()) -> RandomState:
    """Return the present state of the process's generators, and of some that a network owns."""
    with _generators:  # not while another network draws
        return RandomState(
            torch.get_rng_state(),
            tuple((index, torch.cuda.get_rng_state(index)) for index in gpus()),
            np.random.get_state(),
            random.getstate(),
            tuple((generator, _state_of(generator)) for generator in owned),
        )


def set_random_state(state: RandomState) -> None:
    """Set all generators to a state."""
    torch.set_rng_state(state.torch)
    for index, of_device in state.devices:
        torch.cuda.set_rng_state(of_device, index)
    np.random.set_state(state.numpy)
    random.setstate(state.python)
    for generator, own in state.owned:
        _set_state_of(generator, own)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.BitGenerator):
        return generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate()


def _set_state_of(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.BitGenerator):
        generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _same(one: Any, other: Any) -> bool:
    """Tell whether two states of one generator are the same."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool(np.array_equal(one, other)) if isinstance(one, np.ndarray) else one == other


@contextlib.contextmanager
def drawing_from(state: RandomState) -> Iterator[None]:
    """Let the block draw from a random state; put the process's own state back afterwards."""
    with _generators:
        before = random_state([generator for generator, _ in state.owned])
        set_random_state(state)
        try:
            yield
        finally:
            set_random_state(before)


def gpus() -> list[int]:
    """Return the indices of all GPUs, where a network may draw; none before their first use."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def parameters_by_memory(model: nn.Module) -> dict[int, list[tuple[str, nn.Parameter]]]:
    """Return memory (see `memory_of`) -> (name, parameter) of each parameter that lies in it."""
    found: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(memory_of(parameter), []).append((name, parameter))
    return found


class SideEffects(TorchDispatchMode):
    """Watches operations that draw random numbers or write to parameters, in this thread alone.

    The values of a parameter are copied before something is written to it. Nothing else shows what
    is written through its `.data`.

    Args:
        parameters: see `parameters_by_memory`.
        overwritten: name of a parameter -> its values before the first write; filled in.

    Attributes:
        draw: name of the first operation that drew random numbers, "" as long as none did.
    """

    def __init__(
        self,
        parameters: Mapping[int, Sequence[tuple[str, nn.Parameter]]],
        overwritten: dict[str, torch.Tensor],
    ) -> None:
        super().__init__()
        self.draw = ""
        self._parameters, self._overwritten = parameters, overwritten

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        draws, written_to = _effects(func)
        if draws and not self.draw:
            self.draw = func.overloadpacket.__name__
        for index, key in written_to:
            value = args[index] if index < len(args) else kwargs.get(key)
            if isinstance(value, torch.Tensor):
                for name, parameter in self._parameters.get(memory_of(value), ()):
                    if name not in self._overwritten:
                        self._overwritten[name] = parameter.detach().clone()
        return func(*args, **kwargs)


@functools.cache
def _effects(func: Any) -> tuple[bool, tuple[tuple[int, str], ...]]:
    """Return whether an operation draws, and (position, name) of each argument it writes to."""
    arguments = enumerate(func._schema.arguments)
    written_to = ((i, a.name) for i, a in arguments if a.alias_info and a.alias_info.is_write)
    return torch.Tag.nondeterministic_seeded in func.tags, tuple(written_to)
