"""Sliding windows.

plan   where windows lie, and how much each counts at a voxel
blend  the windows' logits stitched, and their maps blended into one map of the volume
part   the windows' values blended onto a part of the volume, such as one slice of all channels
"""

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
