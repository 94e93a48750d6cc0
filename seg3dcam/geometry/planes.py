"""The planes in which a patient is looked at."""

from __future__ import annotations

from typing import Literal

Axis = Literal["axial", "coronal", "sagittal"]

#: Plane -> the axis of RAS along which its slices follow one another.
WORLD_AXIS: dict[str, int] = {"sagittal": 0, "coronal": 1, "axial": 2}
