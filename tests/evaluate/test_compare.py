"""The layer and method that show the evidence win, and where none does, that is said."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_planted import SHAPE, PlantedUNet, planted
from helpers_untouched import untouched
from torch import nn

from seg3dcam import WindowPlan
from seg3dcam.cams.catalogue import ALL_METHODS
from seg3dcam.errors import (
    ConfigError,
    EmptyRegionError,
    EvaluationError,
    InputError,
    LayerError,
    Seg3dcamWarning,
)
from seg3dcam.evaluate import compare, contest, context_deletion
from seg3dcam.evaluate.areas import PartialCurve
from seg3dcam.evaluate.contest import Case, measured

#: Two methods are enough to tell layers from each other.
TWO = ["grad_cam", "hires_cam"]

pytestmark = pytest.mark.filterwarnings("ignore:where the voxels of layer 'bottleneck'")


class Handled(PlantedUNet):
    """A planted network with a layer that counts for nothing, and one that gives NaN to a map."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Conv3d(2, 2, 1)

    def forward(self, x):
        return super().forward(x) + 0 * self.idle(x)


def planted_network(kind=PlantedUNet, **settings):
    return kind(**settings).eval()


def compared(network=None, x=None, **more):
    network = planted_network() if network is None else network
    settings = {"block": 2, "methods": TWO, "baselines": ("mean",)} | more
    return compare(network, planted() if x is None else x, 1, **settings)


@pytest.fixture(scope="module")
def found():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Seg3dcamWarning)
        return compared(baselines=("mean", 0.0))


# ----------------------------------------------------------------------------------- the winner


@pytest.mark.slow
def test_the_layer_that_shows_the_cue_wins(found):
    best = found.best
    assert (best.layer, best.method, best.role) == ("encoder", "grad_cam", "encoder")
    assert found.candidates[0] is best
    assert best.area < 0.03
    assert set(best.baselines) == {"mean", "0.0"}
    assert best.sanity.passed
    assert best.p_value == pytest.approx(1 / 21)
    assert found.controls["mask alone"] > 0.4
    assert found.default.name == "layer bottleneck with hires_cam"
    assert found.default.area > 0.4
    assert found.words.startswith(
        "use layer encoder with grad_cam: it points outside the mask at something the prediction "
        "depends on (context deletion 0.02, mask alone 0.5"
    )
    assert "; the default, layer bottleneck with hires_cam, gets 0.5" in found.words


@pytest.mark.slow
def test_a_map_that_survives_random_weights_comes_after_those_that_do_not():
    """The encoder's main component, whatever comes behind it, shows what is bright."""
    found = compared(methods=["eigen_cam", "hires_cam"], layers=["encoder"])
    assert found.best.method == "hires_cam"
    last = found.candidates[-1]
    assert last.method == "eigen_cam"
    assert last.area < 0.1
    assert not last.sanity.passed
    assert last.fault.startswith("shows what a random network shows: with all weights")


@pytest.mark.slow
def test_areas_are_those_of_whole_curves_and_the_winner_is_the_best(found):
    whole = {}
    network, x = planted_network(), planted()
    for method in TWO:
        result = ALL_METHODS[method](network, ["encoder", "bottleneck", "decoder"])(x, 1)
        for layer, values in result.maps.items():
            curve = context_deletion(values[0], x, network, 1, block=2)
            whole[layer, method] = curve
    assert sum(bool(one.curves) for one in found.candidates) == 4
    for one in found.candidates:
        exact = whole[one.layer, one.method].auc
        assert one.area == pytest.approx(exact, abs=one.error + 0.02)
        for fractions, dice in one.curves:
            assert np.array_equal(fractions, whole[one.layer, one.method].fractions)
            assert np.array_equal(dice, whole[one.layer, one.method].dice)
    assert found.best.area <= min(curve.auc for curve in whole.values()) + 0.05


@pytest.mark.slow
def test_it_costs_less_than_whole_curves(found):
    curves = len(found.candidates) + len(found.controls) + 20 * 3
    assert found.cost < 25 * curves / 8


