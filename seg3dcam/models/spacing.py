"""The voxel size and affine that other programs read from a scan's NIfTI header.

A NIfTI header gives the voxel size twice: in pixdim, and as the length of the sform's columns. The
two should agree, but in many public files they do not. The scan's own affine follows the sform. A
model that was trained with another reader must see such files as that reader gives them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np

from seg3dcam.errors import MissingExtraError, ScanError, tell
from seg3dcam.geometry import LPS_TO_RAS, size_text
from seg3dcam.scan import Scan

Reader = Literal["itk", "nibabel"]

#: The fields of a header that say where voxels lie.
_GEOMETRY = (
    "pixdim",
    "xyzt_units",
    "qform_code",
    "sform_code",
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z"),
)

#: Voxel sizes whose relative difference is below this are equal, since headers hold float32.
SAME_SIZE = 1e-3


def spacing_as_read_by(scan: Scan, reader: Reader) -> tuple[float, ...]:
    """Return the voxel size along the scan's axes, in mm, as a reader gives it.

    Args:
        reader: "itk" (SimpleITK, ITKReader) takes the size from pixdim and converts the header's
            unit to mm; "nibabel" takes `header.get_zooms()`, which is pixdim whatever the unit is.

    A scan that did not come from a NIfTI file has only one voxel size, that of its affine.

    Raises:
        ScanError: ITK refuses the header.
        MissingExtraError: SimpleITK is not installed.

    >>> import torch
    >>> header = nib.Nifti1Header()
    >>> header.set_data_shape((2, 2, 2))
    >>> header.set_sform(np.eye(4), code=1)
    >>> header.set_zooms((1.5, 1.5, 8))
    >>> scan = Scan(torch.zeros(1, 2, 2, 2), np.eye(4), "scan", header)
    >>> scan.spacing, spacing_as_read_by(scan, "nibabel")
    ((1.0, 1.0, 1.0), (1.5, 1.5, 8.0))
    """
    return _as_read(scan, reader)[0]


def affine_as_read_by(scan: Scan, reader: Reader) -> np.ndarray:
    """Return the affine, (4, 4) voxel -> RAS mm, as a reader gives it.

    ITK takes the directions from the sform or the qform, and the voxel size from pixdim. The
    arguments and errors are those of `spacing_as_read_by`.
    """
    return _as_read(scan, reader)[1]


def tell_difference(scan: Scan, read: Sequence[float], reader: str) -> None:
    """Warn where a reader takes another voxel size than the scan's affine has.

    Args:
        read: the voxel size along the scan's axes, as `spacing_as_read_by` returns it.
        reader: the reader's name in the model, for the message.
    """
    if not np.allclose(read, scan.spacing, rtol=SAME_SIZE, atol=0):
        tell(
            f"{scan.name}: {reader}, by which the model reads its scans, takes the voxel size from "
            f"the header's pixdim, {in_mm(read)}; by the affine it is {in_mm(scan.spacing)}. The "
            "prediction is the model's own, made with the former; maps, volumes and distances are "
            "by the affine. One of the two is wrong: repair the header"
        )


def in_mm(spacing: Sequence[float]) -> str:
    """Return a voxel size as text, for a message.

    >>> in_mm([0.5, 0.5, 2])
    '0.5 x 0.5 x 2 mm'
    """
    return f"{size_text(spacing)} mm"


def _as_read(scan: Scan, reader: Reader) -> tuple[tuple[float, ...], np.ndarray]:
    if not isinstance(scan.header, nib.Nifti1Header):
        # ITK's own value has twelve digits; further ones are rounding errors of the affine.
        return tuple(float(f"{mm:.12g}") for mm in scan.spacing), scan.affine
    return _READERS[reader](scan, scan.header)


def _by_nibabel(scan: Scan, header: nib.Nifti1Header) -> tuple[tuple[float, ...], np.ndarray]:
    return tuple(float(mm) for mm in header.get_zooms()[:3]), header.get_best_affine()


def _by_itk(scan: Scan, header: nib.Nifti1Header) -> tuple[tuple[float, ...], np.ndarray]:
    """Let ITK itself read the geometry: which form it follows depends on its version too."""
    try:
        import SimpleITK as sitk  # noqa: N813 (its usual name)
    except ImportError as error:
        raise MissingExtraError(
            "a model that reads its scans by ITK needs SimpleITK: pip install SimpleITK"
        ) from error
    wordy = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # its errors are given as ours below
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "geometry.nii"
            file.write_bytes(_geometry(scan, header))
            found = sitk.ImageFileReader()
            found.SetFileName(str(file))
            found.ReadImageInformation()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].removeprefix("ITK ERROR: ")
        raise ScanError(
            f"{scan.name}: ITK, by which the model reads its scans, refuses this header: {reason} "
            "Repair the sform or the qform, or resample the scan onto a grid with right angles"
        ) from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(wordy)
    spacing = np.abs(found.GetSpacing())
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(found.GetDirection(), (3, 3)) * spacing
    affine[:3, 3] = found.GetOrigin()
    return tuple(float(mm) for mm in spacing), LPS_TO_RAS @ affine


def _geometry(scan: Scan, header: nib.Nifti1Header) -> bytes:
    """Return the start of a NIfTI file that has a header's geometry and nothing else from it."""
    bare = nib.Nifti1Header()
    bare.set_data_shape(scan.shape)
    bare.set_data_dtype(np.uint8)
    for name in _GEOMETRY:
        bare[name] = header[name]
    bare["magic"], bare["vox_offset"] = b"n+1", 352
    return bare.binaryblock + bytes(4)


_READERS: dict[str, Callable[[Scan, Any], tuple[tuple[float, ...], np.ndarray]]] = {
    "itk": _by_itk,
    "nibabel": _by_nibabel,
}
