"""The source series of DICOM objects: which elements are required, and which are copied.

In real or anonymised headers, values may be unusual or missing. So highdicom gets copies of the
headers with only those elements that it needs. The elements about patient and study are copied
afterwards, as they are.
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

#: Elements without which nothing can refer to a slice.
_NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID")

#: Elements about the patient, the study and the part of the body, which are copied.
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
#: Elements of a slice that highdicom reads.
_OF_SLICE = (*_NEEDED, "Modality", "Rows", "Columns", "ImagePositionPatient")
#: Elements that highdicom requires; they are copied from the source later.
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
    """Return the headers of the slices; raise ConfigError if nothing can refer to them."""
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
    """Return, for each slice, a header with nothing but the elements that highdicom needs."""
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
    """Return an item of a Source Image Sequence that refers to a slice."""
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
    """Write an object, in UTF-8, with the elements of patient and study of a source header."""
    image.SpecificCharacterSet = _UTF8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # values that pydicom finds unusual are copied, too
        for name in _CARRIED:
            if name in header:
                image[name] = _copy(header[name])
    if image.Modality != "SEG" and not ("BodyPartExamined" in image or "Laterality" in image):
        image.Laterality = ""  # not known
    with atomic(path) as temporary:
        image.save_as(temporary, enforce_file_format=True)
    return path


def _copy(element: Any) -> Any:
    """Return a copy of an element without the bytes of the file, which may not be UTF-8."""
    from pydicom import config
    from pydicom.dataelem import DataElement

    value = str(element.value) if element.VR == "PN" and element.VM == 1 else element.value
    return DataElement(element.tag, element.VR, value, validation_mode=config.IGNORE)


# ---------------------------------------------------------------------------------------- values


def make_uid(*parts: object) -> str:
    """Return a UID made from a UUID; the same parts always give the same UID.

    >>> make_uid("a", 1) == make_uid("a", 1) != make_uid("a", 2)
    True
    """
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, ' '.join(map(str, parts))).int}"


def one_line(text: str, length: int = 64) -> str:
    r"""Make a text legal in DICOM: one line, no backslash, at most `length` bytes of UTF-8.

    The standard counts characters, but many programs count bytes.

    >>> one_line("left\\right\nkidney"), one_line("a long name", 9)
    ('left/right kidney', 'a long…')
    """
    line = clean_text(text).replace("\\", "/")
    if len(line.encode()) <= length:
        return line
    return line.encode()[: length - len("…".encode())].decode(errors="ignore").rstrip() + "…"


def decimals(values: Iterable[float]) -> list[Any]:
    """Return numbers as DICOM's decimal strings, with as many digits as 16 characters allow."""
    from pydicom.valuerep import DS

    return [DS(float(value), auto_format=True) for value in values]


def check_installed() -> None:
    """Raise MissingExtraError if highdicom is not installed."""
    try:
        import highdicom  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "DICOM is written with highdicom, which is not installed. "
            'Run: pip install "seg3dcam[dicom]"'
        ) from error
