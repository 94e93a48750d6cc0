"""Networks of every kind of output, through windows: prediction and maps as if by hand."""

from __future__ import annotations

import pytest
import torch
from helpers_networks import (
    NETWORKS,
    Row,
    by_hand,
    deviation,
    grad_cam,
    hires_cam,
    log_odds,
    named,
    quiet,
)
from helpers_untouched import untouched
from monai.inferers import sliding_window_inference

from seg3dcam import GradCAM, HiResCAM, WindowPlan, targets
from seg3dcam.cams.calls import each_by
from seg3dcam.errors import ModelError

pytestmark = pytest.mark.usefixtures("usual_grids_where_coarse")

TARGET = targets.ClassLogOdds(1, region="volume")

#: A tensor, with and without a fixed size of the input; a list, a tuple, one of four, nested.
KINDS = (
    "DynUNet",
    "UNETR, 2D",
    "SwinUNETR, 2D",
    "PlainConvUNet, deep supervision",
    "SegResNetVAE",
    "BasicUNet++, deep supervision",
    "SegResNetDS2",
)


def two_windows(row: Row) -> list[torch.Tensor]:
    """Return two images that side by side are twice as long along the last axis."""
    return list(row.input(2).split(1))


@pytest.mark.few(2)
@quiet
@named(*KINDS)
def test_windows_side_by_side_are_explained_as_if_alone(name):
    """Grad-CAM alone is not: its weights are means over all windows."""
    row = NETWORKS[name]
    network, parts = row.network(), two_windows(row)
    plan = WindowPlan(row.shape, overlap=0, mode="constant")
    finest = list(row.decoder)[-1]
    layers = [row.bottleneck[0], finest]
    cams = [
        cam(network, layers, sliding_window=plan, output=row.output) for cam in (HiResCAM, GradCAM)
    ]

    with untouched(network):
        ((hires, pooled),) = each_by(cams, torch.cat(parts, -1), [TARGET])

    a, g = (
        torch.cat(two, -1)
        for two in zip(
            *(by_hand(row, network, part, [finest], log_odds)[finest] for part in parts),
            strict=True,
        )
    )
    for result, formula in ((hires, hires_cam), (pooled, grad_cam)):
        assert result.windows == 2
        found = result.layers[finest].values
        assert deviation(found, formula(a, g), formula(a.abs(), g.abs())) < 1e-5
        for map_ in result.maps.values():
            assert map_.shape == (1, *row.shape[:-1], 2 * row.shape[-1])
            assert torch.isfinite(map_).all()
            assert map_.any()


@quiet
@named(*KINDS)
def test_the_prediction_through_overlapping_windows_is_monais(name):
    row = NETWORKS[name]
    network, x = row.network(), torch.cat(two_windows(row), -1)
    plan = WindowPlan(row.shape, overlap=0.5, mode="gaussian", sw_batch_size=2)
    layer = row.bottleneck[0]
    with untouched(network):
        result = GradCAM(network, layer, sliding_window=plan, output=row.output)(x, TARGET)
    network.eval()
    with torch.no_grad():
        expected = sliding_window_inference(
            x, row.shape, 2, lambda part: row.logits(network(part)), overlap=0.5, mode="gaussian"
        )
    torch.testing.assert_close(result.logits, expected)
    torch.testing.assert_close(result.score[0], log_odds(expected), rtol=1e-4, atol=1e-2)
    assert torch.isfinite(result.maps[layer]).all()
    assert result.maps[layer].any()


def test_a_classifier_has_no_windows():
    row = NETWORKS["ViT classifier"]
    network, plan = row.network(), WindowPlan(row.shape, overlap=0)
    cam = GradCAM(network, row.bottleneck[0], output=0, sliding_window=plan)
    with untouched(network), pytest.raises(ModelError, match=r"only at full resolution"):
        cam(torch.cat(two_windows(row), -1), TARGET)
