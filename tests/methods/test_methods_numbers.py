"""Every method's map is its formula: against slow float64 references, by properties, by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import toy
from reference import maps
from reference import methods as slow
from sklearn.decomposition import KernelPCA

from seg3dcam import METHODS
from seg3dcam.errors import ConfigError

EXACT = 1e-9  # float64, relative to the largest value of the map
CLOSE = 1e-5  # float32

Map = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

#: Methods that look at the activations only.
AGNOSTIC = ("eigen_cam", "kpca_cam", "fem")
#: Their map is a principal component: defined as well as its spectral gap is wide.
COMPONENTS = {
    "eigen_cam": lambda a, g: a,
    "eigen_grad_cam": lambda a, g: a * g,
    "seg_eigen_cam": lambda a, g: a * g.abs(),
    "kpca_cam": lambda a, g: a,
}


def peaks(activations: torch.Tensor) -> torch.Tensor:
    """Return scores (B, C) that stand for those of masked or ablated channels."""
    return activations.flatten(2).amax(-1)


def total(activations: torch.Tensor) -> torch.Tensor:
    """Return a score (B,) that stands for that of the whole, one sign for each item."""
    signs = torch.tensor([1.0, -1.0])[: len(activations)].to(activations)
    return (peaks(activations).sum(1) + 0.5) * signs


def score_cam(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return METHODS["score_cam"](a, lambda channels: peaks(a)[:, channels])


def ablation_cam(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return METHODS["ablation_cam"](a, lambda channels: peaks(a)[:, channels], total(a))


def shapley_cam(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return METHODS["shapley_cam"](a, g, g * a / 3)


def by_key(key: str) -> Map:
    """Return a method of activations and gradients; what else it needs is made of these."""
    special = {"score_cam": score_cam, "ablation_cam": ablation_cam, "shapley_cam": shapley_cam}
    return special.get(key) or (lambda a, g: METHODS[key](a, g))


#: key -> the slow reference.
FORMULAS = {
    "grad_cam": maps.grad_cam,
    "slice_grad_cam": maps.slice_grad_cam,
    "hires_cam": maps.hires_cam,
    "xres_cam": lambda a, g: maps.xres_cam(a, g, 2, "mean"),
    "grad_cam_plus_plus": slow.grad_cam_plus_plus,
    "xgrad_cam": lambda a, g: slow.xgrad_cam(a, g)[0],
    "layer_cam": slow.layer_cam,
    "grad_cam_elementwise": slow.grad_cam_elementwise,
    "eigen_cam": slow.eigen_cam,
    "eigen_grad_cam": slow.eigen_grad_cam,
    "seg_eigen_cam": slow.seg_eigen_cam,
    "kpca_cam": slow.kpca_cam,
    "fem": slow.fem,
    "score_cam": lambda a, g: slow.score_cam(a, peaks(a).double().numpy()),
    "ablation_cam": lambda a, g: slow.ablation_cam(
        a, peaks(a).double().numpy(), total(a).double().numpy()
    ),
    "shapley_cam": lambda a, g: slow.shapley_cam(a, g, g.double() * a.double() / 3),
}


def pair(kind: str, shape: tuple[int, ...], channels: int = 4, seed: int = 0) -> tuple:
    """Return activations and gradients (2, channels, *shape), float64 that float32 represents.

    One pattern dominates A, G * A and |G| * A, so that they have a clear principal component.
    Of "relu", activations are those of a ReLU. Of "signed", the gradients are so small that
    2 + S_k g, the denominator of Grad-CAM++, stays away from zero.
    """
    pattern = 3 * toy.random_input(2, 1, *shape, seed=seed + 1) + 1
    strengths = toy.random_input(2, channels, *[1] * len(shape), seed=seed + 2)
    signs = toy.random_input(2, channels, *[1] * len(shape), seed=seed + 3)
    a = pattern * (strengths + strengths.sign()) + toy.random_input(2, channels, *shape, seed=seed)
    g = signs + signs.sign() + toy.random_input(2, channels, *shape, seed=seed + 4) / 2
    if kind == "relu":
        return a.abs().mul(a > 1).float().double(), g.float().double()
    return a.float().double(), (g / 400).float().double()


def deviation(found: torch.Tensor, expected: np.ndarray | torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected value; 0 / 0 is 0."""
    expected = torch.as_tensor(expected)
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    difference = float((found.double() - expected).abs().max())
    return difference / max(float(expected.abs().max()), 1e-300)


