"""Results for other programs: one writer, one file."""

from seg3dcam.export.nifti import write_nifti

__all__ = ["write_nifti"]
