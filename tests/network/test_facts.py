"""What is known about a network holds for its copy, unless the copy is of another structure."""

from __future__ import annotations

import copy

import pytest
import toy
from torch import nn

from seg3dcam import HiResCAM
from seg3dcam.evaluate import randomisation
from seg3dcam.network.facts import facts_of, take_over
from seg3dcam.network.grids import measurement
from seg3dcam.targets import ClassLogit


def network() -> nn.Module:
    layers = [nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 1)]
    return toy.seeded(nn.Sequential(*layers), seed=3)


def explained() -> HiResCAM:
    """Return a CAM whose network is known."""
    cam = HiResCAM(network(), "1")
    cam(toy.random_input(1, 1, 8, 10, 9, seed=1), ClassLogit(1, "volume"))
    return cam


def test_a_copy_is_known_as_the_network_is():
    original = explained().model
    copied = copy.deepcopy(original)
    take_over(copied, original)
    assert facts_of(copied).grids == facts_of(original).grids != {}
    facts_of(copied).grids.clear()
    assert facts_of(original).grids


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net[0], "stride", (2, 1, 1)),
        lambda net: net.add_module("3", nn.ReLU()),
        lambda net: net.__setitem__(1, nn.Tanh()),
    ],
    ids=["setting", "one more module", "another module"],
)
def test_a_copy_of_another_structure_is_not(change):
    original = explained().model
    copied = copy.deepcopy(original)
    change(copied)
    take_over(copied, original)
    assert facts_of(copied).grids == {}


def test_grids_of_randomised_copies_are_not_measured_again(monkeypatch):
    cam, measured = explained(), []
    once = measurement._measured_twice
    monkeypatch.setattr(measurement, "_measured_twice", lambda *a: measured.append(a) or once(*a))
    randomisation(cam, toy.random_input(1, 1, 8, 10, 9, seed=1), ClassLogit(1, "volume"))
    assert not measured
