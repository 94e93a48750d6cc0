"""Feature maps: a layer's own values, blended slowly again, and Grad-CAM's weights."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.data.utils import compute_importance_map
from scipy.ndimage import map_coordinates
from torch import nn
from toy import PACKED, Nested, linear_head_case, plain, random_input, seeded, shared, skip_case

from seg3dcam import GradCAM, SegModel, WindowPlan, load_scan, targets
from seg3dcam.cams.feature_maps import feature_maps
from seg3dcam.errors import InputError, LayerError, TargetError
from seg3dcam.explaining.features import features_of_scan
from seg3dcam.geometry import FeatureGrid
from seg3dcam.windows import blend_onto, plan_windows

VOLUME = targets.ClassLogit(1, region="volume")


def strided(ndim: int = 3) -> nn.Sequential:
    """A layer "1" of stride 2 whose voxels see the input voxels below them and nothing else."""
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[ndim]
    up = nn.Upsample(scale_factor=2)
    return seeded(nn.Sequential(conv(1, 5, 2, stride=2), nn.ReLU(), up, conv(5, 3, 1)), seed=4)


def convolved(stride: int) -> nn.Sequential:
    """Padding and overlapping kernels: every window has values of its own."""
    up = nn.Upsample(scale_factor=stride)
    first = nn.Conv3d(1, 4, 3, stride=stride, padding=1)
    return seeded(nn.Sequential(first, nn.ReLU(), up, nn.Conv3d(4, 3, 3, padding=1)), seed=2)


# ------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_values_are_those_of_the_layer(axis):
    case = shared(skip_case, "bottleneck")
    expected = case.front(case.x)[1]
    for index in range(expected.shape[1 + axis]):
        found = feature_maps(case.network, case.x, case.layer, axis=axis, index=index, item=1)
        np.testing.assert_array_equal(found.values, expected.select(1 + axis, index).detach())
        assert (found.axis, found.index, found.layer) == (axis, index, "bottleneck")
        assert found.grid == FeatureGrid((4, 3, 5), (2.0,) * 3, (0.0,) * 3)
        assert found.weights is None
        assert found.order.tolist() == list(range(6))


@pytest.mark.parametrize("ndim", [1, 2])
def test_a_layer_without_slices_is_shown_whole(ndim):
    network = plain(ndim)
    x = random_input(1, 1, *(7, 5)[:ndim])
    found = feature_maps(network, x, "1")
    expected = network[:2](x)[0].detach()
    np.testing.assert_array_equal(found.values, expected if ndim == 2 else expected[:, None])
    assert (found.axis, found.index, found.pixel_size) == (None, None, (1.0, 1.0))


def test_the_element_of_a_layer_that_returns_several():
    pack, _ = PACKED["dict"]
    network = seeded(Nested(pack))
    x = random_input(1, 1, 6, 8)
    found = feature_maps(network, x, "backbone[other]")
    np.testing.assert_array_equal(found.values, network.backbone.two(x).relu()[0].detach())


def test_float32_stays_float32_and_half_becomes_float32():
    x = random_input(1, 1, 4, 6, 6).float()
    assert feature_maps(strided().float(), x, "1").values.dtype == np.float32
    assert feature_maps(strided().bfloat16(), x, "1").values.dtype == np.float32


def test_the_middle_slice_is_the_default():
    assert feature_maps(strided(), random_input(1, 1, 10, 4, 6), "1").index == 2
    assert feature_maps(strided(), random_input(1, 1, 4, 4, 8), "1", axis=2).index == 2


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("mode", ["gaussian", "constant"])
def test_windows_change_nothing_where_the_network_is_local(axis, mode):
    x = random_input(1, 1, 12, 14, 10)
    plan = WindowPlan(8, overlap=0.5, mode=mode)
    whole = feature_maps(shared(strided), x, "1", axis=axis, index=3, target=VOLUME)
    found = feature_maps(
        shared(strided), x, "1", axis=axis, index=3, target=VOLUME, sliding_window=plan
    )
    assert found.grid == whole.grid
    np.testing.assert_allclose(found.values, whole.values, atol=1e-14)
    np.testing.assert_allclose(found.weights, whole.weights, atol=1e-14)


def blended_slowly(network, x, plan, grid, window_grid):
    """The layer "1" over the volume, one voxel and window at a time."""
    windows = plan_windows(plan, x.shape[2:])
    importance = compute_importance_map(windows.roi, plan.mode, plan.sigma_scale).double().numpy()
    padded = windows.pad(x)
    stride, offset = np.array(grid.stride), np.array(window_grid.offset)
    size = np.array(window_grid.shape)
    activations = []
    for start in windows.starts:
        cut = tuple(slice(s, s + n) for s, n in zip(start, windows.roi, strict=True))
        activations.append(network[:2](padded[(..., *cut)])[0].detach().numpy())
    total = np.zeros((len(activations[0]), *grid.shape))
    for voxel in itertools.product(*map(range, grid.shape)):
        shares = 0.0
        for start, a in zip(windows.starts, activations, strict=True):
            # In voxels of the window, and in its feature voxels.
            there = np.array(grid.offset) + stride * voxel - start + np.array(windows.before)
            index = np.round((there - offset) / stride, 9)
            if (index < -0.5).any() or (index > size - 0.5).any():
                continue
            index = index.clip(0, size - 1)
            corner = np.array(windows.roi) - 1
            share = map_coordinates(importance, there.clip(0, corner)[:, None], order=1)[0]
            total[(slice(None), *voxel)] += share * np.array(
                [map_coordinates(channel, index[:, None], order=1)[0] for channel in a]
            )
            shares += share
        total[(slice(None), *voxel)] /= shares
    return total


PLANS = {
    "on the layer's grid": (2, WindowPlan(8, overlap=0.5), (12, 10, 8)),
    "off the layer's grid": (2, WindowPlan(8, overlap=0.4, mode="constant"), (11, 13, 8)),
    "off a coarser grid": (4, WindowPlan((8, 8, 12), overlap=0.3), (15, 8, 18)),
    "smaller than the window": (2, WindowPlan(12, overlap=0.5), (7, 16, 12)),
    "batches of 3": (2, WindowPlan(8, overlap=0.25, sw_batch_size=3), (14, 8, 14)),
}


@pytest.mark.parametrize(("stride", "plan", "shape"), PLANS.values(), ids=PLANS)
def test_windows_are_blended_by_their_shares(stride, plan, shape):
    network, x = shared(convolved, stride), random_input(1, 1, *shape)
    roi = plan_windows(plan, shape).roi
    window_grid = feature_maps(network, random_input(1, 1, *roi), "1").grid
    whole = feature_maps(network, x, "1", sliding_window=plan).grid
    expected = blended_slowly(network, x, plan, whole, window_grid)
    for axis, size in enumerate(whole.shape):
        for index in (0, size // 2, size - 1):
            found = feature_maps(network, x, "1", sliding_window=plan, axis=axis, index=index)
            assert found.grid == whole
            np.testing.assert_allclose(found.values, expected.take(index, 1 + axis), atol=1e-6)


def test_windows_may_lie_on_several_devices(monkeypatch):
    """Those kept from the first pass lie where the scan is, the others where the network is."""
    seen = []

    def at(values, _, to):  # interpolation looks at values, which meta tensors do not have
        seen.append(values.device.type)
        return values.new_zeros(len(values), *to.shape)

    monkeypatch.setattr("seg3dcam.windows.part._at", at)
    windows = plan_windows(WindowPlan(8, overlap=0.5), (8, 8, 12))
    grid, whole = (FeatureGrid((4, 4, n), (2.0,) * 3, (0.0,) * 3) for n in (4, 6))
    parts = [(0, torch.zeros(3, 4, 4, 4, device="meta")), (1, torch.zeros(3, 4, 4, 4))]
    assert len(windows) == len(parts)
    blended = blend_onto(whole, grid, windows, parts)
    assert (blended.device.type, tuple(blended.shape)) == ("meta", (3, 4, 4, 6))
    assert seen == ["meta", "meta", "cpu", "meta"]  # values and shares of either window


def test_the_grid_ends_with_the_volume_not_with_the_padding():
    x = random_input(1, 1, 6, 16, 16)
    found = feature_maps(strided(), x, "1", sliding_window=WindowPlan(16))
    # 5 voxels of padding in front: feature voxels lie at -4.5, -2.5, -0.5, ... of the volume.
    assert found.grid == FeatureGrid((4, 8, 8), (2.0,) * 3, (-0.5, 0.5, 0.5))
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 5, 5))
    expected = strided()[:2](padded)[0, :, 2:6].detach()
    np.testing.assert_allclose(found.values, expected[:, 2])
    assert found.index == 2


def test_only_what_is_needed_is_run():
    network, x = strided(), random_input(1, 1, 8, 8, 32)
    windows, seen, ends = x.split(8, dim=-1), [], []
    network[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    network[3].register_forward_hook(lambda *_: ends.append(1))
    plan = WindowPlan(8, overlap=0)
    feature_maps(network, x, "1", sliding_window=plan, axis=2, index=15)
    looked_at = [any(torch.equal(window, given) for given in seen) for window in windows]
    # The first window shows the layer's grid, the last one holds the slice.
    assert looked_at == [True, False, False, True]
    seen.clear()
    ends.clear()
    feature_maps(network, x[..., :12], "1")
    assert not ends, "the network runs only as far as the layer"


# ----------------------------------------------------------------------------------------- weights


def gradients_by_hand(case, target):
    a = case.front(case.x).detach().requires_grad_()
    (g,) = torch.autograd.grad(target(case.back(a)).sum(), a)
    return a.detach(), g


@pytest.mark.parametrize("item", [0, 1])
def test_weights_are_the_mean_gradient(item):
    case = shared(skip_case, "bottleneck")
    # The network's second half looks at the item's own encoder.
    found = feature_maps(case.network, case.x, case.layer, target=VOLUME, item=item)
    _, g = gradients_by_hand(case, VOLUME)
    np.testing.assert_allclose(found.weights, g[item].mean((1, 2, 3)), rtol=1e-12)
    np.testing.assert_array_equal(found.order, sorted(range(6), key=lambda k: -found.weights[k]))
    assert found.target == targets.name_of(VOLUME)


@pytest.mark.parametrize("plan", [None, WindowPlan(8, overlap=0.5)], ids=["one", "windows"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_weighted_channels_are_grad_cams_map_and_the_slice_is_its_peak(plan, axis):
    network, x = shared(convolved, 2), random_input(1, 1, 12, 16, 8)
    found = feature_maps(network, x, "1", target=1, axis=axis, sliding_window=plan)
    result = GradCAM(network, "1", sliding_window=plan)(x, target=1)
    layer = result.layers["1"]
    assert found.grid == layer.grid
    others = [a for a in range(3) if a != axis]
    assert found.index == int(layer.values[0].amax(others).argmax())
    np.testing.assert_allclose(
        np.einsum("c,chw->hw", found.weights, found.values),
        layer.values[0].select(axis, found.index),
        atol=1e-12,
    )


def test_a_given_slice_wins_over_the_peak():
    network, x = shared(convolved, 2), random_input(1, 1, 12, 16, 8)
    assert feature_maps(network, x, "1", target=1, index=0).index == 0


def test_a_score_without_a_slope_gives_zero_weights_and_the_plain_order():
    found = feature_maps(
        convolved(2), random_input(1, 1, 12, 8, 8), "1", target=lambda z: (0 * z).sum((1, 2, 3, 4))
    )
    assert found.weights.tolist() == [0] * 4
    assert found.order.tolist() == [0, 1, 2, 3]
    assert found.index == 3


def test_equal_weights_keep_the_channels_order():
    found = feature_maps(plain(), random_input(1, 1, 4, 4, 4), "3", target=VOLUME)
    twin = type(found)(found.values, "3", found.grid, weights=np.array([1.0, 2.0, 1.0, 2.0]))
    assert twin.order.tolist() == [1, 3, 0, 2]


# -------------------------------------------------------------------------------------------- scan


def test_a_scan_is_prepared_and_its_classes_are_named():
    network = convolved(2)
    spacing = np.diag([1.0, 2.0, 3.0, 1.0])
    scan = load_scan(random_input(8, 10, 12).numpy(), affine=spacing)
    model = SegModel(network, ("background", "liver", "lesion"), window=WindowPlan(8, overlap=0.5))
    found = features_of_scan(scan, model, "1", target="liver", axis=2, index=4)
    x = scan.data[None].double()
    expected = feature_maps(network, x, "1", target=1, axis=2, index=4, sliding_window=model.window)
    np.testing.assert_allclose(found.values, expected.values, atol=1e-6)
    np.testing.assert_allclose(found.weights, expected.weights, atol=1e-6)
    assert "liver" in found.target
    np.testing.assert_allclose(found.affine, spacing @ np.diag([2, 2, 2, 1]))
    assert found.pixel_size == (2.0, 4.0)
    by_number = features_of_scan(scan, model, "1", target=1, axis=2, index=4)
    np.testing.assert_array_equal(by_number.weights, found.weights)


def test_a_mask_of_a_scan_is_the_region():
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    scan = load_scan(random_input(8, 8, 8).numpy(), affine=affine)
    mask = torch.zeros(8, 8, 8)
    mask[2:5, 1:3, 4:] = 1
    model = SegModel(convolved(2))
    region = targets.ClassLogit(1, region=load_scan(mask.numpy(), affine=affine))
    plain_region = targets.ClassLogit(1, region=mask.bool())
    found = features_of_scan(scan, model, "1", target=region)
    expected = features_of_scan(scan, model, "1", target=plain_region)
    np.testing.assert_array_equal(found.weights, expected.weights)


def test_a_batch_of_metatensors_gives_each_item_its_place():
    x = random_input(2, 1, 4, 4, 4)
    affines = torch.stack([torch.eye(4), torch.diag(torch.tensor([3.0, 1, 1, 1]))]).double()
    found = feature_maps(strided(), MetaTensor(x, affine=affines), "1", item=1, axis=2)
    assert found.pixel_size == (6.0, 2.0)


# -------------------------------------------------------------------------- untouched, and refusals


@pytest.mark.parametrize("target", [None, VOLUME, "fails"])
def test_the_model_is_untouched(target):
    network = convolved(2).train()
    network[1].eval()
    network[0].weight.requires_grad_(False)
    x = random_input(1, 1, 8, 8, 8)
    network(x).sum().backward()

    def state():
        modules = list(network.modules())
        return (
            [module.training for module in modules],
            [len(module._forward_hooks) for module in modules],
            [p.requires_grad for p in network.parameters()],
            [None if p.grad is None else p.grad.tolist() for p in network.parameters()],
            [p.tolist() for p in network.parameters()],
            torch.get_rng_state().tolist(),
        )

    before, given = state(), x.clone()
    if target == "fails":
        with pytest.raises(TargetError):
            feature_maps(network, x, "1", target=7)
    else:
        feature_maps(network, x, "1", target=target)
    assert state() == before
    assert torch.equal(x, given)


REFUSED = {
    "slice": ({"index": 4}, InputError, r"slice 4 of layer '1' along axis 0: legal are 0 to 3"),
    "negative slice": ({"index": -1}, InputError, "slice -1 .* legal are 0 to 3"),
    "axis": ({"axis": 3}, InputError, "axis 3: legal are 0, 1 and 2"),
    "item": ({"item": 1}, InputError, "item 1: legal are 0 to 0"),
    "class": ({"target": 3}, TargetError, "3"),
    "no layer": ({"layer": "first"}, LayerError, "no layer 'first'"),
    "several layers": ({"layer": ["0", "1"]}, LayerError, "2 layers.* name one of '0', '1'"),
    "family": ({"target": targets.EveryComponent(1)}, TargetError, "several targets"),
}


@pytest.mark.parametrize(("given", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_say_what_is_legal(given, error, message):
    given = {"layer": "1", **given}
    with pytest.raises(error, match=message):
        feature_maps(shared(convolved, 2), random_input(1, 1, 8, 8, 8), **given)


def test_a_slice_of_a_2d_layer_is_refused():
    with pytest.raises(InputError, match="2D and shown whole"):
        feature_maps(strided(2), random_input(1, 1, 8, 8), "1", index=0)


def test_a_layer_without_a_place_in_the_image_is_refused():
    network = seeded(nn.Sequential(nn.Conv3d(1, 4, 1), nn.Flatten(), nn.Linear(4 * 64, 3)))
    with pytest.raises(LayerError, match="layer '2'"):
        feature_maps(network, random_input(1, 1, 4, 4, 4), "2")


def test_a_slice_between_windows_is_refused():
    network = nn.Sequential(nn.Conv3d(1, 2, 5))  # no padding: a window of 8 gives 4 voxels
    with pytest.raises(LayerError, match="between the windows"):
        feature_maps(
            network,
            torch.rand(1, 1, 16, 8, 8),
            "0",
            sliding_window=WindowPlan(8, overlap=0),
            index=5,
        )


def test_a_linear_head_weighs_channels_by_its_own_weights():
    case = linear_head_case()
    found = feature_maps(case.network, case.x, case.layer, target=VOLUME)
    # Behind the layer is a 1x1x1 convolution alone: its row of class 1 is the gradient.
    np.testing.assert_allclose(
        found.weights, case.network[4].weight[1].detach().flatten(), rtol=1e-12
    )
