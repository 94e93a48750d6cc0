"""Note the states of parts of a network, to put them back later.

Each function notes the present state of a part, and returns a function without arguments that puts
this state back.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from seg3dcam.network.attributes import (
    GENERATORS,
    OF_EVERY_MODULE,
    container_kind,
    memory_of,
    own_attributes,
)

#: In bytes: larger tensors and arrays are not copied, since that would cost too much memory.
LARGEST = 2**28

#: Layout of a sparse tensor -> the methods that return what it is made of.
_SPARSE_PARTS: dict[torch.layout, tuple[str, ...]] = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}

#: Stands for an attribute that does not exist.
_MISSING = object()


Change = Callable[[], None]


def _nothing() -> None:
    """Put nothing back."""


def of_mode(module: nn.Module) -> Change:
    """Return what puts a module's mode back, training or eval; a frozen TorchScript has none."""
    training = getattr(module, "training", None)
    return _nothing if training is None else partial(setattr, module, "training", training)


def of_attributes(module: nn.Module) -> Change:
    """Return what puts a module's own attributes back.

    DynUNet, for example, keeps the outputs of its last pass, whose graph would forbid a deepcopy.
    """
    before = own_attributes(module)

    def put_back() -> None:
        own, now = vars(module), own_attributes(module)
        for name in before.keys() | now.keys():
            old, new = before.get(name, _MISSING), now.get(name, _MISSING)
            if old is _MISSING:
                del own[name]
            elif old is not new:
                own[name] = old

    return put_back


def of_tables(module: nn.Module) -> Change:
    """Return what puts a module's tables back: hooks, submodules, parameters, buffers."""
    if isinstance(module, torch.jit.ScriptModule):
        return _nothing
    empty: list[Any] = []  # as most tables are
    changes: list[Change] = []
    for name, table in vars(module).items():
        if name in OF_EVERY_MODULE and isinstance(table, (dict, set)):
            if _is_empty(table):
                empty.append(table)
            else:
                changes.append(_contents(table))

    def put_back() -> None:
        for table in empty:
            if not _is_empty(table):
                container_kind(table).clear(table)
        for change in changes:
            change()

    return put_back


def _is_empty(container: Any) -> bool:
    """Tell whether a container is empty, without methods that a subclass may have overridden."""
    kind = container_kind(container)
    return not (container if kind is type(container) else kind.__len__(container))


def of_value(value: Any) -> Change:
    """Return what puts back a tensor, array, container or object that a module keeps."""
    # For generators see `seg3dcam.network.random_draws`, for parameters `of_parameter`.
    if isinstance(value, (*GENERATORS, nn.Parameter)):
        return _nothing
    if isinstance(value, torch.Tensor):
        return of_tensor(value)
    if isinstance(value, np.ndarray):
        own = value.flags.writeable and not isinstance(value, np.memmap)
        return _array(value) if own and value.nbytes <= LARGEST else _nothing
    return _contents(vars(value) if container_kind(value) is None else value)


def of_parameter(parameter: nn.Parameter, overwritten: Callable[[], torch.Tensor | None]) -> Change:
    """Return what puts a parameter's `requires_grad`, memory and values back.

    Args:
        overwritten: returns the values before the forward pass wrote to it, None if it did not.
    """
    place, needed = parameter.detach(), parameter.requires_grad

    def put_back() -> None:
        if _place(parameter) != _place(place):
            parameter.data = place
        values = overwritten()
        if values is not None and not _same(place, values):
            parameter.data.copy_(values)  # an earlier graph needs this very memory
        parameter.requires_grad = needed

    return put_back


def _array(array: np.ndarray) -> Change:
    """Return what writes an array's values back."""
    before = array.copy()

    def put_back() -> None:
        array.flags.writeable = True
        np.copyto(array, before)
        if isinstance(array, np.ma.MaskedArray):
            array.mask = np.ma.getmask(before)

    return put_back


def of_tensor(tensor: torch.Tensor) -> Change:
    """Return what writes a tensor's values back, into the memory that it has now."""
    if tensor.layout in _SPARSE_PARTS:
        return _sparse(tensor)
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.nbytes > LARGEST:
        return _nothing
    if not _has_memory(tensor):
        return _nothing
    place, needed = tensor.detach(), tensor.requires_grad
    written = _without_repetition(place)
    values, memory = written.clone(), place.untyped_storage()
    size = memory.nbytes()

    def put_back() -> None:
        with torch.no_grad(), torch.inference_mode(tensor.is_inference()):
            graph = needed != tensor.requires_grad and tensor.grad_fn is not None
            if graph:
                (tensor if tensor._base is None else tensor._base).detach_()
            if _place(tensor) != _place(place):  # replaced through `.data`, or resized
                tensor.data = place
            if memory.nbytes() < size:  # otherwise reading would go beyond its end
                memory.resize_(size)
            # Written only if needed, since a graph made meanwhile may need the tensor unwritten.
            if not _same(written, values):
                written.copy_(values)
        if graph and tensor.requires_grad:
            raise RuntimeError("it is a view, which autograd follows from now on")

    return put_back


def _without_repetition(tensor: torch.Tensor) -> torch.Tensor:
    """Return an expanded tensor without its repetitions, so that each place is written to once."""
    for axis, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[axis] > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def _has_memory(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor lies wholly in its memory, which may have been freed or shrunk."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return not tensor.numel() or end <= tensor.untyped_storage().nbytes()


def _place(tensor: torch.Tensor) -> tuple:
    """Return where a tensor lies in memory, and its form."""
    if tensor.layout != torch.strided:
        return (tensor.shape, tensor.dtype)
    return (memory_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors have the same values; NaN counts as equal to NaN."""
    if torch.equal(one, other):
        return True
    if not (one.is_floating_point() or one.is_complex()) or not other.isnan().any():
        return False
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _sparse(tensor: torch.Tensor) -> Change:
    """Return what writes a sparse tensor's values back."""
    parts = _SPARSE_PARTS[tensor.layout]
    before = tensor.detach().clone()

    def put_back() -> None:
        with torch.no_grad(), torch.inference_mode(tensor.is_inference()):
            now = tensor.detach()
            if not all(torch.equal(getattr(now, p)(), getattr(before, p)()) for p in parts):
                tensor.copy_(before)

    return put_back


def _contents(container: Any) -> Change:
    """Return what puts a container's items back, without methods that a subclass may override."""
    kind = container_kind(container)
    before = _held(container, kind)

    def put_back() -> None:
        # Written only if it changed, since other threads may be reading it.
        now = _held(container, kind)
        if len(now) == len(before) and all(map(operator.is_, now, before)):
            return
        if not issubclass(kind, dict):
            kind.clear(container)
            (kind.update if kind is set else kind.extend)(container, before)
            return
        count = len(before) // 2
        if len(now) != len(before) or not all(map(operator.is_, now[:count], before[:count])):
            kind.clear(container)
        for key, value in zip(before[:count], before[count:], strict=True):
            kind.__setitem__(container, key, value)

    return put_back


def _held(container: Any, kind: Any) -> list[Any]:
    """Return what a container holds; for a dict first the keys, then the values."""
    if issubclass(kind, dict):
        return [*kind.keys(container), *kind.values(container)]
    return list(kind.__iter__(container))
