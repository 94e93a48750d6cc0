"""No name, ID or path of a patient in any result, unless asked for."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import zipfile

import pytest
from helpers_cases import Place, contents

from seg3dcam.config import Job

#: DICOM objects name the patient, as the standard wants it.
FORMATS = [f for f in Job(scan="s", model="m").formats] + ["cine", "nrrd", "fused"]
EVERY_FORMAT = [word for name in FORMATS for word in ("--format", name)]
PATIENT = "Zyxwvut^Quentin"
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


def test_a_name_that_is_asked_for_is_shown(tmp_path):
    place = Place.at(tmp_path)
    options = ["--format", "png", "--format", "html", "--format", "slicer", "--axis", "axial"]
    assert place.explain(*options, "--case", "Fall 7 <ä>").code == 0
    with_name = contents(place.out)
    assert json.loads(with_name["case.json"])["case"] == "Fall 7 <ä>"
    assert b"Fall 7" in with_name["report.html"]
    assert place.explain(*options).code == 0
    without = contents(place.out)
    pictures = [name for name in without if name.endswith(".png")]
    assert pictures
    assert all(without[name] != with_name[name] for name in pictures if "profile" not in name)
