"""Sliding windows: where they lie, how much each counts at a voxel, and how maps are blended."""

from seg3dcam.windows.blend import Blend, GroupBlend, stitched
from seg3dcam.windows.plan import PADDING_MODES, WindowPlan, Windows, plan_windows

__all__ = [
    "PADDING_MODES",
    "Blend",
    "GroupBlend",
    "WindowPlan",
    "Windows",
    "plan_windows",
    "stitched",
]
