"""Where models come from; `load_model` takes what a user has and returns a `SegModel`."""

from seg3dcam.models.base import SegModel
from seg3dcam.models.load import load_model

__all__ = ["SegModel", "load_model"]
