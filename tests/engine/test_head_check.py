"""A map that does not depend on the last layer is found, and the network stays as it is."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import toy
from helpers_engine import signed_maps
from helpers_untouched import untouched
from torch import nn

from seg3dcam import WindowPlan
from seg3dcam.cams.calls import explain_targets
from seg3dcam.cams.catalogue import CAMS
from seg3dcam.engine import head_check
from seg3dcam.engine.head_check import rank_correlation
from seg3dcam.targets import ClassLogit, Component, EveryComponent

pytestmark = signed_maps

#: A part of the input has at most an eighth of its voxels, so an axis needs 320 of them.
LENGTH = 320


def maps_of(network, x, *keys, target=None, layer="3", plan=None, **more):
    cams = [CAMS[key](network, layer, sliding_window=plan) for key in keys]
    target = ClassLogit(1, "volume") if target is None else target
    (row,) = explain_targets(cams, x, [target], examines=True, **more)
    return [next(iter(result.layers.values())) for result in row.results]


@pytest.fixture
def network():
    return toy.plain(1, seed=7).float()  # class 1 is predicted in several places


@pytest.fixture
def x():
    return toy.random_input(1, 1, LENGTH).float()


def test_it_is_the_rank_correlation_with_the_map_of_a_random_last_layer(x):
    """Both maps of the part are made again by hand, from a network with other weights."""
    network = toy.plain(1).float()
    (found,) = maps_of(network, x, "hires_cam")
    other = copy.deepcopy(network)
    drawn = head_check.randomised(network[4]._parameters, torch.Generator().manual_seed(0))
    for name, values in drawn.items():
        getattr(other[4], name).data = values.detach()
    # The seed is 1 everywhere in channel 1, so its first voxel is the largest.
    part = x[..., :32]
    by_hand = []
    for one in (network, other):
        activations = one[:4](part).detach().requires_grad_()
        (gradients,) = torch.autograd.grad(one[4](activations)[:, 1].sum(), activations)
        by_hand.append((activations * gradients).sum(1).detach())
    expected = rank_correlation(*by_hand)
    assert abs(expected) < 0.95
    assert found.head == pytest.approx(expected, abs=1e-6)


def test_maps_that_do_not_look_at_the_weights_stay(network, x, monkeypatch):
    """The activations, whatever the gradients are: a formula that is no explanation."""
    formula = type(CAMS["hires_cam"].formula)
    monkeypatch.setattr(formula, "map", lambda self, a, g, weights: a.sum(1))
    (found,) = maps_of(network, x, "hires_cam")
    assert found.head == pytest.approx(1)


def test_a_map_that_comes_out_alike_by_chance_turns_over_with_the_signs(x):
    """One feature alone: its map is the feature or its opposite, whatever the weights are."""
    network = toy.seeded(nn.Sequential(nn.Conv1d(1, 1, 3, padding=1), nn.Conv1d(1, 2, 1))).float()
    (found,) = maps_of(network, x, "hires_cam", layer="0")
    assert found.head is None or found.head < 0


@pytest.mark.parametrize("key", ["eigen_cam", "score_cam", "full_grad"])
def test_methods_that_cannot_be_compared_cheaply_are_not(network, x, key):
    (found,) = maps_of(network, x, key)
    assert found.head is None


def test_a_small_input_is_not_compared(network):
    """Two passes over a part would cost as much as the map itself."""
    (found,) = maps_of(network, toy.random_input(1, 1, 64).float(), "hires_cam")
    assert found.head is None


class TwoOutputs(nn.Module):
    """The module that runs last feeds an output that is not explained."""

    def __init__(self):
        super().__init__()
        self.body = toy.plain(1, seed=7).float()
        self.other = nn.Conv1d(1, 2, 1)

    def forward(self, x):
        return self.body(x), self.other(x)


def test_the_last_layer_is_the_one_that_the_logits_depend_on(x):
    network = TwoOutputs()
    cam = CAMS["hires_cam"](network, "body.3", output=0)
    (row,) = explain_targets([cam], x, [ClassLogit(1, "volume")], examines=True)
    (found,) = row.results[0].layers.values()
    (alone,) = maps_of(network.body, x, "hires_cam")
    assert found.head == alone.head != 1


def test_in_windows_a_part_of_them_is_compared(network, x):
    (found,) = maps_of(network, x, "grad_cam", "hires_cam", plan=WindowPlan(64, overlap=0.25))[1:]
    assert found.head is not None


def test_lesions_of_a_class_share_one_answer(network, x, monkeypatch):
    asked = []
    original = head_check.head_similarity

    def counted(*args):
        asked.append(args)
        return original(*args)

    monkeypatch.setattr("seg3dcam.cams.steps.head_similarity", counted)
    cam = CAMS["hires_cam"](network, "3")
    rows = explain_targets([cam], x, [EveryComponent(1), ClassLogit(2, "volume")], examines=True)
    assert len(rows) > 3
    assert len(asked) == 2


def test_the_network_stays_as_it_is_also_for_other_threads(network, x, monkeypatch):
    logits = network(x)
    seen = []
    original = head_check._maps

    def meanwhile(*args):
        thread = threading.Thread(target=lambda: seen.append(network(x)))
        thread.start()
        thread.join()
        return original(*args)

    monkeypatch.setattr(head_check, "_maps", meanwhile)
    with untouched(network):
        maps_of(network, x, "hires_cam", target=ClassLogit(1, Component(0)))
    assert len(seen) >= 2
    assert all(torch.equal(one, logits) for one in seen)


# ----------------------------------------------------------------- what the last weights may be


class Biased(nn.Module):
    """Adds a bias to the logits, which leaves every gradient as it is."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 3, 1))

    def forward(self, x):
        return x + self.bias


