"""Ensembles: folds and flips averaged, 2D networks slice by slice, nnU-Net's windows."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from helpers_crossed import crossed
from monai.inferers import sliding_window_inference
from torch import nn
from toy import plain, random_input, seeded

from seg3dcam import EigenCAM, GradCAM, HiResCAM, WindowPlan
from seg3dcam.cams.catalogue import CAMS, METHODS
from seg3dcam.cams.feature_maps import feature_maps
from seg3dcam.errors import ConfigError, InputError, ModelError
from seg3dcam.geometry import FeatureGrid, interpolate
from seg3dcam.network.ensemble import Ensemble, Member
from seg3dcam.network.suggest import suggest_layers
from seg3dcam.targets import ClassLogit, ClassLogOdds
from seg3dcam.windows import plan_windows, stitched

X = random_input(1, 1, 6, 8, 10, seed=3)
#: Voxels that every score sums over: they do not depend on who predicts.
MASK = X[0, 0] > 0.3
TARGET = ClassLogOdds(1, MASK)


@functools.cache
def shared(seed: int, ndim: int = 3) -> nn.Sequential:
    """Return `plain`, the same one for all tests, which change nothing: it is measured once."""
    return plain(ndim, seed=seed)


def strided(seed: int = 0) -> nn.Sequential:
    """A strided convolution, whose voxels lie at 0, 2, 4, ..., and at 1, 3, 5, ... when flipped."""
    return seeded(
        nn.Sequential(
            nn.Conv3d(1, 4, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv3d(4, 3, 3, padding=1),
        ),
        seed,
    )


def by_hand(
    networks: list[nn.Sequential], flips: list[tuple[int, ...]], layer: int, method: str
) -> list[torch.Tensor]:
    """Return every member's map, flipped back, from one graph of the mean logits."""
    activations, logits = [], []
    for network, axes in itertools.product(networks, flips):
        dims = [2 + axis for axis in axes]
        a = network[: layer + 1](X.flip(dims)).detach().requires_grad_()
        activations.append(a)
        logits.append(network[layer + 1 :](a).flip(dims))
    score = TARGET(torch.stack(logits).mean(0)).sum()
    members = itertools.product(networks, flips)
    gradients = torch.autograd.grad(score, activations)
    return [
        # The gradient of a mean is a part of the ensemble's; a member's map is of the whole score.
        METHODS[method](a.detach(), g * len(activations)).flip([1 + axis for axis in axes])
        for a, g, (_, axes) in zip(activations, gradients, members, strict=True)
    ]


# ---------------------------------------------------------------- folds and flips


@pytest.mark.few(3)
@pytest.mark.parametrize("method", ["grad_cam", "hires_cam", "layer_cam", "slice_grad_cam"])
@pytest.mark.parametrize("axes", [(), (0, 2)], ids=["as it is", "flipped"])
def test_the_map_is_the_mean_of_those_of_the_ensembles_gradient(method, axes):
    networks = [shared(1), shared(2)]
    ensemble = Ensemble(networks, axes)
    result = CAMS[method](ensemble, "3")(X, TARGET)
    expected = torch.stack(by_hand(networks, ensemble.flips, 3, method)).mean(0)
    torch.testing.assert_close(result.maps["3"], expected)
    with torch.no_grad():
        torch.testing.assert_close(result.logits, ensemble(X))
    # What a member would explain alone is another map: its own gradient is not the ensemble's.
    alone = torch.stack([CAMS[method](n, "3")(X, TARGET).maps["3"] for n in networks]).mean(0)
    assert (alone - expected).abs().max() > 1e-3 * expected.abs().max()


def test_voxels_of_a_flipped_layer_lie_where_they_look():
    grid = FeatureGrid((3,) * 3, (2.0,) * 3, (0.0,) * 3)
    flipped = Member(nn.Identity(), flips=(1,)).grid(grid, (6, 6, 6))
    assert flipped.positions(1).tolist() == [1, 3, 5]
    assert flipped.positions(0).tolist() == [0, 2, 4]


