"""Pictures for the reader: review a CAM slice by slice, as radiologists look at scans.

`save_slices` writes one PNG per slice, `save_montage` one PNG of several slices, `save_features`
the channels of a layer.
"""

from seg3dcam.look import WINDOWS
from seg3dcam.review.features import save_features
from seg3dcam.review.slices import save_montage, save_slices

__all__ = ["WINDOWS", "save_features", "save_montage", "save_slices"]
