"""Where models come from: `load_model` takes what a user has and returns a `SegModel`."""

from typing import TYPE_CHECKING

from seg3dcam.importing import lazy

if TYPE_CHECKING:  # type checkers and editors read the names here
    from seg3dcam.models.load import load_model
    from seg3dcam.models.seg_model import SegModel
else:  # at run time they are imported when they are first used
    __getattr__, __dir__ = lazy(__name__)

__all__ = ["SegModel", "load_model"]
