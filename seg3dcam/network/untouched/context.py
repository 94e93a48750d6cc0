"""The `with` in which a network is frozen, and which puts everything back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from seg3dcam.errors import ModelError, some, tell
from seg3dcam.network.attributes import attribute_values, in_words
from seg3dcam.network.untouched.buffers import copies_of_buffers
from seg3dcam.network.untouched.process import eager, full_precision
from seg3dcam.network.untouched.restoring import (
    Change,
    of_attributes,
    of_mode,
    of_parameter,
    of_tables,
    of_tensor,
    of_value,
)


def check_explainable(model: nn.Module) -> None:
    """Raise ModelError for a network whose tensors have no values, or that autograd cannot follow.

    Args:
        model: a network without wrappers. It is not changed.
    """
    for name, module in model.named_modules():
        where = in_words(name, module)
        tensors = {**_own(module, "_parameters"), **_own(module, "_buffers")}
        for key, tensor in tensors.items():
            if tensor is None:
                continue
            if is_lazy(tensor):
                raise ModelError(
                    f"{where} is lazy: the shape of its '{key}' is not known yet. Run the network "
                    "once on an input of the right shape before it is explained"
                )
            if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
                kind = "a FakeTensor" if isinstance(tensor, FakeTensor) else "on the meta device"
                raise ModelError(
                    f"{where}: its '{key}' is {kind}, which has a shape but no values. Move the "
                    "network to a real device (network.to_empty(device='cpu')) and load its weights"
                )
        for key, tensor in _own(module, "_parameters").items():
            if tensor is not None and tensor.is_inference():
                raise ModelError(
                    f"{where}: the network's parameters were made inside torch.inference_mode(), "
                    f"'{key}' among them, where autograd cannot follow: build or load the network "
                    "outside of it"
                )


@contextlib.contextmanager
def untouched(model: nn.Module, overwritten: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Freeze a network in eval mode, in exact arithmetic; put everything back at the end.

    Afterwards, also after an exception, the following are as they were: the mode of every module,
    `requires_grad`, buffers and hooks; parameters and submodules that the forward pass replaces,
    adds or writes to; and what modules keep in attributes: tensors, arrays, containers and objects
    of a user's own classes (see `seg3dcam.network.attributes`). A warning names what could not be
    put back. For random states see `seg3dcam.network.random_draws`.

    Not put back are: tensors and arrays of more than `restoring.LARGEST` bytes, or mapped from a
    file; `.grad` that the network itself writes; values that are no attributes, such as globals and
    variables of enclosing functions; iterators; objects that have `__slots__`, that belong to a
    library, or that hold a network, an optimiser, a data set, a file, a lock or a thread; and
    whatever comes after the nearest two thousand values.

    Args:
        model: a network that `check_explainable` has accepted.
        overwritten: name of a parameter that the network's passes write to -> its values before;
            the passes fill it in.
    """
    failed: list[str] = []
    notes: list[tuple[str, Change]] = []
    with contextlib.ExitStack() as stack:
        stack.callback(_tell_changed_parameters, _versions(model), overwritten)
        stack.callback(_tell_failed, failed)
        stack.callback(_put_back, notes, failed)
        freeze = _noted(model, overwritten, notes)
        stack.enter_context(full_precision())
        stack.enter_context(eager(model))
        for change in freeze:
            change()
        yield


def _noted(
    model: nn.Module, overwritten: Mapping[str, torch.Tensor], notes: list[tuple[str, Change]]
) -> list[Change]:
    """Note the state of everything, and change nothing yet.

    Args:
        notes: (part in words, function that puts it back); it is filled in.

    Returns:
        Functions that freeze the network.
    """
    modules, values = list(model.named_modules()), attribute_values(model)
    freeze: list[Change] = []
    notes.extend((place, of_value(value)) for value, place in values)
    for name, module in modules:
        where = in_words(name, module)
        notes += [(where, of(module)) for of in (of_mode, of_attributes, of_tables)]
        if getattr(module, "training", None) is not None:  # a frozen TorchScript module has no mode
            # Set directly, since a network's own train() or eval() may do more than that.
            freeze.append(partial(setattr, module, "training", False))
    for name, parameter in model.named_parameters():
        put_back = of_parameter(parameter, partial(overwritten.get, name))
        notes.append((f"parameter '{name}'", put_back))
        freeze.append(partial(setattr, parameter, "requires_grad", False))
    copies = copies_of_buffers(model, values)
    for name, module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            in_place, own = list(module._buffers.items()), {}
        else:
            buffers = {key: b for key, b in module._buffers.items() if b is not None}
            own = {key: copies[id(b)] for key, b in buffers.items() if id(b) in copies}
            in_place = [(key, b) for key, b in buffers.items() if key not in own]
        if own:
            freeze.append(partial(module._buffers.update, own))
        for key, buffer in in_place:
            if buffer is not None:
                notes.append((f"{in_words(name, module)}: its '{key}'", of_tensor(buffer)))
    return freeze


def _put_back(notes: list[tuple[str, Change]], failed: list[str]) -> None:
    """Put back all that was noted, the last first, even if one fails or the user interrupts."""
    try:
        while notes:
            where, put_back = notes.pop()
            try:
                put_back()
            except Exception as error:
                failed.append(f"{where} ({error})")
    except BaseException:
        _put_back(notes, failed)
        raise


def _tell_failed(failed: Sequence[str]) -> None:
    """Warn about what could not be put back."""
    if failed:
        tell(
            f"the network is not as it was before: {some(failed, 3, '; ')}. Its own forward pass "
            "changes this, also when it only predicts, in a way that cannot be undone: load the "
            "network again, and keep such values in buffers"
        )


def _own(module: nn.Module, table: str) -> dict[str, Any]:
    """Return a module's own parameters or buffers; a TorchScript module keeps them elsewhere."""
    return dict(getattr(module, table).items())


def _versions(model: nn.Module) -> list[tuple[str, nn.Parameter, int]]:
    return [(name, p, p._version) for name, p in model.named_parameters()]


def _tell_changed_parameters(
    before: list[tuple[str, nn.Parameter, int]], overwritten: Mapping[str, torch.Tensor]
) -> None:
    """Warn about parameters to which the network's forward pass wrote without being noticed."""
    changed = [n for n, p, version in before if p._version != version and n not in overwritten]
    if changed:
        tell(
            f"the network's forward pass changes its parameters in place ({', '.join(changed[:3])}"
            f"{', ...' * (len(changed) > 3)}), also when it only predicts: they are not as they "
            "were. Load its weights again, and keep such values in buffers"
        )
