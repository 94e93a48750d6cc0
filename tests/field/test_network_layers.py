"""Every layer of every network: all convolutions, patterns, and what nothing may be asked of."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from helpers_networks import (
    FEW,
    NETWORKS,
    ORDINARY,
    by_hand,
    deviation,
    grad_cam,
    hires_cam,
    log_odds,
    named,
    quiet,
)
from helpers_untouched import untouched
from monai.data import MetaTensor
from torch import nn

from seg3dcam import GradCAM, HiResCAM, targets
from seg3dcam.errors import LayerError, Seg3dcamWarning

pytestmark = pytest.mark.usefixtures("usual_grids_where_coarse")

TARGET = targets.ClassLogOdds(1, region="volume")

IN_PLACE = (
    "DynUNet",
    "SegResNet",
    "SegResNetVAE",
    "BasicUNet",
    "VNet, 2D",
    "FlexibleUNet, 2D",
    "HighResNet, 2D",
    "PlainConvUNet, deep supervision",
    "ResidualEncoderUNet, deep supervision",
)


PLAIN = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d


def convolutions(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, PLAIN)]


@pytest.mark.few(1)
@quiet
@pytest.mark.usefixtures("usual_grids_but_for_few")
@named(*(name for name in ORDINARY if not name.startswith("BasicUNet++")), quick=FEW)
def test_all_explains_every_convolution_that_ran_once(name):
    """The others are named with the reason: heads that are not explained, parts that only train."""
    row = NETWORKS[name]
    network, x = row.network(), row.input()
    expected = by_hand(row, network, x, convolutions(network), log_odds)

    with untouched(network), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Seg3dcamWarning)
        result = HiResCAM(network, "all", output=row.output)(x, TARGET)

    assert list(result.layers) == list(expected)
    for layer, (a, g) in expected.items():
        found = result.native[layer]
        assert deviation(found, hires_cam(a, g), hires_cam(a.abs(), g.abs())) < 1e-4, layer
    said = {
        m[1]: m[2] for w in caught if (m := re.match(r"no map of layer '(.*?)': (.+)", w_text(w)))
    }
    assert set(said) == set(convolutions(network)) - set(expected)


def w_text(warning: warnings.WarningMessage) -> str:
    return str(warning.message)


@quiet
@pytest.mark.usefixtures("usual_grids_but_for_few")
@named(*ORDINARY, quick=FEW)
def test_a_pattern_explains_the_layers_that_it_fits(name):
    row = NETWORKS[name]
    network, x = row.network(), row.input()
    pattern = re.escape(row.many).replace(r"\*\*", ".+").replace(r"\*", "[^.]+")
    fitting = [n for n, _ in network.named_modules() if re.fullmatch(pattern, n)]
    channel_first = row.channel_first if "vit" in row.many or row.output == 0 else None
    expected = by_hand(row, network, x, fitting, log_odds, channel_first)
    assert len(expected) > 1

    with untouched(network):
        result = GradCAM(network, row.many, output=row.output)(x, TARGET)

    assert list(result.layers) == list(expected)
    for layer, (a, g) in expected.items():
        found = result.native[layer]
        assert deviation(found, grad_cam(a, g), grad_cam(a.abs(), g.abs())) < 1e-5, layer
        assert result.maps[layer].shape == x[:, 0].shape


@pytest.mark.slow
@quiet
@named(*IN_PLACE)
def test_activations_in_place_change_nothing(name, monkeypatch):
    """Other tools keep a tensor that the next layer overwrites: maps that correlate by 0.89."""
    row = NETWORKS[name]
    network, x = row.network(), row.input()
    given = HiResCAM(network, "all", output=row.output)(x, TARGET)
    changed = [module for module in network.modules() if getattr(module, "inplace", False)]
    assert changed
    for module in changed:
        monkeypatch.setattr(module, "inplace", False)
    apart = HiResCAM(network, "all", output=row.output)(x, TARGET)

    assert list(given.layers) == list(apart.layers)
    assert len(given.layers) > 5
    for layer, own in given.layers.items():
        assert deviation(own.values, apart.layers[layer].values, own.ceiling) < 1e-5, layer


# ------------------------------------------------------------------------- odd layouts and input


@pytest.mark.slow
@quiet
@named("SwinUNETR, 2D", quick=["SwinUNETR, 2D"])
def test_blocks_of_swin_are_channels_last(name):
    """Taken as channels first, as other tools do, they give a map of another shape, silently."""
    row = NETWORKS[name]
    network, x = row.network(), row.input()
    layers = [
        "swinViT.layers1.0.blocks.1",
        "swinViT.layers1.0.downsample",
        "swinViT.layers2.0.blocks.0",
        "swinViT.layers3.0.blocks.0",
    ]
    last = by_hand(row, network, x, layers, log_odds, lambda tensor: tensor.movedim(-1, 1))
    with untouched(network):
        result = GradCAM(network, layers)(x, TARGET)
    for stride, (layer, (a, g)) in zip((2, 4, 4, 8), last.items(), strict=True):
        assert a.shape[2:] == tuple(size // stride for size in row.shape)
        found = result.native[layer]
        assert deviation(found, grad_cam(a, g), grad_cam(a.abs(), g.abs())) < 1e-5


@pytest.mark.parametrize("inner", ["attn", "attn.qkv", "attn.proj", "attn.softmax"])
def test_what_is_inside_windows_of_attention_is_refused(inner):
    row = NETWORKS["SwinUNETR, 2D"]
    network, layer = row.network(), f"swinViT.layers1.0.blocks.0.{inner}"
    with (
        untouched(network),
        pytest.raises(LayerError, match=r"first axis is not the batch's.*Choose the block around"),
    ):
        HiResCAM(network, layer)(row.input(), TARGET)


@quiet
@named("UNet", "BasicUNet", "PlainConvUNet, deep supervision")
def test_a_metatensor_is_explained_like_a_tensor_and_keeps_its_affine(name):
    row = NETWORKS[name]
    network, x = row.network(), row.input()
    affine = np.array([[0, 0.7, 0, -90], [-0.8, 0, 0, 40], [0, 0, 5, 7], [0, 0, 0, 1.0]])
    layers = row.levels
    with untouched(network):
        of_meta = GradCAM(network, layers)(MetaTensor(x, affine=torch.tensor(affine)), TARGET)
    plain = GradCAM(network, layers)(x, TARGET)
    assert plain.affine is None
    np.testing.assert_allclose(of_meta.affine, affine)
    for layer in layers:
        assert type(of_meta.maps[layer]) is torch.Tensor
        torch.testing.assert_close(of_meta.maps[layer], plain.maps[layer], rtol=0, atol=0)
        stride = of_meta.layers[layer].grid.stride
        sizes = [s * mm for s, mm in zip(stride, (0.8, 0.7, 5), strict=True)]
        assert of_meta.native_spacing[layer] == pytest.approx(sizes)


@quiet
@named(*ORDINARY, quick=FEW)
def test_an_item_of_zeros_in_a_batch(name):
    """It gives no NaN, and the other items' maps are those that they have alone."""
    row = NETWORKS[name]
    network, x = row.network(), row.input()
    layer = row.bottleneck[0]
    batch = torch.cat([torch.zeros_like(x), x])
    with untouched(network):
        result = GradCAM(network, layer, output=row.output)(batch, TARGET)
    assert torch.isfinite(result.maps[layer]).all()
    assert torch.isfinite(result.volume()).all()
    both, g_both = by_hand(row, network, batch, [layer], log_odds)[layer]
    a, g = by_hand(row, network, x, [layer], log_odds)[layer]
    found, uncancelled = result.native[layer], grad_cam(a.abs(), g.abs())
    assert deviation(found, grad_cam(both, g_both), uncancelled) < 1e-5
    assert deviation(found[1:], grad_cam(a, g), uncancelled) < 0.01  # torch rounds otherwise
