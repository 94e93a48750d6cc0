"""A cohort case by case: what is done stays, what fails is said, and nothing is done twice."""

from __future__ import annotations

import csv
import os

import nibabel as nib
import numpy as np
import pytest
from helpers_cases import voxels, write_model, write_scan

from seg3dcam import cohort
from seg3dcam.cohort import running, work
from seg3dcam.cohort.plan import noted
from seg3dcam.errors import ConfigError
from seg3dcam.job.record import record_of
from seg3dcam.job.run import run_job
from seg3dcam.job.settings import Job

NAMES = ("a", "b", "c")


@pytest.fixture
def scans(tmp_path):
    """A folder of three scans, of which `b` is damaged, beside a model."""
    folder = tmp_path / "scans"
    folder.mkdir()
    write_model(tmp_path)
    for number, name in enumerate(NAMES):
        write_scan(tmp_path / "scan.nii.gz")
        image = nib.load(tmp_path / "scan.nii.gz")
        voxels = image.get_fdata(dtype=np.float32) + 0.01 * number
        nib.save(nib.Nifti1Image(voxels, image.affine), folder / f"{name}.nii.gz")
    (folder / "b.nii.gz").write_bytes(b"no scan")
    return folder


def explained(scans, **more):
    settings = {"target": "lesion", "format": ["nifti"]} | more
    return cohort.run(
        scans, model=str(scans.parent / "model.yaml"), out=scans.parent / "out", **settings
    )


def rows(result):
    with result.tables[0].open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_what_fails_is_written_down_and_stops_nothing(scans):
    said = []
    result = explained(scans, say=said.append)
    assert result.done == ("a", "c")
    assert list(result.failed) == ["b"]
    plan, failure = said
    assert plan.startswith("3 cases: 0 done, 3 to do. nifti, thumb: at most about ")
    assert failure == f"b failed: {result.failed['b']}"
    assert [(row["case"], row["status"]) for row in rows(result)] == [
        ("a", "ok"),
        ("b", "failed"),
        ("c", "ok"),
    ]
    one, failed, _ = rows(result)
    assert one["class"] == "lesion"
    assert one["method"] == "hires_cam"
    assert float(one["cam_outside"]) >= 0
    assert failed["error"] == result.failed["b"]
    log = (result.out / "cohort" / "b.log").read_text(encoding="utf-8")
    assert "Traceback" in log
    assert "failed after" in log.splitlines()[-1]
    parquet = pytest.importorskip("pyarrow.parquet")
    assert parquet.read_table(result.tables[1]).column("case").to_pylist() == list(NAMES)


def test_a_case_is_the_job_of_its_own(scans, tmp_path):
    explained(scans)
    alone = Job(
        scan=str(scans / "a.nii.gz"),
        model=str(tmp_path / "model.yaml"),
        target="lesion",
        format=["nifti", "thumb"],
        case="a",
        out=str(tmp_path / "alone"),
    )
    run_job(alone)
    one, other = record_of(tmp_path / "out" / "a"), record_of(tmp_path / "alone")
    assert one.key == other.key
    assert one.files == other.files


def test_a_rerun_does_what_is_missing(scans, monkeypatch):
    first = explained(scans)
    worked, given = [], work.run_with_model

    def counted(job, *args, **settings):
        worked.append(job.case)
        return given(job, *args, **settings)

    monkeypatch.setattr(work, "run_with_model", counted)
    again = explained(scans)
    assert worked == []
    assert again.skipped == ("a", "c")
    assert again.failed == first.failed
    assert explained(scans, retry_failed=True).failed == first.failed
    assert worked == ["b"]

    (first.out / "c" / "case.json").unlink()
    assert explained(scans).done == ("c",)
    (scans / "b.nii.gz").write_bytes((scans / "a.nii.gz").read_bytes())
    mended = explained(scans)
    assert mended.done == ("b",)
    assert mended.failed == {}
    assert [row["status"] for row in rows(mended)] == ["ok"] * 3
    assert noted(first.out, "b").error == ""


