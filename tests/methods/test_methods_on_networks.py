"""Every method's class against its slow reference, on networks cut in two at the layer.

The reference sees the two halves, not the hooks; a score is the log-odds of class 1 over the voxels
where class 1 was predicted in the first place, also when the network sees less.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import toy
from helpers_engine import each_case
from reference import methods as slow
from reference import scores
from torch import nn
from toy import deviation

import seg3dcam
from seg3dcam import METHODS, AblationCAM, FullGrad, GradCAM, ScoreCAM, ShapleyCAM, targets

EXACT = 1e-9
CLOSE = 2e-5  # of a float32 network, whose activations are rounded already

# A random network may well find nothing that speaks for a class; its numbers count all the same.
signed_maps = pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")

#: class -> reference of activations and gradients
ONE_PASS = {
    "GradCAMPlusPlus": slow.grad_cam_plus_plus,
    "XGradCAM": lambda a, g: slow.xgrad_cam(a, g)[0],
    "LayerCAM": slow.layer_cam,
    "GradCAMElementWise": slow.grad_cam_elementwise,
    "EigenCAM": slow.eigen_cam,
    "EigenGradCAM": slow.eigen_grad_cam,
    "SegEigenCAM": slow.seg_eigen_cam,
    "KPCACAM": slow.kpca_cam,
    "FEM": slow.fem,
    "RandomCAM": lambda a, g: METHODS["random"](a, g).numpy(),
}
#: What a component is of: it is only as well defined as its spectral gap is wide.
COMPONENTS = {
    "EigenCAM": lambda a, g: a,
    "EigenGradCAM": lambda a, g: a * g,
    "SegEigenCAM": lambda a, g: a * g.abs(),
    "KPCACAM": lambda a, g: a,
}


def scored(case: toy.Case) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return logits -> (B,): log-odds of class 1 over what the untouched network predicts."""
    mask = scores.predicted(case.network(case.x), 1)
    return lambda logits: scores.score(logits, scores.log_odds, 1, mask)


@pytest.mark.few(14)
@signed_maps
@each_case
@pytest.mark.parametrize("method", list(ONE_PASS))
def test_native_map_is_the_formula(method, name):
    case = toy.shared(toy.CASES[name])
    a, g = scores.activations_and_gradients(case.front, case.back, case.x, scored(case))
    expected = ONE_PASS[method](a, g)
    cam = getattr(seg3dcam, method)

    native = cam(case.network, case.layer)(case.x, target=1).native[case.layer]
    assert native.dtype == torch.float64
    assert deviation(native, expected) < EXACT

    single = cam(toy.shared(toy.converted, case.network, torch.float32), case.layer)
    native = single(case.x.float(), target=1).native[case.layer]
    assert native.dtype == torch.float32
    gap = min(map(slow.spectral_gap, COMPONENTS[method](a, g))) if method in COMPONENTS else 1
    assert deviation(native, expected) < CLOSE / gap


# --------------------------------------------------------------------------------- rescored methods


def on_the_input(case: toy.Case, a: torch.Tensor) -> torch.Tensor:
    """Interpolate activations linearly onto the input's grid; every stride is 1 or 2, offset 0."""
    result = a.numpy()
    for axis, (size, length) in enumerate(zip(a.shape[2:], case.x.shape[2:], strict=True)):
        stride = 1 if size == length else 2
        result = np.apply_along_axis(
            lambda line, stride=stride, length=length: np.interp(
                np.arange(length), stride * np.arange(len(line)), line
            ),
            axis + 2,
            result,
        )
    return torch.as_tensor(result)


