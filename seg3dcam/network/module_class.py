"""The class of a module, and whether hooks on it are called.

In a program that `torch.export` made of a network, the modules have lost their classes; only the
names of the classes remain.
"""

from __future__ import annotations

import sys

import torch
from torch import nn


def takes_hooks(module: nn.Module) -> bool:
    """Tell whether hooks on a module are called; a scripted or traced module ignores them."""
    return not isinstance(module, torch.jit.ScriptModule)


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return a module's class; in an exported program, the class that it was exported from.

    In an exported program, every module is an `InterpreterModule`, which stores the name of its
    original class. It has the parameters of that class, but no other attributes, such as `eps` or
    `stride`.

    >>> class_of(nn.ReLU()).__name__
    'ReLU'
    """
    own = type(module)
    if own.__name__ != "InterpreterModule":
        return own
    place, _, name = str(getattr(module, "_ty", None) or "").rpartition(".")
    if place not in sys.modules:
        return own
    # The class is looked up, but not imported, since a file must not decide what is imported.
    former = getattr(sys.modules[place], name, own)
    return former if isinstance(former, type) and issubclass(former, nn.Module) else own
