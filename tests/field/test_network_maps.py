"""Layers and maps of every network of the field: named right, and equal to plain torch."""

from __future__ import annotations

import pytest
import torch
from helpers_networks import (
    CLASSES,
    FEW,
    NETWORKS,
    ORDINARY,
    Row,
    by_hand,
    deviation,
    grad_cam,
    hires_cam,
    log_odds,
    logit,
    named,
    quiet,
)
from helpers_untouched import untouched
from torch import nn

from seg3dcam import GradCAM, HiResCAM, suggest_layers, targets
from seg3dcam.cams.calls import each_by
from seg3dcam.errors import LayerError, ModelError

METHODS = {"HiResCAM": (HiResCAM, hires_cam), "GradCAM": (GradCAM, grad_cam)}
TARGETS = {
    "logit": (targets.ClassLogit(1, region="volume"), logit),
    "log-odds": (targets.ClassLogOdds(1, region="volume"), log_odds),
}


def per_axis(stride: int | tuple[int, ...], row: Row) -> tuple[int, ...]:
    return stride if isinstance(stride, tuple) else (stride,) * len(row.shape)


def before(name: str, row: Row) -> str:
    """Return the role of a layer that is not made from the bottleneck."""
    if row.role == "bottleneck":
        return "encoder"
    return "late" if name == next(iter(row.encoder)) else "early"


@pytest.mark.few(7)
@named(quick=ORDINARY)
def test_bottleneck_decoder_and_encoder_are_suggested(name):
    row = NETWORKS[name]
    network = row.network()
    bottleneck, stride = row.bottleneck

    with untouched(network):
        found = suggest_layers(network, (2, 1, *row.shape), output=row.output)

    assert [(s.name, s.stride, s.role, s.auto) for s in found] == [
        (bottleneck, per_axis(stride, row), row.role, True),
        *((n, per_axis(s, row), "decoder", False) for n, s in row.decoder.items()),
        *((n, per_axis(s, row), before(n, row), False) for n, s in row.encoder.items()),
    ]


@pytest.mark.few(7)
@named(quick=ORDINARY)
def test_what_is_suggested_has_a_gradient_and_is_not_the_output(name):
    """Heads of deep supervision that the logits do not come from have none."""
    row = NETWORKS[name]
    network, x = row.network(), row.input()
    elements = {name for name in row.encoder if name.endswith("]")}  # of a list: no module
    suggested = [row.bottleneck[0], *row.decoder, *(set(row.encoder) - elements)]
    found = by_hand(row, network, x, suggested)
    assert found.keys() == set(suggested)
    with torch.no_grad():
        logits = row.logits(network.eval()(x))
    for activations, gradients in found.values():
        assert gradients.any()
        assert activations.shape != logits.shape


@pytest.mark.few(3)
@quiet
@pytest.mark.usefixtures("usual_grids_but_for_ordinary")
@named()
def test_maps_equal_plain_torch(name):
    """Grad-CAM and HiResCAM, two targets, bottleneck and decoder; maps of the input's shape.

    Where the layers lie in the image is measured for one of several relatives.
    """
    row = NETWORKS[name]
    assert_maps_equal_plain_torch(row, row.levels, torch.float32, 1e-5, measured=name in ORDINARY)


@quiet
@pytest.mark.usefixtures("usual_grids_where_coarse")
@named(*ORDINARY, quick=FEW)
def test_maps_equal_plain_torch_in_double_precision(name):
    row = NETWORKS[name]
    measured = not row.coarse
    assert_maps_equal_plain_torch(row, row.levels[:1], torch.float64, 1e-9, measured=measured)


def assert_maps_equal_plain_torch(row, layers, dtype, tolerance, *, measured=True):
    network, x = row.network(dtype), row.input(2, dtype)
    cams = [cam(network, layers, output=row.output) for cam, _ in METHODS.values()]

    with untouched(network):
        results = each_by(cams, x, [target for target, _ in TARGETS.values()])

    for (_, score), of_target in zip(TARGETS.values(), results, strict=True):
        expected = by_hand(row, network, x, layers, score)
        for (_, formula), result in zip(METHODS.values(), of_target, strict=True):
            assert list(result.maps) == list(expected) == layers
            for layer, (a, g) in expected.items():
                if measured:
                    assert_placed(result.layers[layer].grid, row.first_voxel)
                assert_same_map(result, layer, formula(a, g), formula(a.abs(), g.abs()), tolerance)
            shown = [any(m.item_status[i] == "ok" for m in result.layers.values()) for i in (0, 1)]
            drawn = result.volume()
            assert drawn.shape == (2, *row.shape)
            assert drawn.min() >= 0
            assert drawn.flatten(1).amax(1).tolist() == shown  # 1 or 0


