"""Every error that seg3dcam raises on purpose, in one tree.

    Seg3dcamError
    ├── InputError (ValueError)          something given cannot be used
    │   ├── ScanError                    a scan: file, shape, affine, voxel values
    │   ├── ModelError                   a network: factory, weights, output
    │   ├── LayerError                   a target layer: unknown, ambiguous, unused, run twice
    │   ├── TargetError                  what is to be explained: class, mask, box
    │   │   └── EmptyRegionError         the region to explain holds no voxel
    │   ├── EvaluationError              a figure about a map would mean nothing
    │   └── ConfigError                  a setting: unknown key, illegal value
    ├── OutputError (OSError)            a result cannot be written
    ├── OutOfMemoryError (torch.OutOfMemoryError)  the network and its gradients do not fit
    └── MissingExtraError (ImportError)  an optional package is not installed

A message says what was given, what is legal and what to do.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any


class Seg3dcamError(Exception):
    """Base class: catches everything that seg3dcam raises on purpose."""


class InputError(Seg3dcamError, ValueError):
    """Something given cannot be used."""


class ScanError(InputError):
    """A scan cannot be read, or its shape, affine or voxel values cannot be used."""


class ModelError(InputError):
    """A network cannot be built, loaded or run, or its output cannot be understood."""


class LayerError(InputError):
    """A target layer is unknown, ambiguous, unused by the score, or runs several times."""


class TargetError(InputError):
    """The target does not fit the network's output."""


class EmptyRegionError(TargetError):
    """The region to explain holds no voxel, so there is nothing to explain."""


class EvaluationError(InputError):
    """A figure about a map is undefined: what it is made of is empty, constant or too small."""


class ConfigError(InputError):
    """A setting is unknown or has an illegal value."""


class OutputError(Seg3dcamError, OSError):
    """A result cannot be written; nothing half-written is left behind."""


if TYPE_CHECKING:
    import torch

    class OutOfMemoryError(Seg3dcamError, torch.OutOfMemoryError):
        """Memory does not suffice, not even for one window at a time."""

else:

    def __getattr__(name: str) -> Any:
        """Make `OutOfMemoryError` when it is first used: its base class is PyTorch's."""
        if name != "OutOfMemoryError":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import torch

        doc = "Memory does not suffice, not even for one window at a time."
        content = {"__doc__": doc, "__module__": __name__}
        made = type(name, (Seg3dcamError, torch.OutOfMemoryError), content)
        return globals().setdefault(name, made)


class MissingExtraError(Seg3dcamError, ImportError):
    """An optional package is needed and not installed."""


class Seg3dcamWarning(UserWarning):
    """A result is usable, but there is something that its reader must know."""


def nearest(name: str, legal: Iterable[str], count: int = 3) -> str:
    """Name the legal values that look most like `name`, ready to end a message.

    >>> nearest("encodr", ["encoder", "decoder", "head"])
    "did you mean 'encoder' or 'decoder'?"
    >>> nearest("q", ["a", "b"])
    "legal: 'a', 'b'"
    """
    choices = [str(choice) for choice in legal]
    close = difflib.get_close_matches(name, choices, n=count)
    if close:
        return "did you mean " + " or ".join(map(repr, close)) + "?"
    return "legal: " + some(list(map(repr, choices)), 12)


def some(names: Sequence[str], most: int = 5, link: str = ", ") -> str:
    """Join the first names of a list, and say how many more there are.

    Args:
        names: words or lines.
        most: how many of them are shown.
        link: stands between them, such as a line break.

    >>> some(["a", "b", "c", "d"], 2)
    'a, b and 2 more'
    >>> some(["a", "b", "c", "d"], 2, "; ")
    'a; b; and 2 more'
    """
    shown, rest = link.join(names[:most]), len(names) - most
    if rest <= 0:
        return shown
    return f"{shown}{' ' if link == ', ' else link}and {rest} more"


def tell(message: str) -> None:
    """Warn, with a `Seg3dcamWarning`, at the line of the user's code that called us."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, Seg3dcamWarning, stacklevel=level)


def _is_ours(module: str) -> bool:
    return module.startswith("seg3dcam") or module == "contextlib"
