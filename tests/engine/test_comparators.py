"""Attributions of the input: against autograd through MONAI's windows, captum, and by hand."""

from __future__ import annotations

import sys

import pytest
import torch
import toy
from helpers_engine import (
    EXACT,
    SCORES,
    Counting,
    curved,
    predicted,
    signed_maps,
    two_levels,
)
from torch import nn
from toy import deviation

from seg3dcam import WindowPlan, targets
from seg3dcam.cams.attributions import (
    ATTRIBUTIONS,
    Gradient,
    GradientXInput,
    GuidedBackprop,
    IntegratedGradients,
    Occlusion,
    SmoothGrad,
)
from seg3dcam.errors import ConfigError, MissingExtraError, Seg3dcamWarning

captum = pytest.importorskip("captum.attr")

SINGLE = 1e-6  # captum divides an occlusion's sums in float32

PLANS = {
    "one window": (None, (6, 4, 8)),
    "side by side": (WindowPlan((4, 4, 8), overlap=0, mode="constant"), (8, 4, 8)),
    "overlapping": (WindowPlan((4, 4, 6), overlap=0.4, sw_batch_size=2), (6, 5, 8)),
    "larger than the volume": (WindowPlan((8, 4, 8), overlap=0.5, cval=0.3), (5, 6, 8)),
    "one window, padded": (WindowPlan(8), (5, 6, 8)),
}


def network_of(*, smooth: bool = False) -> nn.Sequential:
    """Return a network of two input channels."""
    network = two_levels(smooth=smooth)
    network[0] = nn.Conv3d(2, 4, 3, padding=1)
    return toy.seeded(network, seed=5)


def slopes(network: nn.Module, x: torch.Tensor, plan: WindowPlan | None, score) -> torch.Tensor:
    """Return dS/dx of the logits that MONAI stitches, (B, C, *S)."""
    x = x.clone().requires_grad_()
    logits = network(x) if plan is None else predicted(network, x, plan)
    return torch.autograd.grad(score(logits).sum(), x)[0]


@signed_maps
@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("name", PLANS)
def test_gradients_are_those_of_autograd_through_the_stitching(name, score):
    plan, shape = PLANS[name]
    network, x = toy.shared(network_of), toy.random_input(2, 2, *shape, seed=3)
    gradient = slopes(network, x, plan, score)
    found = GradientXInput(network, sliding_window=plan)(x, score)
    assert found.layers["input"].values.shape == (2, *shape)
    assert deviation(found.maps["input"], (x * gradient).sum(1)) < EXACT
    found = Gradient(network, sliding_window=plan)(x, score)
    assert deviation(found.maps["input"], gradient.abs().sum(1)) < EXACT


@signed_maps
def test_smooth_grad_without_noise_is_the_gradient():
    network, x = toy.shared(network_of), toy.random_input(2, 2, 6, 4, 8)
    plain = Gradient(network)(x, curved).maps["input"]
    for samples in (1, 5):
        cam = SmoothGrad(network, noise=0.0, samples=samples, batch=2)
        assert deviation(cam(x, curved).maps["input"], plain) < EXACT
    first, again = (SmoothGrad(network, noise=0.2)(x, curved).maps["input"] for _ in range(2))
    assert deviation(first, plain) > 1e-3
    assert deviation(again, first) < EXACT  # the random numbers are the user's, and stay


@signed_maps
def test_smooth_grad_of_a_linear_network_is_the_gradient():
    network = toy.seeded(nn.Conv3d(2, 2, 3, padding=1))
    x, target = toy.random_input(1, 2, 6, 4, 8), targets.ClassLogit(1, "volume")
    for plan in (None, WindowPlan((4, 4, 8), overlap=0, mode="constant")):
        plain, smooth = (
            cam(network, sliding_window=plan)(x, target) for cam in (Gradient, SmoothGrad)
        )
        assert deviation(smooth.maps["input"], plain.maps["input"]) < EXACT


@signed_maps
@pytest.mark.parametrize("baseline", [0.0, -0.7])
def test_integrated_gradients_sum_to_what_the_score_gains(baseline):
    """Up to the error of the steps, which kinks make larger; a smooth network has none."""
    x = toy.random_input(2, 2, 6, 4, 8)
    for smooth, steps, limit in ((False, 128, 0.1), (True, 16, EXACT)):
        network = toy.shared(network_of, smooth=smooth)
        gain = (curved(network(x)) - curved(network(torch.full_like(x, baseline)))).detach()
        cam = IntegratedGradients(network, steps=steps, baseline=baseline, batch=7)
        assert deviation(cam(x, curved).maps["input"].flatten(1).sum(1), gain) < limit


@signed_maps
def test_integrated_gradients_of_one_step_look_half_way():
    network, x = toy.shared(network_of, smooth=True), toy.random_input(2, 2, 6, 4, 8)
    found = IntegratedGradients(network, steps=1, baseline=0.4)(x, curved).maps["input"]
    half_way = slopes(network, (x + 0.4) / 2, None, curved)
    assert deviation(found, ((x - 0.4) * half_way).sum(1)) < EXACT


