"""Targets x layers x methods in one go: the maps of each alone, at the price of one prediction."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import toy
from helpers_engine import (
    EXACT,
    counting_levels,
    curved,
    in_a_corner,
    signed_maps,
    slow_unless,
    two_levels,
)
from toy import deviation

from seg3dcam import WindowPlan, targets
from seg3dcam.cams.attributions import ATTRIBUTIONS
from seg3dcam.cams.calls import each_by
from seg3dcam.cams.catalogue import CAMS, METHODS
from seg3dcam.methods.base import StepwiseFormula
from seg3dcam.network.capture import Capture

LAYERS = ["network.1", "network.3"]
TARGETS = [targets.ClassLogit(1, "volume"), curved, in_a_corner, targets.ClassLogit(2, "volume")]
AGNOSTIC = [key for key, m in METHODS.items() if getattr(m, "agnostic", False)]
FIRST_ORDER = [key for key, m in METHODS.items() if isinstance(m, StepwiseFormula) and m.order < 2]
#: Methods whose map contains the gradient and whose weights need all gradients: two passes.
TWICE = ["eigen_grad_cam", "seg_eigen_cam"]
ONCE = [key for key in FIRST_ORDER if key not in TWICE]

PLANS = {
    "one window": None,
    "side by side": WindowPlan((4, 4, 6), overlap=0, mode="constant"),
    "overlapping": WindowPlan((4, 4, 6), overlap=0.4, sw_batch_size=3),
}


def volume(items: int = 2, shape: tuple[int, ...] = (8, 4, 18)) -> torch.Tensor:
    return toy.random_input(items, 1, *shape, seed=6)


@signed_maps
@pytest.mark.parametrize(
    "plan", [slow_unless(name == "overlapping", plan, name=name) for name, plan in PLANS.items()]
)
def test_together_is_alone(plan):
    """Every method of the library, in one call, whatever the others need."""
    network, x = toy.shared(two_levels), volume(1, (4, 4, 12))
    layers = [name.removeprefix("network.") for name in LAYERS]
    cams = [
        (CAMS | ATTRIBUTIONS)[key](network, layers, sliding_window=plan)
        for key in [*CAMS, "gradient_x_input", "gradient"]
    ]
    table = each_by(cams, x, TARGETS)
    assert len(table) == len(TARGETS)
    for target, row in zip(TARGETS, table, strict=True):
        assert [result.method for result in row] == [cam.method for cam in cams]
        for cam, together in zip(cams, row, strict=True):
            alone = cam(x, target)
            assert together.status == alone.status
            assert deviation(together.score, alone.score) < EXACT
            for layer, map_ in alone.maps.items():
                assert deviation(together.maps[layer], map_) < EXACT


@signed_maps
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_order_of_methods_does_not_matter(plan):
    network, x = toy.shared(two_levels), volume(1, (4, 4, 12))
    keys = ["ablation_cam", "full_grad", "shapley_cam", "score_cam", "hires_cam", "eigen_cam"]
    found = []
    for chosen in (keys, keys[::-1]):
        cams = [CAMS[key](network, ["1", "3"], sliding_window=plan) for key in chosen]
        (row,) = each_by(cams, x, [curved])
        found.append({result.method: result.maps for result in row})
    for key in keys:
        for layer, map_ in found[0][key].items():
            assert deviation(found[1][key][layer], map_) < EXACT


@signed_maps
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("key", AGNOSTIC)
def test_agnostic_methods_give_every_target_one_map(key, plan):
    cam = CAMS[key](toy.shared(two_levels), "3", sliding_window=plan)
    first, *others = cam.each(volume(shape=(4, 4, 12)), TARGETS)
    for other in others:
        assert torch.equal(other.maps["3"], first.maps["3"])
        assert not torch.equal(other.score, first.score)


# ------------------------------------------------------------------------------------ what it costs


def inputs_run(keys, plan, asked, *, x=None, layers=LAYERS) -> int:
    """Return on how many windows the network is run, the layers' grids being known."""
    counting = toy.shared(counting_levels)
    cams = [CAMS[key](counting, layers, sliding_window=plan) for key in keys]
    x = volume(1) if x is None else x
    each_by(cams, x, [curved])
    counting.reset()
    each_by(cams, x, asked)
    return counting.inputs


@signed_maps
@pytest.mark.parametrize("asked", [TARGETS[:1], TARGETS], ids=["one target", "four targets"])
def test_in_one_window_all_methods_of_gradients_cost_one_forward_pass(asked):
    assert inputs_run(FIRST_ORDER, None, asked) == 1
    assert inputs_run(["grad_cam"], None, asked) == 1
    assert inputs_run(AGNOSTIC, None, asked) == 1


@signed_maps
def test_shapley_cam_in_one_window_shares_that_pass():
    assert inputs_run([*FIRST_ORDER, "shapley_cam"], None, TARGETS[:1]) == 1
    assert inputs_run([*FIRST_ORDER, "shapley_cam"], None, TARGETS) == 1


