"""Sliding windows: where they lie, how much each counts at a voxel, and how maps are blended."""

from seg3dcam.windows.blend import Blend, GroupBlend, stitched
from seg3dcam.windows.part import blend_onto, grid_over_volume, part_in_window
from seg3dcam.windows.plan import WindowPlan, Windows, plan_windows

__all__ = [
    "Blend",
    "GroupBlend",
    "WindowPlan",
    "Windows",
    "blend_onto",
    "grid_over_volume",
    "part_in_window",
    "plan_windows",
    "stitched",
]
