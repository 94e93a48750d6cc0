"""What points at evidence passes; what knows nothing of the network does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import toy
from test_faithfulness import CUE, MASK, SHAPE, Bright, RemoteCue, scene

from seg3dcam import WindowPlan
from seg3dcam.errors import ConfigError, EmptyRegionError
from seg3dcam.evaluate import Rerun, context_deletion, context_evidence
from seg3dcam.evaluate.areas import PartialCurve, area_between
from seg3dcam.evaluate.blocks import Blocks, Subject
from seg3dcam.evaluate.context import evidence_against
from seg3dcam.evaluate.controls import input_alone, mask_alone, nearness, random_maps
from seg3dcam.evaluate.segments import grown
from seg3dcam.evaluate.trial import Rivals
from seg3dcam.geometry import FeatureGrid

GRID = FeatureGrid((6, 10, 7), (2.0,) * 3, (0.5,) * 3)


def evidence(values, network=None, **more):
    settings = {"grid": GRID, "block": 2, "baselines": ("mean", 0.0)} | more
    return context_evidence(values, scene(), network or RemoteCue(), 1, **settings)


def test_a_map_of_the_cue_passes():
    found = evidence(MASK + CUE)
    assert found.passed
    assert found.words.startswith("points outside the mask at something the prediction depends on")
    assert "mask alone 0." in found.words
    assert found.p_value == pytest.approx(1 / 21)
    assert set(found.baselines) == {"mean", "0.0"}


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("values", "words"),
    [
        (MASK, "do not use"),
        (nearness(MASK > 0), "echo: says nothing beyond the|do not use"),
        (next(random_maps(GRID, SHAPE, draws=1, seed=77)), "do not use"),
        (-CUE, "do not use"),
    ],
    ids=["the mask", "near the mask", "random", "the cue as evidence against"],
)
def test_what_knows_nothing_of_the_network_does_not(values, words):
    found = evidence(values)
    assert not found.passed
    assert any(part in found.words for part in words.split("|"))


def test_where_the_input_alone_is_as_good_it_is_said():
    """All that is bright outside of the mask is the cue: an edge detector finds it, too."""
    x = scene(noisy=0.01)
    found = context_evidence(input_alone(x), x, RemoteCue(), 1, grid=GRID, block=2)
    assert found.passed
    assert "; the values of the input alone get 0.0" in found.words


def test_a_prediction_that_needs_nothing_outside_is_said():
    found = evidence(CUE, Bright())
    assert not found.needs_context
    assert not found.passed
    assert found.words.startswith("the prediction needs nothing outside of the mask")
    assert found.left == 1


@pytest.mark.slow
def test_figures_are_those_of_whole_curves():
    """To 0.02, of controls and of other baselines; the map's own curve is whole."""
    found = evidence(CUE)
    x = scene()
    assert max(found.errors[name] for name in found.baselines) <= 0.02
    for values, area in (
        (CUE, found.curve.auc),
        (MASK, found.controls["mask alone"]),
        (input_alone(x), found.controls["input alone"]),
        (nearness(MASK > 0), found.controls["nearness to the mask"]),
    ):
        whole = context_deletion(values, x, RemoteCue(), 1, block=2)
        assert area == pytest.approx(whole.auc, abs=0.03)
    other = context_deletion(CUE, x, RemoteCue(), 1, block=2, baseline=0.0)
    assert found.baselines["0.0"] == pytest.approx(other.auc, abs=0.03)
    ranks = [
        context_deletion(one, x, RemoteCue(), 1, block=2).auc
        for one in random_maps(GRID, SHAPE, draws=20, seed=0)
    ]
    as_good = sum(area <= found.curve.auc for area in ranks)
    assert found.p_value == (1 + as_good) / 21


def test_it_costs_less_than_whole_curves():
    found = evidence(CUE, sliding_window=WindowPlan((6, 18, 8), overlap=0.25))
    curves = 26 * (1 + 1 + 3 + 20)
    assert found.cost < curves / 4


@pytest.mark.slow
def test_areas_are_within_their_errors():
    """However few steps were taken, as the budget allows."""
    x, network, whole = scene(), RemoteCue(), {}

    def area(values, baseline="mean"):
        return context_deletion(values, x, network, 1, block=2, baseline=baseline).auc

    for values in (CUE, next(random_maps(GRID, SHAPE, draws=1, seed=5))):
        whole["mean"], whole["0.0"] = area(values), area(values, 0.0)
        whole["mask alone"] = whole.get("mask alone") or area(MASK)
        whole["nearness to the mask"] = whole.get("nearness to the mask") or area(
            nearness(MASK > 0)
        )
        errors = []
        for budget in (1, 60, 500):
            found = evidence(values, budget=budget)
            areas = {**found.baselines, **found.controls}
            for name, expected in whole.items():
                assert abs(areas[name] - expected) <= found.errors[name] + 1e-12
            errors.append(max(found.errors[name] for name in whole))
        assert errors[0] > errors[1] >= errors[2]
        assert errors[2] <= 0.02


def test_too_small_a_budget_is_said():
    """Whether a map is nearly as good as a random one takes many steps to tell."""
    values = next(random_maps(GRID, SHAPE, draws=1, seed=5))
    roughly, well = evidence(values, budget=1), evidence(values, budget=500)
    assert not roughly.certain
    assert "not shown to be better than random" in roughly.words
    assert "not certain, since areas are known too roughly" in roughly.words
    assert " ± 0." in roughly.words
    assert "random 0.24-0.74 ± 0.2" in roughly.words
    assert well.certain
    assert "not better than random" in well.words
    assert well.p_value <= roughly.p_value
    assert roughly.cost < 40 < well.cost


