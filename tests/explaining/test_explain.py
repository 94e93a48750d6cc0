"""Whole scans: what comes back lies where it belongs, on the scan's own grid."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers_crossed import crossed
from helpers_geometry import OBLIQUE_LAS, rotation, world_field
from monai.data import MetaTensor
from scipy import ndimage
from torch import nn

from seg3dcam import HiResCAM, SegModel, WindowPlan, explain, explain_each, load_scan, targets
from seg3dcam.errors import ConfigError, EmptyRegionError, InputError, ModelError, TargetError
from seg3dcam.explaining.findings import findings
from seg3dcam.files import plain
from seg3dcam.models.preparation import build_preparation
from seg3dcam.models.specs import Prepare

ORIENTATIONS = {
    "oblique LAS": OBLIQUE_LAS,
    "RAS": np.diag([0.8, 0.8, 2.5, 1.0]),
    "PIL, oblique": rotation(4, 11, -8)
    @ np.array([[0, 0, -1.5, 40], [-0.9, 0, 0, 80], [0, -0.9, 0, -10], [0, 0, 0, 1.0]]),
}
SHAPE = (44, 52, 22)


class Passing(nn.Module):
    """A network whose HiResCAM map of class 1 is its input, averaged over `pool` voxels."""

    def __init__(self, pool: int = 1) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv3d(1, 1, 1, bias=False), nn.AvgPool3d(pool))
        self.head = nn.Conv3d(1, 2, 1, bias=False)
        self.upsample = nn.Upsample(scale_factor=pool)
        self.features[0].weight.data.fill_(1.0)
        self.head.weight.data = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.upsample(self.head(self.features(x)))


def field_scan(
    affine: np.ndarray, axis: int, folder: Path, rim: int = 4
) -> tuple[Path, torch.Tensor]:
    """Write a scan that holds its own world coordinate in mm (plus 1000), 0 in its outer rim."""
    field = world_field(affine, SHAPE, axis) + 1000
    scan = torch.zeros(SHAPE, dtype=torch.double)
    inner = tuple(slice(rim, n - rim) for n in SHAPE)
    scan[inner] = field[inner]
    image = nib.Nifti1Image(scan.numpy().astype(np.float32), affine)
    image.header.set_data_dtype(np.float32)
    image.set_sform(affine, 2)
    image.set_qform(affine, 1)
    path = folder / "field.nii.gz"
    nib.save(image, path)
    return path, field


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("orientation", "pool", "window"),
    crossed(ORIENTATIONS, [1, 2, 4], [None, WindowPlan(24, overlap=0.5), WindowPlan((20, 24, 16))]),
)
def test_a_world_field_comes_back_in_place_through_the_whole_preparation(
    orientation: str, pool: int, window: WindowPlan | None, tmp_path: Path
) -> None:
    """Orientation, spacing, crop and padding, windows, the layer's grid, and back: < 0.01 mm."""
    affine = ORIENTATIONS[orientation]
    settings = Prepare(
        orientation="RAS", spacing=(1.1, 0.9, 1.6), crop_foreground=True, pad_divisible=8
    )
    for axis in range(3):
        path, field = field_scan(affine, axis, tmp_path)
        scan = load_scan(path)
        model = SegModel(Passing(pool), prepare=build_preparation(settings), window=window)
        found = explain(
            scan, model, targets.ClassLogit(1, "volume"), layers="features", method="grad_cam"
        )
        assert np.array_equal(found.affine, nib.load(path).affine)
        saved = nib.load(found.save(tmp_path / "cam.nii.gz"))
        assert np.array_equal(saved.affine, nib.load(path).affine)
        assert saved.shape == SHAPE

        centre = tuple(n // 2 for n in SHAPE)
        in_mm = found.maps["features"].double()
        in_mm *= field[centre] / in_mm[centre]  # the channel weight, one number
        deep = tuple(slice(m, n - m) for n, m in zip(SHAPE, (15, 15, 7), strict=True))
        assert (in_mm[deep] - field[deep]).abs().max() < 0.01


def test_the_prediction_lies_where_the_scan_says(tmp_path: Path) -> None:
    """A bright cube is predicted at its own voxels, through flips, resampling and cropping."""
    affine = ORIENTATIONS["PIL, oblique"]
    image = np.ones(SHAPE, dtype=np.float32)
    image[12:30, 20:41, 6:16] = 9
    path = tmp_path / "cube.nii.gz"
    nib.save(nib.Nifti1Image(image, affine), path)
    network = Passing()
    network.head = nn.Conv3d(1, 2, 1)
    network.head.weight.data = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1)
    network.head.bias.data = torch.tensor([0.0, -5.0])
    settings = Prepare(orientation="RAS", spacing=(0.7, 0.8, 0.9), crop_foreground=True)
    model = SegModel(
        network, ("background", "cube"), prepare=build_preparation(settings), window=WindowPlan(32)
    )
    found = explain(path, model, "cube", layers="features")
    truth = torch.as_tensor(image > 5)
    dice = 2 * (found.mask & truth).sum() / (found.mask.sum() + truth.sum())
    assert dice > 0.98
    assert torch.equal(found.prediction.sum(0), torch.ones(SHAPE, dtype=torch.int64))
    voxel, position = found.peak()
    assert truth[voxel]
    np.testing.assert_allclose(position, (affine @ [*voxel, 1])[:3])
    inside = found.volume()[truth].sum() / found.volume().sum()
    assert inside > 0.9


