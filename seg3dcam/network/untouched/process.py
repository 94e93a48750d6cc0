"""Settings of the whole process that are changed while a network is explained."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


class ProcessSwitch:
    """A switch of the process that several threads may need at the same time.

    The first thread turns it on and the last one turns it off. If each thread did so for itself, a
    thread might turn it off while another one still needs it.

    Args:
        turned: returns a `with` in which the switch is on.
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


full_precision = ProcessSwitch(_exact_arithmetic)
_without_compiler = ProcessSwitch(lambda: torch.compiler.set_stance("force_eager"))


def eager(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Run compiled parts eagerly: compiled code does not call hooks that were added later."""
    compiled = any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    return _without_compiler() if compiled else contextlib.nullcontext()
