"""Sanity checks find methods that look at neither weights nor classes; the network stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import toy
from helpers_engine import signed_maps
from helpers_untouched import untouched
from scipy import stats
from torch import nn

from seg3dcam import EigenCAM, Ensemble, GradCAM, HiResCAM, WindowPlan
from seg3dcam.cams.catalogue import CAMS
from seg3dcam.engine.head_check import rank_correlation
from seg3dcam.errors import EvaluationError, InputError
from seg3dcam.evaluate import class_sensitivity, randomisation, stability
from seg3dcam.targets import ClassLogit, ClassLogOdds

pytestmark = signed_maps


def network() -> nn.Module:
    layers = [
        nn.Conv3d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv3d(6, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv3d(6, 3, 1),
    ]
    return toy.seeded(nn.Sequential(*layers), seed=3)


def image() -> torch.Tensor:
    return toy.random_input(1, 1, 8, 10, 9, seed=1)


VOLUME = ClassLogit(1, "volume")


def test_the_correlation_is_that_of_ranks():
    one, other = toy.random_input(1, 1, 6, 7, 8, seed=1), toy.random_input(1, 1, 6, 7, 8, seed=2)
    both = one + other
    expected = np.corrcoef(*(stats.rankdata(v.numpy().ravel()) for v in (one, both)))[0, 1]
    assert rank_correlation(one, both) == pytest.approx(expected, abs=1e-9)
    assert rank_correlation(one, one.exp()) == pytest.approx(1)
    assert rank_correlation(one, one * 0) == 0


def test_weights_are_randomised_from_the_head_to_the_input():
    check = randomisation(HiResCAM(network(), "1"), image(), VOLUME, stages=3)
    assert check.stages == ("down to 4", "down to 2", "down to 0")
    assert randomisation(HiResCAM(network(), "1"), image(), VOLUME, stages=2).stages == (
        "down to 2",
        "down to 0",
    )
    assert len(check.spearman) == len(check.ssim) == 3
    assert all(-1 <= value <= 1 for value in check.spearman)
    assert check.worst == check.spearman[-1]
    assert check.passed == (check.worst <= check.limit)


def test_a_method_without_a_class_does_not_see_the_head():
    """EigenCAM decomposes activations: what comes after the layer is nothing to it."""
    check = randomisation(EigenCAM(network(), "1"), image(), VOLUME, stages=3)
    assert check.spearman[:2] == pytest.approx((1, 1))
    assert abs(check.spearman[2]) < check.limit  # random features give another map, of course
    assert not check.passed
    assert "whatever the network makes of it" in check.why
    sees = randomisation(GradCAM(network(), "1"), image(), VOLUME, stages=3)
    assert abs(sees.spearman[1]) < 0.95
    assert sees.passed == (abs(sees.spearman[-1]) <= sees.limit)
    assert check.ssim[0] == pytest.approx(1)


def test_a_map_of_the_head_itself_has_nothing_behind_it():
    """Then only the network that is random altogether counts."""
    check = randomisation(EigenCAM(network(), "4"), image(), VOLUME, stages=3)
    assert check.worst == abs(check.spearman[-1])
    assert check.why.startswith("with all weights random")


@pytest.mark.parametrize("key", ["eigen_cam", "hires_cam", "grad_cam", "random"])
def test_what_knows_no_class_gives_all_classes_one_map(key):
    check = class_sensitivity(CAMS[key](network(), "1"), image(), predicted())
    assert len(check.stages) == 2
    knows_none = key in ("eigen_cam", "random")
    assert check.passed != knows_none
    if knows_none:
        assert check.worst == pytest.approx(1)


def predicted() -> int:
    """The class that most voxels have."""
    with torch.no_grad():
        return int(network()(image()).argmax(1).flatten().mode().values)


def test_noise_that_leaves_the_prediction_leaves_a_stable_map():
    cam = HiResCAM(network(), "1")
    check = stability(cam, image(), predicted(), noise=1e-4)
    assert check.passed
    assert len(check.stages) == 5
    assert check.worst < 0.05
    assert check.worst < stability(cam, image(), predicted(), noise=1e-3).worst


def test_the_change_is_relative_to_the_length_of_the_map():
    cam, x = HiResCAM(network(), "1"), image()
    check = stability(cam, x, predicted(), noise=1e-3, draws=1, seed=4)
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    other = x + 1e-3 * (x.max() - x.min()) * drawn.to(x)
    region = network()(x).argmax(1) == predicted()
    before, after = (
        cam(one, ClassLogOdds(predicted(), region)).layers["1"].values for one in (x, other)
    )
    assert check.worst == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-6)


def test_a_map_of_noise_is_unstable():
    class Jumps(nn.Module):
        """A layer that turns over for the smallest change, behind which nothing changes."""

        def forward(self, a):
            return a * (1e4 * a).sin()

    net = nn.Sequential(nn.Conv3d(1, 2, 1), Jumps(), nn.Conv3d(2, 2, 1))
    nn.init.constant_(net[2].weight[:1], 1e-3)
    nn.init.constant_(net[2].weight[1:], -1e-3)
    nn.init.constant_(net[2].bias[:1], 5.0)
    check = stability(GradCAM(net, "1"), image(), 0)
    assert not check.passed
    assert check.worst > 0.5


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers():
    for run in (
        lambda seed: randomisation(GradCAM(network(), "1"), image(), VOLUME, seed=seed),
        lambda seed: stability(GradCAM(network(), "1"), image(), predicted(), seed=seed),
    ):
        assert run(1) == run(1)
        assert run(1) != run(2)


@pytest.mark.few(1)
@pytest.mark.parametrize("plan", [None, WindowPlan((8, 6, 6), overlap=0.5)], ids=["one", "many"])
@pytest.mark.parametrize("several", [False, True], ids=["network", "ensemble"])
def test_the_network_is_left_as_it_was(plan, several):
    model = Ensemble([network(), toy.seeded(network(), seed=8)], (0,)) if several else network()
    cam = HiResCAM(model, "1", sliding_window=plan)
    before = cam(image(), VOLUME).volume()
    with untouched(model):
        randomisation(cam, image(), VOLUME, stages=2)
    assert torch.equal(cam(image(), VOLUME).volume(), before)
    assert cam.model is model or several


class Shared(nn.Sequential):
    """A network whose copy has the same modules."""

    def __deepcopy__(self, memo):
        return Shared(*self)


class Coarser(nn.Sequential):
    """A network whose copy has another stride."""

    def __deepcopy__(self, memo):
        first = nn.Conv3d(1, 6, 3, stride=2, padding=1)
        rest = [nn.ReLU(), nn.Conv3d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv3d(6, 3, 1)]
        return nn.Sequential(first, *rest, nn.Upsample(image().shape[2:]))


def test_weights_that_a_copy_shares_are_not_touched():
    shared = Shared(*network())
    with untouched(shared), pytest.raises(EvaluationError, match="shares weights"):
        randomisation(HiResCAM(shared, "1"), image(), VOLUME)


def test_a_weight_that_is_computed_of_others_is_random_too():
    """What an orthogonal weight is computed from may have no spread at all."""
    of_others = network()
    nn.utils.parametrizations.orthogonal(of_others[4])
    with untouched(of_others):
        check = randomisation(HiResCAM(of_others, "1"), image(), VOLUME, stages=3)
    assert check.spearman[0] < 0.95
    assert check.passed


def test_a_copy_whose_map_has_another_shape_is_no_copy():
    with pytest.raises(EvaluationError, match="another shape"):
        randomisation(HiResCAM(Coarser(*network()), "1"), image(), VOLUME)


def test_through_windows_as_without():
    """Windows side by side of a network that sees single voxels."""
    net = toy.seeded(nn.Sequential(nn.Conv3d(1, 6, 1), nn.ReLU(), nn.Conv3d(6, 3, 1)), seed=3)
    x = toy.random_input(1, 1, 8, 8, 8, seed=1)
    one, many = (
        randomisation(HiResCAM(net, "1", sliding_window=plan), x, VOLUME, stages=2)
        for plan in (None, WindowPlan(4, overlap=0))
    )
    assert one.spearman == pytest.approx(many.spearman, abs=1e-3)


def test_what_is_undefined_says_why():
    with pytest.raises(EvaluationError, match="one class"):
        class_sensitivity(GradCAM(nn.Sequential(nn.Conv3d(1, 1, 1)), "0"), image(), 0)
    silent = network()
    nn.init.zeros_(silent[4].weight)
    with pytest.raises(EvaluationError, match=r"0 everywhere"):
        randomisation(GradCAM(silent, "1"), image(), VOLUME)
    with pytest.raises(EvaluationError, match="another one in every draw"):
        stability(GradCAM(network(), "1"), image(), 1, noise=5)
    with pytest.raises(InputError, match="one target layer"):
        randomisation(GradCAM(network(), ["1", "3"]), image(), VOLUME)
    with pytest.raises(InputError, match="one input"):
        randomisation(GradCAM(network(), "1"), image().expand(2, -1, -1, -1, -1), VOLUME)
