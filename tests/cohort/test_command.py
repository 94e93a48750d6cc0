"""`seg3dcam cohort` and its kin: exit codes, files, and what is said."""

from __future__ import annotations

import csv
import json

import pytest
from helpers_cases import seg3dcam
from helpers_cohort import write_cohort

NAMES = ["a", "b", "c"]


@pytest.fixture
def scans(tmp_path):
    return write_cohort(tmp_path, NAMES)


def run(scans, *options):
    root = scans.parent
    return seg3dcam(
        *("cohort", scans, "--model", root / "model.yaml", "--out", root / "out"),
        *("--target", "lesion", *options),
    )


def test_a_cohort_leaves_what_was_promised(scans):
    done = run(scans)
    assert done.code == 0, done.err
    out = scans.parent / "out"
    for name in NAMES:
        record = json.loads((out / name / "case.json").read_text(encoding="utf-8"))
        kinds = {file.split("_")[0].split(".")[0] for file in record["files"]}
        assert kinds == {"cam", "raw", "prediction", "report", "thumb"}
    with (out / "cohort.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == NAMES
    assert {"case", "class", "layer", "method", "status"} <= rows[0].keys()
    assert {row["status"] for row in rows} == {"ok"}
    assert (out / "cohort.parquet").is_file()
    assert (out / "index.html").is_file()
    assert "3 cases: 0 done, 3 to do" in done.out
    assert "3 done, 0 done before, 0 failed" in done.out


def test_failures_are_one_and_wrong_use_is_two(scans):
    (scans / "b.nii.gz").write_bytes(b"no scan")
    failed = run(scans)
    assert failed.code == 1
    assert "b failed: " in failed.out
    assert "failed: 1 of the cases" in failed.complaint
    assert "Traceback" not in failed.out + failed.err
    again = run(scans)
    assert again.code == 1
    assert "1 failed before (to try them again: --retry-failed)" in again.out
    (scans / "b.nii.gz").write_bytes((scans / "a.nii.gz").read_bytes())
    assert run(scans).code == 0
    for wrong in (
        ("--num-parts", "2", "--part-id", "2"),
        ("--workers", "0"),
        ("--keep", "nifty"),
        ("--method", "hires"),
        ("--gpus", "0.5"),
        ("--method", "grad_cam"),  # other settings than those of the folder
    ):
        assert run(scans, *wrong).code == 2, wrong


@pytest.mark.parametrize(
    "words",
    [
        ("cohort",),
        ("cohort", "nowhere", "--model", "m.yaml", "--out", "o"),
        ("cohort", ".", "--out", "o"),
        ("cohort", ".", "--model", "m.yaml"),
        ("cohort-compare", "nowhere", "elsewhere"),
        ("cohort-map", "nowhere", "--target", "lesion"),
    ],
)
def test_wrong_use(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = seg3dcam(*words)
    assert found.code == 2
    assert "Traceback" not in found.out + found.err


def test_what_is_kept_is_what_was_named(scans):
    assert run(scans, "--keep", "png").code == 0
    names = {path.suffix for path in (scans.parent / "out" / "a").rglob("*") if path.is_file()}
    assert names == {".png", ".webp", ".json"}


def test_two_cohorts_and_a_group(scans, tmp_path):
    assert run(scans, "--keep", "nifti").code == 0
    out = scans.parent / "out"
    compared = seg3dcam("cohort-compare", out, out, "--out", tmp_path / "compared")
    assert compared.code == 0, compared.err
    assert "What differs most" in compared.out
    assert (tmp_path / "compared" / "pairs.csv").is_file()
    grouped = seg3dcam("cohort-map", out, "--target", "lesion", "--out", tmp_path / "group")
    assert grouped.code == 0, grouped.err
    assert (tmp_path / "group" / "mean_lesion.nii.gz").is_file()


def test_uncertainty(scans, tmp_path):
    found = seg3dcam(
        *("uncertainty", scans / "a.nii.gz", "--model", scans.parent / "model.yaml"),
        *("--flip", "0", "--out", tmp_path / "unsure"),
    )
    assert found.code == 0, found.err
    assert "Members: 2" in found.out
    names = sorted(path.name for path in (tmp_path / "unsure").iterdir())
    assert names == ["entropy.nii.gz", "figures.json", "mutual_information.nii.gz"]
    assert "2 of 2" in found.out
