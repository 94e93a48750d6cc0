"""Paths that no disk can hold: one sentence, exit 1 or 2, nothing written, for every option."""

from __future__ import annotations

import pytest
from helpers_cases import Place, contents, seg3dcam, write_yaml


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
