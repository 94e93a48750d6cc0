"""seg3dcam: class activation maps for 3D medical segmentation networks, in patient space."""

from seg3dcam import targets
from seg3dcam.cam import BaseCAM, GradCAM, HiResCAM, SliceGradCAM, XResCAM
from seg3dcam.methods import METHODS
from seg3dcam.result import CamResult
from seg3dcam.suggest import suggest_layers
from seg3dcam.windows import WindowPlan

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "BaseCAM",
    "CamResult",
    "GradCAM",
    "HiResCAM",
    "SliceGradCAM",
    "WindowPlan",
    "XResCAM",
    "suggest_layers",
    "targets",
]