@signed_maps
@each_case
def test_score_cam_sees_the_input_through_each_channel(name):
    """The score is the mean over the region: of a sum the softmax would be one for one channel."""
    case = toy.shared(toy.CASES[name])
    score = scored(case)
    a = case.front(case.x).detach()
    seen = slow.masks(on_the_input(case, a))
    voxels = scores.predicted(case.network(case.x), 1).reshape(len(a), -1).sum(1)
    rescored = [score(case.network(case.x * seen[:, k : k + 1])) for k in range(a.shape[1])]
    table = torch.stack(rescored, 1).detach().numpy() / voxels[:, None]
    native = ScoreCAM(case.network, case.layer)(case.x, target=1).native[case.layer]
    assert deviation(native, slow.score_cam(a, table)) < EXACT


@signed_maps
def test_score_cam_sees_nothing_through_a_constant_channel():
    """It has no minimum and maximum to scale by: its mask is zero, and so is the input."""
    case = toy.linear_head_case()
    case.network[2].weight.data[:2] = 0
    case.network[2].bias.data[:2] = torch.tensor([5.0, -5.0]).double()
    a = case.front(case.x).detach()
    assert (a[:, 0] == 5).all()
    assert not a[:, 1].any()
    seen = slow.masks(a)
    assert not seen[:, :2].any()
    rescored = [
        case.network(case.x * seen[:, k : k + 1])[:, 1].flatten(1).mean(1) for k in range(4)
    ]
    table = torch.stack(rescored, 1).detach().numpy()
    result = ScoreCAM(case.network, "3")(case.x, targets.ClassLogit(1, "volume"))
    assert deviation(result.native["3"], slow.score_cam(a, table)) < EXACT


@signed_maps
@each_case
def test_ablation_cam_removes_each_channel(name):
    case = toy.shared(toy.CASES[name])
    score = scored(case)
    a = case.front(case.x).detach()
    table = np.zeros(a.shape[:2])
    for k in range(a.shape[1]):
        without = a.clone()
        without[:, k] = 0
        table[:, k] = score(case.back(without)).detach().numpy()
    whole = score(case.back(a.clone())).detach().numpy()
    native = AblationCAM(case.network, case.layer)(case.x, target=1).native[case.layer]
    assert deviation(native, slow.ablation_cam(a, table, whole)) < EXACT


@signed_maps
def test_ablation_cam_of_a_linear_head_with_a_negative_score():
    """Of S = sum_k c_k S_k + bias a channel's loss is c_k S_k, whatever the sign of S."""
    case = toy.linear_head_case()
    target = targets.ClassLogit(1, "volume")
    for bias in (100.0, -100.0):
        case.network[-1].bias.data[1] = bias
        result = AblationCAM(case.network, "3")(case.x, target)
        assert (result.score.sign() == np.sign(bias)).all()
        a = case.front(case.x).detach()
        losses = a.flatten(2).sum(-1) * case.network[-1].weight[1].flatten().detach()
        weights = losses / result.score.abs()[:, None]
        assert deviation(result.native["3"], slow.weighted(weights.numpy(), a.numpy())) < EXACT


# ------------------------------------------------------------------------------------ second order


def smooth_case(ndim: int) -> toy.Case:
    """Return a tiny network of smooth activations, explained at the first."""
    conv = toy.CONV[ndim]
    layers = [
        conv(1, 3, 3, padding=1),
        nn.Softplus(),
        conv(3, 4, 3, padding=1),
        nn.GELU(),
        conv(4, 2, 1),
    ]
    network = toy.seeded(nn.Sequential(*layers), seed=2)
    return toy.cut(network, 1, toy.random_input(2, 1, *(4, 3, 2)[:ndim], seed=ndim))


@signed_maps
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_shapley_cam_with_the_whole_hessian(ndim):
    """The curvature of both the network and the score, which is not linear in the logits."""
    case = toy.shared(smooth_case, ndim)

    def score(logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, 1] * logits[:, 0].sigmoid()).flatten(1).sum(1)

    a, g = scores.activations_and_gradients(case.front, case.back, case.x, score)
    curvature = slow.curvature(lambda a: score(case.back(a))[0], a)
    result = ShapleyCAM(case.network, "1")(case.x, score).native["1"]
    assert deviation(result, slow.shapley_cam(a, g, curvature)) < EXACT
    flat = slow.shapley_cam(a, g, torch.zeros_like(a))
    assert deviation(torch.as_tensor(flat), result) > 0.01


