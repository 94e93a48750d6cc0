"""The cases of a cohort, from everything that names them; what is wrong is said before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seg3dcam.cohort import read_cases
from seg3dcam.errors import ConfigError


def touched(folder: Path, *names: str) -> None:
    """Make empty files: cases are read from names alone."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(found):
    return [case.name for case in found]


# -------------------------------------------------------------------------------- what is found


def test_a_folder_holds_scans_and_series(tmp_path):
    touched(
        tmp_path, "b.nii.gz", "a.nrrd", "notes.txt", ".hidden.nii", "series/1.dcm", "empty/x.txt"
    )
    found = read_cases(tmp_path)
    assert names(found) == ["a", "b", "series"]
    assert found[1].files == (tmp_path / "b.nii.gz",)
    assert found[2].files == (tmp_path / "series",)


def test_an_nnunet_folder_joins_channels_and_finds_truths(tmp_path):
    folder = tmp_path / "imagesTs"
    touched(folder, *(f"brats_{case}_000{channel}.nii.gz" for case in "12" for channel in "210"))
    touched(tmp_path / "labelsTs", "brats_2.nii.gz")
    one, two = read_cases(folder)
    assert one.name == "brats_1"
    assert [file.name for file in one.files] == [f"brats_1_000{n}.nii.gz" for n in range(3)]
    assert one.truth is None
    assert two.truth == tmp_path / "labelsTs" / "brats_2.nii.gz"


def test_a_pattern_finds_files_at_any_depth(tmp_path):
    touched(tmp_path, "p1/ct.nii", "p2/ct2.nii.gz", "p2/mask.txt")
    assert names(read_cases(f"{tmp_path}/**/*.nii*")) == ["ct", "ct2"]


def test_a_table_names_cases_channels_and_truths(tmp_path, monkeypatch):
    touched(tmp_path, "s/a_t1.nii", "s/a_t2.nii", "s/b.nii.gz", "truth/a.nii")
    table = tmp_path / "cohort.csv"
    table.write_text(
        "Case,Image,truth,age\np1,s/a_t1.nii; s/a_t2.nii,truth/a.nii,50\n,s/b.nii.gz,,\n",
        encoding="utf-8-sig",
    )
    one, two = read_cases(table)
    assert (one.name, two.name) == ("p1", "b")
    assert one.files == (tmp_path / "s" / "a_t1.nii", tmp_path / "s" / "a_t2.nii")
    assert one.truth == tmp_path / "truth" / "a.nii"
    assert two.truth is None
    monkeypatch.chdir(tmp_path)
    assert names(read_cases("cohort.csv")) == ["p1", "b"]


def test_a_parquet_table_is_as_a_csv(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    touched(tmp_path, "a.nii", "b.nii")
    table = pyarrow.table({"id": ["x", "y"], "scan": ["a.nii", "b.nii"], "label": [None, "a.nii"]})
    parquet.write_table(table, tmp_path / "cohort.parquet")
    found = read_cases(tmp_path / "cohort.parquet")
    assert names(found) == ["x", "y"]
    assert [case.truth for case in found] == [None, tmp_path / "a.nii"]


def test_a_datalist_of_monai(tmp_path):
    touched(tmp_path, "imagesTr/a.nii", "labelsTr/a.nii", "imagesTs/b.nii", "c0.nii", "c1.nii")
    content = {
        "labels": {"0": "background"},
        "numTest": 1,
        "training": [{"image": "./imagesTr/a.nii", "label": "./labelsTr/a.nii", "fold": 0}],
        "validation": [{"image": ["c0.nii", "c1.nii"], "case": "c"}],
        "test": ["./imagesTs/b.nii"],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    one, two, three = read_cases(tmp_path / "dataset.json")
    assert (one.name, two.name, three.name) == ("a", "c", "b")
    assert one.truth == tmp_path / "labelsTr" / "a.nii"
    assert [file.name for file in two.files] == ["c0.nii", "c1.nii"]


# ---------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("case,scans\np1,a.nii\n", "no column 'scan'.* did you mean 'scans'"),
        ("case,scan,image\np1,a.nii,a.nii\n", "'scan' and 'image' say the same"),
        ("case,scan\np1,a.nii\nP1,b.nii\n", "'p1', 'P1': more than one case of a name"),
        ("case,scan\n../p1,a.nii\n", r"names of folders.* not so '\.\./p1'"),
        ("case,scan\nnul,a.nii\n", "not so 'nul'"),
        ("case,scan\np1,a.nii\np2,\n", "line 3: no scan is named"),
        ("case,scan\np1,a.nii,more\n", "more cells than there are columns"),
        ("case,scan\np1,gone.nii\n", r"files are missing:\n  p1: .*gone\.nii"),
        ("case,scan,truth\np1,a.nii,gone.nii\n", r"files are missing:\n  p1: .*gone\.nii"),
        ("case,scan\n", "no scans found"),
        ("\0", "not a table|no column"),
    ],
)
def test_a_wrong_table(table, words, tmp_path):
    touched(tmp_path, "a.nii", "b.nii")
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(ConfigError, match=words):
        read_cases(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not a datalist"),
        ('[{"imag": "a.nii"}]', "did you mean 'imag'"),
        ('[{"image": [1]}]', 'without an "image"'),
        ('{"training": []}', "no scans found"),
        ("[" * 100_000, "not a datalist"),
    ],
)
def test_a_wrong_datalist(content, words, tmp_path):
    (tmp_path / "d.json").write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_cases(tmp_path / "d.json")


def test_a_channel_that_is_missing(tmp_path):
    touched(tmp_path, *(f"{case}_000{n}.nii.gz" for case in "abc" for n in (0, 1)))
    (tmp_path / "b_0001.nii.gz").unlink()
    with pytest.raises(ConfigError, match=r"every case has 0000 to 0001; not so b"):
        read_cases(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(ConfigError, match="no scans found; a cohort is a folder"):
        read_cases(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        read_cases(tmp_path / "gone")
    with pytest.raises(ConfigError, match="no such file"):
        read_cases(tmp_path / "gone.csv")
    with pytest.raises(ConfigError, match="no scans found"):
        read_cases(f"{tmp_path}/*.nii")