def test_the_budget_is_kept():
    found = evidence(MASK, budget=50)
    assert 40 < found.cost < 50
    assert evidence(CUE).cost < 60


def test_the_map_s_curve_is_that_of_context_deletion_at_the_steps_taken():
    found = evidence(CUE).curve
    whole = context_deletion(CUE, scene(), RemoteCue(), 1, block=2)
    taken = np.searchsorted(whole.fractions, found.fractions)
    for name in ("fractions", "dice", "drop"):
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name)[taken], atol=1e-12)
    assert 5 <= len(taken) < 26


def test_with_ten_draws_a_map_can_pass():
    """Its p-value is 1/11, which no map can be better than."""
    assert evidence(CUE, draws=10).passed
    assert not evidence(MASK, draws=10).passed


class BySeams(torch.nn.Module):
    """Class 1 is where channel 0 is bright, if channel 1 has few edges anywhere."""

    def forward(self, x):
        seams = x[:, 1:].diff(dim=-1).abs().mean((2, 3, 4), keepdim=True)
        return torch.cat([0 * x[:, :1], x[:, :1] - 0.5 - 1e3 * (seams - 0.15).relu()], 1)


def test_curves_that_fall_and_come_back_are_said():
    """All deleted is as good as nothing deleted, and only what is between disturbs."""
    x = scene(noisy=0)
    x[:, 1] = 1
    found = context_evidence(
        CUE + 0.1 * toy.random_input(1, 1, *SHAPE)[0, 0], x, BySeams(), 1, block=2, baselines=(0.0,)
    )
    assert found.left > 0.95
    assert found.rise > 0.5
    assert not found.passed
    assert not found.certain
    assert found.words.startswith("undefined: with everything around the mask deleted")
    assert "disturbs the network" in found.words


def test_rivals_serve_several_maps():
    """The second map costs less, and its verdict is that of a trial of its own."""
    subject = Subject(Rerun(RemoteCue(), scene()), 1, "softmax")
    rivals = Rivals(
        Blocks.of(subject, 2, kept=grown((MASK > 0).numpy(), 2)),
        baseline="mean",
        steps=25,
        seed=0,
        controls={"mask alone": mask_alone(MASK > 0), "input alone": input_alone(scene())},
        strict=["mask alone"],
        random=random_maps(GRID, SHAPE, draws=20),
    )
    first = evidence_against(rivals, CUE, (), 500)
    second = evidence_against(rivals, MASK + CUE, (), 500)
    assert first.passed
    assert second.passed
    assert second.cost - first.cost < 0.3 * first.cost


def test_the_same_seed_gives_the_same_numbers():
    one, same, other = (evidence(CUE, seed=seed) for seed in (1, 1, 2))
    assert one.random == same.random
    assert np.array_equal(one.curve.dice, same.curve.dice)
    assert one.random != other.random


def test_bad_input():
    with pytest.raises(ConfigError, match="draws"):
        evidence(CUE, draws=9)
    with pytest.raises(ConfigError, match="baseline"):
        evidence(CUE, baselines=())
    with pytest.raises(EmptyRegionError):
        context_evidence(CUE, 0 * scene(), RemoteCue(), 1)


# ------------------------------------------------------------------------------------------ areas


@pytest.mark.parametrize("error", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("seed", range(5))
def test_the_area_of_a_falling_curve_is_within_its_error(seed, error):
    falls = toy.random_input(1, 1, 25, seed=seed)[0, 0].numpy() ** 8
    heights = np.append(1, 1 - 0.9 * np.cumsum(falls) / falls.sum())
    fractions = np.linspace(0, 1, 26)
    asked = []

    def height(step):
        asked.append(step)
        return float(heights[step])

    area, left = area_between(height, fractions, 1.0, float(heights[-1]), error=error)
    whole = float(np.trapezoid(heights, fractions))
    assert abs(area - whole) <= left + 1e-12
    assert left <= error
    assert len(asked) == len(set(asked)) <= 24
    if error == 0.1:
        assert len(asked) < 10


def test_an_area_is_known_when_its_side_is():
    heights = np.linspace(1, 0, 26)
    asked = []
    area, left = area_between(
        lambda step: asked.append(step) or float(heights[step]),
        np.linspace(0, 1, 26),
        1.0,
        0.0,
        error=0.001,
        other=0.05,
    )
    assert area - left > 0.05
    assert len(asked) <= 2
    assert torch.tensor(area).item() == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(20))
def test_the_error_holds_for_curves_that_rise_no_more_than_is_said(seed):
    draws = np.random.default_rng(seed)
    heights = np.append(1, np.clip(np.linspace(1, 0, 25) + draws.normal(0, 0.1, 25), 0, 1))
    rise = float((heights - np.minimum.accumulate(heights)).max())
    curve = PartialCurve(lambda step: heights[step], np.linspace(0, 1, 26), 1.0, heights[-1])
    whole = float(np.trapezoid(heights, np.linspace(0, 1, 26)))
    while curve.error(rise) > 0:
        assert abs(curve.area - whole) <= curve.error(rise)
        assert curve.rise <= rise
        curve.take(curve.widest(rise))
    assert curve.area == pytest.approx(whole)


def test_a_curve_that_falls_and_comes_back_is_taken_whole():
    heights = [1.0, 0.9, 0.2, 0.3, 1.0]
    area, left = area_between(lambda step: heights[step], np.linspace(0, 1, 5), 1.0, 1.0)
    assert area == pytest.approx(np.trapezoid(heights, np.linspace(0, 1, 5)))
    assert left == 0
