"""Nothing of the caller's changes: what a network and its process are put back to.

All is noted before anything changes. Each part is put back by itself, so that one that fails keeps
no other from it, and a network that could not be put back is refused before it is touched.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from seg3dcam.errors import ModelError, tell
from seg3dcam.network.attributes import (
    GENERATORS,
    OF_EVERY_MODULE,
    Kept,
    attributes,
    called,
    container_kind,
    kept,
    memory_of,
)

#: Bytes: a copy of a larger tensor or array would cost more than it is worth.
LARGEST = 2**28


def check_explainable(model: nn.Module) -> None:
    """Raise ModelError for a network whose tensors have no values, or none that autograd follows.

    Args:
        model: without wrappers. Nothing of it is touched.
    """
    for name, module in model.named_modules():
        where = called(name, module)
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
    `requires_grad`, buffers, and hooks; parameters and submodules that the forward pass replaces,
    makes or writes to; and what modules keep in attributes: tensors, arrays, containers and objects
    of a user's own classes (see `attributes`). What cannot be put back is told. Random states
    see `seg3dcam.network.random_draws`.

    Not put back are tensors and arrays of more than `LARGEST` bytes, or mapped from a file; `.grad`
    that the network itself writes; what is no attribute, as globals and what functions close over;
    iterators; objects with `__slots__`, of libraries, or that hold a network, an optimiser, a data
    set, a file, a lock or a thread; and what lies beyond the nearest two thousand things.

    Args:
        model: one that `check_explainable` has let pass.
        overwritten: name of a parameter that the network's passes write to -> its values before;
            filled by these.
    """
    modules = list(model.named_modules())
    things = kept(model)
    failed: list[str] = []
    notes: list[tuple[str, _Change]] = []
    with contextlib.ExitStack() as stack:
        # Whatever is noted is noted before the first change.
        stack.callback(_tell_changed_parameters, _versions(model), overwritten)
        stack.callback(_tell_failed, failed)
        stack.callback(_put_back, notes, failed)
        notes.extend((where, _belonging(thing)) for thing, where in things)
        changes: list[_Change] = []
        for name, module in modules:
            where = called(name, module)
            put_back, change = _mode(module)
            notes += [(where, put_back), (where, _attributes(module)), (where, _tables(module))]
            changes.append(change)
        for name, parameter in model.named_parameters():
            put_back = _parameter(parameter, partial(overwritten.get, name))
            notes.append((f"parameter '{name}'", put_back))
            changes.append(partial(setattr, parameter, "requires_grad", False))
        copies = _copies_of_buffers(model, things)
        for name, module in modules:
            if isinstance(module, torch.jit.ScriptModule):
                kept_in_place, own = list(module._buffers.items()), {}
            else:
                buffers = {key: b for key, b in module._buffers.items() if b is not None}
                own = {key: copies[id(b)] for key, b in buffers.items() if id(b) in copies}
                kept_in_place = [(key, b) for key, b in buffers.items() if key not in own]
            if own:
                changes.append(partial(module._buffers.update, own))
            for key, buffer in kept_in_place:
                if buffer is not None:
                    notes.append((f"{called(name, module)}: its '{key}'", _tensor(buffer)))
        stack.enter_context(_full_precision())
        stack.enter_context(_eager(model))
        for change in changes:
            change()
        yield


_Change = Callable[[], None]


def _nothing() -> None:
    """Change nothing."""


def _put_back(notes: list[tuple[str, _Change]], failed: list[str]) -> None:
    """Put back all that was noted, the last first, also where one fails or is interrupted."""
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
    if failed:
        tell(
            f"the network is not as it was before: {'; '.join(failed[:3])}"
            f"{f'; and {len(failed) - 3} more' * (len(failed) > 3)}. Its own forward pass changes "
            "this, also when it only predicts, in a way that cannot be undone: load the network "
            "again, and keep such values in buffers"
        )


def _mode(module: nn.Module) -> tuple[_Change, _Change]:
    """Return what puts a module's mode back, and what sets it to eval.

    Set directly: a train() or eval() of the network's own may do more than set the mode. A frozen
    script has none.
    """
    training = getattr(module, "training", None)
    if training is None:
        return _nothing, _nothing
    put_back = partial(setattr, module, "training", training)
    return put_back, partial(setattr, module, "training", False)


