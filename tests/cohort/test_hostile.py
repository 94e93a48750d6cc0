"""Real folders and tables, with what lies about in them: read rightly, or refused at once."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys

import nibabel as nib
import numpy as np
import pytest
from helpers_cases import OBLIQUE, voxels, write_model, write_scan
from helpers_cohort import content_of, leftovers, write_cohort
from helpers_dicom import write_series

from seg3dcam import cohort
from seg3dcam.cohort import read_cases
from seg3dcam.cohort.plan import note_file
from seg3dcam.errors import ConfigError
from seg3dcam.job.record import read_record

SETTINGS = {"target": "lesion", "format": ["nifti"]}


@pytest.fixture
def scans(tmp_path):
    return write_cohort(tmp_path, ["a", "b"])


def explained(scans, **more):
    return cohort.run(
        scans,
        model=str(scans.parent / "model.yaml"),
        out=scans.parent / "out",
        **(SETTINGS | more),
    )


def names(source, **more):
    return [case.name for case in read_cases(source, **more)]


# --------------------------------------------------------------------------- what is up to date


def test_a_scan_that_was_replaced_takes_the_others_place(scans):
    first = explained(scans)
    before = content_of(first.out, "a")
    write_scan(scans / "a.nii.gz", voxels() * np.float32(1.1))
    again = explained(scans)
    assert (again.done, again.skipped) == (("a",), ("b",))
    assert content_of(again.out, "a").keys() == before.keys()
    assert content_of(again.out, "a") != before
    assert explained(scans).skipped == ("a", "b")
    record = read_record(again.out / "a")
    there = {str(p.relative_to(again.out / "a")) for p in (again.out / "a").rglob("*.nii.gz")}
    assert there == {name for name in record.files if name.endswith(".nii.gz")}
    assert leftovers(again.out) == []


@pytest.mark.parametrize("content", ["{bad", '{"mine": 1}'])
def test_a_damaged_record_is_a_failure_and_not_silence(scans, content):
    out = explained(scans).out
    (out / "a" / "case.json").write_text(content, encoding="utf-8")
    result = explained(scans)
    assert list(result.failed) == ["a"]
    assert "is damaged, or none of seg3dcam" in result.failed["a"]
    shutil.rmtree(out / "a")
    assert explained(scans).done == ("a",)


@pytest.mark.slow
def test_a_note_that_anybody_wrote_changes_no_state(scans):
    result = explained(scans)
    path = note_file(result.out, "a")
    note = json.loads(path.read_text(encoding="utf-8"))
    (key,) = note["seconds"]
    for change, seconds in (
        *(({"seconds": {key: 3}}, "3.0"), ({"seconds": {key: "3"}}, ""), ({"seconds": 3}, "")),
        *(({"seconds": {key: took}}, "") for took in (-1, 10**400, float("nan"), None, [1])),
        *(({"error": ["x"]}, ""), ({"code": None}, ""), ({"error": "\ud800"}, None)),
        ({"code": "of other files", "error": "failed then"}, None),
    ):
        path.write_text(json.dumps(note | change), encoding="utf-8")
        again = explained(scans)
        assert (again.done, again.failed) == ((), {}), change
        with again.tables[0].open(newline="", encoding="utf-8") as file:
            rows = {row["case"]: row for row in csv.DictReader(file)}
        expected = str(note["seconds"][key]) if seconds is None else seconds
        assert (rows["a"]["status"], rows["a"]["seconds"]) == ("ok", expected), change
    (scans / "b.nii.gz").write_bytes(b"no scan")
    assert list(explained(scans).failed) == ["b"]
    path = note_file(result.out, "b")
    note = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(note | {"error": "\ud800"}), encoding="utf-8")
    assert explained(scans).failed == {"b": "?"}


@pytest.mark.slow
def test_seconds_are_those_of_the_run_that_is_shown(scans):
    def seconds():
        with (scans.parent / "out" / "cohort.csv").open(newline="", encoding="utf-8") as file:
            return {row["case"]: row["seconds"] for row in csv.DictReader(file)}

    explained(scans)
    first = seconds()
    write_model(scans.parent, biases=(0.0, -0.4, -1.5))
    assert explained(scans).done == ("a", "b")
    other = seconds()
    write_model(scans.parent)
    assert explained(scans).skipped == ("a", "b")
    assert seconds() == first != other
    whole = (scans / "a.nii.gz").read_bytes()
    (scans / "a.nii.gz").write_bytes(b"no scan")
    assert list(explained(scans).failed) == ["a"]
    assert seconds() == first | {"a": ""}
    (scans / "a.nii.gz").write_bytes(whole)
    assert explained(scans).done == ("a",)  # it was read, and found to be done
    assert seconds() == first


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_folder_whose_name_is_no_utf_8(scans):
    folder = scans.rename(os.fsdecode(bytes(scans.parent) + b"/d\xff"))
    (folder / "b.nii.gz").write_bytes(b"no scan")
    for done in (("a",), ()):
        found = cohort.run(
            folder, model=str(scans.parent / "model.yaml"), out=scans.parent / "out", **SETTINGS
        )
        assert found.done == done
        assert r"/d\udcff/b.nii.gz: not a NIfTI file" in found.failed["b"]


def test_files_that_change_places_are_told_apart(tmp_path, scans):
    """With the same name, size and time, as an archive may leave them."""
    for folder, factor in (("A", 1.0), ("B", 1.3)):
        (tmp_path / folder).mkdir()
        image = nib.Nifti1Image((voxels() * factor).astype(np.float32), np.eye(4))
        nib.save(image, tmp_path / folder / "t1.nii")
        os.utime(tmp_path / folder / "t1.nii", (10**9, 10**9))
    table = tmp_path / "t.csv"
    settings = {"model": str(tmp_path / "model.yaml"), "out": tmp_path / "swapped"} | SETTINGS
    figures = []
    for order in ("AB", "BA"):
        rows = [f"{name},{folder}/t1.nii" for name, folder in zip("xy", order, strict=True)]
        table.write_text("case,scan\n" + "\n".join(rows), encoding="utf-8")
        assert cohort.run(table, **settings).done == ("x", "y")
        found = [read_record(tmp_path / "swapped" / name).explanations[0].found for name in "xy"]
        figures.append([one["predicted_ml"] for one in found])
    assert figures[0] == figures[1][::-1]
    assert figures[0][0] != figures[0][1]


def test_maps_of_a_group_are_those_of_the_table(tmp_path, scans):
    """Not those of weights that were tried in between."""
    from helpers_cases import BIASES, write_model

    explained(scans)
    write_model(tmp_path, biases=[BIASES[0], BIASES[1], BIASES[2] - 5])
    explained(scans)
    write_model(tmp_path)
    out = explained(scans).out
    current = cohort.comparing.explained_cases(out)
    kept = {len(read_record(out / name).explanations) for name in "ab"}
    assert kept <= {1, 2}
    for name in "ab":
        (entry,) = current[name].explanations
        assert entry.found["predicted_ml"] == pytest.approx(1.3205500082891233)


# ------------------------------------------------------------------------- what is to be done


def test_truths_are_needed_where_the_region_asks_for_them(tmp_path, scans):
    truth = np.zeros(voxels().shape, np.int16)
    truth[7:14, 9:16, 5:12] = 2
    for name in "ab":
        nib.save(
            nib.Nifti1Image(truth, nib.load(scans / f"{name}.nii.gz").affine),
            tmp_path / f"truth_{name}.nii.gz",
        )
    table = tmp_path / "t.csv"
    rows = ["scans/a.nii.gz,truth_a.nii.gz", "scans/b.nii.gz,truth_b.nii.gz"]
    table.write_text("scan,truth\n" + "\n".join(rows), encoding="utf-8")
    settings = {"model": str(tmp_path / "model.yaml"), "out": tmp_path / "regions"} | SETTINGS
    result = cohort.run(table, region="true_positives", **settings)
    assert result.done == ("a", "b"), result.failed
    table.write_text(f"scan,truth\n{rows[0]}\nscans/b.nii.gz,\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"needs a truth for every case.*none has b"):
        cohort.run(table, region="true_positives", **settings)


def test_results_never_go_into_a_series(tmp_path, scans):
    write_series(tmp_path / "dicom" / "p1", voxels(), OBLIQUE)
    before = sorted((tmp_path / "dicom" / "p1").iterdir())
    with pytest.raises(ConfigError, match="own folder"):
        cohort.run(
            tmp_path / "dicom",
            model=str(tmp_path / "model.yaml"),
            out=tmp_path / "dicom",
            **SETTINGS,
        )
    assert sorted((tmp_path / "dicom" / "p1").iterdir()) == before


@pytest.mark.parametrize("name", ["cohort", "cohort.csv", "Cohort.Parquet", "index.html", "group"])
def test_names_that_the_cohort_keeps(scans, name):
    (scans / "a.nii.gz").rename(scans / f"{name}.nii.gz")
    with pytest.raises(ConfigError, match="is kept for the cohort"):
        explained(scans)


def test_cases_of_other_channels_than_the_model_takes(scans):
    for name in ("a", "b"):
        (scans / f"{name}.nii.gz").rename(scans / f"{name}_0000.nii.gz")
        shutil.copy(scans / f"{name}_0000.nii.gz", scans / f"{name}_0001.nii.gz")
    with pytest.raises(ConfigError, match=r"takes 1 channel; other numbers of files have a \(2\)"):
        explained(scans)
    assert not (scans.parent / "out").joinpath("cohort", "settings.json").exists()


def test_slices_that_a_datalist_names_are_no_channels(scans):
    folder = scans.parent / "dicom" / "p"
    write_series(folder, voxels(), OBLIQUE)
    items = [{"image": [f"p/{file.name}" for file in sorted(folder.iterdir())], "case": "p"}]
    (folder.parent / "data.json").write_text(json.dumps(items), encoding="utf-8")
    found = cohort.run(
        folder.parent / "data.json",
        model=str(scans.parent / "model.yaml"),
        out=scans.parent / "out",
        **SETTINGS,
    )
    assert found.done == ("p",)


def test_an_output_folder_that_is_a_file(scans):
    (scans.parent / "out").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError):
        explained(scans)
    assert (scans.parent / "out").read_text(encoding="utf-8") == "mine"


# ----------------------------------------------------------------------------- names and tables


def test_what_lies_beside_scans_is_no_case(scans):
    (scans / ".DS_Store").write_bytes(b"x")
    (scans / "._a.nii.gz").write_bytes(b"x")
    (scans / "notes").mkdir()
    (scans / "notes" / "README").write_text("no series", encoding="utf-8")
    (scans / "hidden").mkdir()
    (scans / "hidden" / ".DS_Store").write_bytes(b"x")
    (scans / "dataset.json").write_text("{}", encoding="utf-8")
    assert names(scans) == ["a", "b"]
    assert names(f"{scans}/*.nii.gz") == ["a", "b"]
    assert names(f"{scans}/*") == ["a", "b"]


def test_a_pattern_finds_no_results(scans):
    explained(scans)
    pattern = f"{scans.parent}/**/*.nii.gz"
    assert names(pattern, without=scans.parent / "out") == ["a", "b"]


def test_one_file_is_a_cohort_of_one(scans):
    assert names(scans / "a.nii.gz") == ["a"]


def test_a_table_in_a_folder_with_brackets(tmp_path, scans):
    place = tmp_path / "a[1]"
    place.mkdir()
    table = place / "t.csv"
    table.write_text(f"scan\n{scans / 'a.nii.gz'}\n", encoding="utf-8")
    assert names(table) == ["a"]


def test_lists_in_lists_and_words_that_are_no_scans(tmp_path, scans):
    content = {
        "classes": ["background", "organ"],
        "training": [[{"image": "scans/a.nii.gz"}], {"image": ["scans/b.nii.gz"]}],
    }
    path = tmp_path / "data.json"
    path.write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    assert names(path) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"image": []}]', r"without an \"image\" that names files: \[\]"),
        ('[{"image": ""}]', 'without an "image" that names files'),
        ('[{"image": "scans/a.nii.gz", "label": ["x.nii.gz"]}]', "a truth is one file"),
        ('[{"img": "scans/a.nii.gz"}]', "did you mean 'image'|without an \"image\""),
    ],
)
def test_a_datalist_that_is_refused(tmp_path, scans, content, words):
    path = tmp_path / "data.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        read_cases(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scan,scan\nscans/a.nii.gz,scans/b.nii.gz\n", "say the same: keep one"),
        ("Scan,scan\nscans/a.nii.gz,scans/b.nii.gz\n", "say the same: keep one"),
        ("scan,truth,Truth\nscans/a.nii.gz,,\n", "say the same: keep one"),
        ("case;scan\na;scans/a.nii.gz\n", "separate columns by commas"),
        ("", "no column 'scan'"),
        ("scan\nscans/a.nii.gz;\n", "names an empty file"),
        ("scan\nfoo://scans/a.nii.gz\n", "foo://scans/a.nii.gz"),
    ],
)
def test_a_table_that_is_refused(tmp_path, scans, text, words):
    table = tmp_path / "t.csv"
    table.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        read_cases(table)


def test_blanks_are_no_truth(tmp_path, scans):
    table = tmp_path / "t.csv"
    table.write_text("scan,truth\nscans/a.nii.gz, \n", encoding="utf-8")
    assert read_cases(table)[0].truth is None


def test_a_link_that_leads_nowhere_is_missing(scans):
    (scans / "c.nii.gz").symlink_to(scans / "gone.nii.gz")
    with pytest.raises(ConfigError, match=r"missing:\n  c: "):
        read_cases(scans)


def test_folders_of_labels_are_no_truths(tmp_path):
    for name in ("imagesTs", "labelsTs/b"):
        (tmp_path / name).mkdir(parents=True)
    for name in "ab":
        write_scan(tmp_path / "imagesTs" / f"{name}_0000.nii.gz")
    write_scan(tmp_path / "labelsTs" / "a.nii.gz")
    found = {case.name: case.truth for case in read_cases(tmp_path / "imagesTs")}
    assert found == {"a": tmp_path / "labelsTs" / "a.nii.gz", "b": None}
