"""Read single files of a DICOM series: the header, the place in the patient, and the voxels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from seg3dcam.errors import MissingExtraError, ScanError
from seg3dcam.files.series.elements import element, numbers

__all__ = ["Slice", "check_pixels", "is_dicom", "read_header", "read_headers", "read_pixels"]

Array = npt.NDArray[np.float64]

#: Files whose names end like this should be DICOM.
_SUFFIXES = (".dcm", ".dicom", ".ima")
_DICOMDIR = "1.2.840.10008.1.3.10"
#: No compression makes a slice more than this many times smaller.
_BEST_RATIO = 5000


@dataclass(frozen=True, eq=False)
class Slice:
    """The header of one file, and numbers taken from it, which are NaN if the header lacks them.

    Attributes:
        path: the file.
        header: its pydicom dataset, without pixels.
        pixel_bytes: how many bytes of the file come after the header.
        position: (3,) centre of the first voxel, in LPS mm.
        directions: (2, 3) unit vectors along a row and down a column, in LPS.
        steps: (2,) distances from column to column and from row to row, in mm.
    """

    path: Path
    header: Any
    pixel_bytes: int
    position: Array
    directions: Array
    steps: Array

    def value(self, keyword: str) -> Any:
        """Return an element of the header; see `element`."""
        return element(self.header, keyword, self.path)

    @property
    def is_image(self) -> bool:
        """Whether the file holds an image."""
        return self.value("Rows") is not None and self.value("Columns") is not None

    @property
    def size(self) -> tuple[int, int]:
        """Number of columns and of rows."""
        return self.value("Columns"), self.value("Rows")

    @property
    def frames(self) -> int:
        """Number of images in the file."""
        return self.value("NumberOfFrames") or 1

    @property
    def is_localizer(self) -> bool:
        """Whether it is a scout, which only shows where the slices of other series lie."""
        return "LOCALIZER" in (self.value("ImageType") or ())


def is_dicom(path: Path) -> bool:
    """Tell whether a file is a DICOM file, by its content."""
    try:
        if not path.is_file():  # opening a pipe might wait for ever
            return False
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except (OSError, ValueError):  # whoever reads the file gets the error
        return False


# -------------------------------------------------------------------------------------- headers


def read_headers(source: Path | Sequence[Path]) -> list[Slice]:
    """Read the headers of a list of DICOM files, or of those in a folder except a DICOMDIR.

    Raises:
        ScanError: a file is damaged; a file in the folder has a name as of DICOM, but is none; or
            the folder holds no DICOM image.
    """
    if not isinstance(source, Path):
        return [read_header(path) for path in source]
    files, folders = _content(source)
    dicom = [path for path in files if is_dicom(path)]
    for path in files:
        if path.suffix.lower() in _SUFFIXES and path not in dicom:
            raise _damaged(path, "it does not start as a DICOM file does")
    found = [read_header(path) for path in dicom]
    found = [one for one in found if one.value("SOPClassUID") != _DICOMDIR]
    if not found:
        raise ScanError(
            f"{source} is a folder. Legal: one .nii or .nii.gz file, a list of them, one per "
            "channel, or a folder that holds one DICOM series. This one holds no DICOM image, "
            f"{len(files)} other files and {folders} folders: give the folder that the slices are "
            "in, name the NIfTI files, or convert the scan to NIfTI (dcm2niix)."
        )
    return found


def _content(folder: Path) -> tuple[list[Path], int]:
    """Return the files in a folder that are not hidden, and the number of folders in it."""
    try:
        found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise ScanError(
            f"{folder}: the folder cannot be read ({error.strerror or error}). Check its "
            "permissions and the disk."
        ) from error
    return [path for path in found if path.is_file()], sum(path.is_dir() for path in found)


def read_header(path: Path) -> Slice:
    """Read a file's header; raise ScanError if it is damaged."""
    pydicom = _pydicom()
    try:
        # pydicom warns of unusual values, which do not matter unless they are needed.
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(file, stop_before_pixels=True)
            found = Slice(
                path=path,
                header=header,
                pixel_bytes=os.fstat(file.fileno()).st_size - file.tell(),
                position=numbers(header, "ImagePositionPatient", 3),
                directions=numbers(header, "ImageOrientationPatient", 6).reshape(2, 3),
                steps=numbers(header, "PixelSpacing", 2)[::-1],  # DICOM gives rows first
            )
            kind = found.value("SOPClassUID")
            kind = kind or element(header.file_meta, "MediaStorageSOPClassUID", path)
            ended = kind is None or (
                "Image Storage" in pydicom.uid.UID(kind).name and not found.is_image
            )
    except ScanError:
        raise
    except Exception as error:  # pydicom's parser may raise anything
        raise _damaged(path, str(error) or type(error).__name__) from error
    if ended:
        raise _damaged(path, "its header ends early")
    return found


