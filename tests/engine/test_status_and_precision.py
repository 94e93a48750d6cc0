"""What a map says of itself, limits that are refused, and networks of low precision."""

from __future__ import annotations

import itertools

import pytest
import torch
import toy
from helpers_crossed import crossed
from helpers_engine import curved, each_method, signed_maps, two_levels
from torch import nn
from toy import deviation

from seg3dcam import (
    KPCACAM,
    EigenCAM,
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    WindowPlan,
    XGradCAM,
    targets,
)
from seg3dcam.cams.attributions import ATTRIBUTIONS
from seg3dcam.cams.catalogue import CAMS
from seg3dcam.errors import ConfigError, Seg3dcamWarning

#: plan and volume; all windows have one shape, for which grids are measured once
PLANS = {
    "one window": (None, (4, 4, 8)),
    "windows": (WindowPlan((4, 4, 8), overlap=0.5), (8, 4, 8)),
}
through = pytest.mark.parametrize(("plan", "shape"), PLANS.values(), ids=PLANS)
SIDE_BY_SIDE = WindowPlan((4, 4, 8), overlap=0, mode="constant")
VOLUME = targets.ClassLogit(1, "volume")


def behind_norm(norm: nn.Module) -> nn.Sequential:
    layers = [nn.Conv3d(1, 4, 3, padding=1), norm, nn.LeakyReLU(), nn.Conv3d(4, 3, 3, padding=1)]
    return toy.seeded(nn.Sequential(*layers), seed=3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("plan", [None, SIDE_BY_SIDE], ids=["one window", "windows"])
def test_xgrad_cam_behind_instance_norm_is_degenerate(plan, dtype):
    """Its sums of activations are rounding noise, of windows side by side as of the whole."""
    network = behind_norm(nn.InstanceNorm3d(4)).to(dtype)
    x = toy.random_input(2, 1, 8, 4, 8).to(dtype)
    with pytest.warns(Seg3dcamWarning, match=r'status "degenerate".*as after InstanceNorm'):
        result = XGradCAM(network, "1", sliding_window=plan)(x, curved)
    assert result.layers["1"].item_status == ("degenerate", "degenerate")
    assert torch.isfinite(result.maps["1"]).all()
    assert not result.volume().any()


@pytest.mark.filterwarnings("ignore:where the voxels")  # a ramp is bright
def test_one_degenerate_item_of_a_batch():
    """A layer that subtracts the mean from bright items only."""

    class Centring(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mean = x.mean((2, 3, 4), keepdim=True)
            return torch.where(mean > 10, x - mean, x)

    network = behind_norm(Centring())
    with torch.no_grad():
        network[0].weight.abs_()
    x = toy.random_input(2, 1, 8, 4, 8).abs()
    x[1] += 1000
    with pytest.warns(Seg3dcamWarning, match=r'status "degenerate"'):
        result = XGradCAM(network, "1")(x, lambda logits: -VOLUME(logits))
    assert result.layers["1"].item_status == ("ok", "degenerate")
    assert not result.volume()[1].any()


@signed_maps
@through
def test_grad_cam_plus_plus_says_where_activations_are_negative(plan, shape):
    network, x = toy.shared(two_levels), toy.random_input(1, 1, *shape)
    result = GradCAMPlusPlus(network, ["0", "1"], sliding_window=plan)(x, curved)
    lowest = network[0](x).min().item()
    (flag,) = result.layers["0"].flags
    assert flag.startswith("the method is meant for activations >= 0; here they go down to -")
    assert result.layers["1"].flags == ()
    if plan is None:
        assert float(flag.split()[-1]) == pytest.approx(lowest, rel=1e-2)
    with pytest.warns(Seg3dcamWarning, match=r"layer '0', 'curved': the method is meant for"):
        GradCAMPlusPlus(network, "0", sliding_window=plan)(x, curved)
    for cam in (GradCAM, HiResCAM, EigenCAM):
        assert cam(network, "0", sliding_window=plan)(x, curved).layers["0"].flags == ()


@pytest.mark.parametrize(
    ("shape", "plan", "voxels"),
    [
        ((1, 1, 17, 16, 16), None, 17 * 16 * 16),
        ((1, 1, 65, 64), None, 65 * 64),
        ((1, 1, 20, 16, 16), WindowPlan(16, overlap=0.5), 2 * 16**3),
    ],
    ids=["3D", "2D", "windows"],
)
def test_kernel_of_too_many_voxels_is_refused_with_the_numbers(shape, plan, voxels):
    network = toy.plain(len(shape) - 2)
    message = rf"the layer has {voxels} or more, and 4096 \(16 x 16 x 16\) is the limit.*eigen_cam"
    with pytest.raises(ConfigError, match=message):
        KPCACAM(network, "1", sliding_window=plan)(torch.rand(shape).double(), target=1)


METHODS = CAMS | ATTRIBUTIONS

#: Their maps are not proportional to the score.
UNITLESS = ("eigen_cam", "kpca_cam", "fem", "random", "score_cam", "ablation_cam",
            "grad_cam_plus_plus")  # fmt: skip


@pytest.mark.few(10)
@signed_maps
@through
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_method(METHODS)
def test_networks_of_low_precision_give_finite_maps_of_float32(key, dtype, plan, shape):
    x = toy.random_input(1, 1, *shape)
    exact = toy.shared(two_levels)
    network = toy.shared(toy.converted, exact, dtype)
    result = METHODS[key](network, ["1", "3"], sliding_window=plan)(x.float(), VOLUME)
    for name, map_ in result.maps.items():
        assert map_.dtype == torch.float32
        assert torch.isfinite(map_).all()
        assert result.status[name] in ("ok", "zero")
    if dtype == torch.float32 and key != "smooth_grad":
        expected = METHODS[key](exact, ["1", "3"], sliding_window=plan)(x, VOLUME)
        for name, map_ in result.maps.items():
            assert deviation(map_, expected.maps[name]) < 1e-4


@pytest.mark.few(4)
@signed_maps
@pytest.mark.parametrize("plan", [None, SIDE_BY_SIDE, WindowPlan(4, overlap=0.5)], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("key", ["score_cam", "ablation_cam"])
def test_the_ceiling_is_what_a_map_would_be_if_nothing_cancelled(key, sign, plan):
    """Two channels hold the input with either sign; the sizes of their weights sum to one."""
    network = nn.Sequential(nn.Conv3d(1, 2, 1, bias=False), nn.Conv3d(2, 1, 1, bias=False))
    for convolution in network:
        convolution.weight.data = torch.tensor([1.0, -1.0]).reshape(convolution.weight.shape)
    x = toy.random_input(2, 1, 8, 4, 8).abs()
    target = targets.WeightedSum([(sign, targets.ClassLogit(0, "volume"))])
    layer = METHODS[key](network.double(), "0", sliding_window=plan)(x, target).layers["0"]
    torch.testing.assert_close(layer.ceiling, x.flatten(1).amax(1))
    assert (layer.values.abs().flatten(1).amax(1) < 0.9 * layer.ceiling).all()


@signed_maps
@through
@each_method(METHODS)
def test_a_score_in_other_units_is_no_less_of_a_map(key, plan, shape):
    """What is rounding noise is measured by the map's own ceiling."""
    network, x = toy.shared(two_levels, smooth=True), toy.random_input(1, 1, *shape)
    cam = METHODS[key](network, ["1", "3"], sliding_window=plan)
    target = targets.ClassLogit(1, targets.Box((1, 0, 2), (shape[0] - 1, 3, 6)))
    one, tiny = cam(x, target), cam(x, targets.WeightedSum([(1e-9, target)]))
    assert one.status == tiny.status
    assert one.layers.keys() == tiny.layers.keys()
    if key not in UNITLESS:
        for name, layer in one.layers.items():
            assert deviation(1e9 * tiny.layers[name].ceiling, layer.ceiling) < 1e-6


def silent(ndim: int) -> nn.Sequential:
    network = two_levels(ndim)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    return network


@pytest.mark.slow
@signed_maps
@pytest.mark.parametrize(("key", "how"), crossed(METHODS, itertools.product([2, 3], PLANS), rows=2))
def test_a_map_of_a_network_that_says_nothing_is_never_a_heatmap(key, how):
    """All weights are zero: no method may make something of that."""
    ndim, through = how
    plan, shape = PLANS[through]
    if ndim == 2:
        shape, plan = shape[:2], plan and WindowPlan(4, overlap=0.5)
    result = METHODS[key](toy.shared(silent, ndim), ["1", "3"], sliding_window=plan)(
        toy.random_input(1, 1, *shape), VOLUME
    )
    assert set(result.status.values()) <= {"zero", "degenerate"}
    assert not result.volume().any()