# ------------------------------------------------------------------- against the slow reference


@pytest.mark.parametrize("kind", ["relu", "signed"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("key", list(FORMULAS))
def test_map_is_the_formula(key, ndim, kind):
    a, g = pair(kind, toy.SHAPES[ndim])
    if key in COMPONENTS:
        assert min(map(slow.spectral_gap, COMPONENTS[key](a, g))) > 0.3
    expected = FORMULAS[key](a, g)

    found = by_key(key)(a, g)
    assert found.dtype == torch.float64
    assert deviation(found, expected) < EXACT

    found = by_key(key)(a.float(), g.float())
    assert found.dtype == torch.float32
    assert deviation(found, expected) < CLOSE


@pytest.mark.parametrize("key", AGNOSTIC)
def test_class_agnostic_methods_need_no_gradients(key):
    a, g = pair("relu", toy.SHAPES[2])
    assert torch.equal(METHODS[key](a), METHODS[key](a, g))
    assert torch.equal(METHODS[key](a), METHODS[key](a, torch.zeros_like(g)))


@pytest.mark.parametrize("kind", ["relu", "signed"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_grad_cam_plus_plus_is_the_papers_alpha_form(ndim, kind):
    a, g = pair(kind, toy.SHAPES[ndim])
    g[0, 0] = 0  # alpha is 0 / 0 there
    expected = slow.grad_cam_plus_plus_alpha(a, g)
    assert deviation(torch.as_tensor(slow.grad_cam_plus_plus(a, g)), expected) < EXACT
    assert deviation(METHODS["grad_cam_plus_plus"](a, g), expected) < EXACT


@pytest.mark.parametrize("kernel", ["sigmoid", "rbf"])
def test_kernel_component_is_that_of_scikit_learn(kernel):
    a, _ = pair("relu", toy.SHAPES[3])
    expected = slow.kpca_cam(a, kernel=kernel)
    for item, map_ in zip(a.numpy(), expected, strict=True):
        voxels = item.reshape(len(item), -1).T
        voxels = voxels - voxels.mean(0)
        found = KernelPCA(n_components=1, kernel=kernel).fit_transform(voxels)[:, 0]
        found *= np.sign(found @ map_.ravel())
        assert deviation(torch.as_tensor(found), map_.ravel()) < EXACT


#: key -> activations and gradients of which the map is what the ceiling is said to be.
WITHOUT_CANCELLING = {
    **dict.fromkeys(
        ("grad_cam", "slice_grad_cam", "hires_cam", "xres_cam", "grad_cam_elementwise"),
        lambda a, g: (a.abs(), g.abs()),
    ),
    "layer_cam": lambda a, g: (a.abs(), g),
    "fem": lambda a, g: (a, g),
}


@pytest.mark.parametrize("key", WITHOUT_CANCELLING)
def test_the_ceiling_is_what_the_map_would_be_if_nothing_cancelled(key):
    a, g = pair("signed", toy.SHAPES[3])
    method = METHODS[key]
    found = method.ceiling(a, g, method.weights_of_all(a, g))
    expected = method(*WITHOUT_CANCELLING[key](a, g)).abs()
    assert deviation(found, expected) < EXACT


def test_what_a_method_needs_it_says():
    a, _ = pair("relu", toy.SHAPES[2])
    for key in set(FORMULAS) - {*AGNOSTIC, "score_cam", "ablation_cam", "shapley_cam"}:
        with pytest.raises(TypeError, match="needs gradients"):
            METHODS[key](a)
    with pytest.raises(TypeError, match="needs the score"):
        METHODS["ablation_cam"](a, lambda channels: peaks(a)[:, channels])


def test_a_kernel_of_16_cubed_voxels_is_the_largest():
    method = METHODS["kpca_cam"]

    def surveyed(voxels: int) -> dict[str, torch.Tensor]:
        return method.survey(torch.zeros(1, 2, voxels), torch.ones(voxels))

    surveyed(4096)
    with pytest.raises(ConfigError, match="4097 or more, and 4096"):
        surveyed(4097)
    method.join(surveyed(4000), surveyed(96))
    with pytest.raises(ConfigError, match="4097 or more, and 4096"):
        method.join(surveyed(4000), surveyed(97))


# ------------------------------------------------------------------------------- unusual numbers

#: name -> activations and gradients
UNUSUAL = {
    "one channel": lambda: pair("relu", (4, 5), channels=1),
    "more channels than voxels": lambda: pair("signed", (2, 3), channels=9),
    "one voxel along some axes": lambda: pair("relu", (1, 7, 1)),
    "some constant channels": lambda: _with_constants(0.1, 0, 2),
    "some dead channels": lambda: _with_constants(0.0, 1, 3),
    "only constant channels": lambda: _with_constants(0.1, 0, 1, 2, 3),
    "no activation at all": lambda: _with_constants(0.0, 0, 1, 2, 3),
    "tiny numbers": lambda: tuple(t * 2.0**-40 for t in pair("relu", (4, 5))),
    "huge numbers": lambda: tuple(t * 2.0**40 for t in pair("relu", (4, 5))),
}


def _with_constants(value: float, *channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, g = pair("relu", (4, 5))
    a[:, list(channels)] = torch.tensor(value).double()
    return a, g


@pytest.mark.few(101)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", list(UNUSUAL))
@pytest.mark.parametrize("key", list(FORMULAS))
def test_unusual_numbers(key, name, dtype):
    a, g = (tensor.to(dtype) for tensor in UNUSUAL[name]())
    expected = FORMULAS[key](a, g)
    found = by_key(key)(a, g)
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    scale = np.abs(expected).max()
    if key in COMPONENTS or key == "fem":  # of a constant they are nothing but rounding
        summed = COMPONENTS.get(key, COMPONENTS["eigen_cam"])(a, g)
        scale = max(scale, 1e-2 * float(summed.abs().max()))
    limit = EXACT if dtype == torch.float64 else CLOSE
    if key == "kpca_cam" and np.abs(expected).max() < 1e-7:
        scale, limit = 1.0, 1e-7  # its kernel is about 1: this is the root of that one's rounding
    assert np.abs(found.double().numpy() - expected).max() <= limit * scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("value", [0.1, -0.3, 1 / 3, 1e6 + 0.1])
@pytest.mark.parametrize("shape", [(3,), (7, 5), (5, 4, 7), (9, 11, 13)], ids=str)
def test_no_voxel_of_a_constant_channel_stands_out(shape, value, dtype):
    """The mean of N times 0.1 is not always 0.1, and the deviation from it not always 0."""
    a = torch.full((1, 2, *shape), value, dtype=dtype)
    assert not METHODS["fem"](a).any()
    rounding = 100 * torch.finfo(dtype).eps * abs(value)
    assert METHODS["eigen_cam"](a).abs().max() <= rounding


@pytest.mark.parametrize("key", [key for key in FORMULAS if key not in AGNOSTIC])
def test_zero_gradients_give_a_zero_map(key):
    a, g = pair("signed", toy.SHAPES[2])
    if key not in ("score_cam", "ablation_cam"):
        assert not by_key(key)(a, torch.zeros_like(g)).any()


@pytest.mark.parametrize("key", list(FORMULAS))
def test_activations_and_gradients_are_left_alone(key):
    a, g = pair("relu", toy.SHAPES[2])
    copies = a.clone(), g.clone()
    by_key(key)(a, g)
    assert torch.equal(a, copies[0])
    assert torch.equal(g, copies[1])


# ------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("key", [key for key in FORMULAS if key != "ablation_cam"])
def test_batch_is_its_items_alone(key):
    a, g = pair("relu", toy.SHAPES[3])
    together = by_key(key)(a, g)
    alone = torch.cat([by_key(key)(a[b : b + 1], g[b : b + 1]) for b in range(len(a))])
    assert deviation(together, alone) < EXACT


def test_batch_is_its_items_alone_of_ablation_cam():
    a, _ = pair("relu", toy.SHAPES[3])
    scores, score = peaks(a), torch.tensor([3.0, -5.0]).double()
    method = METHODS["ablation_cam"]
    together = method(a, lambda channels: scores[:, channels], score)
    for b in range(len(a)):
        one = slice(b, b + 1)
        alone = method(a[one], lambda channels, one=one: scores[one, channels], score[one])
        assert deviation(together[one], alone) < EXACT


#: No slices and no blocks: an axis is an axis, and has no direction.
ISOTROPIC = [key for key in FORMULAS if key not in ("slice_grad_cam", "xres_cam")]
FLIPS = [axes for n in (1, 2, 3) for axes in itertools.combinations((2, 3, 4), n)]


@pytest.mark.parametrize("axes", FLIPS, ids=str)
@pytest.mark.parametrize("key", [*ISOTROPIC, "slice_grad_cam", "xres_cam"])
def test_flips_commute_with_the_map(key, axes):
    shape = (4, 2, 6) if key == "xres_cam" else toy.SHAPES[3]  # its last block would be cut short
    a, g = pair("relu", shape)
    expected = by_key(key)(a, g).flip([axis - 1 for axis in axes])
    assert deviation(by_key(key)(a.flip(axes), g.flip(axes)), expected) < EXACT


@pytest.mark.parametrize("order", list(itertools.permutations((2, 3, 4))), ids=str)
@pytest.mark.parametrize("key", [*ISOTROPIC, "slice_grad_cam", "xres_cam"])
def test_axis_permutations_commute_with_the_map(key, order):
    if key == "slice_grad_cam" and order[0] != 2:
        pytest.skip("another axis counts the slices")
    a, g = pair("relu", toy.SHAPES[3])
    expected = by_key(key)(a, g).permute(0, *(axis - 1 for axis in order))
    found = by_key(key)(a.permute(0, 1, *order), g.permute(0, 1, *order))
    assert deviation(found, expected) < EXACT


@pytest.mark.parametrize("key", list(FORMULAS))
def test_order_of_the_channels_does_not_matter(key):
    a, g = pair("signed", toy.SHAPES[3])
    order = torch.tensor([2, 0, 3, 1])
    assert deviation(by_key(key)(a[:, order], g[:, order]), by_key(key)(a, g)) < EXACT


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e3, 1e6])
def test_grad_cam_plus_plus_of_a_scaled_score(factor):
    """A sum over N voxels or their mean differ by N: no epsilon may drown the smaller one."""
    a, g = pair("relu", toy.SHAPES[3])
    expected = slow.grad_cam_plus_plus(a, g * factor)
    assert deviation(METHODS["grad_cam_plus_plus"](a, g * factor), expected) < EXACT
    found = METHODS["grad_cam_plus_plus"](a.float(), (g * factor).float())
    assert deviation(found, expected) < CLOSE


def test_grad_cam_plus_plus_in_its_two_limits():
    """Small gradients: half of their sum. Large ones: how many are positive, over S_k."""
    a, g = pair("relu", toy.SHAPES[2])
    sums = a.flatten(2).sum(-1)
    assert (sums > 0).all()
    small = g.relu().flatten(2).sum(-1) / 2 * 1e-15
    large = (g > 0).double().flatten(2).sum(-1) / sums
    for factor, weights in ((1e-15, small), (1e15, large)):
        expected = slow.weighted(weights.numpy(), a.numpy())
        assert deviation(METHODS["grad_cam_plus_plus"](a, g * factor), expected) < EXACT


@pytest.mark.parametrize("key", ["eigen_cam", "kpca_cam"])
def test_a_constant_added_to_each_channel_changes_no_component(key):
    a, _ = pair("relu", toy.SHAPES[3])
    shift = 10 * toy.random_input(2, 4, 1, 1, 1, seed=8)
    assert deviation(METHODS[key](a + shift), METHODS[key](a)) < EXACT


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize("key", ["layer_cam", "grad_cam_elementwise", "xgrad_cam",
                                 "eigen_grad_cam", "seg_eigen_cam", "shapley_cam"])  # fmt: skip
def test_map_scales_with_the_score(key, factor):
    a, g = pair("signed", toy.SHAPES[3])
    assert deviation(by_key(key)(a, g * factor), by_key(key)(a, g) * factor) < EXACT


# -------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("key", ["layer_cam", "grad_cam_elementwise"])
@pytest.mark.parametrize("kind", ["relu", "signed"])
def test_for_minus_against_is_hires_cam(kind, key):
    a, g = pair(kind, toy.SHAPES[3])
    found = METHODS[key](a, g) - METHODS[key](a, -g)
    assert deviation(found, METHODS["hires_cam"](a, g)) < EXACT


def test_where_activations_are_positive_layer_cam_bounds_hires_cam():
    a, g = pair("relu", toy.SHAPES[3])
    assert torch.equal(METHODS["layer_cam"](a, g), METHODS["grad_cam_elementwise"](a, g))
    slack = METHODS["layer_cam"](a, g) - METHODS["hires_cam"](a, g)
    assert (slack > -1e-12 * slack.max()).all()
    assert slack.max() > 0


@pytest.mark.parametrize("kind", ["relu", "signed"])
def test_xgrad_cam_sums_to_what_hires_cam_sums_to(kind):
    """Its axiom: the map adds up to sum of G A, which is the score where S is linear in A."""
    a, g = pair(kind, toy.SHAPES[3])
    expected = METHODS["hires_cam"](a, g).flatten(1).sum(1)
    assert deviation(METHODS["xgrad_cam"](a, g).flatten(1).sum(1), expected) < EXACT


@pytest.mark.parametrize("key", ["xgrad_cam", "hires_cam", "xres_cam", "slice_grad_cam"])
def test_constant_gradients_make_it_grad_cam(key):
    a, g = pair("relu", toy.SHAPES[3])
    g = g[..., :1, :1, :1].expand_as(g)
    assert deviation(METHODS[key](a, g), METHODS["grad_cam"](a, g)) < EXACT


def test_xgrad_cam_gives_a_channel_that_sums_to_zero_no_weight():
    """As InstanceNorm leaves it: the sum is rounding, and nothing may be divided by it."""
    a, g = pair("relu", toy.SHAPES[3])
    a[:, 1] -= a[:, 1].mean((1, 2, 3), keepdim=True)
    without = METHODS["xgrad_cam"](a[:, [0, 2, 3]], g[:, [0, 2, 3]])
    assert deviation(METHODS["xgrad_cam"](a, g), without) < EXACT
    found = METHODS["xgrad_cam"](a.float(), g.float())
    assert deviation(found, without) < CLOSE


@pytest.mark.parametrize("key", ["eigen_cam", "eigen_grad_cam", "seg_eigen_cam"])
def test_component_of_one_pattern_is_the_pattern(key):
    """A_k(u) = c_k f(u) projects to |c| (f - mean of f), up to the sign that is chosen."""
    pattern = toy.random_input(2, 1, *toy.SHAPES[3]) ** 2
    strengths = toy.random_input(2, 4, 1, 1, 1, seed=1)
    a, g = pattern * strengths, torch.full_like(pattern, -2).expand(2, 4, *toy.SHAPES[3])
    expected = (pattern - pattern.mean((2, 3, 4), keepdim=True))[:, 0]
    expected = expected * strengths.square().sum(1).sqrt()
    if key == "eigen_cam":
        found = METHODS[key](a)
    else:
        found, expected = METHODS[key](a, g), 2 * expected
    if key == "eigen_grad_cam":  # its sign is that of the sum of G A
        expected = expected * -strengths.sum(1).sign()
    assert deviation(found, expected) < EXACT


@pytest.mark.parametrize("key", ["eigen_cam", "seg_eigen_cam", "kpca_cam"])
def test_largest_value_of_a_component_is_positive(key):
    for sign in (1, -1):
        a, g = pair("signed", toy.SHAPES[3])
        found = METHODS[key](sign * a, g).flatten(1)
        assert (found.amax(1) >= -found.amin(1)).all()


def test_eigen_grad_cam_agrees_with_hires_cam():
    for seed in range(5):
        a, g = pair("signed", toy.SHAPES[3], seed=10 * seed)
        found = METHODS["eigen_grad_cam"](a, g).flatten(1)
        hires = METHODS["hires_cam"](a, g).flatten(1)
        assert ((found * (hires - hires.mean(1, keepdim=True))).sum(1) > 0).all()
        assert deviation(METHODS["eigen_grad_cam"](a, -g), -found.reshape(2, 5, 4, 7)) < EXACT


def test_fem_worked_out_by_hand():
    """Of 0 0 0 0 0 0 0 0 0 10: mean 1, deviation 3; only 10 is above 7. Of 1 1 2 2: none."""
    a = torch.zeros(1, 2, 10)
    a[0, 0, 9] = 10
    a[0, 1] = torch.tensor([1.0, 1, 2, 2, 1, 1, 2, 2, 1, 1])
    assert METHODS["fem"](a).tolist() == [[0] * 9 + [1]]


# ------------------------------------------------------------------------------- rescored methods


@pytest.mark.parametrize("key", ["score_cam", "ablation_cam"])
def test_every_channel_is_rescored_once(key):
    a, _ = pair("relu", toy.SHAPES[3], channels=7)
    asked: list[int] = []

    def rescore(channels: list[int]) -> torch.Tensor:
        asked.extend(channels)
        return peaks(a)[:, channels]

    METHODS[key](a, rescore, *([total(a)] if key == "ablation_cam" else []))
    assert sorted(asked) == list(range(7))
    assert all(isinstance(channel, int) for channel in asked)


def test_score_cam_of_equal_scores_is_the_mean_and_of_one_large_one_that_channel():
    a, _ = pair("relu", toy.SHAPES[3])
    scores = torch.full((2, 4), 1e6).double()
    found = METHODS["score_cam"](a, lambda channels: scores[:, channels])
    assert deviation(found, a.mean(1)) < EXACT
    scores[:, 2] *= 2
    found = METHODS["score_cam"](a, lambda channels: scores[:, channels])
    assert deviation(found, a[:, 2]) < EXACT


def test_score_cam_needs_no_baseline():
    a, _ = pair("relu", toy.SHAPES[3])
    shift = torch.tensor([[3.0], [-7.0]]).double()
    found = METHODS["score_cam"](a, lambda channels: peaks(a)[:, channels] + shift)
    assert deviation(found, score_cam(a, a)) < EXACT


def test_ablation_cam_of_a_negative_score_keeps_its_sign():
    """Losing channel 0 lowers the score by 1, whatever the score is: its weight is positive."""
    a = toy.random_input(2, 1, 3, 4).abs()
    score = torch.tensor([4.0, -4.0]).double()
    found = METHODS["ablation_cam"](a, lambda channels: score[:, None] - 1, score)
    assert deviation(found, a[:, 0] / 4) < EXACT


def test_ablation_cam_of_a_score_of_zero_has_no_scale():
    """There is nothing to divide by; which channel matters more is still known."""
    a, _ = pair("relu", toy.SHAPES[3])
    drops = torch.tensor([[1.0, 2.0, -3.0, 0.0]] * 2).double()
    found = METHODS["ablation_cam"](a, lambda channels: -drops[:, channels], torch.zeros(2))
    assert deviation(found, slow.weighted(drops.numpy(), a.numpy())) < EXACT


def test_ablation_cam_where_the_score_is_the_sum_of_the_channels():
    """S = sum c_k S_k: the drop is c_k S_k, exactly."""
    a, _ = pair("relu", toy.SHAPES[3])
    parts = a.flatten(2).sum(-1) * torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    score = parts.sum(1)
    found = METHODS["ablation_cam"](
        a, lambda channels: (score[:, None] - parts)[:, channels], score
    )
    expected = slow.weighted((parts / score.abs()[:, None]).numpy(), a.numpy())
    assert deviation(found, expected) < EXACT


# ---------------------------------------------------------------------------------- second order


def test_shapley_cam_without_curvature_is_grad_cam():
    a, g = pair("signed", toy.SHAPES[3])
    found = METHODS["shapley_cam"](a, g, torch.zeros_like(a))
    assert deviation(found, METHODS["grad_cam"](a, g)) < EXACT


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_shapley_cam_with_the_whole_hessian_of_a_smooth_network(ndim):
    shape = (3, 2, 2)[:ndim]
    conv = toy.CONV[ndim]
    layers = [conv(3, 4, 3, padding=1), torch.nn.Softplus(), conv(4, 2, 1), torch.nn.GELU()]
    network = toy.seeded(torch.nn.Sequential(*layers))

    def score(a: torch.Tensor) -> torch.Tensor:
        return network(a)[:, 1].flatten(1).sum(1)

    a = toy.random_input(2, 3, *shape).requires_grad_()
    (g,) = torch.autograd.grad(score(a).sum(), a, create_graph=True)
    (product,) = torch.autograd.grad(g, a, a.detach())
    expected = slow.curvature(lambda a: score(a)[0], a)
    assert expected.abs().max() > 0.01
    assert deviation(product, expected) < EXACT
    found = METHODS["shapley_cam"](a.detach(), g.detach(), product)
    assert deviation(found, slow.shapley_cam(a, g, expected)) < EXACT


def test_shapley_cam_of_a_quadratic_score():
    """S = a H a / 2 + q a: G = H a + q, so the weight is the mean of H a / 2 + q."""
    a = toy.random_input(1, 2, 3)
    root, q = toy.random_input(6, 6, seed=1), toy.random_input(1, 2, 3, seed=2)
    curvature = ((root + root.T) @ a.flatten()).reshape(1, 2, 3)
    expected = slow.weighted((curvature / 2 + q).mean(2).numpy(), a.numpy())
    assert deviation(METHODS["shapley_cam"](a, curvature + q, curvature), expected) < EXACT


# ----------------------------------------------------------------------------------------- random


def test_random_is_reproducible_and_draws_no_number_of_the_callers():
    a, g = pair("relu", toy.SHAPES[3])
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = METHODS["random"](a, g), METHODS["random"](a, g)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()


def test_random_is_a_weighted_sum_with_one_weight_for_a_channel():
    a, g = pair("signed", toy.SHAPES[3])
    b, _ = pair("relu", toy.SHAPES[3], seed=20)
    method = METHODS["random"]
    found = method(2 * a - 3 * b, g)
    assert deviation(found, 2 * method(a, g) - 3 * method(b, g)) < EXACT
    ones = torch.zeros(1, 4, 2, 3).double()
    weights = []
    for k in range(4):
        channel = ones.clone()
        channel[:, k] = 1
        values = method(channel, channel).unique()
        assert len(values) == 1
        weights.append(float(values))
    assert len(set(weights)) == 4
    assert all(math.isfinite(weight) and weight != 0 for weight in weights)
