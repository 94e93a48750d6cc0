"""Results for other programs: one writer, one file."""

from seg3dcam.export.fused import write_fused
from seg3dcam.export.nifti import write_nifti
from seg3dcam.export.nrrd import write_nrrd
from seg3dcam.export.slicer import save_scene

__all__ = ["save_scene", "write_fused", "write_nifti", "write_nrrd"]