class Scaled(nn.Module):
    """Scales the logits by a positive number, which leaves every map as it is."""

    def __init__(self):
        super().__init__()
        self.log = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return x * self.log.exp()


class Fused(nn.Module):
    """Adds the scores of another branch, which runs last."""

    def __init__(self):
        super().__init__()
        self.body, self.other = toy.plain(1).float(), nn.Conv1d(1, 3, 1)

    def forward(self, x):
        return self.body(x) + self.other(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(toy.plain(1).float(), Biased()),
        lambda: nn.Sequential(toy.plain(1).float(), Scaled()),
        Fused,
    ],
    ids=["a bias", "a scale", "another branch"],
)
def test_weights_that_leave_the_gradient_as_it_is_are_not_the_last(make, x):
    torch.manual_seed(0)
    network = make()
    layer = "body.3" if isinstance(network, Fused) else "0.3"
    (found,) = maps_of(network, x, "hires_cam", layer=layer)
    (alone,) = maps_of(toy.plain(1).float(), x, "hires_cam")
    assert found.head == pytest.approx(alone.head, abs=1e-6)


@pytest.mark.parametrize("kind", ["parametrised", "old weight norm", "refuses to be copied"])
def test_a_head_of_any_kind_does_not_stop_an_explanation(kind, x):
    network = toy.plain(1).float()
    if kind == "parametrised":
        nn.utils.parametrizations.weight_norm(network[4])
    elif kind == "old weight norm":
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(network[4])
    else:

        class Stubborn(nn.Conv1d):
            def __getstate__(self):
                raise TypeError("not to be copied")

        network[4] = Stubborn(4, 3, 1)
    (found,) = maps_of(network, x, "hires_cam")
    assert found.status == "ok"
    assert found.head is None or found.head < 0.95


def test_functions_with_one_index_have_answers_of_their_own(network, x):
    def one(logits):
        return logits[:, 1].sum(1)

    def other(logits):
        return logits[:, 2].sum(1) - logits[:, 0].sum(1)

    one.index = other.index = 1
    cam = CAMS["hires_cam"](network, "3")
    rows = explain_targets([cam], x, [one, other], examines=True)
    heads = [next(iter(row.results[0].layers.values())).head for row in rows]
    assert heads[0] != heads[1]
