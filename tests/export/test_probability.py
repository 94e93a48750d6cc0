"""Probabilities as volumes: they are the network's, in their place, in two bytes a voxel."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers_cases import write_model, write_scan
from torch import nn

from seg3dcam import SegModel, explain, load_scan
from seg3dcam.errors import ConfigError
from seg3dcam.explaining.certainty import Probabilities, soft_dice_confidence
from seg3dcam.export.probability import STEP
from seg3dcam.job import Job, run_job
from seg3dcam.job.read_back import load_explanation


def test_volumes_are_the_probabilities_on_the_scans_grid(tmp_path):
    scan, model = write_scan(tmp_path / "scan.nii.gz"), write_model(tmp_path)
    job = Job(
        scan=str(scan),
        model=str(model),
        target="lesion",
        format=["probability", "nifti"],
        out=str(tmp_path / "out"),
    )
    run_job(job)
    from seg3dcam import load_model

    network = load_model(str(model))
    with torch.no_grad():
        x = network.prepare(load_scan(scan)).as_tensor()[None]
        from seg3dcam.evaluate.rerun import Rerun

        logits = Rerun(network.module, x, sliding_window=network.window).logits[0].double()
    expected = logits.softmax(0).numpy()
    total = 0
    for index, name in enumerate(["background", "organ", "lesion"]):
        image = nib.load(tmp_path / "out" / f"probability_{name}.nii.gz")
        assert image.get_data_dtype() == np.uint16
        assert np.allclose(image.affine, nib.load(scan).affine, atol=1e-4)
        assert np.abs(image.get_fdata() - expected[index]).max() < STEP
        total = total + image.get_fdata()
    assert np.abs(total - 1).max() < 3 * STEP


def test_an_explanation_that_was_read_back_has_none(tmp_path):
    scan, model = write_scan(tmp_path / "scan.nii.gz"), write_model(tmp_path)
    out = tmp_path / "out"
    run_job(Job(scan=str(scan), model=str(model), target="lesion", format=["nifti"], out=str(out)))
    again = load_explanation(out, scan=scan)
    assert again.probability is None
    assert again.confidence == pytest.approx(
        explain(scan, _loaded(model), "lesion").confidence, abs=1e-9
    )
    from seg3dcam.export.probability import ProbabilityMaps

    with pytest.raises(ConfigError, match="read back"):
        ProbabilityMaps(tmp_path).add(again, "lesion")


def _loaded(model):
    from seg3dcam import load_model

    return load_model(str(model))


# ------------------------------------------------------------------------------------ confidence


def slow_confidence(p, mask):
    inside = sum(float(v) for v, m in zip(p.ravel(), mask.ravel(), strict=True) if m)
    return 2 * inside / (float(p.sum(dtype=np.float64)) + int(mask.sum()))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_confidence_is_that_of_the_definition(activation, classes):
    torch.manual_seed(0)
    logits = 3 * torch.randn(classes, 9, 8, 7)
    for index in range(classes):
        p = Probabilities(logits, activation).of(index)
        wide = logits.double()
        exact = wide.sigmoid() if activation == "sigmoid" or classes == 1 else wide.softmax(0)
        assert torch.allclose(p.double(), exact[index], atol=1e-6)
        mask = torch.rand(9, 8, 7) > 0.5
        found = soft_dice_confidence(p, mask)
        assert found == pytest.approx(slow_confidence(exact[index].numpy(), mask.numpy()), abs=1e-6)
    assert soft_dice_confidence(p, torch.zeros_like(mask)) is None


def test_each_lesion_has_a_confidence_of_its_own():
    """A network whose logit is the scan: the brighter lesion is the surer one."""
    network = nn.Sequential(nn.Conv3d(1, 1, 1), nn.Conv3d(1, 1, 1))
    for layer in network:
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    voxels = np.full((16, 16, 16), -20, np.float32)
    voxels[2:6, 2:6, 2:6], voxels[9:13, 9:13, 9:13] = 5, 0.5
    from seg3dcam import targets
    from seg3dcam.explaining.explain import explain_each

    model = SegModel(network, class_names=["lesion"], activation="sigmoid")
    found = list(
        explain_each(
            load_scan(voxels, affine=np.eye(4)), model, [targets.EveryComponent(0)], layers="0"
        )
    )
    p = [1 / (1 + np.exp(-brightness)) for brightness in (5, 0.5)]
    expected = sorted(2 * one / (one + 1) for one in p)
    assert sorted(one.confidence for one in found) == pytest.approx(expected, abs=1e-5)
    whole = explain(load_scan(voxels, affine=np.eye(4)), model, "lesion", layers="0")
    assert whole.confidence == pytest.approx(2 * sum(p) / (sum(p) + 2), abs=1e-5)
