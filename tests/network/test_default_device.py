"""Callers that have set a default device: nothing of this library is made there by accident.

On the device "meta" tensors have no values, so whatever is made there unasked fails at once where
it meets a value. Maps must be those of a caller without a default device, bit for bit.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers_cases import OBLIQUE, SHAPE, Place
from helpers_crossed import crossed
from helpers_nnunet import write_case, write_folder
from monai.data import MetaTensor
from torch import nn

from seg3dcam import (
    Ensemble,
    GradCAM,
    HiResCAM,
    WindowPlan,
    explain,
    load_model,
    load_scan,
    suggest_layers,
    targets,
)
from seg3dcam.cams.attributions import ATTRIBUTIONS
from seg3dcam.cams.catalogue import CAMS
from seg3dcam.cams.feature_maps import feature_maps
from seg3dcam.errors import EmptyRegionError
from seg3dcam.integrations import Camd, CamInferer, EpochCams

METHODS = CAMS | ATTRIBUTIONS
VOLUME = targets.ClassLogit(1, region="volume")
LAYER = "2"

quiet = pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")


@pytest.fixture
def net():
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv3d(4, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose3d(6, 3, 2, 2),
    )


@pytest.fixture
def x():
    return torch.rand(1, 1, 8, 8, 8)


def same_elsewhere(explained):
    """Call it without a default device and with one; return both, which must be equal."""
    expected = explained()
    with torch.device("meta"):
        found = explained()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# captum itself makes the steps of integrated gradients on the default device.
@quiet
@pytest.mark.parametrize(
    ("key", "plan"),
    crossed(
        [key for key in METHODS if key != "integrated_gradients"],
        [None, WindowPlan((8, 8, 4))],
        rows=8,
    ),
)
def test_every_method(key, plan, net, x):
    def explained():
        torch.manual_seed(0)
        cam = METHODS[key](net, LAYER, sliding_window=plan)
        return [layer.values for layer in cam(x, VOLUME).layers.values()]

    same_elsewhere(explained)


def test_the_device_that_shows_it_would_show_it(net, x):
    """A tensor that is made without a device does not pass unnoticed."""
    stray = lambda logits: (logits * torch.ones(logits.shape)).flatten(1).sum(1)  # noqa: E731
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta"):
        HiResCAM(net, LAYER)(x, stray)


MASK = torch.zeros(8, 8, 8, dtype=torch.int64)
MASK[2:6, 2:6, 2:6] = 1
REGIONS = {
    "volume": "volume",
    "predicted": "predicted",
    "box": targets.Box((0, 0, 0), (4, 4, 4)),
    "component": targets.Component(0),
    "boundary": targets.Boundary(),
    "mask": MASK,
    "truth": targets.FalseNegatives(MASK, label=1),
    "mask on its grid": MetaTensor(MASK[None].float()),
}


@quiet
@pytest.mark.parametrize("region", REGIONS)
def test_every_region(region, net, x):
    for target in (targets.ClassLogit(1, REGIONS[region]), targets.SoftDice(1, MASK)):
        same_elsewhere(lambda target=target: GradCAM(net, LAYER)(x, target).volume())


def test_a_voxel_outside_of_every_component_is_explained(net, x):
    with torch.no_grad():
        where = net(x)[0].argmax(0).ne(1).nonzero()[0].tolist()
    region = targets.Component(voxel=tuple(where))
    with torch.device("meta"), pytest.raises(EmptyRegionError, match="nearest component"):
        HiResCAM(net, LAYER)(x, targets.ClassLogit(1, region))


@quiet
@pytest.mark.parametrize("convention", ["monai", "nnunet"])
def test_ensembles_in_overlapping_windows(convention, net, x):
    plan = WindowPlan((4, 8, 8), overlap=0.5, convention=convention)
    ensemble = Ensemble([net, net], mirror_axes=(0, 2))
    cam = GradCAM(ensemble, LAYER, sliding_window=plan)
    same_elsewhere(lambda: cam(x, VOLUME).maps[LAYER])


def test_suggestions_and_feature_maps(net, x):
    def found():
        return (
            [suggestion.name for suggestion in suggest_layers(net, x.shape)],
            feature_maps(net, x, LAYER, index=2).values,
        )

    names, values = found()
    with torch.device("meta"):
        again = found()
    assert again[0] == names
    np.testing.assert_array_equal(again[1], values)


@quiet
def test_a_whole_scan_from_file_to_file(tmp_path):
    place = Place.at(tmp_path)
    with torch.device("meta"):
        found = explain(load_scan(place.scan), load_model(place.model), "lesion")
        found.save(tmp_path / "cam.nii.gz")
        outcome = place.explain("--device", "cpu", "--target", "lesion", "--format", "html")
        assert outcome.code == 0, outcome.complaint
    expected = explain(load_scan(place.scan), load_model(place.model), "lesion")
    torch.testing.assert_close(found.volume(), expected.volume(), rtol=0, atol=0)
    assert torch.equal(found.prediction, expected.prediction)


@pytest.mark.slow
@quiet
def test_a_folder_of_nnunet(tmp_path):
    folder = write_folder(tmp_path, mirror=(0,))
    data = np.random.default_rng(0).normal(20, 10, (1, *SHAPE))
    (file,) = write_case(tmp_path, data, OBLIQUE)
    same_elsewhere(
        lambda: explain(load_scan(file), load_model(f"nnunet:{folder}"), VOLUME).volume()
    )


@quiet
def test_parts_for_training_code(tmp_path, net, x):
    image = MetaTensor(x[0])
    camd, inferer = Camd("image", net, LAYER, VOLUME), CamInferer("GradCAM", LAYER, VOLUME)
    same_elsewhere(lambda: camd({"image": image})["cam"].as_tensor())
    same_elsewhere(lambda: inferer(image[None], net).as_tensor())
    cams = EpochCams(tmp_path, targets=[VOLUME], target_layers=LAYER)
    with torch.device("meta"):
        assert cams.write(net, x[0], epoch=1, case=0)