def test_maps_of_flipped_layers_are_brought_together_in_place():
    network = strided()
    ensemble = Ensemble([network], (0, 1, 2))
    result = HiResCAM(ensemble, "1")(X, TARGET)
    expected = torch.zeros_like(X[0])
    for map_, axes in zip(
        by_hand([network], ensemble.flips, 1, "hires_cam"), ensemble.flips, strict=True
    ):
        offset = tuple(1.0 if axis in axes else 0.0 for axis in range(3))
        grid = FeatureGrid(map_.shape[1:], (2.0,) * 3, offset)
        expected += interpolate(map_, grid, FeatureGrid.of_voxels(X.shape[2:])) / 8
    torch.testing.assert_close(result.maps["1"], expected)


def test_a_symmetric_picture_has_a_symmetric_map():
    x = X + sum(X.flip(axes) for axes in [(2,), (3,), (4,), (2, 3), (2, 4), (3, 4), (2, 3, 4)])
    target = ClassLogit(1, "volume")
    flipped = HiResCAM(Ensemble([strided()], (0, 1, 2)), "1")(x, target).maps["1"]
    for axis in (1, 2, 3):
        torch.testing.assert_close(flipped, flipped.flip(axis))
    alone = HiResCAM(strided(), "1")(x, target).maps["1"]
    assert (alone - alone.flip(1)).abs().max() > 0.01 * alone.abs().max()


@pytest.mark.parametrize("method", crossed(CAMS, rows=6))
def test_an_ensemble_of_twins_gives_the_map_of_one(method):
    """Also through windows, and by the methods that take no gradients."""
    network, target = shared(1), ClassLogit(1, MASK)
    for plan in (None, WindowPlan((6, 6, 6), overlap=0.5)):
        one = CAMS[method](network, "3", sliding_window=plan)(X, target)
        both = CAMS[method](Ensemble([network, network]), "3", sliding_window=plan)(X, target)
        torch.testing.assert_close(both.score, one.score)
        for name in one.maps:
            assert both.status[name] == one.status[name]
            torch.testing.assert_close(both.maps[name], one.maps[name], rtol=1e-6, atol=1e-9)


@pytest.mark.few(2)
@pytest.mark.parametrize("method", ["grad_cam", "hires_cam", "ablation_cam", "eigen_cam"])
def test_flips_change_nothing_where_the_network_sees_single_voxels(method):
    pointwise = seeded(nn.Sequential(nn.Conv3d(1, 4, 1), nn.ReLU(), nn.Conv3d(4, 3, 1)), 1)
    plan = WindowPlan((4, 4, 6), overlap=0.4)
    one = CAMS[method](pointwise, "1", sliding_window=plan)(X, TARGET)
    flipped = CAMS[method](Ensemble([pointwise], (0, 1)), "1", sliding_window=plan)(X, TARGET)
    torch.testing.assert_close(flipped.maps["1"], one.maps["1"], rtol=1e-6, atol=1e-9)


@pytest.mark.few(3)
@pytest.mark.parametrize("method", ["ablation_cam", "score_cam", "full_grad"])
@pytest.mark.parametrize("plan", [None, WindowPlan((6, 6, 6), overlap=0.5)])
def test_methods_that_look_at_logits_look_at_the_members_own(method, plan):
    """Of a score that is linear in the logits the ensemble's map is then the mean of theirs."""
    networks, target = [shared(1), shared(2)], ClassLogit(1, MASK)
    settings = {"sliding_window": plan}
    (both,) = CAMS[method](Ensemble(networks), "3", **settings)(X, target).maps.values()
    maps = [CAMS[method](n, "3", **settings)(X, target).maps.values() for n in networks]
    torch.testing.assert_close(both, torch.stack([one for (one,) in maps]).mean(0))


def test_the_ensemble_is_untouched_and_runs_by_itself():
    networks = [plain(seed=1).train(), plain(seed=2)]
    networks[0][0].weight.requires_grad_(False)
    ensemble = Ensemble(networks, (1,))
    before = {name: value.clone() for name, value in ensemble.state_dict().items()}
    GradCAM(nn.DataParallel(ensemble), "auto")(X, TARGET)
    assert all(torch.equal(value, before[name]) for name, value in ensemble.state_dict().items())
    assert networks[0].training
    assert not networks[1].training
    assert [p.requires_grad for p in networks[0].parameters()][:2] == [False, True]
    assert all(not module._forward_hooks for module in ensemble.modules())


