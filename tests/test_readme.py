"""What the README shows works as it stands there."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from helpers_cases import seg3dcam

from seg3dcam.cams.catalogue import CAMS
from seg3dcam.job.formats import FORMATS
from seg3dcam.models import factory
from seg3dcam.settings import validate

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize(
    "number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))]
)
def test_the_python_examples_run(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(blocks("python")[number], {"__name__": "readme"})
    written = {file.name for file in tmp_path.iterdir()} - {"demo"}
    of_pictures = {"report.html", "slicer", "slices"}
    assert written == [{"cam.nii.gz"}, {"lesion.nii.gz"}, of_pictures, set()][number]


def test_the_model_spec_is_legal() -> None:
    (spec,) = blocks("yaml")
    validate(yaml.safe_load(spec), factory.Spec, "README.md")


def test_every_method_and_every_format_is_in_a_table() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", README.read_text(), re.MULTILINE))
    assert listed == set(CAMS) | set(FORMATS)


def test_the_two_commands_are_those_of_ci() -> None:
    ci = (README.parent / ".ci" / "run").read_text()
    install_and_demo, install_and_test = (line for line in blocks("bash")[:2])
    for command in [*install_and_demo.split(" && "), *install_and_test.split(" && ")]:
        assert command.strip() in ci


def test_every_picture_is_there() -> None:
    pictures = re.findall(r"!\[[^]]+\]\((.+?)\)", README.read_text(encoding="utf-8"))
    assert len(pictures) == 3
    assert all((README.parent / picture).is_file() for picture in pictures)


@pytest.mark.slow
def test_the_first_picture_is_what_the_demo_writes(tmp_path: Path) -> None:
    demo = Path(os.environ.get("SEG3DCAM_DEMO", tmp_path))  # CI has run the README's command
    if not (demo / "explained").is_dir():
        assert seg3dcam("demo", "--out", demo).code == 0
    record = json.loads((demo / "explained" / "case.json").read_text(encoding="utf-8"))
    assert not any(entry["found"]["warnings"] for entry in record["explanations"])
    made = cv2.imread(str(demo / "explained" / "planes_lesion.png")).astype(float)
    shown = cv2.imread(str(README.parent / "docs" / "demo_planes.png")).astype(float)
    assert made.shape == shown.shape
    assert np.abs(made - shown).mean() < 1  # of 255; another version may round otherwise
