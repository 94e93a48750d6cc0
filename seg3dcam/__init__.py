"""seg3dcam: class activation maps for 3D medical segmentation networks, in patient space."""

from seg3dcam import targets
from seg3dcam.cam import BaseCAM, GradCAM, HiResCAM, SliceGradCAM, XResCAM
from seg3dcam.explain import Explanation, explain, explain_each
from seg3dcam.methods import METHODS
from seg3dcam.models import SegModel, load_model
from seg3dcam.result import CamResult
from seg3dcam.scan import Scan, load_scan
from seg3dcam.suggest import suggest_layers
from seg3dcam.windows import WindowPlan

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "BaseCAM",
    "CamResult",
    "Explanation",
    "GradCAM",
    "HiResCAM",
    "Scan",
    "SegModel",
    "SliceGradCAM",
    "WindowPlan",
    "XResCAM",
    "explain",
    "explain_each",
    "load_model",
    "load_scan",
    "suggest_layers",
    "targets",
]
