"""Nothing of the caller's changes: what a network and its process are put back to.

All is noted before anything changes. Each part is put back by itself, so that one that fails keeps
no other from it, and a network that could not be put back is refused before it is touched.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from seg3dcam.belongings import GENERATORS, attributes, belongings
from seg3dcam.errors import ModelError, tell

#: Bytes: a copy of a larger tensor or array would cost more than it is worth.
LARGEST = 2**28


def check_explainable(model: nn.Module) -> None:
    """Raise ModelError for a network whose tensors have no values, or none that autograd follows.

    Args:
        model: without wrappers. Nothing of it is touched.
    """
    for name, module in model.named_modules():
        where = f"module '{name}' ({type(module).__name__})" if name else "the network itself"
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
def untouched(model: nn.Module) -> Iterator[None]:
    """Freeze a network in eval mode, in exact arithmetic; put everything back at the end.

    The mode of every module, `requires_grad`, buffers, and what modules keep in attributes are
    afterwards as they were, also after an exception: tensors, arrays, containers and objects of a
    user's own classes (`seg3dcam.belongings`). Random states see `seg3dcam.draws`.

    Not put back are tensors and arrays of more than `LARGEST` bytes, or mapped from a file; what is
    no attribute, as globals and what functions close over; objects with `__slots__`, of libraries,
    or that hold a network, an optimiser, a data set, a file, a lock or a thread; and what lies
    beyond the nearest two thousand things.

    Args:
        model: one that `check_explainable` has let pass.
    """
    modules = list(model.modules())
    with contextlib.ExitStack() as stack:
        # Whatever is noted is noted before the first change.
        stack.callback(_tell_changed_parameters, _versions(model))
        for put_back in _belongings(model):
            stack.callback(put_back)
        changes: list[Callable[[], None]] = []
        for module in modules:
            for note in (_mode, _attributes, _buffers):
                put_back, change = note(module)
                stack.callback(put_back)
                changes.append(change)
        for parameter in model.parameters():
            stack.callback(setattr, parameter, "requires_grad", parameter.requires_grad)
            changes.append(partial(setattr, parameter, "requires_grad", False))
        copies: dict[int, torch.Tensor] = {}
        for module in modules:
            changes += _copying(module, copies)
        stack.enter_context(_full_precision())
        stack.enter_context(_eager(model))
        for change in changes:
            change()
        yield


_Change = Callable[[], None]


def _nothing() -> None:
    """Change nothing."""


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


def _attributes(module: nn.Module) -> tuple[_Change, _Change]:
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
            elif old is not new and name not in module._modules:  # a submodule came in its place
                own[name] = old

    return put_back, _nothing


#: Stands for an attribute that is not there.
_NONE = object()


def _belongings(model: nn.Module) -> Iterator[_Change]:
    """Yield what puts back each tensor, array, container and object that modules keep."""
    for thing in belongings(model):
        if isinstance(thing, nn.Parameter):
            continue  # as those that an RNN lists: whether one changed is told
        if isinstance(thing, torch.Tensor):
            strided = thing.layout == torch.strided and thing.device.type != "meta"
            if strided and not thing.is_inference() and thing.nbytes <= LARGEST:
                yield partial(_write_back, thing, thing.detach().clone())
        elif isinstance(thing, np.ndarray):
            own = thing.flags.writeable and not isinstance(thing, np.memmap)
            if own and thing.nbytes <= LARGEST:
                yield partial(np.copyto, thing, thing.copy())
        elif isinstance(thing, list | set | deque):
            yield partial(_refill, thing, list(thing))
        elif not isinstance(thing, GENERATORS):
            items = thing if isinstance(thing, dict) else vars(thing)
            yield partial(_refill, items, dict(items))


def _write_back(tensor: torch.Tensor, values: torch.Tensor) -> None:
    with torch.no_grad():
        # Only then: a graph that was made meanwhile may need it as it is.
        if not torch.equal(tensor, values):
            tensor.copy_(values)


def _refill(container: Any, before: Any) -> None:
    """Put back what a container held, where that changed: other threads may look into it."""
    now, then = _held(container), _held(before)
    if len(now) == len(then) and all(map(operator.is_, now, then)):
        return
    container.clear()
    put = container.extend if isinstance(container, list | deque) else container.update
    put(before)


def _held(container: Any) -> list[Any]:
    if isinstance(container, dict):
        return [*container, *container.values()]
    return list(container)


def _buffers(module: nn.Module) -> tuple[_Change, _Change]:
    """Return what puts a module's buffers back; those of a script are written over."""
    buffers = _own(module, "_buffers")
    if not isinstance(module, torch.jit.ScriptModule):

        def put_back() -> None:
            module._buffers.clear()  # also of those that the forward pass registered
            module._buffers.update(buffers)

        return put_back, _nothing

    kept = [(b, b.detach().clone()) for b in buffers.values() if b is not None]

    def write_back() -> None:
        for buffer, before in kept:
            _write_back(buffer, before)

    return write_back, _nothing


def _copying(module: nn.Module, copies: dict[int, torch.Tensor]) -> list[_Change]:
    """Return what gives a module copies of its buffers to work on: the caller's are not touched.

    Args:
        copies: id of a buffer -> its copy, one for all modules that share it.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return []
    for buffer in module._buffers.values():
        if buffer is not None and id(buffer) not in copies:
            copies[id(buffer)] = buffer.detach().clone()
    own = {key: b if b is None else copies[id(b)] for key, b in module._buffers.items()}
    return [lambda: module._buffers.update(own)]


def _own(module: nn.Module, table: str) -> dict[str, Any]:
    """Return a module's own parameters or buffers; a script keeps them elsewhere."""
    return dict(getattr(module, table).items())


def _versions(model: nn.Module) -> list[tuple[str, nn.Parameter, int]]:
    return [(name, p, p._version) for name, p in model.named_parameters()]


def _tell_changed_parameters(before: list[tuple[str, nn.Parameter, int]]) -> None:
    """Say which parameters the network's own forward pass wrote to: that cannot be undone."""
    changed = [name for name, parameter, version in before if parameter._version != version]
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
