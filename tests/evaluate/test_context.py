"""What points at evidence passes; what knows nothing of the network does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import toy
from test_faithfulness import CUE, MASK, SHAPE, Bright, RemoteCue, scene

from seg3dcam import WindowPlan
from seg3dcam.errors import ConfigError, EmptyRegionError
from seg3dcam.evaluate import context_deletion, context_evidence
from seg3dcam.evaluate.areas import area_between
from seg3dcam.evaluate.controls import input_alone, nearness, random_maps
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


def test_figures_are_those_of_whole_curves():
    """To 0.02, of controls and of other baselines; the map's own curve is whole."""
    found = evidence(CUE)
    x = scene()
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
