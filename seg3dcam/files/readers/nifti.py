"""Read headers of NIfTI-1 and NIfTI-2 files."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from seg3dcam.errors import ScanError, tell
from seg3dcam.files.readers.frames import Affine, Frame, best_affine
from seg3dcam.files.readers.plan import Plan, channels_first, not_real, read_start
from seg3dcam.geometry import checked_affine

__all__ = ["plan_nifti"]

_MM_PER_UNIT = {1: ("metre", 1e3), 3: ("micron", 1e-3)}  # NIfTI codes; all others are read as mm
_LARGEST_OFFSET = 2**40


def plan_nifti(path: Path, frame: Frame | None, *, must: bool) -> Plan:
    """Read a NIfTI file's header; for `frame` and `must` see `frames.best_affine`."""
    header, zipped = _read_header(path)
    shape = channels_first(header.get_data_shape(), path)
    affine = best_affine(path, header, frame, must=must)
    slope, intercept = _scaling(header, path)
    return Plan(
        path=path,
        shape=shape,
        affine=_in_mm(checked_affine(affine, str(path), ScanError), header, path),
        dtype=_checked_dtype(header, path),
        header=header,
        packing="gzip" if zipped else "plain",
        skip=_start(header, path),
        slope=slope,
        intercept=intercept,
    )


def _read_header(path: Path) -> tuple[nib.Nifti1Header, bool]:
    """Return the header, and whether the file is gzipped."""
    start, zipped = read_start(path, 540)
    header_class, size = _header_class(start, path)
    # The constructor leaves out header extensions, which may hold patient data.
    header = header_class(start[:size], check=False)
    _check_fields(header, path)
    repairs = _Repairs()
    try:
        header.check_fix(logger=repairs.logger)
    except HeaderDataError as error:
        raise ScanError(
            f"{path}: the NIfTI header cannot be used ({error}). Write the file again with the "
            "program that made it."
        ) from error
    if repairs.found:
        tell(
            f"{path}: the NIfTI header is odd, and was read as nibabel does: "
            f"{'; '.join(repairs.found)}. Write it again with the program that made it."
        )
    return header, zipped


class _Repairs(logging.Handler):
    """Collects the messages about repairs of a header, which nibabel would print."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []
        self.logger = logging.Logger(__name__, logging.WARNING)
        self.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message, except one about the alignment of voxels, which is harmless."""
        message = record.getMessage()
        if "divisible by 16" not in message:
            self.found.append(message)


def _header_class(start: bytes, path: Path) -> tuple[type[nib.Nifti1Header], int]:
    sizes = {int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big")}
    if 348 in sizes and start[344:348] == b"n+1\0":
        return nib.Nifti1Header, 348
    if 540 in sizes and len(start) == 540 and start[4:8] == b"n+2\0":
        return nib.Nifti2Header, 540
    if start[344:347] == b"ni1" or start[4:7] == b"ni2":
        found = "it is one half of a .hdr/.img pair"
    elif len(start) < 348:
        found = f"it holds only {len(start)} bytes"
    else:
        found = "it does not start with a NIfTI header"
    raise ScanError(
        f"{path}: not a NIfTI file: {found}. Legal: NIfTI-1 or NIfTI-2 in one file, .nii or "
        ".nii.gz. Check that it is the right file, or convert it."
    )


def _check_fields(header: nib.Nifti1Header, path: Path) -> None:
    """Refuse illegal values that nibabel's own check does not look at."""
    axes = int(header["dim"][0])
    if not 1 <= axes <= 7:
        raise _illegal(path, "dim[0]", axes, "1 to 7 axes")
    sizes = [int(size) for size in header["dim"][1 : axes + 1]]
    if min(sizes) < 0 and sizes[:3] != [-1, 1, 1]:  # how FreeSurfer marks surfaces
        raise _illegal(path, "dim", sizes, "whole numbers from 1 up")
    offset = float(header["vox_offset"])
    if not 0 <= offset <= _LARGEST_OFFSET or offset % 1:
        raise _illegal(path, "vox_offset", offset, "the byte at which the voxels start")
    if not np.isfinite(header["pixdim"][: axes + 1][:4]).all():
        raise _illegal(path, "pixdim", header["pixdim"][:4].tolist(), "finite distances in mm")


def _illegal(path: Path, key: str, found: object, legal: str) -> ScanError:
    return ScanError(
        f"{path}: the NIfTI header's {key} is {found}. Legal: {legal}. The file is damaged: copy "
        "it again, or write it again with the program that made it."
    )


def _checked_dtype(header: nib.Nifti1Header, path: Path) -> np.dtype:
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        label = header["datatype"].item()
        kind = "colour (RGB)" if dtype.names else str(dtype)
        raise not_real(str(path), f"{kind}, NIfTI datatype {label}")
    return dtype


def _scaling(header: nib.Nifti1Header, path: Path) -> tuple[float, float]:
    """Return slope and intercept of the values; a slope of 0 or NaN stands for no scaling."""
    found = float(header["scl_slope"])
    try:
        if math.isinf(found):
            raise HeaderDataError(f"scl_slope is {found}")
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise ScanError(
            f"{path}: the header cannot be used ({error}). Legal: a finite scaling, or slope 0 for "
            "none. Write the file again with the program that made it."
        ) from error
    return (1.0, 0.0) if slope is None else (float(slope), float(intercept))


def _start(header: nib.Nifti1Header, path: Path) -> int:
    """Return the byte at which the voxels start; warn if the header does not say it."""
    first = int(header.single_vox_offset)
    if int(header["vox_offset"]) == 0:
        others = "ITK reads from byte 348, nibabel" if first == 352 else "nibabel reads"
        tell(
            f"{path}: vox_offset is 0, so the header does not say where the voxels start. They are "
            f"read from byte {first}, the first that the standard allows; {others} from byte 0, so "
            "that they see other voxels. Write the file again with the program that made it."
        )
    return max(int(header["vox_offset"]), first)


def _in_mm(affine: Affine, header: nib.Nifti1Header, path: Path) -> Affine:
    code = int(header["xyzt_units"]) & 7
    if code not in _MM_PER_UNIT:
        return affine
    unit, factor = _MM_PER_UNIT[code]
    tell(
        f"{path}: the header measures in {unit}, so the affine was multiplied by {factor:g} to "
        "become mm, as ITK and Slicer do; other programs ignore the unit. If the scan is in mm "
        "after all, correct xyzt_units in the file."
    )
    return np.diag([factor, factor, factor, 1.0]) @ affine