def test_wrapped_ensembles_are_seen_whole():
    networks = [shared(1), shared(2)]
    wrapped = GradCAM(nn.DataParallel(Ensemble(networks)), "3")(X, TARGET)
    assert wrapped.members == 2
    assert torch.equal(wrapped.maps["3"], GradCAM(Ensemble(networks), "3")(X, TARGET).maps["3"])
    with pytest.raises(InputError, match="maps of 2 networks and flips were averaged"):
        _ = wrapped.native


def test_bad_ensembles_are_refused():
    with pytest.raises(ModelError, match="at least one network"):
        Ensemble([])
    other = seeded(nn.Sequential(nn.Conv3d(1, 3, 1)))
    with pytest.raises(ModelError, match="must have the same layers; one has no '3'"):
        GradCAM(Ensemble([plain(), other]), "3")(X, TARGET)
    with pytest.raises(ModelError, match=r"mirror axes \(3,\): legal are 0, 1 and 2"):
        Ensemble([plain()], (3,))


# ---------------------------------------------------------------- 2D networks


@pytest.mark.parametrize("plane", [(8, 10), (8, 6)], ids=["whole slices", "windows"])
@pytest.mark.parametrize("axes", [(), (1, 2)], ids=["as it is", "flipped"])
def test_a_2d_network_explains_a_volume_slice_by_slice(plane, axes):
    network = shared(4, ndim=2)
    ensemble = Ensemble([network], axes, slices=True)
    plan = WindowPlan((1, *plane), overlap=0.5)
    result = HiResCAM(ensemble, "3", sliding_window=plan)(X, ClassLogit(1, MASK))
    slices = X[0].transpose(0, 1)  # (D, 1, H, W): every slice is an item
    flat = Ensemble([network], [axis - 1 for axis in axes])
    of_slices = HiResCAM(flat, "3", sliding_window=WindowPlan(plane, overlap=0.5))
    expected = of_slices(slices, ClassLogit(1, MASK))
    torch.testing.assert_close(result.logits[0].transpose(0, 1), expected.logits)
    torch.testing.assert_close(result.maps["3"][0], expected.maps["3"])


def test_weights_are_pooled_over_all_slices():
    network, target = shared(4, ndim=2), ClassLogit(1, MASK)
    plan = WindowPlan((1, 8, 10))
    found = GradCAM(Ensemble([network], slices=True), "3", sliding_window=plan)(X, target)
    a = network[:4](X[0].transpose(0, 1)).detach().requires_grad_()
    (g,) = torch.autograd.grad(network[4](a)[:, 1][MASK].sum(), a)
    weights = g.mean((0, 2, 3), keepdim=True)
    torch.testing.assert_close(found.maps["3"][0], (weights * a.detach()).sum(1))


def test_a_strided_2d_layer_lies_on_its_slice():
    network = seeded(
        nn.Sequential(
            nn.Conv2d(1, 2, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2, 2, 1),
        )
    )
    plan = WindowPlan((1, 8, 10))
    cam = HiResCAM(Ensemble([network], slices=True), "auto", sliding_window=plan)
    result = cam(X, ClassLogit(0, "volume"))
    (layer,) = result.layers.values()
    assert layer.grid.stride == (1, 2, 2)
    assert layer.grid.offset == (0, 0, 0)
    assert layer.grid.shape == (6, 4, 5)
    found = feature_maps(Ensemble([network], slices=True), X, "1", sliding_window=plan, index=2)
    with torch.no_grad():
        own = network[:2](X[:, :, 2])[0]
    assert torch.allclose(torch.from_numpy(found.values), own)
    assert suggest_layers(Ensemble([network], slices=True), (1, 1, 1, 8, 10))[0].stride == (2, 2)


def test_a_2d_network_without_slices_of_its_own_is_refused():
    ensemble = Ensemble([plain(ndim=2)], slices=True)
    with pytest.raises(ModelError, match=r"in windows \(1, H, W\); got \(6, 8, 10\)"):
        GradCAM(ensemble, "3")(X, TARGET)