@pytest.mark.slow
def test_the_table_has_a_row_for_each_in_their_order(found):
    rows = found.table()
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [(row["layer"], row["method"]) for row in rows] == [
        (one.layer, one.method) for one in found.candidates
    ]
    assert [row["verdict"] for row in rows[:2]] == ["best", ""]
    assert rows[-1]["verdict"] == found.candidates[-1].fault


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(found):
    network = planted_network()
    with untouched(network):
        again = compared(network, baselines=("mean", 0.0))
    assert again.table() == found.table()
    assert again.random == found.random


@pytest.mark.slow
def test_windows_find_the_same_layer():
    plan = WindowPlan((12, 16, 16), overlap=0.75)
    other = compared(sliding_window=plan, methods=["hires_cam"])
    assert other.best.layer == "encoder"
    assert other.best.area < 0.05


# -------------------------------------------------------------------------------- several inputs


@pytest.mark.slow
def test_several_inputs_are_ranked_by_their_means():
    """One that needs nothing around the mask does not count."""
    alone = planted(seed=5)
    alone[:, 0] *= 3  # so bright that no cue is needed
    inputs = [planted(seed=3), alone, planted(seed=4)]
    both = compared(x=inputs)
    assert both.counted == (0, 2)
    assert both.best.layer == "encoder"
    assert both.words.endswith("; means of 2 inputs, while 1 more need nothing outside of the mask")
    for one in both.candidates:
        assert one.area == pytest.approx(np.mean(one.areas))
        assert len(one.areas) == 2
        assert len(one.curves) in (0, 2)


def test_an_error_says_of_which_input_it_is():
    with pytest.raises(EmptyRegionError, match=r"input 2 of 2: .*class 1"):
        compared(x=[planted(), 0 * planted()])


# -------------------------------------------------------------------------------- nothing passes


@pytest.mark.slow
def test_where_only_echoes_are_offered_none_is_recommended():
    echo = compared(layers=["bottleneck", "decoder"], methods=["hires_cam"])
    assert echo.best is None
    assert echo.candidates[0].fault.startswith("echo: says nothing beyond the ")
    assert echo.words.startswith("no layer and method passes: do not use any; the best, layer ")
    assert echo.default is None  # since the layers were named


def test_layers_may_be_patterns_and_auto():
    """Nothing is measured on a volume so bright that no cue is needed."""
    names = compared(x=3 * planted(), layers=["auto", "enc*", "encoder"]).order
    assert [layer for layer, method in names if method == "hires_cam"] == ["bottleneck", "encoder"]


def test_where_nothing_outside_is_needed_that_is_said():
    free = compared(planted_network(gain=0.0))
    assert free.best is None
    assert free.words.startswith("undefined: the prediction needs nothing outside of the mask")
    assert {one.reason for one in free.candidates} == {"not measured"}
    assert free.cost < 3


@pytest.mark.slow
def test_one_of_many_random_maps_that_is_as_good_counts_against_the_winner(monkeypatch):
    """The winner was chosen among all layers, so a draw has as many random maps."""
    cue = torch.zeros(SHAPE)
    cue[4:8, 8:12, 4:8] = 1
    given = contest.random_maps

    def drawn(grid, shape, **more):
        for number, values in enumerate(given(grid, shape, **more)):
            yield cue if number == 7 and grid.stride[0] in lucky else values

    monkeypatch.setattr(contest, "random_maps", drawn)
    lucky = (1, 2)
    chance = compared(methods=["hires_cam"])
    assert chance.best is None
    first = chance.candidates[0]
    assert first.layer == "encoder"
    assert first.p_value == pytest.approx(2 / 21)
    assert first.fault.startswith(
        "no better than the best of as many random maps of its resolution as there are layers (0.0"
    )
    assert first.fault in chance.words
    assert len(chance.random) < 20  # it ends where nothing can help

    lucky = (2,)
    other = compared(methods=["hires_cam"])
    assert other.best.layer == "encoder"
    assert other.best.p_value == pytest.approx(1 / 21)
    assert len(other.random) == 20


