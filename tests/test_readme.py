"""What the README shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from seg3dcam.cams import CAMS
from seg3dcam.config import ModelSpec, validate

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(3))
def test_the_python_examples_run(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(blocks("python")[number], {"__name__": "readme"})
    written = [file.name for file in tmp_path.glob("*.nii.gz")]
    assert written == [["cam.nii.gz"], ["lesion.nii.gz"], []][number]


def test_the_model_spec_is_legal() -> None:
    (spec,) = blocks("yaml")
    validate(yaml.safe_load(spec), ModelSpec, "README.md")


def test_every_method_is_in_the_table() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", README.read_text(), re.MULTILINE)) == set(CAMS)


def test_the_two_commands_are_those_of_ci() -> None:
    ci = (README.parent / ".ci" / "run").read_text()
    install_and_demo, install_and_test = (line for line in blocks("bash")[:2])
    for command in [*install_and_demo.split(" && "), *install_and_test.split(" && ")]:
        assert command.strip() in ci
