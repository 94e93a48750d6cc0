"""No name, ID or path of a patient in any result, unless asked for."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import zipfile

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
from helpers_cases import Place, contents, voxels
from helpers_dicom import write_series
from helpers_phantom import OBLIQUE

from seg3dcam.job.settings import Job
from seg3dcam.scan import load_scan

#: DICOM objects name the patient, as the standard wants it.
FORMATS = [f for f in Job(scan="s", model="m").formats] + ["cine", "nrrd", "fused"]
EVERY_FORMAT = [word for name in FORMATS for word in ("--format", name)]
PATIENT = "Zyxwvut^Quentin"
MORE = ("MRN0042", "19700229")
MARKS = [b"zyxwvut", b"quentin", b"mrn0042", b"19700229"]


def plain(name, content):
    """Yield a file's bytes, and those of what it holds in a compressed form."""
    yield name, content
    if name.endswith(".gz"):
        yield name, gzip.decompress(content)
    if name.endswith((".nrrd",)):
        header, _, data = content.partition(b"\n\n")
        yield name, header + gzip.decompress(data)
    if name.endswith(".mrb"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.namelist():
                yield f"{name}: {member}", member.encode()
                yield from plain(f"{name}: {member}", archive.read(member))


@pytest.fixture(scope="module")
def explained(tmp_path_factory):
    """One scan under two names, one of them a patient's, in every format."""
    folder = tmp_path_factory.mktemp("Zyxwvut_Quentin_MRN0042")
    named = Place.at(folder)
    scan = named.scan.rename(folder / f"{PATIENT}_19700229_MRN0042.nii.gz")
    other = Place.at(tmp_path_factory.mktemp("other"))
    shutil.copy(scan, other.scan)
    outcome = named.explain(*EVERY_FORMAT, scans=[scan])
    assert outcome.code == 0, outcome.err
    assert other.explain(*EVERY_FORMAT).code == 0
    return contents(named.out), contents(other.out)


@pytest.mark.slow
def test_no_file_names_the_patient(explained):
    files, _ = explained
    assert len(files) > 30
    for name, content in files.items():
        for part, found in plain(name, content or b""):
            low = (part.encode() + found).lower()
            assert not [mark for mark in MARKS if mark in low], part


def test_every_file_is_the_same_whatever_the_scan_is_called(explained):
    """Pixels too."""
    named, other = explained
    assert named.keys() == other.keys()
    assert [name for name in named if named[name] != other[name]] == []


def test_the_code_in_place_of_a_name_is_that_of_the_voxels(explained):
    case = json.loads(explained[0]["case.json"])["case"]
    assert case.startswith("scan ")
    assert len(case) == len("scan ") + 8


@pytest.mark.slow
def test_a_name_that_is_asked_for_is_shown(tmp_path):
    place = Place.at(tmp_path)
    formats = ["--format", "png", "--format", "html", "--format", "slicer"]
    options = ["--target", "lesion", *formats, "--axis", "axial"]
    assert place.explain(*options, "--case", "Fall 7 <ä>").code == 0
    with_name = contents(place.out)
    assert json.loads(with_name["case.json"])["case"] == "Fall 7 <ä>"
    assert b"Fall 7" in with_name["report.html"]
    assert place.explain(*options, "--out", tmp_path / "without").code == 0
    without = contents(tmp_path / "without")
    pictures = [name for name in without if name.endswith(".png")]
    assert pictures
    assert all(without[name] != with_name[name] for name in pictures if "profile" not in name)


# ---------------------------------------------------------------------------------- DICOM series

AFFINE = np.eye(4)
AFFINE[:3, :3], AFFINE[:3, 3] = OBLIQUE @ np.diag([-1.2, -1.2, 2.5]), (30, -20, 410)


@pytest.fixture(scope="module")
def of_a_series(tmp_path_factory):
    """A DICOM series that names its patient, explained from the command line."""
    place = Place.at(tmp_path_factory.mktemp("series"), prepare={"intensity": {"range": [0, 1000]}})
    folder = place.folder / "Zyxwvut"

    def name_the_patient(header, k):
        header.PatientName, header.PatientID, header.PatientBirthDate = PATIENT, *MORE

    write_series(folder, np.round(voxels() * 1000), AFFINE, "MR", change=name_the_patient)
    outcome = place.explain(*EVERY_FORMAT, "--format", "dicom", scans=[folder])
    assert outcome.code == 0, outcome.err
    return place, folder


@pytest.mark.slow
def test_only_dicom_objects_name_the_patient_of_a_series(of_a_series):
    place, _ = of_a_series
    files = contents(place.out)
    named = set()
    for name, content in files.items():
        for part, found in plain(name, content or b""):
            low = (part.encode() + found).lower()
            named |= {name for mark in MARKS if mark in low}
    assert named == {name for name in files if name.endswith(".dcm")}
    assert len(named) > 30


@pytest.mark.slow
def test_a_series_is_explained_like_the_same_scan_in_nifti(of_a_series, tmp_path):
    """All formats agree on the place: NIfTI, the DICOM map, and what case.json says."""
    place, folder = of_a_series
    scan = load_scan(folder)
    cam = nib.load(place.out / "cam_lesion.nii.gz")
    np.testing.assert_allclose(cam.affine, scan.affine, atol=1e-4)
    header = pydicom.dcmread(place.out / "dicom" / "lesion_map.dcm")
    assert (header.PatientName, header.PatientID) == (PATIENT, "MRN0042")
    of_dicom = highdicom.imread(place.out / "dicom" / "lesion_map.dcm").get_volume()
    to_ras = np.diag([-1, -1, 1, 1]) @ of_dicom.affine
    frames, rows, columns = np.unravel_index(of_dicom.array.argmax(), of_dicom.array.shape)
    at = to_ras @ [frames, rows, columns, 1]
    (lesion,) = [e for e in place.record["explanations"] if e["label"] == "lesion"]
    largest = np.argwhere(cam.get_fdata() == 1) @ cam.affine[:3, :3].T + cam.affine[:3, 3]
    assert np.linalg.norm(largest - at[:3], axis=1).min() < 1e-3
    assert np.linalg.norm(largest - lesion["found"]["peak_mm"], axis=1).min() < 1e-3

    image = nib.Nifti1Image(scan.data[0].numpy(), scan.affine)
    nib.save(image, place.scan)
    again = Place(place.folder)
    assert again.explain("--format", "nifti", "--out", tmp_path / "again").code == 0
    same = nib.load(tmp_path / "again" / "cam_lesion.nii.gz")
    np.testing.assert_allclose(same.get_fdata(), cam.get_fdata(), atol=1e-5)
