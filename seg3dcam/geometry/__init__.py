"""Geometry: voxel grids, affines, and values moved from one grid to another."""

from typing import TYPE_CHECKING

from seg3dcam.importing import lazy

if TYPE_CHECKING:  # type checkers and editors read the names here
    from seg3dcam.geometry.affines import (
        LPS_TO_RAS,
        SAME_GRID_MM,
        SAME_GRID_VOXELS,
        anatomical_axis,
        checked_affine,
        corner_gap,
        ras_affine,
        same_grid,
        size_text,
        spacing_of,
        to_world,
        voxel_ml,
    )
    from seg3dcam.geometry.grids import FeatureGrid, cropped, interpolate
    from seg3dcam.geometry.peaks import peak_voxel, plateau_middle
    from seg3dcam.geometry.planes import Axis
    from seg3dcam.geometry.resampling import resample, resample_labels
else:  # at run time they are imported when they are first used
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "LPS_TO_RAS",
    "SAME_GRID_MM",
    "SAME_GRID_VOXELS",
    "Axis",
    "FeatureGrid",
    "anatomical_axis",
    "checked_affine",
    "corner_gap",
    "cropped",
    "interpolate",
    "peak_voxel",
    "plateau_middle",
    "ras_affine",
    "resample",
    "resample_labels",
    "same_grid",
    "size_text",
    "spacing_of",
    "to_world",
    "voxel_ml",
]
