"""Windows that do not overlap and start on the layer's grid.

Their activations and gradients, side by side, are the volume's, so that every method gives what its
function gives of those.
"""

from __future__ import annotations

import pytest
import torch
import toy
from helpers_engine import EXACT, SCORES, STRIDES, each_method, joined, level, parts_of, signed_maps
from reference.methods import spectral_gap
from torch import nn
from toy import deviation

from seg3dcam import METHODS, WindowPlan, XResCAM
from seg3dcam.cams.catalogue import CAMS

COMPONENTS = {
    "eigen_cam": lambda a, g: a,
    "eigen_grad_cam": lambda a, g: a * g,
    "seg_eigen_cam": lambda a, g: a * g.abs(),
}
#: What takes activations and gradients, and nothing else.
KEYS = [
    key for key in METHODS if key not in ("score_cam", "ablation_cam", "shapley_cam", "full_grad")
]

PLANS = {
    3: (WindowPlan((4, 4, 8), overlap=0, mode="constant"), (8, 12, 8)),
    2: (WindowPlan((4, 8), overlap=0, mode="constant", sw_batch_size=3), (12, 16)),
}


@pytest.mark.few(14)
@signed_maps
@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("layer", STRIDES)
@pytest.mark.parametrize("ndim", PLANS)
@each_method(KEYS, ["grad_cam", "xres_cam", "eigen_grad_cam", "kpca_cam", "fem"])
def test_map_is_that_of_the_windows_side_by_side(key, ndim, layer, score):
    plan, shape = PLANS[ndim]
    case = level(layer, toy.random_input(2, 1, *shape, seed=ndim))
    a, g = joined(parts_of(case, plan, score), STRIDES[layer])
    if key in COMPONENTS:
        assert min(map(spectral_gap, COMPONENTS[key](a, g))) > 0.05
    found = CAMS[key](case.network, layer, sliding_window=plan)(case.x, score).layers[layer]
    assert found.grid.stride == (float(STRIDES[layer]),) * ndim
    assert deviation(found.values, METHODS[key](a, g)) < EXACT


@pytest.mark.few(7)
@signed_maps
@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("window", [1, 2, None, (1, None, 2), (None, 2, None)], ids=str)
def test_blocks_pooled_over_windows(window, mode, score):
    """Where no window has a seed the gradient is zero; that counts for a maximum, too."""
    plan, shape = PLANS[3]
    case = level("3", toy.random_input(2, 1, *shape, seed=3))
    a, g = joined(parts_of(case, plan, score), 2)
    method = type(METHODS["xres_cam"])(window, mode)
    cam = XResCAM(case.network, "3", sliding_window=plan, window=window, mode=mode)
    assert deviation(cam(case.x, score).layers["3"].values, method(a, g)) < EXACT


@signed_maps
@pytest.mark.parametrize("last", [4, 8], ids=["in one window", "everywhere"])
def test_maximum_of_gradients_that_are_negative_wherever_there_are_some(last):
    """Where a window has no seed the gradients are zero, and that is the larger number."""
    layers = [nn.Conv3d(1, 4, 1), nn.ReLU(), nn.Conv3d(4, 2, 1)]
    network = toy.seeded(nn.Sequential(*layers), seed=5)
    assert (network[2].weight[1] < 0).any()
    case = toy.cut(network, 1, toy.random_input(1, 1, 4, 4, 8))
    plan = WindowPlan(4, overlap=0, mode="constant")

    def score(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 1, :, :, :last].flatten(1).sum(1)

    pair = joined(parts_of(case, plan, score), 1)
    found = XResCAM(network, "1", sliding_window=plan, window=None, mode="max")(case.x, score)
    method = type(METHODS["xres_cam"])(None, "max")
    assert deviation(found.layers["1"].values, method(*pair)) < EXACT
