"""Where models come from: `load_model` takes what a user has and returns a `SegModel`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seg3dcam.models.load import load_model
    from seg3dcam.models.seg_model import SegModel

__all__ = ["SegModel", "load_model"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `models.specs` alone loads no PyTorch."""
    if name == "load_model":
        return importlib.import_module("seg3dcam.models.load").load_model
    if name == "SegModel":
        return importlib.import_module("seg3dcam.models.seg_model").SegModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
