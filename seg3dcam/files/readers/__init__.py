"""Read files that hold a volume: first the header, then the voxels.

    plan = plan_file(Path("ct.nii.gz"))      # reads the header, and refuses a file that is wrong
    plan.affine                              # (4, 4) voxel -> RAS mm
    read_voxels(plan, out)                   # into (C, X, Y, Z) float32, slab by slab

One module per format turns a header into a `Plan`; all formats share the reading of the voxels.
Headers of NRRD and MetaImage are read here and not by ITK. ITK ends the whole process at some
damaged headers, needs memory for a volume twice, and does not tell if a header lacks the place.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from seg3dcam.errors import ScanError
from seg3dcam.files.readers.frames import FRAMES, Frame
from seg3dcam.files.readers.metaimage import plan_meta
from seg3dcam.files.readers.mgh import plan_mgh
from seg3dcam.files.readers.nifti import plan_nifti
from seg3dcam.files.readers.nrrd import plan_nrrd
from seg3dcam.files.readers.plan import Plan, check_file, check_length, read_voxels, reading
from seg3dcam.files.remote import Place

__all__ = ["FRAMES", "READABLE", "Frame", "Plan", "plan_file", "read_voxels", "stem"]

#: The endings of readable files, for messages.
READABLE = ".nii, .nii.gz, .nrrd, .nhdr, .mha, .mhd, .mgh, .mgz"

_NIFTI = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
_OTHERS: dict[str, Callable[[Path], Plan]] = {
    ".nrrd": plan_nrrd,
    ".nhdr": plan_nrrd,
    ".mha": plan_meta,
    ".mhd": plan_meta,
    ".mgh": plan_mgh,
    ".mgz": plan_mgh,
}
#: Ending of files that are often given and cannot be read -> why, and what to do instead.
_ADVICE = {
    ".hdr": "An Analyze or NIfTI pair (.hdr and .img) does not say for certain where left is. "
    "Convert it to one NIfTI file with the program that made it.",
    ".dcm": "A DICOM slice is read with its series: give the folder.",
    ".gz": "If it is a NIfTI file, call it .nii.gz.",
    ".seg": "Convert it to NIfTI.",
}
_ADVICE[".img"] = _ADVICE[".hdr"]
_ADVICE[".dicom"] = _ADVICE[".ima"] = _ADVICE[".dcm"]


def plan_file(path: Path, frame: Frame | None = None, *, must: bool = True) -> Plan:
    """Read a file's header, with the reader of the format that its suffix stands for.

    - `frame`: which of the two forms of a NIfTI header is taken; None chooses as nibabel does.
    - `must`: whether a file that lacks that form is refused. If not, the place that it has is
      taken.

    Raises `ScanError` for a file that is missing or cannot be used.
    """
    check_file(path)
    if _NIFTI.search(path.name):
        with reading(path, "NIfTI file"):
            plan = plan_nifti(path, frame, must=must)
    else:
        plan = _other(path, frame if must else None)
    check_length(plan)
    return plan


def stem(path: Place) -> str:
    """Return a file's name without the suffix of its format.

    >>> stem(Path("a.b.nii.gz")), stem(Path("masks.seg.nrrd")), stem(Path("case"))
    ('a.b', 'masks', 'case')
    """
    if _NIFTI.search(path.name):
        return _NIFTI.sub("", path.name)
    if path.suffix.lower() in _OTHERS:
        return re.sub(r"\.seg$", "", path.stem, flags=re.IGNORECASE)
    return path.name


def _other(path: Path, frame: Frame | None) -> Plan:
    suffix = path.suffix.lower()
    if suffix not in _OTHERS:
        advice = _ADVICE.get(suffix, "Convert the scan to NIfTI (dcm2niix for DICOM, SimpleITK).")
        raise ScanError(f"{path}: the name ends with {path.suffix!r}. Legal: {READABLE}. {advice}")
    if frame is not None:
        raise ScanError(
            f"{path}: frame {frame!r} chooses between the two forms of a NIfTI header, and this "
            f"{suffix} file has one place alone. Leave frame out."
        )
    with reading(path, f"{suffix} file"):
        return _OTHERS[suffix](path)