@signed_maps
@pytest.mark.parametrize(
    ("key", "settings", "inputs"),
    [
        ("smooth_grad", {"samples": 7}, 7),
        ("integrated_gradients", {"steps": 7}, 7),
        ("occlusion", {"block": (2, 4, 8)}, 5),  # of 2 of 6 voxels each: five places
    ],
)
def test_no_more_than_a_batch_of_inputs_goes_through_the_network_at_once(key, settings, inputs):
    network, sizes = network_of(), []
    network.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    x = toy.random_input(1, 2, 6, 4, 8)
    for batch in (1, 3):
        sizes.clear()
        ATTRIBUTIONS[key](network, batch=batch, **settings)(x, curved)
        assert max(sizes) == batch
        assert sum(sizes) >= inputs
    sizes.clear()
    ATTRIBUTIONS[key](network, batch=50, **settings)(x, curved)
    assert max(sizes) == inputs


@signed_maps
@pytest.mark.parametrize("name", PLANS)
def test_integrated_gradients_of_a_linear_score_through_windows(name):
    given, shape = PLANS[name]
    plan = given or WindowPlan(shape)
    network, x = toy.shared(network_of, smooth=True), toy.random_input(2, 2, *shape, seed=3)
    target, empty = targets.ClassLogit(1, "volume"), torch.full_like(x, plan.cval)
    gain = target(predicted(network, x, plan)) - target(predicted(network, empty, plan))
    cam = IntegratedGradients(network, sliding_window=given, steps=16, baseline=plan.cval)
    assert deviation(cam(x, target).maps["input"].flatten(1).sum(1), gain.detach()) < EXACT


def test_integrated_gradients_of_a_straight_line_are_exact():
    network = toy.seeded(nn.Conv3d(2, 2, 3, padding=1))
    x, target = toy.random_input(1, 2, 6, 5, 8), targets.ClassLogit(1, "volume")
    for plan in (None, WindowPlan((4, 4, 8), overlap=0.5)):
        gradient = slopes(network, x, plan, target)
        result = IntegratedGradients(network, sliding_window=plan, baseline=0.5)(x, target)
        assert deviation(result.maps["input"], ((x - 0.5) * gradient).sum(1)) < EXACT


def rectified(*, inplace: bool) -> nn.Sequential:
    layers = [
        nn.Conv3d(2, 4, 3, padding=1),
        nn.BatchNorm3d(4),
        nn.ReLU(inplace=inplace),
        nn.Conv3d(4, 4, 3, padding=1),
        nn.ReLU(inplace=inplace),
        nn.Conv3d(4, 3, 1),
    ]
    return toy.seeded(nn.Sequential(*layers), seed=2)


@signed_maps
@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
def test_guided_backprop_is_captums_of_a_copy_that_works_out_of_place(inplace):
    network, x = rectified(inplace=inplace), toy.random_input(2, 2, 6, 4, 8)
    scored = nn.Sequential(rectified(inplace=False))
    scored.register_forward_hook(lambda module, args, logits: curved(logits))
    with pytest.warns(UserWarning, match="backward hooks"):
        expected = captum.GuidedBackprop(scored).attribute(x.clone().requires_grad_()).sum(1)
    result = GuidedBackprop(network)(x, curved)
    assert deviation(result.maps["input"], expected) < EXACT
    assert deviation(GradientXInput(network)(x, curved).maps["input"], expected) > 1e-2
    assert [m.inplace for m in network if isinstance(m, nn.ReLU)] == [inplace] * 2


@signed_maps
def test_guided_backprop_by_hand():
    """Behind a ReLU only positive gradients go on: those of the weights 2 and 5."""
    network = nn.Sequential(nn.Conv1d(1, 3, 1), nn.ReLU(inplace=True), nn.Conv1d(3, 1, 1)).double()
    network[0].weight.data = torch.tensor([1.0, -1.0, 1.0]).double().reshape(3, 1, 1)
    network[2].weight.data = torch.tensor([2.0, -3.0, 5.0]).double().reshape(1, 3, 1)
    network[0].bias.data.zero_()
    x = torch.tensor([[[4.0, -4.0]]]).double()  # the second voxel passes the second channel alone
    found = GuidedBackprop(network)(x, targets.ClassLogit(0, "volume")).maps["input"]
    assert found.tolist() == [[7.0, 0.0]]


def test_guided_backprop_of_a_network_without_relu_says_so():
    network = toy.seeded(
        nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv3d(4, 3, 1))
    )
    x = toy.random_input(1, 2, 6, 4, 8)
    with pytest.warns(Seg3dcamWarning, match=r"changes nn.ReLU only"):
        result = GuidedBackprop(network)(x, curved)
    assert deviation(result.maps["input"], slopes(network, x, None, curved).sum(1)) < EXACT


