"""The recipes of CONTRIBUTING.md are whole changes: applied to a copy, a job uses them all."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
RECIPES = dict(
    re.findall(
        r"^## Add a ([\w ]+)\n.*?^```diff\n(.*?)^```",
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
)

#: Brightness from which the recipe's model calls a voxel bright.
THRESHOLD = 0.5


def test_there_are_four_recipes():
    assert list(RECIPES) == ["method", "target", "format", "model source"]


@pytest.mark.parametrize("kind", RECIPES)
def test_a_recipe_is_a_formula_or_a_file_and_a_line(kind):
    """What a contributor touches: at most three files, and ten lines beside what is new."""
    files = re.findall(r"^\+\+\+ b/(.*)$", RECIPES[kind], re.MULTILINE)
    assert 2 <= len(files) <= 3
    removed = re.findall(r"^-(?!--)", RECIPES[kind], re.MULTILINE)
    assert len(removed) <= 1


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """Return a copy of the package with all recipes applied."""
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(
        ROOT / "seg3dcam", folder / "seg3dcam", ignore=shutil.ignore_patterns("__pycache__")
    )
    for recipe in RECIPES.values():
        subprocess.run(
            ["git", "apply", "--unidiff-zero", "-"],
            cwd=folder,
            input=recipe,
            text=True,
            check=True,
            env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)},
        )
    return folder


def run(changed, folder, *words):
    """Run the changed command in a folder; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "seg3dcam", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(changed), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_job_uses_all_recipes(changed, tmp_path):
    """Of a network without weights but one the map is known: its logit over the bright voxels."""
    voxels = np.random.default_rng(0).random((6, 7, 8), dtype=np.float32)
    nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 2.0, 3.0, 1.0])), tmp_path / "scan.nii.gz")
    (tmp_path / "model.yaml").write_text(f"threshold: {THRESHOLD}\n")
    what = "scan.nii.gz --model model.yaml --target bright --score margin --layer 0"
    how = "--method size_cam --format arrays --out out"
    run(changed, tmp_path, "explain", *what.split(), *how.split())
    found = np.load(tmp_path / "out" / "arrays_bright.npz")
    np.testing.assert_array_equal(found["affine"], np.diag([1.0, 2.0, 3.0, 1.0]))
    expected = np.where(voxels > THRESHOLD, voxels - THRESHOLD, 0)
    np.testing.assert_allclose(found["0"], expected, atol=1e-6)


def test_the_command_lists_what_the_recipes_add(changed, tmp_path):
    assert "size_cam" in run(changed, tmp_path, "methods")
    shown = run(changed, tmp_path, "explain", "--help")
    assert "margin" in shown
    assert "arrays" in shown
