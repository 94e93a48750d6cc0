"""`seg3dcam compare`: what it prints, what it writes, and what explain makes of it."""

from __future__ import annotations

import csv
import json

import cv2
import pytest
from helpers_cases import Place, contents, seg3dcam
from helpers_planted import write_planted

FILES = ["compare.png", "compare.csv", "compare.json"]


def compare(folder, *options, scans=(3, 4)):
    return seg3dcam(
        "compare",
        *(folder / f"scan_{seed}.nii.gz" for seed in scans),
        *("--model", folder / "model.yaml", "--trust", "--out", folder / "out", "--block", 2),
        *options,
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A folder in which a comparison was made and its winner recommended; and what it said."""
    folder = tmp_path_factory.mktemp("planted")
    write_planted(folder)
    methods = ("--method", "hires_cam", "--method", "xgrad_cam")
    return folder, compare(folder, "--recommend", *methods)


@pytest.mark.slow
def test_it_prints_a_table_and_a_sentence(ran):
    _, outcome = ran
    assert outcome.code == 0
    rows = [line.split("│") for line in outcome.out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row[1:-1]] for row in rows]
    assert cells[0] == ["encoder", "encoder", "hires_cam", "0.02", "best"]
    assert any(row[0] == "mask alone" and float(row[3]) > 0.4 for row in cells)
    (sentence,) = [line for line in outcome.out.splitlines() if line.startswith("use layer ")]
    assert sentence.startswith("use layer encoder with hires_cam: it points outside the mask at ")
    assert sentence.endswith("; means of 2 inputs")


@pytest.mark.slow
def test_it_writes_picture_table_and_record(ran):
    folder, outcome = ran
    assert [path.name for path in outcome.files] == [*FILES, "model.recommended.json"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted(FILES)
    picture = cv2.imread(str(folder / "out" / "compare.png"))
    assert min(picture.shape[:2]) > 500
    assert picture.max() > 200
    record = json.loads((folder / "out" / "compare.json").read_text())
    assert record["best"] == {"layer": "encoder", "method": "hires_cam"}
    assert record["class"] == "organ"
    assert record["words"] in outcome.out
    with (folder / "out" / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == [row["layer"] for row in record["candidates"]]
    assert float(rows[0]["context_deletion"]) == record["candidates"][0]["context_deletion"]
    assert len(rows) == 6
    assert all(len(row["areas"].split()) == 2 for row in rows)


@pytest.mark.slow
def test_no_name_of_a_scan_is_written(ran):
    folder, _ = ran
    recommended = folder / "model.recommended.json"
    for file in (*(folder / "out").iterdir(), recommended):
        assert b"scan_3" not in file.read_bytes()
    (one,) = json.loads(recommended.read_text())["recommended"]
    assert len(one["cases"]) == 2
    assert all(name.startswith("scan ") for name in one["cases"])
    assert one["figures"]["context_deletion"] < 0.03 < 0.4 < one["figures"]["mask_alone"]
    assert one["figures"]["default"] > 0.4


@pytest.mark.slow
def test_explain_uses_what_was_recommended(ran):
    folder, _ = ran
    outcome = seg3dcam(
        *("explain", folder / "scan_3.nii.gz", "--model", folder / "model.yaml", "--trust"),
        *("--target", "organ", "--out", folder / "case", "--format", "nifti"),
    )
    assert outcome.code == 0
    assert outcome.out.startswith("auto is layer encoder by hires_cam, which model.recommended")
    (entry,) = json.loads((folder / "case" / "case.json").read_text())["explanations"]
    assert list(entry["layers"]) == ["encoder"]


@pytest.mark.slow
def test_channels_of_one_case_are_joined_by_commas(ran, tmp_path):
    """The two channels in files of their own give what one file of both gives."""
    folder, _ = ran
    write_planted(tmp_path)
    split(tmp_path)
    record = json.loads((folder / "out" / "compare.json").read_text())
    words = ",".join(str(tmp_path / f"channel_{number}.nii.gz") for number in (0, 1))
    outcome = seg3dcam(
        *("compare", words, "--model", tmp_path / "model.yaml", "--trust", "--block", 2),
        *("--out", tmp_path / "out", "--method", "hires_cam", "--layer", "encoder"),
    )
    assert outcome.code == 0
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert found["cases"] == record["cases"][:1]
    assert found["best"] == record["best"]


def split(folder):
    import nibabel as nib

    whole = nib.load(folder / "scan_3.nii.gz")
    for number in (0, 1):
        part = nib.Nifti1Image(whole.get_fdata(dtype="float32")[..., number], whole.affine)
        nib.save(part, folder / f"channel_{number}.nii.gz")


# ------------------------------------------------------------------------------ nothing passes


@pytest.fixture
def place(tmp_path):
    """A network whose classes need nothing around them."""
    return Place.at(tmp_path)


def compare_place(place, *options, block=2):
    return seg3dcam(
        *("compare", place.scan, "--model", place.model, "--out", place.out, "--block", block),
        *options,
    )


def test_where_nothing_passes_nothing_is_recommended(place):
    outcome = compare_place(place, "--target", "lesion", "--recommend")
    assert outcome.code == 1
    assert "undefined: the prediction needs nothing outside of the mask" in outcome.out
    assert outcome.err.startswith("error: nothing to recommend: undefined: the prediction needs")
    assert not (place.folder / "model.recommended.json").exists()
    record = json.loads((place.out / "compare.json").read_text())
    assert record["best"] is None
    assert record["candidates"][0]["verdict"] == "not measured"
    assert (place.out / "compare.png").is_file()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ((), 2, "a comparison is about one class: name one with target, of 1 organ, 2 lesion"),
        (("--target", "liver"), 2, "class 'liver' does not exist"),
        (("--target", "lesion", "--layer", "model.9"), 2, "model.9"),
        (("--target", "lesion", "--method", "hires"), 2, "did you mean 'hires_cam'"),
        (("--target", "lesion", "--margin", 99), 1, "there are 0 blocks outside of the grown mask"),
        (("--target", "lesion", "--block", 0), 2, "block"),
    ],
)
def test_bad_input_leaves_nothing(place, options, code, words):
    before = contents(place.folder)
    outcome = compare_place(place, *options)
    assert outcome.code == code
    assert words in outcome.complaint
    place.out.rmdir()
    assert contents(place.folder) == before


def test_a_comma_without_a_name_is_refused(place):
    outcome = seg3dcam("compare", f"{place.scan},", "--model", place.model, "--out", place.out)
    assert outcome.code == 2
    assert "files joined by commas, as t1.nii.gz,t2.nii.gz" in outcome.complaint
