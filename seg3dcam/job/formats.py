"""The formats of a case, in a table: one line says how a format is written and which files it has.

Writers stand here by their names in `seg3dcam.job.writers`, so that nothing here imports PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from seg3dcam.errors import ConfigError

if TYPE_CHECKING:
    from seg3dcam.scan import Scan


def check_formats(scan: Scan, names: Iterable[str]) -> None:
    """Raise ConfigError early where a format cannot be written for this scan."""
    for name in names:
        if (check := FORMATS[name].check) is not None:
            check(scan)


def _check_series(scan: Scan) -> None:
    if scan.series is None:
        raise ConfigError(
            "format dicom: its objects belong to a patient and a study, which only a DICOM series "
            "names: give the series' folder as the scan, or leave this format out"
        )


@dataclass(frozen=True)
class Format:
    """How a format is written.

    Attributes:
        writer: its function in `seg3dcam.job.writers`, called by `write_format`, or by
            `joint_writer` where it is joint.
        files: patterns of the files in the case's folder; * is a target, a layer or a class.
        joint: its files show all explanations together; otherwise each explanation has its own.
        by_default: it is written where a job names no format.
        check: raises ConfigError where it cannot be written for a scan.
        size: bytes for each voxel of the scan and each explanation, as an estimate.
        fixed: bytes of its files however small the scan is.
    """

    writer: str
    files: tuple[str, ...]
    joint: bool = False
    by_default: bool = False
    check: Callable[[Scan], None] | None = None
    size: float = 1.0
    fixed: int = 0


_NIFTI = ("prediction*.nii.gz", "cam_*.nii.gz", "raw_*.nii.gz", "region_*.nii.gz", "truth_*.nii.gz")
_PNG = ("slices/*/*.png", "montage_*.png", "planes_*.png", "profile_*.png")

#: Format -> how it is written.
FORMATS = {
    "nifti": Format("write_nifti_files", _NIFTI, by_default=True, size=2),
    "png": Format("write_png", _PNG, by_default=True, size=0.6),
    "html": Format(
        "start_report", ("report.html",), joint=True, by_default=True, size=0.2, fixed=95_000
    ),
    "slicer": Format("start_scene", ("slicer/*",), joint=True, by_default=True, size=1.7),
    "cine": Format("write_film", ("cine_*.webp",), size=0.5),
    "thumb": Format("write_thumbnail", ("thumb_*.webp",), size=0, fixed=20_000),
    "probability": Format("start_probability", ("probability_*.nii.gz",), joint=True, size=1.0),
    "nrrd": Format("write_nrrd_file", ("cam_*.nrrd",), size=0.7),
    "fused": Format("write_fused_file", ("fused_*.nii.gz",), size=0.4),
    "dicom": Format("start_dicom", ("dicom/*",), joint=True, check=_check_series, size=8),
}
