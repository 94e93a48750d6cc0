"""The anatomical planes.

This is a module of its own, which loads neither NumPy nor nibabel, so that a job can be checked
without them.
"""

from __future__ import annotations

from typing import Literal

Axis = Literal["axial", "coronal", "sagittal"]

#: Plane -> the axis of RAS along which its slices follow one another.
WORLD_AXIS: dict[str, int] = {"sagittal": 0, "coronal": 1, "axial": 2}
