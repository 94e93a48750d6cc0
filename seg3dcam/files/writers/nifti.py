"""Write a map or a label volume as a NIfTI-1 file that lies exactly on its scan.

    write_nifti("cam.nii.gz", cam, scan.affine, reference=scan.header)

nibabel makes the header. The voxels are written here, slab by slab, since nibabel would need a
second copy of the volume.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from nibabel.spatialimages import HeaderDataError

from seg3dcam.errors import OutputError, tell
from seg3dcam.files.readers.frames import FRAMES, Frame, agree, form_of, is_sheared
from seg3dcam.files.writers.volumes import (
    as_stored,
    check_suffix,
    checked_volume,
    gzipped,
    slabs,
)
from seg3dcam.files.writing import as_path, atomic
from seg3dcam.geometry import checked_affine, corner_gap, same_grid

__all__ = ["write_nifti"]

_SCANNER = 1  # NIfTI's code for "mm in the scanner's own axes"
_INTENT_NONE, _INTENT_LABEL = 0, 1002
_MM = 2
RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])  # NIfTI's RGB24
_QFORM = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
_SFORM = ("srow_x", "srow_y", "srow_z")


def write_nifti(
    path: str | os.PathLike[str],
    volume: npt.NDArray | torch.Tensor,
    affine: npt.ArrayLike,
    *,
    reference: nib.Nifti1Header | None = None,
    intent_name: str = "",
    description: str = "",
    display_range: tuple[float, float] | None = (0, 1),
    dtype: npt.DTypeLike = np.float32,
) -> Path:
    """Write a volume (X, Y, Z) as `.nii` or `.nii.gz`, completely or not at all.

    - `affine`: (4, 4) voxel -> RAS mm, stored in float32 as NIfTI-1 does.
    - `reference`: the header of the scan that the volume belongs to. If the volume has the same
      grid (within 0.001 mm), qform and sform are copied bit by bit, so that every program puts the
      volume where it puts the scan. On another grid only the codes are taken over. A form that is
      missing (code 0), or that gives another place than `affine`, is filled from the affine. It
      gets the code of the other form, or 1 (scanner) if both are missing.
    - `intent_name`, `description`: plain ASCII, at most 15 and 79 characters. The rest is cut off,
      accents are dropped, and other characters become "?".
    - `display_range`: the values that viewers show as black and white; with None, or for labels,
      the file says none.
    - `dtype`: float32 for maps, whose values are kept, including NaN and infinity. An integer type
      makes a label volume (intent 1002), in which every value must be a whole number that fits.

    Whatever the volume's size, about 16 MB of extra memory are needed. The same input gives the
    same bytes.

    Raises `OutputError` for another suffix, shape, affine or dtype, for an axis of more than 32767
    voxels, for values that do not fit, and where the file cannot be written. Warns
    (`Seg3dcamWarning`) where a sheared affine (gantry tilt) makes the qform approximate.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = write_nifti(f"{folder}/cam.nii.gz", np.ones((4, 5, 6)), np.diag([1, 1, 3, 1]))
    ...     nib.load(path).header.get_zooms()[2].item()
    3.0
    """
    path = as_path(path)
    volume = checked_volume(volume, path)
    header = placed_header(path, volume.shape, dtype, affine, reference)
    is_label = header.get_data_dtype().kind in "iu"
    header["intent_code"] = _INTENT_LABEL if is_label else _INTENT_NONE
    header["intent_name"] = _ascii(intent_name, 15)  # C programs want the last byte to be 0
    header["descrip"] = _ascii(description, 79)
    if display_range is not None and not is_label:
        header["cal_min"], header["cal_max"] = display_range
    return write_slabs(
        path, header, (as_stored(slab, header.get_data_dtype(), path) for slab in slabs(volume))
    )


def placed_header(
    path: Path,
    shape: Sequence[int],
    dtype: npt.DTypeLike,
    affine: npt.ArrayLike,
    reference: nib.Nifti1Header | None,
) -> nib.Nifti1Header:
    """Make the header of a volume whose place is given by `affine` and `reference`."""
    check_suffix(path, "NIfTI", ".nii", ".nii.gz")
    header = _header(path, tuple(shape), dtype)
    _set_forms(header, checked_affine(affine, str(path), OutputError), reference, path)
    return header


def write_slabs(path: Path, header: nib.Nifti1Header, voxels: Iterable[bytes | memoryview]) -> Path:
    """Write a header, and the voxels piece by piece in the order of the file."""
    with atomic(path) as temporary, temporary.open("wb") as file:
        zipped = path.name.lower().endswith(".gz")
        with gzipped(file) if zipped else nullcontext(file) as stream:
            stream.write(header.binaryblock)
            stream.write(b"\0\0\0\0")  # no extensions
            for piece in voxels:
                stream.write(piece)
    return path


def _header(path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike) -> nib.Nifti1Header:
    header = nib.Nifti1Header(endianness="<")
    header.set_data_shape(shape)
    kind = np.dtype(dtype)
    try:
        if kind.kind not in "iuf" and kind != RGB:
            raise HeaderDataError
        header.set_data_dtype(kind)
    except HeaderDataError:
        raise OutputError(
            f"{path}: dtype {kind} cannot be written. Legal: float32, float64, and for labels "
            "uint8, int8, uint16, int16, uint32, int32, uint64, int64."
        ) from None
    header["vox_offset"] = header.single_vox_offset
    header["xyzt_units"] = _MM
    header.set_slope_inter(1, 0)
    return header


# ------------------------------------------------------------------------------------- geometry


def _set_forms(
    header: nib.Nifti1Header,
    affine: npt.NDArray[np.float64],
    reference: nib.Nifti1Header | None,
    path: Path,
) -> None:
    """Fill both forms: ITK refuses a file that has only a sheared sform."""
    codes = {f: 0 if reference is None else int(reference[f"{f}_code"]) for f in FRAMES}
    kept = _forms_to_keep(header, affine, reference)
    if kept:  # the code of a form that gives another place is not used
        codes = {form: codes[form] if form in kept else 0 for form in FRAMES}
    any_code = codes["qform"] or codes["sform"] or _SCANNER
    if reference is not None and "qform" in kept:
        _copy(_QFORM, reference, header)
        header["pixdim"][:4] = reference["pixdim"][:4]  # spacing and handedness of the qform
        header["qform_code"] = codes["qform"]
    else:
        header.set_qform(affine, code=codes["qform"] or any_code)
        _warn_of_shear(header, affine, path)
    if reference is not None and "sform" in kept:
        _copy(_SFORM, reference, header)
        header["sform_code"] = codes["sform"]
    else:
        header.set_sform(affine, code=codes["sform"] or any_code)


def _forms_to_keep(
    header: nib.Nifti1Header,
    affine: npt.NDArray[np.float64],
    reference: nib.Nifti1Header | None,
) -> set[Frame]:
    """Return the forms of the reference that give the same place as the affine.

    Only these may be copied. If the two forms of a scan differ, one of them was chosen as its
    place. A copy of the other would put the volume elsewhere in the programs that read that form.
    """
    shape = header.get_data_shape()
    if reference is None or tuple(reference.get_data_shape()[:3]) != shape:
        return set()
    # The reference's unit is ignored, so that forms in metres are not copied into a file in mm.
    there = [form for form in FRAMES if int(reference[f"{form}_code"]) > 0]
    forms = {form: form_of(reference, form) for form in there}
    places = {form: place for form, place in forms.items() if place is not None}
    if not any(same_grid(place, affine, shape) for place in places.values()):
        return set()
    pairs = {form: (place, affine) for form, place in places.items()}
    if "qform" in places:
        pairs["qform"] = (affine, places["qform"])
    return {form for form, (sform, qform) in pairs.items() if agree(sform, qform, shape)}


def _copy(fields: tuple[str, ...], source: nib.Nifti1Header, target: nib.Nifti1Header) -> None:
    for field in fields:
        target[field] = source[field]


def _warn_of_shear(header: nib.Nifti1Header, affine: npt.NDArray[np.float64], path: Path) -> None:
    if is_sheared(affine):
        gap = corner_gap(header.get_qform(), affine, header.get_data_shape())
        tell(
            f"{path}: the affine is sheared (gantry tilt?), which a qform cannot say. The sform "
            f"is exact; programs that read the qform (ITK, 3D Slicer) place voxels up to "
            f"{gap:.3g} mm off. Resample the scan onto a grid without shear if that matters."
        )


# ----------------------------------------------------------------------------------------- text


def _ascii(text: str, length: int) -> bytes:
    """Return a text as at most `length` printable ASCII bytes.

    >>> _ascii("Läsion der Leber", 9), _ascii("肝臓", 9)
    (b'Lasion de', b'??')
    """
    apart = unicodedata.normalize("NFKD", text)
    letters = (letter for letter in apart if not unicodedata.combining(letter))
    plain = "".join(letter if letter.isprintable() else " " for letter in letters)
    return plain.encode("ascii", errors="replace")[:length]