def _attributes(module: nn.Module) -> _Change:
    """Return what puts a module's own attributes back.

    DynUNet notes the heads of its last pass: their graph would stay, and forbid a deepcopy.
    """
    before = attributes(module)

    def put_back() -> None:
        own, now = vars(module), attributes(module)
        for name in before.keys() | now.keys():
            old, new = before.get(name, _NONE), now.get(name, _NONE)
            if old is _NONE:
                del own[name]
            elif old is not new:
                own[name] = old

    return put_back


#: Stands for an attribute that is not there.
_NONE = object()


def _tables(module: nn.Module) -> _Change:
    """Return what puts a module's tables back: of hooks, submodules, parameters and buffers."""
    if isinstance(module, torch.jit.ScriptModule):
        return _nothing
    empty: list[Any] = []  # most are
    changes: list[_Change] = []
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
    """Tell whether a container is empty, whatever methods a subclass has."""
    kind = container_kind(container)
    return not (container if kind is type(container) else kind.__len__(container))


def _belonging(thing: Any) -> _Change:
    """Return what puts a tensor, array, container or object back that a module keeps."""
    if isinstance(thing, (*GENERATORS, nn.Parameter)):
        return _nothing  # see `seg3dcam.network.random_draws`; whether a parameter changed is told
    if isinstance(thing, torch.Tensor):
        return _tensor(thing)
    if isinstance(thing, np.ndarray):
        own = thing.flags.writeable and not isinstance(thing, np.memmap)
        return _array(thing) if own and thing.nbytes <= LARGEST else _nothing
    return _contents(vars(thing) if container_kind(thing) is None else thing)


def _parameter(parameter: nn.Parameter, overwritten: Callable[[], torch.Tensor | None]) -> _Change:
    """Return what puts `requires_grad` back, and what the forward pass wrote."""
    place, needed = parameter.detach(), parameter.requires_grad

    def put_back() -> None:
        if _place(parameter) != _place(place):
            parameter.data = place
        values = overwritten()
        if values is not None and not _same(place, values):
            parameter.data.copy_(values)  # a graph that was made before needs just these
        parameter.requires_grad = needed

    return put_back


def _array(array: np.ndarray) -> _Change:
    before = array.copy()

    def put_back() -> None:
        array.flags.writeable = True
        np.copyto(array, before)
        if isinstance(array, np.ma.MaskedArray):
            array.mask = np.ma.getmask(before)

    return put_back


def _tensor(tensor: torch.Tensor) -> _Change:
    """Return what writes a tensor's values back, into the memory that it had."""
    if tensor.layout in _PARTS:
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
            if _place(tensor) != _place(place):  # by `.data`, or resized
                tensor.data = place
            if memory.nbytes() < size:  # to read from it would read what is not there
                memory.resize_(size)
            # Only then: a graph that was made meanwhile may need it as it is.
            if not _same(written, values):
                written.copy_(values)
        if graph and tensor.requires_grad:
            raise RuntimeError("it is a view, which autograd follows from now on")

    return put_back


