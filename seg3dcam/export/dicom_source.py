"""The series that DICOM objects are made of: what is asked of it, and what is carried over.

Values of a real or anonymised header may be unusual or missing. So highdicom is shown copies of the
headers that hold only what it needs, and patient and study are then copied as they are.
"""

from __future__ import annotations

import re
import uuid
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from seg3dcam.errors import ConfigError, MissingExtraError
from seg3dcam.explaining.explanation import Explanation
from seg3dcam.files import atomic
from seg3dcam.review.pictures.text import clean_text

_UTF8 = "ISO_IR 192"

#: Without these nothing can refer to a slice.
_NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID")

#: Patient, study and part of the body.
_CARRIED = (
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "PatientSpeciesDescription",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "StudyInstanceUID",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "StudyDescription",
    "AccessionNumber",
    "ReferringPhysicianName",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "ClinicalTrialSponsorName",
    "ClinicalTrialProtocolID",
    "ClinicalTrialProtocolName",
    "ClinicalTrialSiteID",
    "ClinicalTrialSiteName",
    "ClinicalTrialSubjectID",
    "ClinicalTrialSubjectReadingID",
    "BodyPartExamined",
    "Laterality",
)
#: What highdicom reads of every slice.
_OF_SLICE = (*_NEEDED, "Modality", "Rows", "Columns", "ImagePositionPatient")
#: What it must find, but is carried over later.
_OF_PATIENT = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
)


def checked_series(explanation: Explanation) -> Sequence[Any]:
    """Return the source's headers, one per slice; ConfigError where nothing can refer to them."""
    headers, shape = explanation.scan.series, tuple(explanation.scan.shape)
    if headers is None:
        raise ConfigError(
            "DICOM objects refer to the slices they were made of, so the scan must be a DICOM "
            "series: load_scan('folder with the slices'). For other scans leave the format 'dicom' "
            "out."
        )
    grids = {(int(header.Columns), int(header.Rows), len(headers)) for header in headers}
    if grids != {shape}:
        raise ConfigError(
            f"the scan has {shape} voxels, but its DICOM series {sorted(grids)} (columns, rows, "
            "slices). DICOM objects need the scan as it was loaded, neither cropped nor turned."
        )
    missing = [name for name in _NEEDED if not all(header.get(name) for header in headers)]
    if missing:
        raise ConfigError(
            f"the DICOM series has no {', '.join(missing)}, so nothing can refer to its slices. "
            "Anonymise it again so that UIDs are replaced, not removed."
        )
    return headers


def references(headers: Sequence[Any], step_mm: float) -> list[Any]:
    """Return what highdicom needs of each slice, and nothing else of it."""
    from pydicom.dataset import Dataset

    first = headers[0]
    frame = first.get("FrameOfReferenceUID") or make_uid(first.SeriesInstanceUID, "frame")
    found = []
    for header in headers:
        source = Dataset()
        for name in _OF_SLICE:
            if name in header:
                source[name] = header[name]
        for name in _OF_PATIENT:
            setattr(source, name, None)
        source.ImageOrientationPatient = first.ImageOrientationPatient
        source.PixelSpacing = first.PixelSpacing
        source.SliceThickness = first.get("SliceThickness") or decimals([step_mm])[0]
        source.FrameOfReferenceUID = frame
        source.PositionReferenceIndicator = first.get("PositionReferenceIndicator")
        found.append(source)
    return found


def names_patient(text: str, header: Any) -> bool:
    """Tell whether a text holds the patient's ID, or a part of the patient's name."""
    given = f"{header.get('PatientID') or ''} {header.get('PatientName') or ''}"
    words = re.split(r"[\s^=]+", given.casefold())
    return any(len(word) > 1 and word in text.casefold() for word in words)


def source_item(header: Any) -> Any:
    """Return the item of a Source Image Sequence that names a slice."""
    from highdicom.sr import CodedConcept
    from pydicom.dataset import Dataset
    from pydicom.sr.codedict import codes

    item = Dataset()
    item.ReferencedSOPClassUID = header.SOPClassUID
    item.ReferencedSOPInstanceUID = header.SOPInstanceUID
    purpose = codes.DCM.SourceImageForImageProcessingOperation
    item.PurposeOfReferenceCodeSequence = [CodedConcept.from_code(purpose)]
    return item


def save_object(image: Any, header: Any, path: Path) -> Path:
    """Write an object with the patient and the study of a source header, in UTF-8."""
    image.SpecificCharacterSet = _UTF8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a value that pydicom finds odd is carried over as it is
        for name in _CARRIED:
            if name in header:
                image[name] = _copy(header[name])
    if image.Modality != "SEG" and not ("BodyPartExamined" in image or "Laterality" in image):
        image.Laterality = ""  # unknown, as is whether the part of the body is one of a pair
    with atomic(path) as temporary:
        image.save_as(temporary, enforce_file_format=True)
    return path


def _copy(element: Any) -> Any:
    """Return an element without the bytes that it was read from, which may not be UTF-8."""
    from pydicom import config
    from pydicom.dataelem import DataElement

    value = str(element.value) if element.VR == "PN" and element.VM == 1 else element.value
    return DataElement(element.tag, element.VR, value, validation_mode=config.IGNORE)


# ---------------------------------------------------------------------------------------- values


def make_uid(*parts: object) -> str:
    """Return a UID made of a UUID; the same parts give the same one.

    >>> make_uid("a", 1) == make_uid("a", 1) != make_uid("a", 2)
    True
    """
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, ' '.join(map(str, parts))).int}"


def one_line(text: str, length: int = 64) -> str:
    r"""Make a text one that DICOM takes: one line, no backslash, at most `length` bytes of UTF-8.

    The standard counts characters, many programs bytes.

    >>> one_line("left\\right\nkidney"), one_line("a long name", 9)
    ('left/right kidney', 'a long…')
    """
    line = clean_text(text).replace("\\", "/")
    if len(line.encode()) <= length:
        return line
    return line.encode()[: length - len("…".encode())].decode(errors="ignore").rstrip() + "…"


def decimals(values: Iterable[float]) -> list[Any]:
    """Return numbers as DICOM writes them, with all the digits that fit into 16 characters."""
    from pydicom.valuerep import DS

    return [DS(float(value), auto_format=True) for value in values]


def check_installed() -> None:
    """Raise MissingExtraError where highdicom is not installed."""
    try:
        import highdicom  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "DICOM is written with highdicom, which is not installed. "
            'Run: pip install "seg3dcam[dicom]"'
        ) from error
