"""Read a DICOM series: from a folder of slices to voxels with their place in the patient.

    series = read_series(Path("ct_thin"))
    series.voxels    # (columns, rows, slices) float32
    series.affine    # (4, 4) voxel -> RAS mm
    series.headers   # one pydicom dataset per slice, without pixels

`slices` reads single files, `stack` puts them together. pydicom reads the headers, and SimpleITK
(GDCM) the voxels, whatever their compression. Both come with the extra `seg3dcam[dicom]`.
"""

from seg3dcam.files.series.slices import is_dicom
from seg3dcam.files.series.stack import read_series

__all__ = ["is_dicom", "read_series"]
