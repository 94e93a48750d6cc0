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
from seg3dcam.evaluate import compare, comparing, contest, context_deletion, ranking
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
    of_second_baseline = len(found.controls) + 1
    curves = len(found.candidates) + len(found.controls) + 20 * 3 + of_second_baseline
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
def test_whoever_wins_was_measured_wholly(monkeypatch, found):
    """Also one that was not among the first few."""
    monkeypatch.setattr(ranking, "WHOLE", 0)
    other = compared(baselines=("mean", 0.0))
    assert other.best.name == found.best.name
    assert other.best.error == 0
    assert other.best.curves
    assert other.best.area == found.best.area


@pytest.mark.slow
def test_another_baseline_has_controls_of_its_own():
    """With a bright baseline whatever is deleted becomes a cue."""
    found = compared(baselines=("mean", 1.0), methods=["hires_cam"])
    alone = compared(baselines=(1.0,), methods=["hires_cam"])
    assert found.best is None or alone.best is not None


@pytest.mark.slow
def test_how_well_random_maps_are_known_is_said(monkeypatch, found):
    def exactly(curves, **bounds):
        for curve in curves:
            curve.complete()
        return measured(curves)

    monkeypatch.setattr(ranking, "measured", exactly)
    exact = compared(baselines=("mean", 0.0))
    assert exact.random_error == 0
    assert found.random_error > 0.02
    assert f"-{max(found.random):.2f} ± {found.random_error:.2f}, p" in found.words
    for known, true in zip(found.random, exact.random, strict=True):
        assert abs(known - true) <= found.random_error + 1e-9


@pytest.mark.slow
def test_windows_find_the_same_layer():
    plan = WindowPlan((12, 16, 16), overlap=0.75)
    other = compared(sliding_window=plan, methods=["hires_cam"])
    assert other.best.layer == "encoder"
    assert other.best.area < 0.05


# ------------------------------------------------------------------------- where no layer is good


@pytest.fixture
def echoes_alone(monkeypatch):
    """Let layers be suggested that show the mask and no cue."""
    given = comparing.suggest_layers

    def without_encoder(*args, **more):
        return [one for one in given(*args, **more) if one.role != "encoder"]

    monkeypatch.setattr(comparing, "suggest_layers", without_encoder)
    monkeypatch.setattr(comparing, "METHODS", ("hires_cam",))


@pytest.mark.slow
@pytest.mark.usefixtures("echoes_alone")
def test_where_no_layer_is_good_the_input_is_explained_too():
    pytest.importorskip("captum", reason="captum is not installed")
    found = compared(methods=None)
    assert (found.best.layer, found.best.method) == ("input", comparing.FURTHER)
    assert found.best.area < 0.05
    assert found.best.p_value == pytest.approx(1 / 21)
    assert found.words.startswith(f"use layer input with {comparing.FURTHER}: it points outside")
    assert found.order == (
        ("bottleneck", "hires_cam"),
        ("decoder", "hires_cam"),
        ("input", comparing.FURTHER),
    )
    assert found.default.name == "layer bottleneck with hires_cam"


@pytest.mark.slow
@pytest.mark.usefixtures("echoes_alone")
@pytest.mark.parametrize(
    "named", [{"methods": ["hires_cam"]}, {"methods": None, "layers": ["bottleneck"]}]
)
def test_where_layers_or_methods_are_named_no_other_is_looked_at(named):
    assert "input" not in {one.layer for one in compared(**named).candidates}