@signed_maps
@each_case
def test_shapley_cam_of_a_logit_of_a_relu_network_is_grad_cam(name):
    case = toy.shared(toy.CASES[name])
    if "norm" in name or "in-place" in name:
        pytest.skip("InstanceNorm is curved")
    target = targets.ClassLogit(1, "volume")
    flat, expected = (
        cam(case.network, case.layer)(case.x, target).native[case.layer]
        for cam in (ShapleyCAM, GradCAM)
    )
    assert deviation(flat, expected) < EXACT


# ---------------------------------------------------------------------------------------- FullGrad


def piecewise_linear(ndim: int) -> nn.Sequential:
    """Convolutions, BatchNorm as learnt, ReLU and LeakyReLU, all on the input's grid."""
    conv, norm = toy.CONV[ndim], (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[ndim - 1]
    layers = [
        conv(2, 4, 3, padding=1),
        norm(4),
        nn.ReLU(inplace=True),
        conv(4, 4, 3, padding=1, bias=False),
        norm(4),
        nn.LeakyReLU(0.1),
        conv(4, 3, 1),
    ]
    network = toy.seeded(nn.Sequential(*layers), seed=3)
    for number in (1, 4):
        generator = torch.Generator().manual_seed(number)
        network[number].running_mean.copy_(torch.randn(4, generator=generator))
        network[number].running_var.copy_(torch.rand(4, generator=generator) + 0.5)
    return network


def logit(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 1].flatten(1).sum(1)


@signed_maps
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_full_grad_takes_the_score_apart(ndim):
    network = toy.shared(piecewise_linear, ndim)
    x = toy.random_input(2, 2, *toy.SHAPES[ndim], seed=ndim)
    parts = slow.full_grad(network, x, logit)
    assert list(parts) == ["input", "0", "1", "4", "6"]
    score = logit(network(x)).detach()
    whole = torch.as_tensor(sum(part.sum(1) for part in parts.values()))
    assert deviation(whole.flatten(1).sum(1), score) < EXACT

    result = FullGrad(network)(x, targets.ClassLogit(1, "volume"))
    assert deviation(result.score, score) < EXACT
    assert deviation(result.native["input"], whole) < EXACT


@signed_maps
def test_full_grad_as_in_the_paper_takes_absolute_values_and_scales_each_channel():
    network, x = toy.shared(piecewise_linear, 3), toy.random_input(2, 2, *toy.SHAPES[3])
    parts = slow.full_grad(network, x, logit)
    expected = sum(slow.masks(torch.as_tensor(abs(part))).sum(1) for part in parts.values())
    result = FullGrad(network, psi="paper")(x, targets.ClassLogit(1, "volume"))
    assert deviation(result.native["input"], expected) < EXACT


@pytest.mark.slow
@signed_maps
def test_full_grad_is_complete_across_strides():
    """On a coarser grid a bias speaks for several input voxels; its part is spread, not lost."""
    layers = [
        nn.Conv3d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(4, 4, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose3d(4, 4, 2, stride=2),
        nn.ConvTranspose3d(4, 3, 2, stride=2),
    ]
    network = toy.seeded(nn.Sequential(*layers), seed=4)
    x = toy.random_input(2, 2, 8, 4, 12)
    parts = slow.full_grad(network, x, logit)
    score = logit(network(x)).detach()
    total = torch.as_tensor(sum(part.reshape(2, -1).sum(1) for part in parts.values()))
    assert deviation(total, score) < EXACT
    result = FullGrad(network)(x, targets.ClassLogit(1, "volume"))
    assert deviation(result.native["input"].flatten(1).sum(1), score) < EXACT


@pytest.mark.few(1)
@signed_maps
@pytest.mark.parametrize("layer", ["encoder", "bottleneck"])
def test_full_grad_of_a_u_net_sums_to_the_score(layer):
    case = toy.shared(toy.skip_case, layer)
    result = FullGrad(case.network)(case.x, targets.ClassLogit(1, "volume"))
    assert deviation(result.native["input"].flatten(1).sum(1), result.score) < EXACT


# ------------------------------------------------------------------------------ status, classifiers


def centred_case(affine: bool) -> nn.Sequential:
    layers = [
        nn.Conv3d(1, 4, 3, padding=1),
        nn.InstanceNorm3d(4, affine=affine),
        nn.LeakyReLU(0.1),
        nn.Conv3d(4, 2, 1),
    ]
    return toy.seeded(nn.Sequential(*layers), seed=3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_xgrad_cam_after_instance_norm_says_so(dtype):
    """InstanceNorm without a bias leaves channels that sum to zero, which nothing can divide."""
    x = toy.random_input(1, 1, *toy.SHAPES[3]).to(dtype)
    cam = seg3dcam.XGradCAM(centred_case(affine=False).to(dtype), "1")
    with pytest.warns(seg3dcam.errors.Seg3dcamWarning, match="degenerate"):
        assert cam(x, target=1).status == {"1": "degenerate"}


@signed_maps
def test_a_dead_channel_makes_no_map_degenerate():
    """A ReLU that never fires contributes nothing; that is no reason to distrust the map."""
    case = toy.plain_case(3)
    case.network[0].bias.data[2] = -100
    result = seg3dcam.XGradCAM(case.network, "1")(case.x, targets.ClassLogit(1, "volume"))
    assert not case.front(case.x)[:, 2].any()
    assert result.status == {"1": "ok"}


def classifier() -> nn.Sequential:
    layers = [
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    ]
    return toy.seeded(nn.Sequential(*layers), seed=3)


@signed_maps
@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("method", list(ONE_PASS))
def test_networks_that_classify_are_explained_too(method, layer):
    case = toy.cut(toy.shared(classifier), layer, toy.random_input(2, 1, 9, 8))
    pair = scores.activations_and_gradients(case.front, case.back, case.x, lambda z: z[:, 2])
    result = getattr(seg3dcam, method)(case.network, case.layer)(case.x, targets.ClassLogit(2))
    assert deviation(result.native[case.layer], ONE_PASS[method](*pair)) < EXACT


@signed_maps
def test_networks_that_classify_are_rescored():
    network, x, target = toy.shared(classifier), toy.random_input(2, 1, 9, 8), targets.ClassLogit(1)
    case = toy.cut(network, 1, x)
    a = case.front(x).detach()
    seen = slow.masks(a)
    through = np.stack([network(x * seen[:, k, None])[:, 1].detach() for k in range(4)], 1)
    found = ScoreCAM(network, "1")(x, target).native["1"]
    assert deviation(found, slow.score_cam(a, through)) < EXACT

    keep = 1 - torch.eye(4, dtype=torch.float64)[:, None, :, None, None]
    without = torch.stack([case.back(a * row)[:, 1] for row in keep], 1).detach().numpy()
    whole = network(x)[:, 1].detach().numpy()
    found = AblationCAM(network, "1")(x, target).native["1"]
    assert deviation(found, slow.ablation_cam(a, without, whole)) < EXACT


@signed_maps
def test_full_grad_of_a_network_that_classifies_sums_to_the_score():
    """The bias of the last, linear layer has no place, but it is part of the score."""
    network, x = toy.shared(classifier), toy.random_input(2, 1, 9, 8)
    parts = slow.full_grad(network, x, lambda logits: logits[:, 1])
    total = torch.as_tensor(sum(part.reshape(2, -1).sum(1) for part in parts.values()))
    result = FullGrad(network)(x, targets.ClassLogit(1))
    assert deviation(total, result.score) < EXACT
    assert deviation(result.native["input"].flatten(1).sum(1), result.score) < EXACT
