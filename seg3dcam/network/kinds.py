"""What kind of module a module is, also in a program that `torch.export` made of a network."""

from __future__ import annotations

import sys

import torch
from torch import nn


def takes_hooks(module: nn.Module) -> bool:
    """Tell whether what a module gives can be seen: of a script, traced or frozen, it cannot."""
    return not isinstance(module, torch.jit.ScriptModule)


def kind_of(module: nn.Module) -> type[nn.Module]:
    """Return a module's class; in an exported program, the class that it was exported from.

    There every module is an `InterpreterModule`, which notes the name of that class. It has no more
    than the parameters of such a module: no `eps`, no `stride`.

    >>> kind_of(nn.ReLU()).__name__
    'ReLU'
    """
    kind = type(module)
    if kind.__name__ != "InterpreterModule":
        return kind
    place, _, name = str(getattr(module, "_ty", None) or "").rpartition(".")
    if place not in sys.modules:
        return kind
    # Looked up, not imported: a file must not choose what is imported.
    noted = getattr(sys.modules[place], name, kind)
    return noted if isinstance(noted, type) and issubclass(noted, nn.Module) else kind