@pytest.mark.slow
@pytest.mark.usefixtures("echoes_alone")
def test_without_captum_the_layers_are_all(monkeypatch):
    monkeypatch.setattr(comparing.importlib.util, "find_spec", lambda name: None)
    found = compared(methods=None)
    assert found.best is None
    assert {one.layer for one in found.candidates} == {"bottleneck", "decoder"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hires_cam", "eigen_cam"])
def test_what_a_second_round_finds_is_what_one_round_finds(monkeypatch, method):
    """Whether the best of the first round has won there, or has a fault (it knows no class)."""
    pytest.importorskip("captum", reason="captum is not installed")
    monkeypatch.setattr(comparing, "METHODS", (method,))
    monkeypatch.setattr(comparing, "FAR", -1.0)
    twice = compared(methods=None)
    once = compared(methods=[method, comparing.FURTHER])
    assert twice.table() == once.table()
    assert sum(one.won for one in twice.candidates) == 1
    assert twice.best.method == ("hires_cam" if method == "hires_cam" else comparing.FURTHER)
    assert twice.words.startswith(f"use {twice.best.name}")


@pytest.mark.slow
def test_where_a_layer_is_good_nothing_else_is_looked_at(monkeypatch):
    monkeypatch.setattr(comparing, "METHODS", ("hires_cam",))
    found = compared(methods=None)
    assert found.best.layer == "encoder"
    assert "input" not in {one.layer for one in found.candidates}


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
    assert both.words.endswith(
        "; means of 2 inputs, while 1 more needs nothing outside of the mask"
    )
    for one in both.candidates:
        assert one.area == pytest.approx(np.mean(one.areas))
        assert len(one.areas) == 2
        assert len(one.curves) in (0, 2)


@pytest.mark.slow
def test_an_input_twice_is_the_input():
    """However many there are, what decides is known exactly."""
    one, two = compared(methods=["hires_cam"]), compared(x=[planted()] * 2, methods=["hires_cam"])
    assert two.controls == pytest.approx(one.controls, abs=1e-12)
    assert two.best.layer == one.best.layer
    assert two.best.area == one.best.area


class TwoBranches(nn.Module):
    """Of channel 0 it looks 4 voxels to the left; channel 1 is the class itself."""

    def __init__(self):
        super().__init__()
        self.context, self.aside = nn.Conv3d(1, 1, 1), nn.Conv3d(1, 2, 9, padding=4)
        self.itself = nn.Conv3d(1, 2, 1)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        with torch.no_grad():
            self.context.weight[:] = 1
            self.aside.weight[1, 0, 4, 4, 0] = 1
            self.aside.bias[1] = -0.5
            self.itself.weight[1] = 1

    def forward(self, x):
        return self.aside(self.context(x[:, :1])) + self.itself(x[:, 1:])


@pytest.mark.slow
def test_an_input_that_does_not_count_throws_no_candidate_out():
    """Nothing of the context's branch speaks for a class that needs no context."""
    scan = 0.1 * torch.rand(1, 1, 16, 16, 24, generator=torch.Generator().manual_seed(0))
    scan[..., 4:8, 4:8, 8:12] = 1
    needs, itself = (torch.cat(pair, 1) for pair in ((scan, 0 * scan), (0 * scan, scan)))
    settings = {"layers": ["context"], "methods": ["hires_cam"], "margin": 0}
    alone = compared(TwoBranches().eval(), needs, **settings)
    for x, counted in (([needs, itself], (0,)), ([itself, needs], (1,))):
        found = compared(TwoBranches().eval(), x, **settings)
        assert found.counted == counted
        assert found.best.area == alone.best.area
        assert found.words.endswith("; of 1 input, while 1 more needs nothing outside of the mask")


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
        "with the baseline noise it gets 1.00, and says nothing beyond the nearness to the mask, "
        "which alone gets 0.40"
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
        ({"baselines": ()}, ConfigError, "give a list, such as"),
        ({"baselines": "mean"}, ConfigError, "give a list, such as"),
        ({"baselines": ("mean", "bluur")}, ConfigError, "did you mean 'blur'"),
        ({"baselines": (1e39,)}, ConfigError, "too large"),
        ({"seed": -1}, ConfigError, "seed"),
        ({"seed": 1.5}, ConfigError, "seed"),
        ({"spacing": (1,)}, ConfigError, "give 3 numbers above 0"),
        ({"spacing": (1, float("nan"), 1)}, ConfigError, "give 3 numbers above 0"),
        ({"spacing": (1, 0, 1)}, ConfigError, "give 3 numbers above 0"),
        ({"x": planted().numpy()}, InputError, "inputs are tensors"),
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