# --------------------------------------------------------------------------------------- voxels


def check_pixels(image: Slice) -> None:
    """Raise ScanError for colour, for values scaled by a table, and if voxels are missing."""
    photometric, samples = image.value("PhotometricInterpretation"), image.value("SamplesPerPixel")
    samples = samples or 1
    if photometric != "MONOCHROME2" or samples != 1:
        raise ScanError(
            f"{image.path}: the picture is {photometric}, {samples} sample(s) per pixel. Legal: "
            "MONOCHROME2, grey from dark to bright. Give the original slices, not screenshots or "
            "colour maps."
        )
    if "ModalityLUTSequence" in image.header:
        raise ScanError(
            f"{image.path}: the voxels are scaled by a lookup table (Modality LUT). Legal: Rescale "
            "Slope and Intercept, or none. Convert the series with the program that made it."
        )
    for keyword in ("RescaleSlope", "RescaleIntercept"):
        image.value(keyword)
    columns, rows = image.size
    plain = columns * rows * (image.value("BitsAllocated") or 16) // 8
    wanted = max(plain // _BEST_RATIO, 1) if _is_compressed(image) else plain
    if image.pixel_bytes < wanted:
        raise _damaged(
            image.path,
            f"it is cut short: {max(image.pixel_bytes, 0)} of {wanted} bytes of voxels are there",
        )


def _is_compressed(image: Slice) -> bool:
    name = element(image.header.file_meta, "TransferSyntaxUID", image.path)
    if name is None:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        syntax = _pydicom().uid.UID(name)
    if not syntax.is_transfer_syntax:
        raise ScanError(
            f"{image.path}: the DICOM element TransferSyntaxUID is {name}. Legal: a transfer "
            "syntax that DICOM knows. Export the series again from the archive, uncompressed."
        )
    return bool(syntax.is_compressed or syntax.is_deflated)


def read_pixels(image: Slice) -> npt.NDArray[np.float32]:
    """Read the voxels (rows, columns), scaled by the file's own slope and intercept."""
    simple_itk = _simple_itk()
    columns, rows = image.size
    try:
        found = simple_itk.ReadImage(os.fspath(image.path), imageIO="GDCMImageIO")
        plane = simple_itk.GetArrayViewFromImage(found).reshape(rows, columns)
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise ScanError(
            f"{image.path}: the voxels cannot be decoded. The file is damaged, or compressed in a "
            "way that SimpleITK does not know: copy or export it again, uncompressed."
        ) from error
    with np.errstate(over="ignore"):  # the check of the voxels refuses infinity
        return plane.astype(np.float32)


# --------------------------------------------------------------------------------- what goes wrong


def _damaged(path: Path, found: str) -> ScanError:
    return ScanError(
        f"{path}: the DICOM file is damaged: {found}. Copy or export it again; without it the "
        "series has a gap."
    )


def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise _missing("pydicom") from error
    return pydicom


def _simple_itk() -> Any:
    try:
        import SimpleITK
    except ImportError as error:
        raise _missing("SimpleITK") from error
    return SimpleITK


def _missing(package: str) -> MissingExtraError:
    return MissingExtraError(
        f"DICOM is read with pydicom and SimpleITK, and {package} is not installed. "
        'Run: pip install "seg3dcam[dicom]"'
    )
