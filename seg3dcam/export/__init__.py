"""Write results for other programs, each format in a module of its own."""

from seg3dcam.export.fused import write_fused
from seg3dcam.export.slicer import save_scene
from seg3dcam.files.writers.nifti import write_nifti
from seg3dcam.files.writers.nrrd import write_nrrd

__all__ = ["save_scene", "write_fused", "write_nifti", "write_nrrd"]
