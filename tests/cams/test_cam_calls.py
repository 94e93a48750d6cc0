"""What a CAM takes and refuses as settings and targets; and what FullGrad says of its sum."""

from __future__ import annotations

import inspect

import pytest
import torch
import toy

from seg3dcam import (
    BaseCAM,
    FullGrad,
    GradCAM,
    HiResCAM,
    RandomCAM,
    WindowPlan,
    XResCAM,
    targets,
)
from seg3dcam.cams.attributions import Gradient
from seg3dcam.cams.calls import each_by
from seg3dcam.cams.catalogue import CAMS
from seg3dcam.errors import ConfigError, Seg3dcamWarning, TargetError

X = toy.random_input(1, 1, 6, 4, 5)


def test_auto_is_the_same_layer_for_every_method_and_in_every_call():
    network = toy.plain()
    cams = [HiResCAM(network), GradCAM(network)]
    once, again = each_by(cams, X, [1]), each_by(cams, X, [1])
    assert cams[0].layers == cams[1].layers != []
    assert [r.layers.keys() for r in once[0]] == [r.layers.keys() for r in again[0]]
    alone = HiResCAM(network)
    alone(X, 1)
    each_by([alone, GradCAM(network)], X, [1])
    other = "1" if str(alone.layers[0]) != "1" else "3"
    with pytest.raises(ConfigError, match="different target layers"):
        each_by([HiResCAM(network, other), GradCAM(network)], X, [1])


@pytest.mark.parametrize(
    ("cam", "settings", "message"),
    [
        (GradCAM, {"block": 1}, "GradCAM has no setting 'block': this method has none"),
        (HiResCAM, {"window": 2}, "HiResCAM has no setting 'window'"),
        (XResCAM, {"block": 3}, "XResCAM has no setting 'block': legal: 'window', 'mode'"),
        (CAMS["fem"], {"sigma": 3}, "FEM has no setting 'sigma'"),
        (CAMS["score_cam"], {"memory": 3}, "did you mean 'memory_gb'"),
        (FullGrad, {"psi": "abs"}, "legal are 'signed' and 'paper'"),
        (GradCAM, {"sliding_window": 8}, r"sliding_window 8: give a WindowPlan, such as"),
        (GradCAM, {"progress": 3}, r"progress 3: a function of \(step, done, total\)"),
    ],
)
def test_settings_that_a_method_does_not_have(cam, settings, message):
    with pytest.raises(ConfigError, match=message):
        cam(toy.plain(), "1", **settings)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (1, "targets 1: give a list"),
        ("lesion", "targets 'lesion': give a list"),
        (targets.ClassLogit(1), "give a list, such as"),
        (targets.EveryComponent(1), "give a list, such as"),
        ([], "the list of targets is empty"),
        (lambda logits: [], "the list of targets is empty"),
        (lambda logits: logits.sum(), "give a list"),
    ],
)
def test_targets_come_in_a_list(asked, message):
    with pytest.raises(TargetError, match=message):
        GradCAM(toy.plain(), "1").each(X, asked)


def test_methods_that_share_a_pass_look_at_the_same():
    network = toy.plain()
    first = GradCAM(network, "1")
    for other, what in (
        (GradCAM(network, "3"), "target layers"),
        (GradCAM(toy.plain(), "1"), "models"),
        (GradCAM(network, "1", sliding_window=WindowPlan(4)), "windows"),
        (GradCAM(network, "1", activation="sigmoid"), "activations"),
        (GradCAM(network, "1", output=0), "outputs"),
    ):
        with pytest.raises(ConfigError, match=f"different {what} cannot share a pass"):
            each_by([first, other], X, [targets.ClassLogit(1, "volume")])
    with pytest.raises(ConfigError, match="no method given"):
        each_by([], X, [1])
    row = each_by([Gradient(network), first], X, [targets.ClassLogit(1, "volume")])[0]
    assert [list(result.layers) for result in row] == [["input"], ["1"]]


def test_full_grad_says_that_it_takes_a_slope_apart():
    """Of a logit the map sums to the score; of log-odds among three classes it does not."""
    network = toy.plain()
    found = FullGrad(network)(X, targets.ClassLogit(1, "volume"))
    assert found.layers["input"].flags == ()
    assert found.maps["input"].sum().item() == pytest.approx(found.score.item())
    target = targets.ClassLogOdds(1, "volume")
    with pytest.warns(Seg3dcamWarning, match="is not linear in the logits"):
        found = FullGrad(network)(X, target)
    logits = network(X).detach().requires_grad_()
    (slope,) = torch.autograd.grad(target(logits).sum(), logits)
    assert found.maps["input"].sum().item() == pytest.approx((slope * logits).sum().item())
    assert abs(found.maps["input"].sum() - found.score) > 0.1 * found.score.abs()


@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
def test_full_grad_names_the_layers_whose_biases_it_leaves_out():
    """A module that runs twice has no one map."""
    twice = torch.nn.Conv3d(4, 4, 1)
    layers = [torch.nn.Conv3d(1, 4, 1), twice, torch.nn.ReLU(), twice, torch.nn.Conv3d(4, 2, 1)]
    network = toy.seeded(torch.nn.Sequential(*layers))
    with pytest.warns(Seg3dcamWarning, match="The biases of 1 are left out: .*ran 2 times"):
        FullGrad(network)(X, targets.ClassLogit(1, "volume"))


def test_a_class_that_names_a_method_has_its_formula():
    """Whatever class it is derived from: the name that results bear is what made them."""

    class Renamed(GradCAM):
        method = "hires_cam"

    class OfTheBase(BaseCAM):
        method = "random"

    class Same(XResCAM):
        pass

    assert Renamed.formula is HiResCAM.formula
    assert OfTheBase.formula is RandomCAM.formula
    assert Same.formula is XResCAM.formula


def test_a_class_of_an_unknown_method_needs_a_formula():
    with pytest.raises(ConfigError, match=r"Own names the method 'hires_can', did you mean 'hires"):

        class Own(GradCAM):
            method = "hires_can"

    class Mine(GradCAM):
        method, formula = "mine", HiResCAM.formula

    assert Mine.formula is HiResCAM.formula


def test_signatures_show_the_settings_of_a_method():
    shown = inspect.signature(XResCAM).parameters
    assert (shown["window"].default, shown["mode"].default) == (2, "mean")
    assert "settings" not in shown
    assert list(inspect.signature(GradCAM).parameters) == [
        *("model", "target_layers", "sliding_window", "output", "activation"),
        *("reshape_transform", "progress"),
    ]

    class Own(XResCAM):
        def __init__(self, model):
            super().__init__(model, "0", window=4)

    assert list(inspect.signature(Own).parameters) == ["model"]