@pytest.mark.slow
def test_a_winner_by_one_baseline_alone_is_none(monkeypatch):
    """With a baseline that leaves the cue as it is, nothing is deleted by deleting it."""
    given = contest.Blocks.replacement

    def leaves_the_cue(self, baseline, seed):
        replacement = given(self, "mean", seed)
        if baseline == "mean":
            return replacement
        return lambda deleted: torch.where(
            self.subject.rerun.x > 0.5, self.subject.rerun.x, replacement(deleted)
        )

    monkeypatch.setattr(contest.Blocks, "replacement", leaves_the_cue)
    other = compared(methods=["hires_cam"], baselines=("mean", "noise"))
    assert other.best is None
    assert other.candidates[0].fault == (
        "with the baseline noise it gets 1.00, no better than the mask alone"
    )


@pytest.mark.slow
def test_maps_that_cannot_be_used_are_listed_with_the_reason(monkeypatch):
    """Zero, the same everywhere, not finite."""
    given = Case.maps

    def spoilt(self, layers, methods, **more):
        for layer, method, found in given(self, layers, methods, **more):
            values = {"decoder": torch.full_like(found.values, 2.0)}
            values["bottleneck"] = torch.full_like(found.values, float("nan"))
            yield layer, method, replace(found, values=values.get(layer, found.values))

    monkeypatch.setattr(Case, "maps", spoilt)
    network = planted_network(Handled)
    layers = ["idle", "bottleneck", "decoder", "encoder"]
    partly = compared(network, layers=layers, methods=["hires_cam"])
    assert partly.best.layer == "encoder"
    told = {one.layer: (one.status, one.reason, one.area) for one in partly.candidates[1:]}
    assert told["decoder"] == ("degenerate", "the same value everywhere (2)", None)
    assert told["bottleneck"] == ("nonfinite", "NaN or infinity in the map", None)
    assert told["idle"][0] == "zero"
    none = compared(network, layers=["decoder", "bottleneck"], methods=["hires_cam"])
    assert none.best is None
    assert none.words == (
        "undefined: no map can be used; layer decoder with hires_cam: the same value everywhere (2)"
    )


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"draws": 18}, ConfigError, "draws"),
        ({"baselines": ()}, ConfigError, "no baseline"),
        ({"methods": []}, ConfigError, "give a list of keys"),
        ({"methods": "hires_cam"}, ConfigError, "give a list of keys"),
        ({"methods": ["hires"]}, ConfigError, "did you mean 'hires_cam'"),
        ({"layers": []}, ConfigError, "no layer given"),
        ({"layers": ["encodr"]}, LayerError, "encoder"),
        ({"x": []}, InputError, "no input given"),
        ({"x": 0 * planted()}, EmptyRegionError, "class 1"),
        ({"margin": 16}, EvaluationError, "curve needs 20"),
        ({"block": 8}, EvaluationError, "blocks outside of the grown mask"),
        ({"margin": -1}, ConfigError, "margin"),
    ],
)
def test_bad_input(settings, error, words):
    with pytest.raises(error, match=words):
        compared(**settings)


# ----------------------------------------------------------------------------------------- areas


def steep(step):
    return 1.0 if step < 5 else 0.2


def test_bad_maps_are_known_roughly_and_good_ones_well():
    fractions = np.linspace(0, 1, 26)
    rough = PartialCurve(steep, fractions, 1.0, 0.2)
    area, error = measured([rough], best=0.01)
    assert 0.02 < error <= 0.1
    well = PartialCurve(steep, fractions, 1.0, 0.2)
    exact, error = measured([well])
    assert error <= 0.02
    assert area == pytest.approx(exact, abs=0.1)
    assert len(rough.heights) < len(well.heights)


def test_of_several_inputs_the_one_that_is_known_least_is_measured():
    flat = PartialCurve(lambda step: 1.0, np.linspace(0, 1, 26), 1.0, 1.0)
    falling = PartialCurve(steep, np.linspace(0, 1, 26), 1.0, 0.2)
    measured([flat, falling])
    assert len(flat.heights) == 2
    assert len(falling.heights) > 3
