"""Damaged scans: an error of our own, or the voxels and place that the format's library reads.

Each case is one seed; what once failed is kept in `ONCE_FAILED`.
"""

from __future__ import annotations

import gzip
import random
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 (its own convention)
from helpers_dicom import write_series
from itk_reader import ItkReader
from mutations import EXTREME_VALUES, mutated_bytes
from pydicom.dataelem import DataElement

from seg3dcam.errors import Seg3dcamError, Seg3dcamWarning
from seg3dcam.scan import load_scan

AFFINE = np.array([[-0.8, 0, 0, 90], [0, 0.9, 0, -120], [0, 0, 2.5, -30], [0, 0, 0, 1.0]])
SHAPE = (5, 4, 3)
MUTATIONS = 120

#: Seeds of what once failed: a crash, a place or voxels that no other program reads.
ONCE_FAILED = {
    "nifti1.nii": (928, 1101),
    "nifti2.nii": (172, 188, 1217, 1377),
    "packed.mha": (37, 2519),
    "raw.mha": (124,),
    "brain.mgh": (636, 913),
}


def voxels() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 90, SHAPE).astype(np.int16)


# ---------------------------------------------------------------------------------- sound files


def by_nibabel(path: Path, image_class) -> Path:
    image = image_class(voxels(), AFFINE)
    image.set_qform(AFFINE, 1)
    image.set_sform(AFFINE, 1)
    path.write_bytes(image.to_bytes())
    return path


def by_itk(path: Path, packed: bool) -> Path:
    image = sitk.GetImageFromArray(voxels().T)
    image.SetSpacing((0.8, 0.9, 2.5))
    image.SetOrigin((-90.0, 120.0, -30.0))
    sitk.WriteImage(image, str(path), packed)
    return path


MAKERS = {
    "nifti1.nii": lambda path: by_nibabel(path, nib.Nifti1Image),
    "nifti2.nii": lambda path: by_nibabel(path, nib.Nifti2Image),
    "raw.nrrd": lambda path: by_itk(path, False),
    "packed.nrrd": lambda path: by_itk(path, True),
    "raw.mha": lambda path: by_itk(path, False),
    "packed.mha": lambda path: by_itk(path, True),
    "of-nifti.mha": lambda path: by_itk_of_nifti(path),
    "by-axes.nrrd": lambda path: by_axes(path),
    "brain.mgh": lambda path: by_nibabel_mgh(path),
}


def by_itk_of_nifti(path: Path) -> Path:
    """With all fields of the NIfTI header in that of the MetaImage."""
    nifti = by_nibabel(path.with_suffix(".nii"), nib.Nifti1Image)
    sitk.WriteImage(sitk.ReadImage(str(nifti)), str(path))
    return path


def by_axes(path: Path) -> Path:
    """A grid that is said axis by axis, without a space."""
    lines = [
        *("NRRD0004", "type: short", "dimension: 3", "sizes: 5 4 3", "endian: little"),
        *("encoding: raw", "spacings: 0.8 0.9 2.5", "axis mins: -90 120 -30"),
        *("centers: cell node cell", "", ""),
    ]
    path.write_bytes("\n".join(lines).encode() + voxels().tobytes(order="F"))
    return path


def by_nibabel_mgh(path: Path) -> Path:
    path.write_bytes(nib.MGHImage(voxels(), AFFINE).to_bytes())
    return path


# ------------------------------------------------------------------------------ what is right


def of_nibabel(path: Path) -> tuple[np.ndarray, np.ndarray]:
    kind = nib.Nifti2Image if path.name.startswith("nifti2") else nib.Nifti1Image
    image = kind.from_bytes(path.read_bytes())
    if image.dataobj.offset == 0:
        raise ValueError("nibabel reads the header as voxels, other programs what follows on it")
    to_mm = {1: 1e3, 3: 1e-3}.get(int(image.header["xyzt_units"]) & 7, 1)
    return image.get_fdata(), np.diag([to_mm, to_mm, to_mm, 1]) @ image.affine


