"""A scan: voxels, where they lie in the patient, and a name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch

from seg3dcam.files.readers import Frame
from seg3dcam.geometry import size_text, spacing_of

#: Fields of a NIfTI header about the place and the type of the voxels.
_PLACE_FIELDS = (
    *("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "pixdim", "xyzt_units", "datatype"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("scl_slope", "scl_inter", "intent_code"),
)


@dataclass(frozen=True, eq=False, repr=False)
class Scan:
    """A scan on its own grid.

    - `data`: (C, X, Y, Z) float32, one entry of C per channel (modality).
    - `affine`: (4, 4) float64, voxel index -> mm in RAS (x to the right, y forward, z up).
    - `name`: the file name without folder and suffix. For a DICOM series it is "scan", since the
      name of the folder may be that of the patient.
    - `header`: the unchanged header of a NIfTI file (the first one, if there were several), from
      which writers copy the geometry. None for other formats, and for scans made in memory.
    - `series`: the DICOM headers of the slices without voxels, one for each index of the last axis.
      None if the scan was no DICOM series.
    - `frame`: "sform" or "qform" if the user chose between the two forms of a NIfTI header.

    >>> scan = Scan(torch.zeros(1, 4, 5, 6), np.diag([0.5, 0.5, 2, 1]), "case")
    >>> scan.shape, scan.spacing
    ((4, 5, 6), (0.5, 0.5, 2.0))
    """

    data: torch.Tensor
    affine: npt.NDArray[np.float64]
    name: str
    header: nib.Nifti1Header | None = None
    series: Sequence[Any] | None = None
    frame: Frame | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels per spatial axis."""
        return tuple(self.data.shape[1:])

    @property
    def spacing(self) -> tuple[float, ...]:
        """Distance between voxel centres along each spatial axis, in mm."""
        return spacing_of(self.affine)

    @property
    def title(self) -> str:
        """How a sentence names the scan: "scan case_7", or "the scan" if it has no name."""
        return "the scan" if self.name == "scan" else f"scan {self.name}"

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return (
            f"Scan({self.name!r}, {len(self.data)} channel(s), {shape} voxels of "
            f"{size_text(self.spacing)} mm)"
        )


def place_code(scan: Scan) -> str:
    """Return a hash of everything in a scan except its voxels: its place and its headers.

    It covers everything that writers copy into results: both forms of a NIfTI header and their
    codes, spacing, units and type, the chosen frame, and the DICOM headers of a series.
    """
    said: list[str] = [np.ascontiguousarray(scan.affine).tobytes().hex(), str(scan.frame)]
    if scan.header is not None:
        said += [f"{key} {scan.header[key].tolist()}" for key in _PLACE_FIELDS]
    for header in scan.series or ():
        said += [_element_code(header, tag) for tag in sorted(header.keys())]
    return hashlib.sha256("\n".join(said).encode(errors="backslashreplace")).hexdigest()


def _element_code(header: Any, tag: Any) -> str:
    try:
        return repr((tag, header[tag].VR, header[tag].value))
    except Exception:  # pydicom cannot decode the value, so the raw one is hashed
        return repr((tag, header.get_item(tag)))