class BlockSum(nn.Module):
    """The logit everywhere is the sum of the input over a block."""

    def __init__(self, block: tuple[slice, ...]) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x[(slice(None), slice(None), *self.block)].flatten(1).sum(1)
        return total.reshape(-1, 1, 1, 1).expand(len(x), 1, *x.shape[2:])


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_occlusion_by_hand(batch):
    """Blocks of 4 start at every second voxel; each hides its part of the block that counts."""
    network = BlockSum((slice(2, 4), slice(0, 8)))
    x = toy.random_input(1, 2, 8, 8).abs() + 1
    target = targets.ClassLogit(0, targets.Voxel((0, 0)))
    lost = torch.zeros(8, 8).double()
    count = torch.zeros(8, 8).double()
    for i in (0, 2, 4):
        for j in (0, 2, 4):
            hidden = x.clone()
            hidden[:, :, i : i + 4, j : j + 4] = 0.25
            lost[i : i + 4, j : j + 4] += (target(network(x)) - target(network(hidden))).item()
            count[i : i + 4, j : j + 4] += 1
    found = Occlusion(network, block=4, baseline=0.25, batch=batch)(x, target)
    assert deviation(found.maps["input"][0], lost / count) < SINGLE
    assert not found.maps["input"][0, 6:].any()
    rows = Occlusion(network, block=(1, 8), baseline=0.25, batch=batch)(x, target)
    expected = (x - 0.25).sum((0, 1, 3)) * (torch.arange(8) // 2 == 1)
    assert deviation(rows.maps["input"][0], expected[:, None].expand(8, 8)) < SINGLE


@signed_maps
def test_occlusion_of_whole_windows():
    """What a window's logits lose, weighted with the slope of the score at the prediction."""
    network, x = toy.shared(network_of), toy.random_input(1, 2, 4, 4, 8)
    plan = WindowPlan(4, overlap=0, mode="constant")
    logits = predicted(network, x, plan).detach().requires_grad_()
    (slope,) = torch.autograd.grad(curved(logits).sum(), logits)
    lost = (slope * (logits - predicted(network, 0 * x, plan))).detach()
    expected = lost.reshape(-1, 2, 4).sum((0, 2)).repeat_interleave(4).expand(1, 4, 4, 8)
    found = Occlusion(network, sliding_window=plan, block=4)(x, curved)
    assert deviation(found.maps["input"], expected) < SINGLE


@signed_maps
@pytest.mark.parametrize("key", ATTRIBUTIONS)
def test_items_of_a_batch_may_have_masks_of_their_own(key):
    network, x = toy.shared(network_of), toy.random_input(2, 2, 6, 4, 8)
    mask = torch.zeros(2, 6, 4, 8)
    mask[0, :2] = mask[1, 4:] = 1
    settings = {"noise": 0.0} if key == "smooth_grad" else {}
    for plan in (None, WindowPlan((4, 4, 8), overlap=0, mode="constant")):
        cam = ATTRIBUTIONS[key](network, sliding_window=plan, **settings)
        together = cam(x, targets.ClassLogit(1, mask)).maps["input"]
        for item in range(2):
            alone = cam(x[item : item + 1], targets.ClassLogit(1, mask[item])).maps["input"]
            assert deviation(together[item], alone[0]) < EXACT


def test_windows_without_a_seed_are_not_run_again():
    counting = Counting(network_of())
    x, plan = toy.random_input(1, 2, 4, 4, 20), WindowPlan(4, overlap=0, mode="constant")
    Gradient(counting, sliding_window=plan)(x, targets.ClassLogit(1, "volume"))  # gets to know it
    runs = []
    for region in (targets.Voxel((0, 0, 9)), targets.Box((0, 0, 0), (4, 4, 8))):
        counting.reset()
        Gradient(counting, sliding_window=plan)(x, targets.ClassLogit(1, region))
        runs.append(counting.inputs)
    assert runs[1] - runs[0] == 1


@pytest.mark.parametrize("key", ATTRIBUTIONS)
def test_without_captum_the_error_names_the_extra(key, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    network = toy.shared(network_of)
    with pytest.raises(MissingExtraError, match=r"pip install 'seg3dcam\[captum\]'"):
        ATTRIBUTIONS[key](network)(toy.random_input(1, 2, 6, 4, 8), curved)


DEFAULTS = {
    "smooth_grad": {"samples": 16, "noise": 0.1, "batch": 4},
    "integrated_gradients": {"baseline": 0.0, "steps": 50, "batch": 4},
    "occlusion": {"baseline": 0.0, "block": 8, "batch": 4},
}


@pytest.mark.parametrize("key", ATTRIBUTIONS)
def test_settings_that_are_not_given_are_the_documented_ones(key):
    assert ATTRIBUTIONS[key](toy.shared(network_of)).settings == DEFAULTS.get(key, {})


def test_settings_are_those_of_the_comparator():
    with pytest.raises(ConfigError, match=r"IntegratedGradients has no setting 'step'.*steps"):
        IntegratedGradients(network_of(), step=3)
