"""How other programs' readers take a scan's voxel size and place from its NIfTI header.

A NIfTI header says the voxel size twice: in pixdim, and as the length of the sform's columns. Both
should agree, and in many public files they do not. The scan's own affine follows the sform; a model
that was trained on what another reader made of such files must see them in the same way.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np

from seg3dcam.errors import MissingExtraError, ScanError, tell
from seg3dcam.geometry import LPS_TO_RAS
from seg3dcam.scan import Scan

Reader = Literal["itk", "nibabel"]

#: What a reader's geometry is made of.
_GEOMETRY = (
    "pixdim",
    "xyzt_units",
    "qform_code",
    "sform_code",
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z"),
)

#: Two voxel sizes that differ by less than this part say the same: headers hold float32.
SAME_SIZE = 1e-3


def spacing_as_read_by(scan: Scan, reader: Reader) -> tuple[float, ...]:
    """Return the voxel size along the scan's axes, in mm, as a reader gives it.

    Args:
        reader: "itk" (SimpleITK, ITKReader) takes it from pixdim and heeds the header's unit;
            "nibabel" takes `header.get_zooms()`, which is pixdim in whatever unit.

    A scan that did not come from NIfTI has one voxel size only, its affine's.

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

    ITK takes directions from the sform or the qform, and the voxel size from pixdim. Arguments and
    errors are those of `spacing_as_read_by`.
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
            f"the header's pixdim, {_mm(read)}; by the affine it is {_mm(scan.spacing)}. The "
            "prediction is the model's own, made with the former; maps, volumes and distances are "
            "by the affine. One of the two is wrong: repair the header"
        )


def _as_read(scan: Scan, reader: Reader) -> tuple[tuple[float, ...], np.ndarray]:
    if not isinstance(scan.header, nib.Nifti1Header):
        # Twelve digits: what ITK read, without the rounding of the way through an affine.
        return tuple(float(f"{mm:.12g}") for mm in scan.spacing), scan.affine
    return _READERS[reader](scan, scan.header)


def _by_nibabel(scan: Scan, header: nib.Nifti1Header) -> tuple[tuple[float, ...], np.ndarray]:
    return tuple(float(mm) for mm in header.get_zooms()[:3]), header.get_best_affine()


def _by_itk(scan: Scan, header: nib.Nifti1Header) -> tuple[tuple[float, ...], np.ndarray]:
    """Let ITK read the geometry itself: which form it follows depends on much, and its version."""
    try:
        import SimpleITK as sitk  # noqa: N813 (its usual name)
    except ImportError as error:
        raise MissingExtraError(
            "a model that reads its scans by ITK needs SimpleITK: pip install SimpleITK"
        ) from error
    wordy = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # what it says of the header is said by us
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
    """Return the start of a NIfTI file with a header's geometry, and nothing else of it."""
    bare = nib.Nifti1Header()
    bare.set_data_shape(scan.shape)
    bare.set_data_dtype(np.uint8)
    for name in _GEOMETRY:
        bare[name] = header[name]
    bare["magic"], bare["vox_offset"] = b"n+1", 352
    return bare.binaryblock + bytes(4)


def _mm(spacing: Sequence[float]) -> str:
    return " x ".join(f"{mm:.4g}" for mm in spacing) + " mm"


_READERS: dict[str, Callable[[Scan, Any], tuple[tuple[float, ...], np.ndarray]]] = {
    "itk": _by_itk,
    "nibabel": _by_nibabel,
}