def test_without_preparation_the_scans_grid_is_the_networks() -> None:
    """explain() then gives the numbers of the plain call, at the same voxels."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv3d(1, 3, 3, 2, 1), nn.Tanh(), nn.Conv3d(3, 2, 1), nn.Upsample(scale_factor=2)
    )
    x = torch.rand(1, 1, 12, 10, 8)
    scan = load_scan(MetaTensor(x[0], affine=torch.as_tensor(OBLIQUE_LAS)))
    target = targets.ClassLogit(0, "volume")
    plain = HiResCAM(network, "0")(x, target)
    found = explain(scan, SegModel(network), target, layers="0")
    torch.testing.assert_close(found.maps["0"], plain.maps["0"][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.volume(), plain.volume()[0], rtol=1e-5, atol=1e-6)
    assert found.score == pytest.approx(float(plain.score[0]))


def two_classes() -> tuple[SegModel, np.ndarray]:
    """Return a model that calls a voxel 'dark' below -1, 'bright' above 1, and such a scan."""
    network = nn.Sequential(nn.Conv3d(1, 2, 1, bias=False), nn.Conv3d(2, 3, 1))
    network[0].weight.data = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1, 1)
    network[1].weight.data = torch.tensor([[0, 0], [0, 1.0], [1.0, 0]]).view(3, 2, 1, 1, 1)
    network[1].bias.data = torch.tensor([0.0, -1.0, -1.0])
    scan = np.zeros((8, 8, 8), dtype=np.float32)
    scan[1:3], scan[5:7] = -3, 3
    return SegModel(network, ("background", "dark", "bright")), scan


def test_without_a_target_every_predicted_class_but_the_background_is_explained() -> None:
    model, voxels = two_classes()
    found = list(explain_each(load_scan(voxels, np.eye(4)), model, layers="0"))
    assert [e.class_name for e in found] == ["dark", "bright"]
    voxels[5:7] = 0
    found = list(explain_each(load_scan(voxels, np.eye(4)), model, layers="0"))
    assert [e.class_name for e in found] == ["dark"]
    voxels[1:3] = 0.5
    with pytest.raises(EmptyRegionError, match="predicts no foreground class anywhere"):
        explain_each(load_scan(voxels, np.eye(4)), model, layers="0")


def test_each_class_is_explained_by_its_own_voxels() -> None:
    model, voxels = two_classes()
    dark, bright = explain_each(load_scan(voxels, np.eye(4)), model, ["dark", 2], layers="0")
    assert dark.volume()[1:3].min() == 1
    assert not dark.volume()[5:7].any()
    assert bright.volume()[5:7].min() == 1
    assert not bright.volume()[1:3].any()
    assert torch.equal(dark.mask, torch.as_tensor(voxels < -1))


def test_a_lesions_region_is_its_component_on_the_scans_grid() -> None:
    model, _ = two_classes()
    data = np.zeros((14, 15, 13), dtype=np.float32)
    data[2:6, 2:6, 2:6], data[9:11, 9:12, 9:11] = -3, -3
    scan = load_scan(data, affine=OBLIQUE_LAS)
    lesions = targets.EveryComponent(1)
    large, small = explain_each(scan, model, [lesions], layers="0")
    labelled, count = ndimage.label(large.mask.numpy())
    assert count == 2
    assert np.array_equal(large.region.numpy(), labelled == labelled[3, 3, 3])
    assert np.array_equal(small.region.numpy(), labelled == labelled[10, 10, 10])


@pytest.mark.parametrize("region", ["predicted", "volume"])
def test_a_mask_or_a_whole_volume_is_no_region_of_its_own(region: str) -> None:
    model, data = two_classes()
    target = targets.ClassLogit(1, region=region)
    found = explain(load_scan(data, affine=OBLIQUE_LAS), model, target, layers="0")
    assert found.region is None
    assert (found.explained is None) == (region == "volume")
    assert region == "volume" or torch.equal(found.explained, found.mask)


def test_evidence_elsewhere_is_said_of_a_mask_and_not_of_a_volume() -> None:
    """The network shifts the scan, so what speaks for a class lies beside its mask."""

    class Shifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = nn.Conv3d(1, 1, 1, bias=False)
            nn.init.ones_(self.seen.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            score = self.seen(x).roll(8, dims=2) - 0.5
            return torch.cat([-score, score], dim=1)

    data = np.zeros((20, 8, 8), dtype=np.float32)
    data[2:6] = 1
    model, scan = SegModel(Shifting(), ("background", "lesion")), load_scan(data, np.eye(4))
    said = {
        region: findings(explain(scan, model, targets.ClassLogit(1, region), layers="seen"))
        for region in ("predicted", "volume")
    }
    assert (
        said["volume"]["cam_inside_prediction"] == said["predicted"]["cam_inside_prediction"] == 0
    )
    (warning,) = said["predicted"]["warnings"]
    assert warning.startswith("the CAM lies outside of the predicted region (0.26 ml): 0 %")
    assert said["volume"]["warnings"] == []


def test_slices_are_cut_along_anatomical_axes() -> None:
    model, voxels = two_classes()
    permuted = np.array([[0, 0, 1.0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])  # axes A, S, R
    found = explain(load_scan(voxels, permuted), model, "dark", layers="0")
    volume = found.volume()
    assert torch.equal(found.slice(2, "coronal"), volume[2])
    assert torch.equal(found.slice(2, "axial"), volume[:, 2])
    assert torch.equal(found.slice(2, "sagittal"), volume[:, :, 2])
    with pytest.raises(InputError, match="axial slice 8: legal are 0 to 7"):
        found.slice(8)
    with pytest.raises(InputError, match="did you mean 'axial'"):
        found.slice(2, "axal")


def test_overlapping_sigmoid_classes_keep_a_mask_each() -> None:
    model, voxels = two_classes()
    model.module[1].weight.data[0, 0] = 0.1
    model.module[1].bias.data = torch.tensor([9.0, 5.0, -1.0])
    model = SegModel(model.module, ("whole", "much", "core"), activation="sigmoid")
    found = list(explain_each(load_scan(voxels, np.eye(4)), model, layers="0"))
    assert [e.class_name for e in found] == ["whole", "much", "core"]
    whole, much, core = found[0].prediction
    assert whole.all()
    assert torch.equal(much, torch.ones_like(much))
    assert torch.equal(core, torch.as_tensor(voxels > 1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"target": "brigth"}, TargetError, "'brigth' does not exist: did you mean 'bright'"),
        (
            {"target": 7},
            TargetError,
            "class 7 does not exist; the classes are 0 background",
        ),
        ({"target": 1, "method": "grad_came"}, ConfigError, "did you mean 'grad_cam'"),
    ],
)
def test_what_does_not_exist_is_refused(call: dict, error: type, message: str) -> None:
    model, voxels = two_classes()
    with pytest.raises(error, match=message):
        explain(load_scan(voxels, np.eye(4)), model, layers="0", **call)


def test_a_scan_of_another_number_of_channels_is_refused() -> None:
    model, voxels = two_classes()
    model = SegModel(model.module, model.class_names, in_channels=1)
    scan = load_scan(np.stack([voxels, voxels]), np.eye(4))
    with pytest.raises(ModelError, match="the scan has 2 channels, the model takes 1"):
        explain(scan, model, 1, layers="0")


def test_class_names_that_do_not_fit_the_output_are_refused() -> None:
    model, voxels = two_classes()
    model = SegModel(model.module, ("background", "lesion"))
    with pytest.raises(ModelError, match="output has 3 channels, but 2 classes are named"):
        explain(load_scan(voxels, np.eye(4)), model, 1, layers="0")


def test_provenance_holds_what_is_needed_to_make_the_map_again() -> None:
    model, voxels = two_classes()
    found = explain(
        load_scan(voxels, np.eye(4)), model, "dark", layers="0", method="xres_cam", window=4
    )
    record = found.provenance
    assert record["target"]["region_voxels"] == 128
    assert record["target"]["score"] == pytest.approx(found.score)
    assert record["method"] == {"name": "xres_cam", "settings": {"block": 4, "mode": "mean"}}
    layer = record["layers"]["0"]
    assert (layer["stride"], layer["offset"], layer["status"]) == ((1, 1, 1), (0, 0, 0), "ok")
    assert layer["raw_max"] == float(found.maps["0"].max())
    assert record["model"]["weights_sha256"] == model.fingerprint()


def test_typed_provenance_is_written_word_for_word_as_it_was_read() -> None:
    model, voxels = two_classes()
    found = explain(load_scan(voxels, np.eye(4)), model, "dark", layers="0", method="xres_cam")
    record = found.provenance
    keys = ("scan", "prepared", "model", "target", "method", "layers", "dropped_layers", "versions")
    assert tuple(record) == keys
    assert json.dumps(plain(found.origin.as_dict())) == json.dumps(plain(record))
    assert found.origin.target.class_ == record["target"]["class"] == "dark"
    assert found.origin.layers["0"].map.shape == record["layers"]["0"]["map"]["shape"]


def test_provenance_of_ones_own_may_hold_anything() -> None:
    """What it says of the same things is found; the rest is neither needed nor lost."""
    model, voxels = two_classes()
    found = explain(load_scan(voxels, np.eye(4)), model, "dark", layers="0")
    own = {"model": {"name": "UNet", "epoch": 7}, "layers": {"0": {"status": "ok"}}, "note": "x"}
    changed = replace(found, provenance=own)
    assert changed.provenance == own
    assert changed.origin.model.name == "UNet"
    assert changed.origin.model.weights_sha256 == "unknown"
    assert changed.origin.prepared.affine is None
    assert replace(found, provenance={}).origin.layers == {}


def test_logits_below_full_resolution_are_refused() -> None:
    network = nn.Sequential(nn.AvgPool3d(2), nn.Conv3d(1, 2, 1))
    scan = load_scan(np.random.default_rng(0).random((8, 8, 8)), np.eye(4))
    with pytest.raises(ModelError, match="only at full resolution"):
        explain(scan, SegModel(network), targets.ClassLogit(1, "volume"), layers="0")


def test_a_target_takes_its_activation_from_the_model() -> None:
    model, voxels = two_classes()
    model.module[1].bias.data = torch.tensor([9.0, 5.0, -1.0])
    model = SegModel(model.module, ("whole", "much", "core"), activation="sigmoid")
    scan = load_scan(voxels, np.eye(4))
    by_name = explain(scan, model, "core", layers="0")
    by_target = explain(scan, model, targets.ClassLogOdds(2), layers="0")
    assert by_target.score == by_name.score == pytest.approx(float((voxels[voxels > 1] - 1).sum()))
