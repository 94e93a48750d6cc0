"""The documents about the whole package tell the truth: docs/architecture.md and CITATION.cff."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from test_package import LEVEL, PACKAGE

import seg3dcam

ROOT = Path(__file__).parents[1]


def test_every_room_is_described_in_the_order_of_imports():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = [room.removesuffix(".py") for room in re.findall(r"^\| `(\w+(?:/|\.py))`", text, re.M)]
    rooms = [room.removesuffix("/") for room in rooms]
    assert sorted(rooms) == sorted(LEVEL)
    assert [LEVEL[room] for room in rooms] == sorted(LEVEL[room] for room in rooms)
    there = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert set(rooms) == there - {"__init__", "__main__"}


def test_files_that_the_architecture_names_are_there():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:tests|cams|explaining|models)/[\w/]*\w\.py)`", text):
        assert (PACKAGE / name).is_file() or (ROOT / name).is_file(), name


def test_the_citation_has_the_version_and_licence_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == "seg3dcam"
    assert citation["version"] == seg3dcam.__version__
    assert citation["license"] == "Apache-2.0"
    assert {"message", "authors"} <= set(citation)