#: Six windows; the corner lies in one of them.
SIX = WindowPlan((4, 4, 6), overlap=0, mode="constant")


@pytest.mark.few(2)
@signed_maps
@pytest.mark.parametrize(
    "layers",
    [slow_unless(False, LAYERS[:1], name="one layer"), pytest.param(LAYERS, id="two layers")],
)
@pytest.mark.parametrize("keys", [["grad_cam"], ["hires_cam"], ["xgrad_cam", "fem"], ONCE], ids=str)
def test_through_windows_those_with_a_seed_are_run_once_more(keys, layers):
    assert inputs_run(keys, SIX, [in_a_corner], layers=layers) == 6 + 1
    assert inputs_run(keys, SIX, [curved], layers=layers) == 6 + 6
    assert inputs_run(keys, SIX, TARGETS, layers=layers) == 6 + 6
    other = targets.ClassLogit(1, targets.Voxel((7, 3, 16)))
    assert inputs_run(keys, SIX, [in_a_corner, other, in_a_corner], layers=layers) == 6 + 2


@signed_maps
def test_through_windows_agnostic_methods_run_each_once():
    assert inputs_run(AGNOSTIC, SIX, TARGETS) == 6


@pytest.mark.slow
@signed_maps
def test_components_of_products_need_their_gradients_twice():
    for keys in (["eigen_grad_cam"], ["seg_eigen_cam"], FIRST_ORDER):
        assert inputs_run(keys, SIX, [in_a_corner]) == 6 + 2 * 1
        assert inputs_run(keys, SIX, TARGETS) == 6 + 2 * 6


@pytest.mark.slow
@signed_maps
def test_batches_of_windows_and_of_items():
    """Each item has windows of its own; several go through the network at once."""
    plan = replace(SIX, sw_batch_size=4)
    assert inputs_run(ONCE, plan, TARGETS, x=volume(2)) == 2 * (6 + 6)
    assert inputs_run(ONCE, plan, [in_a_corner], x=volume(2)) == 2 * (6 + 1)


@pytest.mark.slow
@signed_maps
def test_activations_that_were_not_kept_are_computed_once_more():
    """Once to survey them and once to map them; the network stops behind the last layer."""
    plan = replace(SIX, cache_gb=0.0)
    assert inputs_run(["grad_cam"], plan, [in_a_corner]) == 6 + 1 + 6
    assert inputs_run(["grad_cam"], plan, TARGETS) == 6 + 6 + 6
    assert inputs_run(["hires_cam"], plan, TARGETS) == 6 + 6
    assert inputs_run(["eigen_cam"], plan, TARGETS) == 6 + 2 * 6
    assert inputs_run(["eigen_cam", "xgrad_cam"], plan, TARGETS) == 6 + 6 + 2 * 6


#: Method -> its steps, through windows.
STEPS = {
    "hires_cam": ["predicting", "explaining"],
    "grad_cam": ["predicting", "explaining", "mapping"],
    "eigen_cam": ["predicting", "mapping", "mapping"],
    "score_cam": ["predicting", "rescoring"],
    "full_grad": ["predicting", "explaining"],
    "gradient": ["predicting", "comparing"],
}


@signed_maps
@pytest.mark.parametrize("plan", [None, SIX, replace(SIX, sw_batch_size=4)], ids=str)
@pytest.mark.parametrize("key", STEPS)
def test_progress_counts_up_to_what_there_is_to_do(key, plan):
    steps: list[list[tuple]] = []

    def progress(*call):
        if not steps or steps[-1][-1][0] != call[0] or steps[-1][-1][1] == call[2]:
            steps.append([])
        steps[-1].append(call)

    kind = (CAMS | ATTRIBUTIONS)[key]
    kind(toy.shared(two_levels), "3", sliding_window=plan, progress=progress)(volume(1), curved)
    for step in steps:
        _, counts, (total, *others) = zip(*step, strict=True)
        assert {*others} <= {total}
        assert list(counts) == sorted(counts)
        assert counts[0] >= 0
        assert counts[-1] <= total
        assert plan is None or counts[-1] == total
    assert plan is None or [step[0][0] for step in steps] == STEPS[key]


@signed_maps
@pytest.mark.parametrize("key", ["hires_cam", "grad_cam"])
def test_a_target_is_differentiated_in_its_own_windows_only(key, monkeypatch):
    """They share the forward pass of a window, not the way back."""
    batches = []

    def counted(capture, outputs, seed, **settings):
        batches.append(seed.abs().amax((1, 2, 3, 4)).tolist())
        return gradients(capture, outputs, seed, **settings)

    gradients = Capture.gradients
    monkeypatch.setattr(Capture, "gradients", counted)
    other = targets.ClassLogit(1, targets.Voxel((7, 3, 16)))
    cam = CAMS[key](toy.shared(two_levels), "1", sliding_window=SIX)
    cam(volume(1), other)  # whether the gradient tells the truth is found out once
    batches.clear()
    cam.each(volume(1), [in_a_corner, other])
    assert len(batches) == 2
    assert all(batch[0] > 0 for batch in batches)
