"""What is said of an input that is none: about the input, not about what came of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import toy
from monai.networks.nets import UNet
from torch import nn

from seg3dcam import GradCAM, HiResCAM, ScoreCAM, SegModel, WindowPlan, explain, load_scan, targets
from seg3dcam.cams.feature_maps import feature_maps
from seg3dcam.errors import InputError, LayerError, ModelError, ScanError
from seg3dcam.network.ensemble import Ensemble

TARGET = targets.ClassLogit(1, "volume")


def unet(axes: int, channels: int = 1) -> nn.Module:
    return toy.seeded(UNet(axes, channels, 3, channels=(4, 8), strides=(2,)))


def plain(axes: int) -> nn.Module:
    """Its convolutions also take an item without a batch axis, and PyTorch says nothing."""
    kind = {2: nn.Conv2d, 3: nn.Conv3d}[axes]
    return toy.seeded(nn.Sequential(kind(1, 4, 3, padding=1), nn.ReLU(), kind(4, 2, 1)))


NETWORKS = {"UNet": unet, "convolutions": plain}
CALLS = {
    "auto": lambda network, x: GradCAM(network)(x, TARGET),
    "named layer": lambda network, x: HiResCAM(network, next(conv_names(network)))(x, TARGET),
    "windows": lambda network, x: GradCAM(network, sliding_window=WindowPlan(8))(x, TARGET),
    "no gradient": lambda network, x: ScoreCAM(network)(x, TARGET),
    "feature maps": lambda network, x: feature_maps(network, x),
}


def conv_names(network):
    kinds = (nn.Conv2d, nn.Conv3d)
    return (name for name, module in network.named_modules() if isinstance(module, kinds))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_a_missing_batch_axis_is_said(network, call):
    with pytest.raises(
        InputError, match=r"is 3D .*\(B, C, D, H, W\).*no batch axis: give x\[None\]"
    ):
        call(network(3), torch.rand(1, 12, 12, 12))


@pytest.mark.parametrize(
    ("network", "x", "said"),
    [
        (
            unet(3),
            torch.rand(12, 12, 12),
            r"neither a batch nor a channel axis: give x\[None, None",
        ),
        (unet(2), torch.rand(1, 12, 12), r"is 2D .*\(B, C, H, W\).*no batch axis"),
        (unet(3, 2), torch.rand(4, 12, 12, 12), r"lacks one axis: .*x\[:, None\] without channels"),
        (unet(2), torch.rand(1, 1, 12, 12, 12), r"is a volume: .*Ensemble\(\[network\], slices"),
        (unet(2), torch.rand(1, 1, 1, 12, 12, 12), "is a volume"),
        (unet(3), torch.rand(1, 1, 1, 12, 12, 12), "has 1 too many"),
    ],
    ids=["3D alone", "2D item", "a batch without channels", "2D, a volume", "2D, more", "3D, more"],
)
def test_axes_that_are_missing_or_too_many(network, x, said):
    with pytest.raises(InputError, match=said):
        GradCAM(network)(x, TARGET)


def test_a_network_that_adds_its_axes_itself_is_explained():
    class Slices(nn.Module):
        """Takes (B, D, H, W) as a volume of one channel."""

        def __init__(self):
            super().__init__()
            self.inner = plain(3)

        def forward(self, x):
            return self.inner(x[:, None]).flatten(1, 2)

    assert GradCAM(toy.seeded(Slices()), "inner.0")  # made without a word
    x = torch.rand(2, 3, 8, 8)

    class Unsqueezed(nn.Module):
        """A convolution along all axes of an image, with a channel added and taken."""

        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 1)
            self.deep = nn.Conv3d(1, 1, 1)

        def forward(self, x):
            return self.deep(self.first(x)[:, None])[:, 0]

    found = GradCAM(toy.seeded(Unsqueezed()), "first")(x, TARGET)
    assert found.maps["first"].shape == (2, 8, 8)


def test_other_errors_stay_what_they_are():
    with pytest.raises(ModelError, match="the network failed on an input of shape"):
        GradCAM(unet(3, 2), "model.0")(torch.rand(1, 1, 8, 8, 8), TARGET)
    with pytest.raises(LayerError):
        GradCAM(unet(3), "nope")
    stack = Ensemble([unet(2)], slices=True)
    found = GradCAM(stack, "model.0", sliding_window=WindowPlan((1, 8, 8)))(
        torch.rand(1, 1, 3, 8, 8), TARGET
    )
    assert found.maps["model.0"].shape == (1, 3, 8, 8)


GIVEN = {
    "numpy": (
        np.zeros((1, 1, 4, 4, 4), np.float32),
        r"array \(1, 1, 4, 4, 4\) of float32: .*from_",
    ),
    "a list": ([torch.zeros(1, 4, 4, 4)] * 2, r"a list of 2: give torch\.stack\(x\)"),
    "a dict": ({"image": 0}, "a dict with the keys 'image': give one of them"),
    "a path": ("scan.nii.gz", r"a str: scans are explained by explain\(scan, SegModel"),
    "a scan": (load_scan(np.random.rand(4, 4, 4), affine=np.eye(4)), r"a Scan: scans are expl"),
    "nothing": (None, "got a NoneType"),
    "two axes": (torch.rand(4, 4), r"with a batch and a channel axis; got the shape \(4, 4\)"),
}


@pytest.mark.parametrize(("given", "said"), GIVEN.values(), ids=GIVEN)
def test_what_is_no_tensor_is_named_with_the_mend(given, said):
    with pytest.raises(InputError, match=said):
        GradCAM(plain(3), "0")(given, TARGET)


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor], ids=["numpy", "tensor"])
@pytest.mark.parametrize("shape", [(8, 8, 8), (1, 8, 8, 8), (1, 1, 8, 8, 8)], ids=str)
def test_explain_says_how_an_array_becomes_a_scan(make, shape):
    array = make(np.random.default_rng(0).random(shape, dtype=np.float32))
    with pytest.raises(ScanError, match=r"load_scan\(array, affine=\.\.\.\)") as caught:
        explain(array, SegModel(plain(3)), TARGET)
    assert str(shape) in str(caught.value)
    assert "(X, Y, Z) or (C, X, Y, Z)" in str(caught.value)


def test_a_scan_without_a_name_is_called_the_scan():
    scan = load_scan(np.random.default_rng(0).random((2, 4, 4, 4)), affine=np.eye(4))
    with pytest.raises(ModelError, match=r"^the scan has 2 channels, the model takes 1"):
        SegModel(plain(3), in_channels=1).check_scan(scan)
