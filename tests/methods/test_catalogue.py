"""A method is one formula and one class: every table, and every setting, follows from them."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, fields

import pytest
import torch
from torch import nn

import seg3dcam
from seg3dcam import METHODS, BaseCAM, XResCAM
from seg3dcam.cams import attributions, catalogue
from seg3dcam.cams.attributions import ATTRIBUTIONS
from seg3dcam.cams.base import methods_by_key
from seg3dcam.cams.catalogue import ALL_METHODS, CAMS
from seg3dcam.methods.base import StepwiseFormula, weighted_sum
from seg3dcam.targets import ClassLogit


def network():
    return nn.Sequential(nn.Conv3d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv3d(3, 2, 1))


@dataclass(frozen=True)
class SharpenedGradients(StepwiseFormula):
    """sum_k sign(G_k) |G_k|^power A_k, voxel by voxel."""

    power: float = 2.0

    def whole_axes(self, ndim):
        return ()

    def maps_gradients(self, ndim):
        return True

    def map(self, a, g, weights):
        return weighted_sum(a, g.sign() * g.abs() ** self.power)

    def ceiling(self, a, g, weights):
        return weighted_sum(a.abs(), g.abs() ** self.power)


class SharpCAM(BaseCAM):
    """A method that the library does not have."""

    method, formula = "sharp_cam", SharpenedGradients()


def test_a_method_more_is_one_formula_and_one_class():
    assert methods_by_key(globals()) == {"sharp_cam": SharpCAM}
    net, x, target = network(), torch.rand(1, 1, 6, 6, 6), ClassLogit(1, "volume")
    plain = seg3dcam.HiResCAM(net, "1")(x, target).native["1"]
    torch.testing.assert_close(SharpCAM(net, "1", power=1.0)(x, target).native["1"], plain)
    sharp = SharpCAM(net, "1")(x, target)
    assert sharp.method == "sharp_cam"
    assert sharp.settings == {"power": 2.0}
    assert not torch.allclose(sharp.native["1"], plain)
    with pytest.raises(seg3dcam.errors.ConfigError, match=r"no setting 'powr'.*power"):
        SharpCAM(net, "1", powr=2)


def test_the_tables_hold_every_class_of_their_file():
    for module, table in ((catalogue, CAMS), (attributions, ATTRIBUTIONS)):
        classes = [c for c in vars(module).values() if isinstance(c, type)]
        own = [c for c in classes if c.__module__ == module.__name__]
        assert list(table.values()) == own
        assert [cam.method for cam in own] == list(table)
    assert list(ALL_METHODS) == [*CAMS, *ATTRIBUTIONS]
    assert {key: cam.formula for key, cam in CAMS.items()} == METHODS
    assert {cam.__name__ for cam in CAMS.values()} < set(seg3dcam.__all__)


def test_no_formula_bears_the_name_of_a_method():
    methods = {cam.__name__ for cam in ALL_METHODS.values()}
    assert not methods & {type(cam.formula).__name__ for cam in ALL_METHODS.values()}


FIXED = {"grad_cam", "slice_grad_cam", "hires_cam", "shapley_cam"}


@pytest.mark.parametrize("key", ALL_METHODS)
def test_settings_are_the_fields_of_the_formula(key):
    kind = ALL_METHODS[key]
    names = {field.name for field in fields(kind.formula)}
    assert set(kind.formula.own_settings.values()) == (set() if key in FIXED else names)
    given = {
        name: getattr(kind.formula, field) for name, field in kind.formula.own_settings.items()
    }
    cam = kind(network(), "1", **given)
    assert cam.formula == kind.formula
    assert set(cam.settings) == names


def test_an_object_has_settings_of_its_own():
    cam = XResCAM(network(), "1", window=(1, 2, 3), mode="max")
    assert cam.settings == {"block": (1, 2, 3), "mode": "max"}
    assert XResCAM(network(), "1").settings == {"block": 2, "mode": "mean"}


@pytest.mark.parametrize("key", ["xres_cam", "grad_cam", "occlusion", "full_grad"])
def test_a_method_survives_pickling(key):
    cam = ALL_METHODS[key](network(), "1")
    again = pickle.loads(pickle.dumps(cam))
    assert type(again) is type(cam)
    assert again.formula == cam.formula