def test_the_same_scan_with_another_time_is_not_explained_again(scans):
    result = explained(scans)
    volumes = sorted((result.out / "a").glob("*.nii.gz"))
    before = [volume.stat().st_mtime_ns for volume in volumes]
    seconds = [row["seconds"] for row in rows(result)]
    assert [bool(cell) for cell in seconds] == [True, False, True]
    assert float(seconds[0]) > 0
    os.utime(scans / "a.nii.gz", ns=(1, 1))
    assert explained(scans).done == ("a",)  # it was read, and found to be done
    assert [volume.stat().st_mtime_ns for volume in volumes] == before != []
    again = explained(scans)
    assert again.done == ()
    assert [row["seconds"] for row in rows(again)] == seconds  # of the work, not of the reading


def test_another_recommendation_is_another_setting(scans, monkeypatch):
    """A case knows its layer, so "auto" must not hide that it means another one now."""
    explained(scans)
    given = running.advised

    def advised(job, model):
        return given(job.model_copy(update={"layer": "model.0"}), model)

    monkeypatch.setattr(running, "advised", advised)
    with pytest.raises(ConfigError, match=r"other settings.*\n  layer: 'auto' there"):
        explained(scans)


def test_parts_make_the_whole(scans):
    parts = [explained(scans, num_parts=2, part_id=part) for part in (0, 1)]
    assert [part.done for part in parts] == [("a", "c"), ()]
    assert list(parts[1].failed) == ["b"]
    assert [row["case"] for row in rows(parts[1])] == list(NAMES)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_parts": 2, "part_id": 2}, "legal are 0 to 1"),
        ({"num_parts": 0}, "num_parts"),
        ({"truth": "t.nii"}, "every case of a cohort has its own"),
        ({"methd": "x"}, "did you mean 'method'"),
        ({"method": "hires"}, "hires_cam"),
    ],
)
def test_bad_input(scans, settings, words):
    with pytest.raises(ConfigError, match=words):
        explained(scans, **settings)
    assert not list((scans.parent / "out").glob("*/case.json"))


def test_a_folder_of_other_settings_is_left_alone(scans):
    explained(scans)
    with pytest.raises(
        ConfigError, match=r"cohort of other settings.*\n  method: \['hires_cam'\] there"
    ):
        explained(scans, method="grad_cam")


def test_a_case_must_not_lie_where_the_cohorts_own_files_lie(scans):
    (scans / "a.nii.gz").rename(scans / "cohort.nii.gz")
    with pytest.raises(ConfigError, match="kept for the cohort"):
        explained(scans)


def test_a_scan_without_the_class_has_not_failed(scans):
    """One class of two is explained where the other is not there; and a case may have neither."""
    image = nib.load(scans / "a.nii.gz")
    for name, array in (("b", voxels(lesion=False)), ("c", voxels(lesion=False, organ=False))):
        nib.save(nib.Nifti1Image(array, image.affine), scans / f"{name}.nii.gz")
    result = explained(scans, target=["organ", "lesion"])
    assert result.done == NAMES
    assert result.failed == {}
    found = [(row["case"], row["class"], row["status"]) for row in rows(result)]
    assert found == [
        ("a", "organ", "ok"),
        ("a", "lesion", "ok"),
        ("b", "organ", "ok"),
        ("c", "", "empty"),
    ]
    assert "the region is empty" in rows(result)[-1]["error"]
    assert record_of(result.out / "c").explanations == []
    assert explained(scans, target=["organ", "lesion"]).skipped == NAMES
    assert explained_every_class(scans).failed == {}


def explained_every_class(scans):
    model = str(scans.parent / "model.yaml")
    return cohort.run(scans, model=model, out=scans.parent / "every", format=["nifti"])


def test_empty_targets_are_left_out_where_that_is_asked_for(tmp_path):
    from seg3dcam import load_model
    from seg3dcam.errors import EmptyRegionError
    from seg3dcam.explaining.explain import explain_each

    write_scan(tmp_path / "scan.nii.gz", voxels(lesion=False))
    model = load_model(str(write_model(tmp_path)))
    both = ["organ", "lesion"]
    with pytest.raises(EmptyRegionError):
        list(explain_each(tmp_path / "scan.nii.gz", model, both))
    found = list(explain_each(tmp_path / "scan.nii.gz", model, both, skip_empty=True))
    assert [one.label for one in found] == ["organ"]
    with pytest.raises(EmptyRegionError):
        list(explain_each(tmp_path / "scan.nii.gz", model, ["lesion"], skip_empty=True))