def of_mgh(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = nib.MGHImage.from_bytes(path.read_bytes())
    return image.get_fdata(), image.affine


@pytest.fixture(scope="module")
def library():
    """Return a function: voxels and RAS affine by the format's library; None where it refuses."""
    with ItkReader() as itk:

        def read(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
            if path.suffix in (".nrrd", ".mha"):
                return itk(path)
            try:
                return of_mgh(path) if path.suffix == ".mgh" else of_nibabel(path)
            except Exception:  # nibabel raises whatever its parser comes across
                return None

        yield read


def fault_of(path: Path, library) -> str | None:
    """Load a scan; return what is wrong with the outcome, None where nothing is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", Seg3dcamWarning)
            scan = load_scan(path)
    except Seg3dcamError as error:
        return None if path.name in str(error) else f"does not name the file: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    right = library(path)
    if right is None:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.asarray(right[0]).astype(np.float32)
    array = array.reshape((*scan.shape, -1), order="F")
    same = np.array_equal(scan.data.numpy(), np.moveaxis(array, -1, 0))
    # ITK gives what the memory held where the packed size is lost: the sound voxels are right too.
    if not same and not np.array_equal(scan.data[0].numpy(), voxels()):
        return "other voxels than the library's"
    if not np.allclose(scan.affine, right[1], rtol=1e-5, atol=1e-4):
        return f"another place than the library's:\n{scan.affine}\n{right[1]}"
    return None


@pytest.fixture(autouse=True)
def _quiet(capfd):
    sitk.ProcessObject_GlobalWarningDisplayOff()
    yield
    capfd.readouterr()


def check(path: Path, content: bytes, seed: object, library) -> str | None:
    path.write_bytes(content)
    fault = fault_of(path, library)
    return None if fault is None else f"seed {seed}: {fault}"


@pytest.mark.few(4)
@pytest.mark.parametrize("name", MAKERS)
def test_damaged_files(tmp_path, name, library):
    sound = MAKERS[name](tmp_path / name).read_bytes()
    assert fault_of(tmp_path / name, library) is None
    found = []
    for seed in (*range(MUTATIONS), *ONCE_FAILED.get(name, ())):
        content = mutated_bytes(sound, random.Random(f"{name} {seed}"))
        found.append(check(tmp_path / name, content, seed, library))
    assert [fault for fault in found if fault] == []


@pytest.mark.parametrize("name", ["nifti1.nii", "brain.mgh"])
def test_damaged_packed_files(tmp_path, name):
    """Damage before packing and after it."""
    sound = MAKERS[name](tmp_path / name).read_bytes()
    path = tmp_path / {"nifti1.nii": "a.nii.gz", "brain.mgh": "a.mgz"}[name]
    found = []
    for seed in range(MUTATIONS // 2):
        rng = random.Random(f"packed {name} {seed}")
        content = gzip.compress(mutated_bytes(sound, rng), 1, mtime=0)
        content = content if seed % 2 else mutated_bytes(content, rng)
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Seg3dcamWarning)
                load_scan(path)
        except Seg3dcamError as error:
            found.append(None if path.name in str(error) else f"seed {seed}: {error}")
        except Exception as error:
            found.append(f"seed {seed}: {type(error).__name__}: {error}")
    assert [fault for fault in found if fault] == []


# ------------------------------------------------------------------------------------------- DICOM

ELEMENTS = (
    *("Rows", "Columns", "NumberOfFrames", "BitsAllocated", "BitsStored", "HighBit"),
    *("PixelRepresentation", "SamplesPerPixel", "PhotometricInterpretation", "Modality"),
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "ImageType"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"),
    *("RescaleSlope", "RescaleIntercept", "AcquisitionNumber", "SpecificCharacterSet"),
)
VRS = ("US", "SS", "UL", "IS", "DS", "CS", "UI", "LO", "OB", "UN", "FD", "PN", "DA")


def series_fault(folder: Path) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", Seg3dcamWarning)
            scan = load_scan(folder)
    except Seg3dcamError:
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k, header in enumerate(scan.series):
            whole = pydicom.dcmread(header.filename)
            slope, shift = whole.get("RescaleSlope", 1), whole.get("RescaleIntercept", 0)
            try:
                plane = whole.pixel_array.astype(float) * float(slope or 1) + float(shift or 0)
            except Exception:  # pydicom refuses what GDCM repairs
                continue
            if plane.ndim == 3:  # data that go on after the picture are frames to pydicom
                plane = plane[0]
            if not np.allclose(scan.data[0, :, :, k].numpy(), plane.T, rtol=1e-6):
                return f"slice {k}: other voxels than pydicom's"
            place = (scan.affine @ [0, 0, k, 1])[:3] * (-1, -1, 1)
            if not np.allclose(place, [float(x) for x in whole.ImagePositionPatient], atol=0.06):
                return f"slice {k}: another place than its header says"
    return None


@pytest.mark.slow
def test_damaged_dicom_bytes(tmp_path):
    files = write_series(tmp_path / "ct", voxels().astype(float), AFFINE)
    assert series_fault(tmp_path / "ct") is None
    sound = files[1].read_bytes()
    found = []
    for seed in (*range(MUTATIONS), 210, 437, 464):
        files[1].write_bytes(mutated_bytes(sound, random.Random(f"dicom {seed}"), head=len(sound)))
        fault = series_fault(tmp_path / "ct")
        found.append(fault and f"seed {seed}: {fault}")
    assert [fault for fault in found if fault] == []


@pytest.mark.slow
def test_odd_dicom_elements(tmp_path, monkeypatch):
    """Any value under any VR, in one slice or in all of them."""
    monkeypatch.setattr(pydicom.config.settings, "writing_validation_mode", 0)
    files = write_series(tmp_path / "ct", voxels().astype(float), AFFINE)
    sound = [path.read_bytes() for path in files]
    found = []
    for seed in (*range(MUTATIONS), 206, 273, 711):
        rng = random.Random(f"element {seed}")
        keyword, vr = rng.choice(ELEMENTS), rng.choice(VRS)
        value = rng.choice([*EXTREME_VALUES, ["1", "2"], ["CT", "MR"], [1, 2], b"\x01\x02\x03"])
        change_all = rng.random() < 0.5
        for path, content in zip(files, sound, strict=True):
            path.write_bytes(content)
            if path == files[1] or change_all:
                _set(path, keyword, rng.choice((vr, None)), value)
        fault = series_fault(tmp_path / "ct")
        found.append(fault and f"seed {seed}, {keyword} {vr} {str(value)[:40]!r}: {fault}")
    assert [fault for fault in found if fault] == []


def _set(path: Path, keyword: str, vr: str | None, value: object) -> None:
    """Give an element a value, where pydicom can write it at all."""
    sound = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header = pydicom.dcmread(path)
        tag = pydicom.datadict.tag_for_keyword(keyword)
        try:
            header[tag] = DataElement(
                tag, vr or pydicom.datadict.dictionary_VR(tag), value, validation_mode=0
            )
            header.save_as(path)
        except Exception:
            path.write_bytes(sound)
