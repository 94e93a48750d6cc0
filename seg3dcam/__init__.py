"""seg3dcam: class activation maps for 3D medical segmentation networks, in patient space."""

from typing import TYPE_CHECKING

from seg3dcam.importing import find_old_names, lazy

if TYPE_CHECKING:  # type checkers and editors read the names here
    from seg3dcam import targets
    from seg3dcam.cams.catalogue import (
        FEM,
        KPCACAM,
        METHODS,
        AblationCAM,
        BaseCAM,
        EigenCAM,
        EigenGradCAM,
        FullGrad,
        GradCAM,
        GradCAMElementWise,
        GradCAMPlusPlus,
        HiResCAM,
        LayerCAM,
        RandomCAM,
        ScoreCAM,
        SegEigenCAM,
        ShapleyCAM,
        SliceGradCAM,
        XGradCAM,
        XResCAM,
    )
    from seg3dcam.cams.result import CamResult
    from seg3dcam.explaining.explain import explain, explain_each
    from seg3dcam.explaining.explanation import Explanation
    from seg3dcam.job.read_back import load_explanation
    from seg3dcam.models import SegModel, load_model
    from seg3dcam.network.ensemble import Ensemble
    from seg3dcam.network.suggest import suggest_layers
    from seg3dcam.scan import Scan, load_scan
    from seg3dcam.windows import WindowPlan
else:  # at run time they are imported when they are first used
    __getattr__, __dir__ = lazy(__name__)

__version__ = "0.1.0"

__all__ = [
    "FEM",
    "KPCACAM",
    "METHODS",
    "AblationCAM",
    "BaseCAM",
    "CamResult",
    "EigenCAM",
    "EigenGradCAM",
    "Ensemble",
    "Explanation",
    "FullGrad",
    "GradCAM",
    "GradCAMElementWise",
    "GradCAMPlusPlus",
    "HiResCAM",
    "LayerCAM",
    "RandomCAM",
    "Scan",
    "ScoreCAM",
    "SegEigenCAM",
    "SegModel",
    "ShapleyCAM",
    "SliceGradCAM",
    "WindowPlan",
    "XGradCAM",
    "XResCAM",
    "explain",
    "explain_each",
    "load_explanation",
    "load_model",
    "load_scan",
    "suggest_layers",
    "targets",
]
find_old_names()
