"""A job run from Python: the same as by the command, and the tables that jobs are made of."""

from __future__ import annotations

import fnmatch
import inspect
from typing import get_args

import pytest
from helpers_cases import Place, contents, explain_once, voxels, write_scan

from seg3dcam import targets
from seg3dcam.cams.base import BaseCAM
from seg3dcam.errors import ConfigError, InputError, ScanError
from seg3dcam.explaining.explain import explain_each
from seg3dcam.files.readers import FRAMES
from seg3dcam.geometry import Axis
from seg3dcam.job import Job, JobResult, load_explanation, run_job, settings, writers
from seg3dcam.job.checks import OF_CALLS
from seg3dcam.job.formats import FORMATS
from seg3dcam.job.record import read_record
from seg3dcam.review import WINDOWS
from seg3dcam.targets.named import REGIONS, SCORES
from seg3dcam.targets.regions import as_region

pytestmark = pytest.mark.usefixtures("measured_once")


def job_at(place, **settings):
    where = {"scan": str(place.scan), "model": str(place.model), "out": str(place.out)}
    return Job(**{**where, "format": "nifti", **settings})


# ----------------------------------------------------------------------------------- run


def test_a_job_writes_what_the_command_writes_and_says_nothing(place, capsys):
    result = run_job(job_at(place, target=["lesion"]))
    assert capsys.readouterr() == ("", "")
    assert (result.folder, result.was_done, result.notes) == (place.out, False, ())
    assert result.record["explanations"] == place.record["explanations"]
    assert set(result.record["files"]) == set(place.record["files"])
    assert load_explanation(result.folder, scan=place.scan).label == "lesion"
    written = contents(place.out)
    assert place.explain("--target", "lesion", "--force").code == 0
    assert contents(place.out) == written


def test_a_job_that_is_done_is_skipped(place):
    first = run_job(job_at(place))
    written = contents(place.out)
    again = run_job(job_at(place), verify=True)
    assert again == JobResult(first.folder, first.record, was_done=True, key=first.key)
    assert first.key == read_record(first.folder).runs[-1].key
    assert contents(place.out) == written
    events = []
    steps = {"progress": lambda step, *_: events.append(step), "say": events.append}
    (forced,) = run_job(job_at(place), force=True, **steps).notes
    assert events[:2] == ["reading", forced]
    assert forced == f"{place.out} holds this job from before: it is done again, and replaced"


def test_another_scan_gets_a_folder_of_its_own_which_is_said(place):
    run_job(job_at(place))
    other = Place(place.folder / "other")
    other.folder.mkdir()
    Place.at(other.folder)
    write_scan(other.scan, voxels() * 1.01)
    result = run_job(job_at(place, scan=str(other.scan)))
    assert result.folder.parent == place.out
    assert result.notes == (
        f"{place.out} holds another scan's case: this one goes to {result.folder}",
    )


def test_what_is_replaced_is_said_before_the_work(place):
    run_job(job_at(place))
    events = []
    steps = {"progress": lambda step, *_: events.append(step), "say": events.append}
    result = run_job(job_at(place), force=True, **steps)
    (note,) = result.notes
    assert events.index("reading") < events.index(note) < events.index("predicting")


def test_progress_is_told(place):
    calls = []
    run_job(job_at(place, target="lesion"), progress=lambda *call: calls.append(call))
    assert calls[0] == ("reading", 0, 1)
    assert ("writing lesion: nifti", 0, 1) in calls


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "gradcam"}, "method 'gradcam': did you mean 'grad_cam'"),
        ({"method": ["fem", "grad_cam"], "settings": {"window": 4}}, "those of one method"),
        ({"settings": {"threshold": 4}}, "'threshold' is none of a method"),
        ({"settings": {"sliding_window": 4}}, "'sliding_window' is none of a method"),
        ({"settings": {"windo": 4}, "method": "xres_cam"}, "no setting 'windo'.*'window'"),
        ({"score": "contrast"}, "score 'contrast' needs a class"),
        ({"score": "mask_output", "target": 1}, "mask_output is about no class: leave out the tar"),
        ({"score": "mask_output", "region": "boundary"}, "about one: take predicted or volume"),
        ({"score": "mask_output", "truth": "t.nii.gz"}, "so there is no truth of it"),
        ({"score": "soft_dice", "target": 1}, "score soft_dice and the regions false_negatives, "),
        ({"colormap": "no_colours"}, "no_colours"),
        ({"out": "."}, "the scan or the truth lies in this folder"),
    ],
    ids=str,
)
def test_wrong_settings_are_found_before_anything_is_loaded(settings, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = Job(**{"scan": "missing.nii.gz", "model": "missing.yaml", **settings})
    with pytest.raises(ConfigError, match=said):
        run_job(job)
    assert contents(tmp_path) == {}


def test_a_missing_scan_or_model_is_an_error_of_its_own(place):
    with pytest.raises(ScanError, match="missing"):
        run_job(job_at(place, scan="missing.nii.gz"))
    with pytest.raises(InputError, match="missing"):
        run_job(job_at(place, model="missing.yaml"))


# ------------------------------------------------------------------------------- tables


def test_arguments_of_calls_are_no_settings_of_a_method():
    calls = (BaseCAM.__init__, explain_each)
    names = {name for call in calls for name in inspect.signature(call).parameters}
    assert names - set(Job.model_fields) == OF_CALLS


@pytest.mark.parametrize("score", SCORES)
def test_every_score_is_a_target(score):
    assert SCORES[score].type_name in targets.__all__


@pytest.mark.parametrize("region", REGIONS)
def test_every_region_is_known(region):
    name = REGIONS[region].type_name
    assert name in targets.__all__ or (not name and as_region(region))


def test_what_settings_say_again_is_what_the_other_rooms_say():
    """Rooms that need PyTorch are not asked when the settings are made."""
    assert get_args(settings.Axis) == get_args(Axis)
    assert get_args(get_args(Job.model_fields["frame"].annotation)[0]) == FRAMES
    words = Job.model_fields["intensity_window"].description
    assert all(name in words for name in WINDOWS)


def test_defaults_are_the_first_and_the_marked():
    job = Job(scan="a", model="b")
    assert job.score == next(iter(SCORES))
    assert job.formats == [name for name in FORMATS if FORMATS[name].by_default]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_has_a_writer(kind):
    assert callable(getattr(writers, FORMATS[kind].writer))


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", [kind for kind in FORMATS if FORMATS[kind].check is None])
def test_a_format_writes_the_files_that_its_line_names(place, kind, monkeypatch):
    monkeypatch.setattr("seg3dcam.job.run.explain_each", explain_once)
    settings = {"target": ["organ"], "method": ["hires_cam", "fem"], "format": kind}
    files = run_job(job_at(place, **settings)).record["files"]
    of_some = {"region_*.nii.gz", "truth_*.nii.gz"}
    for file in files:
        assert any(fnmatch.fnmatch(file, pattern) for pattern in FORMATS[kind].files), file
    for pattern in set(FORMATS[kind].files) - of_some:
        found = fnmatch.filter(files, pattern)
        assert found, pattern
        own = not FORMATS[kind].joint and not pattern.startswith("prediction")
        assert len(found) >= 2 if own else found
