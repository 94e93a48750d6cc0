"""DICOM series made of a volume and its affine, as scanners write them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

SOP_CLASSES = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
}

#: What the standard asks of each modality beyond a plain image.
MODALITY_FIELDS: dict[str, dict[str, Any]] = {
    "CT": {"KVP": "120", "AcquisitionNumber": "1", "RescaleType": "HU"},
    "MR": {
        "ScanningSequence": "SE",
        "SequenceVariant": "NONE",
        "ScanOptions": "",
        "MRAcquisitionType": "2D",
        "EchoTime": "90",
        "EchoTrainLength": "1",
        "RepetitionTime": "4000",
    },
    "PT": {
        "Units": "BQML",
        "CountsSource": "EMISSION",
        "SeriesType": ["STATIC", "IMAGE"],
        "CorrectedImage": ["DECY", "ATTN"],
        "DecayCorrection": "START",
        "CollimatorType": "NONE",
        "FrameReferenceTime": "1000",
        "RadiopharmaceuticalInformationSequence": [],
        "ActualFrameDuration": "60000",
        "DecayFactor": "1",
        "PatientOrientationCodeSequence": [],
        "PatientGantryRelationshipCodeSequence": [],
    },
}


def make_headers(
    shape: tuple[int, int, int],
    affine: NDArray[np.float64],
    modality: str = "CT",
    patient: str = "Müller^Zoë",
    seed: str = "series",
) -> list[Dataset]:
    """Return one dataset per slice, without pixels; slices lie along the last axis.

    Args:
        shape: columns, rows, slices.
        affine: (4, 4) voxel -> RAS mm.
        seed: another series has other UIDs.
    """
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    columns, rows, slices = shape
    steps = np.linalg.norm(lps[:3, :3], axis=0)
    headers = []
    for k in range(slices):
        header = Dataset()
        header.SpecificCharacterSet = "ISO_IR 100"
        header.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL" if modality == "CT" else "OTHER"]
        if modality == "PT":
            header.ImageType = ["ORIGINAL", "PRIMARY"]
        header.SOPClassUID = SOP_CLASSES[modality]
        header.SOPInstanceUID = generate_uid(entropy_srcs=[seed, str(k)])
        header.StudyDate = header.SeriesDate = header.AcquisitionDate = "20240102"
        header.ContentDate = "20240102"
        header.StudyTime = header.SeriesTime = header.AcquisitionTime = "030405"
        header.ContentTime = "030405"
        header.AccessionNumber = "A1"
        header.Modality = modality
        header.Manufacturer = "Scanner"
        header.ReferringPhysicianName = ""
        header.SeriesDescription = "thin"
        header.PatientName = patient
        header.PatientID = "P-1"
        header.PatientBirthDate = "19700101"
        header.PatientSex = "F"
        header.BodyPartExamined = "CHEST"
        header.SliceThickness = f"{steps[2]:.6g}"
        header.PatientPosition = "HFS"
        header.StudyInstanceUID = generate_uid(entropy_srcs=["study"])
        header.SeriesInstanceUID = generate_uid(entropy_srcs=[seed])
        header.StudyID = "1"
        header.SeriesNumber = "3"
        header.InstanceNumber = str((7 * k) % slices + 1)  # no order, as in an anonymised export
        header.ImagePositionPatient = [f"{x:.10g}"[:16] for x in (lps @ [0, 0, k, 1])[:3]]
        header.ImageOrientationPatient = [
            f"{x:.12f}" for x in (*lps[:3, 0] / steps[0], *lps[:3, 1] / steps[1])
        ]
        header.FrameOfReferenceUID = generate_uid(entropy_srcs=["frame"])
        header.PositionReferenceIndicator = ""
        header.SamplesPerPixel = 1
        header.PhotometricInterpretation = "MONOCHROME2"
        header.Rows, header.Columns = rows, columns
        header.PixelSpacing = [f"{steps[1]:.10g}", f"{steps[0]:.10g}"]
        header.BitsAllocated = header.BitsStored = 16
        header.HighBit = 15
        header.PixelRepresentation = 1
        header.RescaleIntercept, header.RescaleSlope = "0", "1"
        for name, value in MODALITY_FIELDS[modality].items():
            setattr(header, name, value)
        if modality == "PT":
            header.NumberOfSlices, header.ImageIndex = slices, k + 1
            del header.PatientPosition  # PET says it by codes
        if modality == "MR":
            del header.RescaleIntercept, header.RescaleSlope
        headers.append(header)
    return headers


def write_series(
    folder: Path,
    volume: NDArray[np.floating],
    affine: NDArray[np.float64],
    modality: str = "CT",
    change: Callable[[Dataset, int], None] = lambda header, k: None,
    name: str = "IM{:04d}.dcm",
    **fields: Any,
) -> list[Path]:
    """Write a volume (columns, rows, slices) as one file per slice.

    Whole numbers are stored as they are. PET is stored with another slope for every slice.

    Args:
        change: called with each dataset and its slice before it is written.
        fields: of `make_headers`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for k, header in enumerate(make_headers(volume.shape, affine, modality, **fields)):
        plane = np.asarray(volume[:, :, k]).T
        if modality == "PT":
            header.RescaleSlope = f"{(abs(plane).max() or 1) / 30000:.10g}"
            plane = plane / float(header.RescaleSlope)
        header.PixelData = np.ascontiguousarray(plane.round(), dtype="<i2").tobytes()
        header["PixelData"].VR = "OW"
        change(header, k)
        files.append(folder / name.format(len(volume.T) - k))
        write_file(files[-1], header)
    return files


def write_file(path: Path, header: Dataset) -> None:
    """Write a dataset with its file meta information."""
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    pydicom.dcmwrite(path, header, enforce_file_format=True)


def complaints(path: Path) -> list[str]:
    """Return the errors that dciodvfy finds in a file; skip where it is not installed."""
    if shutil.which("dciodvfy") is None:
        if os.environ.get("CI"):
            pytest.fail("dciodvfy is missing: install Debian's dicom3tools")
        pytest.skip("needs dciodvfy, of Debian's dicom3tools")
    found = subprocess.run(["dciodvfy", "-new", path], capture_output=True, check=False)
    return [line for line in found.stderr.decode().splitlines() if line.startswith("Error")]
