"""Paths that no disk can hold: one sentence, exit 1 or 2, nothing written, for every option."""

from __future__ import annotations

import os
import re

import pytest
from helpers_cases import Place, contents, seg3dcam, write_model, write_yaml


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = Place.at(tmp_path_factory.mktemp("paths"))
    (place.folder / "loop").symlink_to(place.folder / "loop")
    return place


PATHS = {
    "too long": "x" * 3000,
    "a deep folder": "/".join(["x" * 200] * 40),
    "a loop": "loop",
    "inside a loop": "loop/a.nii.gz",
    "under a file": "scan.nii.gz/a.nii.gz",
    "a device": "/dev/null",
    "NUL": "a\0b",
    "nothing": "",
    "half a character": "a\ud800b",
}


@pytest.mark.few(20)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("key", ["scan", "model", "out", "truth", "bundle", "nnunet", "weights"])
def test_in_a_job(place, key, path, monkeypatch):
    if (key, path) == ("out", "nothing"):
        pytest.skip("the folder of the job")
    monkeypatch.chdir(place.folder)
    job = {"scan": "scan.nii.gz", "model": "model.yaml", "out": "out", "format": ["nifti"]}
    value = PATHS[path]
    if key in ("bundle", "nnunet"):
        job["model"] = f"{key}:{value}"
    elif key == "weights":
        write_yaml(
            place.folder / "other.yaml",
            {"factory": "monai.networks.nets:UNet", "weights": value, "classes": ["a"]},
        )
        job["model"] = "other.yaml"
    else:
        job[key] = value
    before = contents(place.folder)
    write_yaml(place.folder / "job.yaml", job)
    outcome = seg3dcam("explain", "--config", "job.yaml")
    assert outcome.code in (1, 2), outcome.out
    assert 20 < len(outcome.complaint) < 20_000
    after = contents(place.folder)
    assert after.keys() - before.keys() <= {"job.yaml", "out"}
    assert not any(name.startswith("out/") for name in after)


@pytest.mark.parametrize("path", [p for p in PATHS if p not in ("NUL", "nothing")])
@pytest.mark.parametrize("command", ["layers", "features", "config", "out", "model"])
def test_on_the_command_line(place, command, path, monkeypatch):
    monkeypatch.chdir(place.folder)
    value = PATHS[path]
    words = {
        "layers": ("layers", "--model", value),
        "features": ("features", value, "--model", "model.yaml", "--layer", "model.0"),
        "config": ("explain", "--config", value),
        "out": ("features", "scan.nii.gz", "--model", "model.yaml", "--out", value),
        "model": ("features", "scan.nii.gz", "--model", value),
    }[command]
    outcome = seg3dcam(*words)
    assert outcome.code in (1, 2), outcome.out
    assert 10 < len(outcome.complaint) < 20_000


# ------------------------------------------------------------------------ other values of a job

WRONG = {
    "a class by true": ({"target": True}, "target"),
    "a class by a number with a point": ({"target": 1.0}, "target"),
    "no scan in a list": ({"scan": [None]}, "scan"),
    "a list in a list": ({"scan": [["a.nii.gz"]]}, "scan"),
    "an endless name": ({"case": "x" * 4000}, "case: .*at most 200"),
    "a setting of the call": ({"settings": {"targets": 1}}, "'targets' is none of a method"),
    "layers as a setting": ({"settings": {"layers": ["a"]}}, "'layers' is none of a method"),
    "self as a setting": ({"settings": {"self": 1}}, "'self' is none of a method"),
}


@pytest.mark.parametrize("what", WRONG)
def test_values_that_are_taken_for_no_others(place, what, monkeypatch):
    monkeypatch.chdir(place.folder)
    change, said = WRONG[what]
    write_yaml(place.folder / "job.yaml", {"scan": "scan.nii.gz", "model": "model.yaml", **change})
    outcome = seg3dcam("explain", "--config", "job.yaml")
    assert outcome.code == 2
    assert re.search(said, outcome.complaint)


@pytest.mark.parametrize(
    "key", [{"window": {"roi_size": 10**6}}, {"prepare": {"pad_divisible": 10**5}}], ids=str
)
def test_sizes_that_no_scan_has(place, key):
    path = write_model(place.folder / "large", **key)
    outcome = seg3dcam("explain", place.scan, "--model", path)
    assert outcome.code == 2
    assert re.search("roi_size|pad_divisible", outcome.complaint)


@pytest.mark.parametrize("option", ["--model", "--config"])
def test_a_pipe_is_not_waited_for(place, option):
    pipe = place.folder / "pipe.yaml"
    if not pipe.exists():
        os.mkfifo(pipe)
    outcome = seg3dcam("explain", place.scan, option, pipe)
    assert outcome.code in (1, 2)
    assert "pipe" in outcome.complaint


def test_nothing_that_a_terminal_obeys_is_printed(place):
    weights = "\x1b]0;evil\x07\x1b[2J" + "w.pt"
    path = write_model(place.folder / "evil", weights=weights, **{"key\x1b[31m": 1})
    outcome = seg3dcam("explain", place.scan, "--model", path)
    assert outcome.code in (1, 2)
    path = write_model(place.folder / "evil", weights=weights)
    again = seg3dcam("explain", place.scan, "--model", path)
    assert "w.pt" in again.err
    assert not {"\x1b", "\x07"} & {*outcome.err, *again.err}