# ---------------------------------------------------------------- nnU-Net's windows


def test_windows_and_weights_are_nnunets():
    sliding = pytest.importorskip("nnunetv2.inference.sliding_window_prediction")
    for shape, roi, step in [((33, 40, 21), (16, 24, 12), 0.5), ((20, 16, 40), (16, 16, 16), 0.3)]:
        windows = plan_windows(WindowPlan(roi, overlap=1 - step, convention="nnunet"), shape)
        steps = sliding.compute_steps_for_sliding_window(shape, roi, step)
        assert windows.starts == tuple(itertools.product(*steps))
        gaussian = sliding.compute_gaussian(
            roi, sigma_scale=1 / 8, value_scaling_factor=10, device=torch.device("cpu")
        )
        assert torch.equal(windows.importance, gaussian.float())
        flat = plan_windows(WindowPlan(roi, 1 - step, "constant", convention="nnunet"), shape)
        assert torch.equal(flat.importance, torch.ones(roi))


def test_windows_of_one_slice_weigh_as_a_2d_window():
    sliding = pytest.importorskip("nnunetv2.inference.sliding_window_prediction")
    windows = plan_windows(WindowPlan((1, 8, 6), 0.5, convention="nnunet"), (6, 8, 10))
    steps = sliding.compute_steps_for_sliding_window((8, 10), (8, 6), 0.5)
    assert windows.starts == tuple(itertools.product(range(6), *steps))
    flat = sliding.compute_gaussian((8, 6), value_scaling_factor=10, device=torch.device("cpu"))
    assert torch.equal(windows.importance[0], flat.float())


@pytest.mark.parametrize("shape", [(20, 24, 33), (9, 24, 16)], ids=["larger", "smaller"])
def test_what_is_stitched_here_is_what_monai_stitches(shape):
    x, network = random_input(2, 1, *shape), plain()
    plan = WindowPlan(16, overlap=0.25, sw_batch_size=3)
    windows = plan_windows(plan, shape)
    with torch.no_grad():
        expected = sliding_window_inference(x, (16,) * 3, 3, network, 0.25, mode="gaussian")
        torch.testing.assert_close(stitched(windows, x, network), expected)


def test_gradients_through_nnunets_windows_are_exact():
    pytest.importorskip("nnunetv2")
    network = shared(1)
    plan = WindowPlan((6, 6, 6), overlap=0.5, convention="nnunet", sw_batch_size=2)
    windows = plan_windows(plan, X.shape[2:])
    result = HiResCAM(network, "3", sliding_window=plan)(X, TARGET)
    graphs: list[torch.Tensor] = []

    def collected(batch: torch.Tensor) -> torch.Tensor:
        graphs.append(network[:4](batch).detach().requires_grad_())
        return network[4:](graphs[-1])

    logits = stitched(windows, X, collected)
    torch.testing.assert_close(result.logits, logits.detach())
    gradients = torch.autograd.grad(TARGET(logits).sum(), graphs)
    expected = torch.zeros_like(X[0, 0])
    maps = torch.cat([(g * a.detach()).sum(1) for a, g in zip(graphs, gradients, strict=True)])
    for start, map_ in zip(windows.starts, maps, strict=True):
        expected[tuple(slice(s, s + 6) for s in start)] += map_
    torch.testing.assert_close(result.maps["3"][0], expected)


def test_nnunets_windows_are_run_once_for_a_map_of_activations():
    """They are kept from the prediction, as those of MONAI's windows are."""
    pytest.importorskip("nnunetv2")
    network, runs = plain(seed=1), []
    plan = WindowPlan((6, 6, 6), overlap=0.5, convention="nnunet")
    cam = EigenCAM(network, "3", sliding_window=plan)
    cam(X, TARGET)  # the layer's grid is measured once
    network.register_forward_pre_hook(lambda module, args: runs.append(len(args[0])))
    assert cam(X, TARGET).windows == sum(runs)


def test_an_unknown_convention_is_refused():
    with pytest.raises(ConfigError, match="legal are 'monai' and 'nnunet'"):
        WindowPlan(16, convention="itk")
