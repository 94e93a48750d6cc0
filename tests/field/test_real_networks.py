"""Real networks of one resolution, trained by others, on a real T1; skipped without them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from seg3dcam import HiResCAM, suggest_layers, targets

REAL = Path(__file__).parents[3] / "shared" / "real"
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="the real networks are not here")

#: name: the layer in the middle, its depth, the whole depth
MIDDLE = {
    "model5_gw_ae": ("blocks.4", 5, 10),
    "model11_gw_ae": ("blocks.3", 4, 9),
    "model20chan3cls": ("blocks.4", 5, 10),
    "model18cls": ("blocks.4", 5, 10),
    "model30chan18cls": ("blocks.4", 5, 10),
    "model30chan50cls": ("blocks.4", 5, 10),
    "model21_104class": ("blocks.3", 4, 9),
    "mindgrab": ("blocks.12", 13, 26),
}


def settings_of(name):
    return yaml.safe_load((REAL / f"{name}.yaml").read_text())


def mesh_net(name):
    spec = importlib.util.spec_from_file_location("mesh_nets", REAL / "nets.py")
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    network = nets.MeshNet(**settings_of(name)["arguments"])
    network.load_state_dict(load_file(REAL / f"{name}.safetensors"))
    return network.eval()


def the_head(name):
    """Return the scan as the network is trained to see it: axes to the left, down and forward."""
    image = nib.load(REAL / "t1_crop.nii.gz")
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt("LIA")
    )
    voxels = image.as_reoriented(turn).get_fdata()
    low, high = np.percentile(voxels, settings_of(name)["prepare"]["intensity"]["percentiles"])
    voxels = np.clip((voxels - low) / (high - low), 0, 1)
    return torch.tensor(voxels, dtype=torch.float32)[None, None]


def middle_of_the_head(name, size=64):
    """Return the voxels in the middle of the scan."""
    x = the_head(name)
    return x[(..., *(slice(n // 2 - size // 2, n // 2 + size // 2) for n in x.shape[2:]))].clone()


@pytest.mark.parametrize("name", MIDDLE)
def test_the_middle_of_a_mesh_net_is_taken(name):
    layer, depth, whole = MIDDLE[name]
    only, *others = suggest_layers(mesh_net(name), (1, 1, 12, 14, 16))
    assert [s.role for s in others] == ["late", "early", "early"]
    assert (only.name, only.role, only.stride) == (layer, "middle", (1, 1, 1))
    assert f"{depth} of {whole} layers deep" in only.reason
    assert "all evidence for the mask passes through it" in only.reason
    assert "dilated convolutions" in only.reason


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "model11_gw_ae",
        pytest.param("model20chan3cls", marks=pytest.mark.slow),
    ],
)
def test_its_map_echoes_the_mask_less_than_that_of_the_last_layer(name):
    """All that the last layer shows lies inside of the mask."""
    network, x = mesh_net(name), middle_of_the_head(name, size=48)
    with torch.no_grad():
        labels = network(x).argmax(1)
    mask = labels == 1  # white matter
    assert 0.05 < mask.float().mean() < 0.95
    middle = MIDDLE[name][0]
    result = HiResCAM(network, [middle, "blocks"])(x, targets.ClassLogOdds(1))

    def echo(layer):
        values = result.maps[layer]
        alike = np.corrcoef(values.flatten(), mask.flatten())[0, 1]
        positive = values.relu()
        return alike, float(positive[mask].sum() / positive.sum())

    (alike, inside), (last_alike, last_inside) = echo(middle), echo("blocks")
    assert last_alike > 0.7
    assert alike < last_alike - 0.25
    assert last_inside > 0.99
    assert inside < 0.9