def assert_placed(grid, first_voxel):
    assert grid.measured
    if first_voxel:
        expected = [(s - 1) / 2 if first_voxel == "centre" else 0 for s in grid.stride]
        assert grid.offset == pytest.approx(expected, abs=0.005)


def assert_same_map(result, layer, expected, uncancelled, tolerance):
    native, full = result.native[layer], result.maps[layer]
    assert native.dtype == full.dtype == expected.dtype
    assert deviation(native, expected, uncancelled) < tolerance
    assert full.shape == (2, *result.shape)
    assert torch.isfinite(full).all()
    assert full.min() >= native.min() - tolerance
    assert full.max() <= native.max() + tolerance
    for item, status in enumerate(result.layers[layer].item_status):
        height = expected[item].max() / uncancelled[item].max()
        if height < 1e-7 or height > 1e-4:  # between them, rounding decides
            assert status == ("ok" if height > 1e-4 else "zero"), float(height)


@pytest.mark.few(3)
@quiet
@pytest.mark.usefixtures("usual_grids_where_coarse")
@named()
def test_auto_is_the_bottleneck(name):
    row = NETWORKS[name]
    network, x = row.network(), row.input()
    target = targets.ClassLogOdds(1, region="volume")
    auto = GradCAM(network, output=row.output)(x, target)
    assert list(auto.maps) == [row.bottleneck[0]]
    a, g = by_hand(row, network, x, row.levels[:1], log_odds)[row.bottleneck[0]]
    native = auto.native[row.bottleneck[0]]
    assert deviation(native, grad_cam(a, g), grad_cam(a.abs(), g.abs())) < 1e-5


@named(
    "DynUNet, deep supervision",
    "SegResNetDS",
    "SegResNetVAE",
    "BasicUNet++, deep supervision",
    "PlainConvUNet, deep supervision",
)
def test_logits_are_those_of_eval_mode(name):
    """In train mode these return a stack, a list, or a tuple with a loss."""
    row = NETWORKS[name]
    network, x = row.network().train(), row.input()
    target = targets.ClassLogit(0, region="volume")
    result = HiResCAM(network, "auto", output=row.output)(x, target)
    assert network.training
    with torch.no_grad():
        logits = row.logits(network.eval()(x))
    torch.testing.assert_close(result.logits, logits)
    torch.testing.assert_close(result.score, logits[:, 0].sum().view(1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        ("BasicUNet++, deep supervision", r"4 tensors .*output=0 \(.*output=3 or -1 \("),
        ("SegResNetDS2", r"output=lambda out: out\[0\]\[0\] .*output=lambda out: out\[1\]\[0\]"),
    ],
)
def test_outputs_that_may_each_be_the_logits_are_refused(name, candidates):
    row = NETWORKS[name]
    network = row.network()
    with untouched(network), pytest.raises(ModelError, match=candidates):
        suggest_layers(network, (1, 1, *row.shape))
    with untouched(network), pytest.raises(ModelError, match=candidates):
        HiResCAM(network, row.bottleneck[0])(row.input(), 1)


@named("PlainConvUNet, deep supervision", "ResidualEncoderUNet, deep supervision")
@pytest.mark.parametrize("index", range(CLASSES))
def test_a_class_of_a_list_is_a_class_of_the_finest_level(name, index):
    """Other tools pair target n with output n, and class 0 is silently that of all channels."""
    row = NETWORKS[name]
    network, x, layer = row.network(), row.input(), row.bottleneck[0]
    result = HiResCAM(network, layer)(x, targets.ClassLogit(index, region="volume"))
    a, g = by_hand(row, network, x, [layer], lambda logits: logit(logits, index))[layer]
    assert deviation(result.native[layer], hires_cam(a, g), hires_cam(a.abs(), g.abs())) < 1e-5
    assert result.logits.shape == (1, CLASSES, *row.shape)


def test_a_head_of_deep_supervision_that_is_not_explained_is_refused():
    row = NETWORKS["PlainConvUNet, deep supervision"]
    network = row.network()
    with (
        untouched(network),
        pytest.raises(LayerError, match=r"does not depend on .*decoder\.seg_layers\.0"),
    ):
        HiResCAM(network, "decoder.seg_layers.0")(row.input(), 1)


def test_a_transformer_that_classifies_is_explained_at_its_patches():
    """The logits have no place in the image, the map has."""
    row = NETWORKS["ViT classifier"]
    network = row.network()
    assert isinstance(network.classification_head, nn.Sequential)
    result = GradCAM(network, output=0)(row.input(2), targets.ClassLogit(2, region="volume"))
    assert result.logits.shape == (2, CLASSES)
    assert result.native["blocks.2.norm1"].shape == (2, 4, 6)
    assert result.maps["blocks.2.norm1"].shape == (2, *row.shape)
