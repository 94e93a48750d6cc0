"""The inferer and the dictionary transform: the same maps, and in the right place afterwards."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.inferers import Inferer
from monai.transforms import (
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    Orientationd,
    SaveImaged,
    Spacingd,
)
from torch import nn

from seg3dcam import GradCAM, SegModel, WindowPlan, explain, load_scan
from seg3dcam.cams.catalogue import CAMS
from seg3dcam.errors import ConfigError, InputError
from seg3dcam.integrations import Camd, CamInferer
from seg3dcam.targets import ClassLogit

SPACING = [0.9, 1.1, 2.4]
OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.2, -0.15, 0.1) @ np.diag(SPACING) @ np.diag([-1, 1, 1]),
    [12.0, -30.0, 55.0],
)
BLOB = (9, 17, 10)
TARGET = ClassLogit(1, "volume")


def network() -> nn.Module:
    """Class 1 is what is bright."""
    layers = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv3d(2, 2, 1))
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.zero_()
        layers[0].weight[0, 0, 1, 1, 1] = 1
        layers[2].weight[1, 0] = 1
    return layers


@pytest.fixture
def scan_file(tmp_path):
    shape = (26, 34, 19)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    distance = np.linalg.norm((grid - BLOB) * SPACING, axis=-1)
    inside = np.zeros(shape)
    inside[3:-5, 5:-3, 2:-2] = 1
    data = (0.1 + np.exp(-((distance / 3.5) ** 2))) * inside
    file = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(data.astype(np.float32), OBLIQUE), file)
    return file


PREPARE = Compose(
    [
        LoadImaged("image"),
        EnsureChannelFirstd("image"),
        Orientationd("image", axcodes="RAS", labels=None),
        Spacingd("image", pixdim=(1.5, 1.5, 2.0), mode="bilinear"),
        CropForegroundd("image", source_key="image", allow_smaller=True),
    ]
)


def test_a_map_is_inverted_and_saved_where_the_scan_lies(scan_file, tmp_path):
    data = PREPARE({"image": str(scan_file)})
    operations = len(data["image"].applied_operations)
    data = Camd("image", network(), "1", TARGET, cam_name="hires_cam")(data)
    assert len(data["image"].applied_operations) == operations  # still invertible itself
    assert data["cam"].shape == data["image"].shape
    back = Invertd("cam", transform=PREPARE, orig_keys="image", nearest_interp=False)
    data = back(data)
    SaveImaged("cam", output_dir=tmp_path / "o", output_postfix="cam", separate_folder=False)(data)
    image = nib.load(tmp_path / "o" / "scan_cam.nii.gz")
    assert np.allclose(image.affine, OBLIQUE, atol=1e-5)
    assert image.shape == (26, 34, 19)
    heat = image.get_fdata()
    assert np.unravel_index(heat.argmax(), heat.shape) == BLOB

    def prepare(scan):
        image = MetaTensor(scan.data, affine=torch.as_tensor(scan.affine))
        return Compose(PREPARE.transforms[2:])({"image": image})["image"]

    model = SegModel(network(), prepare=prepare)
    direct = explain(load_scan(scan_file), model, TARGET, layers="1").volume().numpy()
    # In one interpolation instead of two: as good or better, never elsewhere.
    assert np.corrcoef(heat.ravel(), direct.ravel())[0, 1] > 0.99


@pytest.mark.few(3)
@pytest.mark.parametrize("scale", ["max", "raw"])
@pytest.mark.parametrize(
    ("name", "key"),
    [("GradCAM", "grad_cam"), ("GradCAMpp", "grad_cam_plus_plus"), ("layer_cam",) * 2],
)
def test_the_inferer_gives_the_methods_volumes(name, key, scale):
    x = torch.rand(2, 1, 7, 8, 9)
    plan = WindowPlan(6, overlap=0.5)
    inferer = CamInferer(name, "1", TARGET, scale=scale, sliding_window=plan)
    assert isinstance(inferer, Inferer)
    found = inferer(x, network())
    expected = CAMS[key](network(), "1", sliding_window=plan)(x, TARGET).volume(scale=scale)
    assert torch.equal(found, expected[:, None])
    assert not isinstance(found, MetaTensor)


def test_the_inferers_maps_know_where_they_lie():
    x = MetaTensor(torch.rand(1, 1, 7, 8, 9), affine=torch.as_tensor(OBLIQUE)[None])
    x.is_batch = True
    found = CamInferer("hires_cam", "1", TARGET)(x, network())
    assert torch.equal(found.affine, x.affine)
    assert found.shape == (1, 1, 7, 8, 9)
    recipe = CamInferer("slice_grad_cam", "1")(x, network())  # about no class
    expected = CAMS["slice_grad_cam"](network(), "1")(x).volume()
    assert torch.equal(recipe.as_tensor()[:, 0], expected)


def test_bad_use_is_refused():
    with pytest.raises(ConfigError, match="fully connected layer"):
        CamInferer("CAM", "1")
    with pytest.raises(ConfigError, match="did you mean 'grad_cam'"):
        CamInferer("grad_camm", "1")
    with pytest.raises(ConfigError, match="networks with one input"):
        CamInferer("GradCAM", "1", TARGET)(torch.rand(1, 1, 6, 6, 6), network(), "prompt")
    with pytest.raises(ConfigError, match="did you mean 'hires_cam'"):
        Camd("image", network(), cam_name="hirescam")
    with pytest.raises(ConfigError, match="one for each of the keys"):
        Camd(["a", "b"], network(), names=["cam", "cam"])
    with pytest.raises(InputError, match=r"'image' is a Tensor: .* must be a MetaTensor"):
        Camd("image", network(), "1", TARGET)({"image": torch.rand(1, 6, 6, 6)})
    data = {"image": MetaTensor(torch.rand(1, 6, 6, 6))}
    found = Camd("image", network(), "1", TARGET, names="heat")(data)
    assert list(data) == ["image"]
    expected = GradCAM(network(), "1")(data["image"][None], TARGET)  # of one layer, all alike
    assert expected.shape == found["heat"].shape[1:]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_workers_of_a_dataloader_are_refused():
    items = [{"image": MetaTensor(torch.rand(1, 6, 6, 6))} for _ in range(2)]
    dataset = Dataset(items, Camd("image", network(), "1", TARGET))
    assert len(list(DataLoader(dataset, num_workers=0))) == 2
    with pytest.raises(Exception, match="must not run in a DataLoader's workers"):
        next(iter(DataLoader(dataset, num_workers=1)))
