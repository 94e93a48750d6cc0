"""The training script of the demo's model runs, and the shipped model is what it describes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from monai.networks.nets import UNet
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "train_demo_model.py"
SHIPPED = ROOT / "seg3dcam" / "demo"


def load_model(folder: Path) -> tuple[UNet, dict]:
    """Build the network that a model.yaml describes and load its weights, all keys matching."""
    spec = yaml.safe_load((folder / "model.yaml").read_text(encoding="utf-8"))
    assert spec["factory"] == "monai.networks.nets:UNet"
    model = UNet(**spec["arguments"])
    model.load_state_dict(load_file(folder / spec["weights"]))
    return model.eval(), spec


def run_fast_check(*folders: Path) -> str:
    """Run the script's smoke run from the repository, so that it finds the package there.

    One process makes all runs, of which each begins as it would in one of its own: it sets seeds.
    """
    # Where pydicom is installed, one of MONAI's readers complains of a missing decoder.
    allowed = ["-W", "ignore:nvImageCodec", "-W", "ignore:NvImgCodecPydicomReader"]
    bootstrap = """
import runpy, sys
sys.path.insert(0, ".")
script, *folders = sys.argv[1:]
for folder in folders:
    sys.argv = [script, "--fast-check", "--out", folder]
    runpy.run_path(script, run_name="__main__")
"""
    command = [sys.executable, "-W", "error", *allowed, "-c", bootstrap, str(SCRIPT)]
    command += map(str, folders)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_fast_check_runs_and_repeats_itself(tmp_path):
    said = run_fast_check(tmp_path / "first", tmp_path / "again")
    for name in ("grey matter", "white matter", "lesion"):
        assert said.count(f"demo scan: Dice of {name}") == 2
    one, spec = load_model(tmp_path / "first")
    two, _ = load_model(tmp_path / "again")
    assert spec["window"]["roi_size"] == [32, 32, 32]
    # The same seed gives the same weights, up to the order in which threads add up.
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-3), name


def test_shipped_model_loads_and_gives_its_classes():
    model, spec = load_model(SHIPPED)
    assert spec["classes"] == ["background", "grey matter", "white matter", "lesion"]
    with torch.no_grad():
        scores = model(torch.zeros(1, 1, *spec["window"]["roi_size"]))
    assert scores.shape == (1, 4, *spec["window"]["roi_size"])
    assert torch.isfinite(scores).all()


def test_shipped_weights_are_small_and_single_precision():
    assert (SHIPPED / "model.safetensors").stat().st_size <= 2_000_000
    weights = load_file(SHIPPED / "model.safetensors")
    kinds = {tensor.dtype for tensor in weights.values()}
    assert kinds <= {torch.float32, torch.int64}  # batch norm counts its batches


def test_window_fits_the_network_and_slides_over_the_scan():
    _, spec = load_model(SHIPPED)
    stride = int(np.prod(spec["arguments"]["strides"]))
    assert stride >= 8
    assert all(size % stride == 0 for size in spec["window"]["roi_size"])
    prepared = np.array([197, 233, 189]) / spec["prepare"]["spacing"]
    assert (prepared > spec["window"]["roi_size"]).all()