def _without_repetition(tensor: torch.Tensor) -> torch.Tensor:
    """Return each value of an expanded tensor once: a place can be written to but once."""
    for axis, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[axis] > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def _has_memory(tensor: torch.Tensor) -> bool:
    """Tell whether all of a tensor lies in its memory, which may have been let go of."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return not tensor.numel() or end <= tensor.untyped_storage().nbytes()


def _place(tensor: torch.Tensor) -> tuple:
    if tensor.layout != torch.strided:
        return (tensor.shape, tensor.dtype)
    return (memory_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if torch.equal(one, other):
        return True
    if not (one.is_floating_point() or one.is_complex()) or not other.isnan().any():
        return False
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


#: Layout -> what a sparse tensor of it is made of.
_PARTS: dict[torch.layout, tuple[str, ...]] = {torch.sparse_coo: ("_indices", "_values")}
for _layout in (torch.sparse_csr, torch.sparse_bsr):
    _PARTS[_layout] = ("crow_indices", "col_indices", "values")
for _layout in (torch.sparse_csc, torch.sparse_bsc):
    _PARTS[_layout] = ("ccol_indices", "row_indices", "values")


def _sparse(tensor: torch.Tensor) -> _Change:
    parts = _PARTS[tensor.layout]
    before = tensor.detach().clone()

    def put_back() -> None:
        with torch.no_grad(), torch.inference_mode(tensor.is_inference()):
            now = tensor.detach()
            if not all(torch.equal(getattr(now, p)(), getattr(before, p)()) for p in parts):
                tensor.copy_(before)

    return put_back


def _contents(container: Any) -> _Change:
    """Return what puts back what a container holds, whatever methods a subclass has."""
    kind = container_kind(container)
    before = _held(container, kind)

    def put_back() -> None:
        # Only where it changed: other threads may look into it.
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
    """Return what a container holds; of a dict the keys, then the values."""
    if issubclass(kind, dict):
        return [*kind.keys(container), *kind.values(container)]
    return list(kind.__iter__(container))


def _copies_of_buffers(model: nn.Module, things: Iterable[Kept]) -> dict[int, torch.Tensor]:
    """Return id of a buffer -> a copy to work on, so that the caller's are not touched.

    Buffers that lie in one memory, as one that is a view of another, do so in their copies. One
    that lies in the memory of a parameter, or of a tensor that a module keeps, has no copy: what is
    written to one of them is to be read from the other.
    """
    others = [thing for thing, _ in things if isinstance(thing, torch.Tensor)]
    taken = {memory_of(tensor) for tensor in (*others, *model.parameters())}
    groups: dict[int, dict[int, torch.Tensor]] = {}
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            for buffer in module._buffers.values():
                if buffer is not None and memory_of(buffer) not in taken:
                    groups.setdefault(memory_of(buffer), {})[id(buffer)] = buffer
    copies: dict[int, torch.Tensor] = {}
    for group in groups.values():
        copies.update(zip(group, _copied(list(group.values())), strict=False))
    return copies


def _copied(buffers: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return copies of the buffers of one memory, none where they cannot lie in one as these do."""
    one = buffers[0]
    if len(buffers) == 1:
        return [one.detach().clone()]
    unlike = (b.dtype != one.dtype or b.is_quantized or b.is_conj() or b.is_neg() for b in buffers)
    if any(unlike):
        return []
    memory = one.untyped_storage().clone()
    size = memory.nbytes() // one.element_size()
    whole = one.detach().new_empty(0).set_(memory, 0, (size,), (1,))
    with torch.enable_grad():  # views that autograd follows, as the buffers themselves are
        return [whole.as_strided(b.shape, b.stride(), b.storage_offset()) for b in buffers]


def _own(module: nn.Module, table: str) -> dict[str, Any]:
    """Return a module's own parameters or buffers; a script keeps them elsewhere."""
    return dict(getattr(module, table).items())


def _versions(model: nn.Module) -> list[tuple[str, nn.Parameter, int]]:
    return [(name, p, p._version) for name, p in model.named_parameters()]


def _tell_changed_parameters(
    before: list[tuple[str, nn.Parameter, int]], overwritten: Mapping[str, torch.Tensor]
) -> None:
    """Say which parameters were written to, unseen, by the network's own forward pass."""
    changed = [n for n, p, version in before if p._version != version and n not in overwritten]
    if changed:
        tell(
            f"the network's forward pass changes its parameters in place ({', '.join(changed[:3])}"
            f"{', ...' * (len(changed) > 3)}), also when it only predicts: they are not as they "
            "were. Load its weights again, and keep such values in buffers"
        )


# ------------------------------------------------------------------- switches of the whole process


class _Switch:
    """A switch of the whole process: the first thread that needs it sets it, the last puts it back.

    Each by itself would put back what another one had set.
    """

    def __init__(self, turned: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self._turned = turned
        self._lock = threading.Lock()
        self._users = 0
        self._held = contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._users:
                self._held.enter_context(self._turned())
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._held.close()


@contextlib.contextmanager
def _exact_arithmetic() -> Iterator[None]:
    """Switch off TF32 and bfloat16 arithmetic on float32 numbers."""
    b: Any = torch.backends
    if hasattr(b.cuda.matmul, "fp32_precision"):
        operations = [b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv]
        switch, exact = "fp32_precision", "ieee"
    else:  # before torch 2.9
        operations, switch, exact = [b.cuda.matmul, b.cudnn], "allow_tf32", ""
    before = [getattr(operation, switch) for operation in operations]
    try:
        for operation in operations:
            setattr(operation, switch, exact)
        yield
    finally:
        for operation, value in zip(operations, before, strict=True):
            setattr(operation, switch, value)


_full_precision = _Switch(_exact_arithmetic)
_without_compiler = _Switch(lambda: torch.compiler.set_stance("force_eager"))


def _eager(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Run compiled parts eagerly: compiled code does not call hooks that came after it."""
    compiled = any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    return _without_compiler() if compiled else contextlib.nullcontext()
