"""Scores equal their formulas, regions the voxels that they name, and wrong targets are refused."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from torch import nn

from seg3dcam import GradCAM, HiResCAM
from seg3dcam.errors import EmptyRegionError, TargetError
from seg3dcam.targets import (
    Box,
    ClassLogit,
    ClassLogOdds,
    ClassProbability,
    MaskOutput,
    Target,
    Voxel,
    as_target,
    name_of,
    score_and_seed,
)

CLASS_TARGETS = [ClassLogit, ClassLogOdds, ClassProbability]
SHAPE = (3, 4, 5)


def random_logits(classes=3, batch=2, shape=SHAPE):
    generator = torch.Generator().manual_seed(classes + batch)
    return 3 * torch.randn(batch, classes, *shape, dtype=torch.float64, generator=generator)


# ---------------------------------------------------------------------------------------- formulas


def value(target, z, c, activation):
    """The value at one voxel of logits `z`, straight from the formula."""
    z, binary = z.numpy(), activation == "sigmoid" or len(z) == 1
    if target is ClassLogit:
        return z[c]
    if target is ClassLogOdds:
        others = sum(np.exp(z[d]) for d in range(len(z)) if d != c)
        return z[c] if binary else z[c] - np.log(others)
    return 1 / (1 + np.exp(-z[c])) if binary else np.exp(z[c]) / np.exp(z).sum()


def is_predicted(z, c, activation):
    z = z.numpy()
    return z[c] > 0 if activation == "sigmoid" or len(z) == 1 else z.argmax() == c


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("classes", [1, 2, 4])
@pytest.mark.parametrize("target", CLASS_TARGETS)
def test_score_is_the_formula_summed_over_the_region(target, classes, activation):
    logits = random_logits(classes)
    for c in range(classes):
        for region in ("predicted", "volume"):
            expected = [
                sum(
                    value(target, voxel, c, activation)
                    for voxel in item.flatten(1).T
                    if region == "volume" or is_predicted(voxel, c, activation)
                )
                for item in logits
            ]
            found = target(c, region=region, activation=activation)(logits)
            torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_mask_output_sums_every_channel(activation):
    logits = random_logits()
    torch.testing.assert_close(MaskOutput()(logits), logits.sum((1, 2, 3, 4)))
    foreground = logits > 0 if activation == "sigmoid" else logits.argmax(1, keepdim=True) > 0
    inside = foreground.any(1, keepdim=True)
    found = MaskOutput("predicted", activation)(logits)
    torch.testing.assert_close(found, (logits * inside).sum((1, 2, 3, 4)))


@settings(max_examples=20, deadline=None)
@given(shift=st.floats(-50, 50), c=st.integers(0, 2))
def test_log_odds_and_probability_ignore_what_changes_no_prediction(shift, c):
    logits = random_logits()
    ramp = torch.linspace(-shift, shift, SHAPE[0], dtype=torch.float64).view(-1, 1, 1)
    for target in (ClassLogOdds(c), ClassProbability(c)):
        torch.testing.assert_close(target(logits + ramp), target(logits))


def test_log_odds_of_large_logits_are_finite():
    logits = torch.tensor([[[1000.0, -1000.0], [0.0, 0.0], [-2000.0, -500.0]]])
    torch.testing.assert_close(ClassLogOdds(0, region="volume")(logits), torch.tensor([0.0]))


# ----------------------------------------------------------------------------------------- regions


def masks(kind):
    """A mask with one voxel in item 0 and two in item 1 (the same for both where it is (*S))."""
    mask = torch.zeros(2, *SHAPE)
    mask[0, 1, 2, 3] = mask[1, 0, 0, 0] = mask[1, 2, 3, 4] = 2
    if kind == "(*S)":
        mask = mask[:1].expand(2, *SHAPE)
        return mask, mask[0]
    return mask, {
        "(B, *S)": mask,
        "(B, 1, *S)": mask[:, None],
        "bool": mask != 0,
        "integer": mask.to(torch.uint8),
        "array": mask.numpy(),
        "MetaTensor": MetaTensor(mask),
        "MetaTensor (B, 1, *S)": MetaTensor(mask[:, None]),
        "needs a gradient": mask.clone().requires_grad_(),
    }[kind]


KINDS = ["(*S)", "(B, *S)", "(B, 1, *S)", "bool", "integer", "array", "MetaTensor"]
KINDS += ["MetaTensor (B, 1, *S)", "needs a gradient"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_any_kind_is_the_same_region(kind):
    logits = random_logits()
    mask, region = masks(kind)
    target = ClassLogit(2, region=region)
    expected = (logits[:, 2] * (mask != 0)).sum((1, 2, 3))
    score, seed = score_and_seed(target, logits)
    torch.testing.assert_close(score, expected)
    torch.testing.assert_close(seed[:, 2], (mask != 0).double())
    assert not seed[:, :2].any()
    assert {type(score), type(seed), type(target.regions(logits))} == {torch.Tensor}
    assert target.regions(logits).dtype == torch.bool


def test_boxes_and_voxels():
    logits = random_logits()
    box = logits[:, 1, 1:3, 0:2, 4:5].sum((1, 2, 3))
    torch.testing.assert_close(ClassLogit(1, region=Box((1, 0, 4), (3, 2, 5)))(logits), box)
    torch.testing.assert_close(ClassLogit(1, Voxel((2, 3, 4)))(logits), logits[:, 1, 2, 3, 4])
    torch.testing.assert_close(
        ClassLogit(1, Box((0, 0, 0), SHAPE))(logits), logits[:, 1].sum((1, 2, 3))
    )


@pytest.mark.parametrize(
    ("start", "stop"),
    [
        ((0, 0, 0), (4, 4, 5)),  # one too far
        ((-1, 0, 0), (1, 1, 1)),
        ((1, 1, 1), (1, 2, 2)),  # no voxel
        ((2, 2, 2), (1, 3, 3)),
        ((0, 0), (1, 1)),
        ((0, 0, 0), (1, 1)),
    ],
)
def test_a_box_outside_the_volume_is_refused(start, stop):
    with pytest.raises(
        TargetError, match=r"box \[.*\] \(exclusive\) does not lie in .*\(3, 4, 5\)"
    ):
        ClassLogit(1, Box(start, stop))(random_logits())


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 6), (5, 4, 3), (3, 3, 4, 5), (2, 2, 3, 4, 5)])
def test_a_mask_of_another_shape_is_refused(shape):
    legal = r"legal for these logits are \(3, 4, 5\), \(2, 3, 4, 5\) and \(2, 1, 3, 4, 5\)"
    given = rf"the mask has shape \({', '.join(map(str, shape))}\); "
    with pytest.raises(TargetError, match=given + legal):
        ClassLogit(1, region=torch.ones(shape))(random_logits())


def test_a_mask_that_is_not_finite_is_refused():
    mask = torch.zeros(SHAPE)
    mask[0, 0, 0] = float("nan")
    with pytest.raises(TargetError, match="mask"):
        ClassLogit(1, region=mask)(random_logits())


def logits_that_predict(labels, classes=4):
    return nn.functional.one_hot(torch.as_tensor(labels), classes).T[None].double() * 9 - 4


@pytest.mark.parametrize(
    ("target", "logits", "message"),
    [
        (
            ClassLogOdds(3),
            logits_that_predict([0, 0, 2, 0]),
            r"log-odds of class 3 over the predicted mask: the region is empty\. "
            r"Predicted: class 0 in 3 voxels, class 2 in 1 voxels\. .*give a region: 'volume'",
        ),
        (
            ClassLogit(0, activation="sigmoid"),
            logits_that_predict([1, 1, 2, 1]),
            "Predicted: class 1 in 3 voxels, class 2 in 1 voxels",
        ),
        (ClassLogit(0), torch.full((1, 1, 4), -1.0), "Predicted: no class anywhere"),
        (
            MaskOutput("predicted"),
            logits_that_predict([0, 0, 0]),
            r"mask output \(all channels\) over the predicted mask.*Predicted: class 0 in 3 voxels",
        ),
        (
            ClassLogit(1, region=torch.zeros(4)),
            logits_that_predict([1, 1, 2, 1]),
            "logit of class 1 over the given mask: the region is empty",
        ),
        (
            ClassLogit(1),
            torch.cat([logits_that_predict([1, 1]), logits_that_predict([2, 0])]),
            "empty in item 1 of the batch. Predicted: class 0 in 1 voxels, class 2 in 1 voxels",
        ),
    ],
)
def test_an_empty_region_says_what_is_predicted(target, logits, message):
    with pytest.raises(EmptyRegionError, match=message):
        target(logits)


def test_an_empty_region_reaches_the_caller_of_a_cam():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1))
    nn.init.constant_(net[1].weight, 0)
    net[1].bias.data = torch.tensor([1.0, 0.0])
    with pytest.raises(EmptyRegionError, match="Predicted: class 0 in 16 voxels"):
        GradCAM(net, "0")(torch.ones(1, 1, 4, 4), target=1)


# ------------------------------------------------------------------------------------- classifiers


@pytest.mark.parametrize("region", ["predicted", "volume"])
@pytest.mark.parametrize("target", CLASS_TARGETS)
def test_a_classifier_has_one_place(target, region):
    """Logits (B, K): the class is explained whether or not it is predicted."""
    logits = random_logits(classes=4, batch=3, shape=())
    expected = [value(target, item, 2, "softmax") for item in logits]
    found = target(2, region=region)(logits)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_the_cam_of_a_classifier_is_the_evidence_for_the_class():
    """With global average pooling Grad-CAM is CAM: the class's weights on the features."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 6, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
        ).double()
        x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    net[0].weight.data.abs_()
    net[3].weight.data.abs_()
    with torch.no_grad():
        features = net[0](x)
        expected = torch.einsum("k,bkyx->byx", net[3].weight[2], features) / 16
        logits = net(x)
    for cam in (GradCAM, HiResCAM):
        result = cam(net, "0")(x, ClassLogit(2))
        torch.testing.assert_close(result.native["0"], expected)
        torch.testing.assert_close(result.score, logits[:, 2])


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("target", CLASS_TARGETS)
@pytest.mark.parametrize("index", [True, False, 1.0, "1", None, torch.tensor(1)])
def test_a_class_is_a_whole_number(target, index):
    with pytest.raises(TargetError, match=r"by its index, a whole number; got"):
        target(index)


@pytest.mark.parametrize("target", CLASS_TARGETS)
@pytest.mark.parametrize("index", [-1, 3, 100])
def test_a_class_that_does_not_exist_is_refused(target, index):
    message = f"class {index} does not exist: .* has 3 channels, so classes 0 to 2 are legal"
    with pytest.raises(TargetError, match=message):
        target(index, region="volume")(random_logits())


def test_class_1_of_a_single_channel_is_refused():
    with pytest.raises(TargetError, match=r"class 1 does not exist: .* has 1 channel,"):
        ClassLogit(1)(random_logits(classes=1))


@pytest.mark.parametrize("make", [lambda **s: ClassLogit(1, **s), MaskOutput])
def test_a_setting_that_does_not_exist_is_refused(make):
    with pytest.raises(TargetError, match="region 'predictd': did you mean 'predicted'"):
        make(region="predictd")
    with pytest.raises(TargetError, match="activation 'relu': legal are 'softmax' and 'sigmoid'"):
        make(activation="relu")


@pytest.mark.parametrize("region", [None, 3, (0, 1, 2), [True, "x"]])
def test_a_region_of_another_type_is_refused(region):
    with pytest.raises(TargetError, match=r"region|mask"):
        ClassLogit(1, region=region)(random_logits())


@pytest.mark.parametrize("given", [True, "1", 1.5, torch.tensor(1), {"class": 1}])
def test_what_is_no_target_is_refused(given):
    with pytest.raises(TargetError, match=r"give a class index, a target such as targets\.Class"):
        as_target(given)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda z: z.sum(), r"'<lambda>' must return one score per item, shape \(2,\); .* \(\)"),
        (lambda z: z.sum((2, 3, 4)), r"shape \(2,\); it returned \(2, 3\)"),
        (lambda z: z.sum((1, 2, 3, 4))[:, None], r"shape \(2,\); it returned \(2, 1\)"),
        (lambda z: z.sum((1, 2, 3, 4))[:1], r"shape \(2,\); it returned \(1,\)"),
        (lambda z: z.sum().item(), r"shape \(2,\); it returned float"),
        (lambda z: None, r"it returned NoneType"),
        (lambda z: z.argmax(1).sum((1, 2, 3)), "does not depend on the logits through a gradient"),
        (
            lambda z: (z > 0).sum((1, 2, 3, 4)).float(),
            r"a comparison, argmax or detach\(\) cuts it",
        ),
        (lambda z: z.detach().sum((1, 2, 3, 4)), "does not depend on the logits"),
        (lambda z: torch.zeros(2), "does not depend on the logits"),
        (lambda z: torch.ones(2, requires_grad=True) * 2, "does not depend on the logits"),
    ],
)
def test_a_function_that_is_no_score_is_refused(target, message):
    with pytest.raises(TargetError, match=message):
        score_and_seed(target, random_logits())


def test_an_error_of_a_function_of_the_users_passes_through():
    def target(logits):
        raise KeyError("my own")

    with pytest.raises(KeyError, match="my own"):
        score_and_seed(target, random_logits())


# -------------------------------------------------------------------------------- score and seed


@pytest.mark.parametrize("caller", [torch.enable_grad, torch.no_grad])
def test_the_seed_is_the_gradient_of_the_score(caller):
    """Against finite differences, for a target that is not linear."""
    logits = random_logits(batch=1, shape=(2, 2))

    def target(z):
        return (z.softmax(1)[:, 1] ** 2).sum((1, 2))

    with caller():
        score, seed = score_and_seed(target, logits)
    torch.testing.assert_close(score, target(logits))
    step = 1e-6
    for index in np.ndindex(*logits.shape):
        moved = logits.clone()
        moved[index] += step
        slope = (target(moved) - score) / step
        assert seed[index].item() == pytest.approx(slope.item(), abs=1e-5)
    assert not score.requires_grad
    assert not seed.requires_grad


@pytest.mark.parametrize("target", [*(t(1) for t in CLASS_TARGETS), MaskOutput("predicted")])
def test_items_of_a_batch_do_not_mix(target):
    logits = random_logits(batch=3)
    score, seed = score_and_seed(target, logits)
    for item in range(3):
        alone = score_and_seed(target, logits[item : item + 1])
        torch.testing.assert_close((score[item : item + 1], seed[item : item + 1]), alone)


# ------------------------------------------------------------------------------------------ names


class Named:
    name = "my score"

    def __call__(self, logits):
        return logits.flatten(1).sum(1)


class Unnamed:
    def __call__(self, logits):
        return logits.flatten(1).sum(1)


def tumour_volume(logits):
    return logits[:, 1].flatten(1).sum(1)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (ClassLogit(2), "logit of class 2 over the predicted mask"),
        (ClassLogOdds(0, region="volume"), "log-odds of class 0 over the whole volume"),
        (ClassProbability(1, torch.ones(2)), "probability of class 1 over the given mask"),
        (ClassLogit(1, Box((0, 1), (2, 3))), "logit of class 1 over the box [0, 1] to [2, 3]"),
        (ClassLogit(1, Voxel((4, 5))), "logit of class 1 over the box [4, 5] to [5, 6]"),
        (MaskOutput(), "mask output (all channels) over the whole volume"),
        (Named(), "my score"),
        (Unnamed(), "Unnamed"),
        (tumour_volume, "tumour_volume"),
        (functools.partial(tumour_volume), "partial"),
        (lambda logits: logits, "<lambda>"),
    ],
)
def test_name_of(target, name):
    assert name_of(target) == name


def test_what_may_be_given_as_a_target():
    for index in (3, np.int64(3)):
        found = as_target(index, "sigmoid")
        assert isinstance(found, ClassLogOdds)
        assert (found.index, found.region, found.activation) == (3, "predicted", "sigmoid")
    found = as_target(None, "sigmoid")
    assert isinstance(found, MaskOutput)
    assert (found.region, found.activation) == ("volume", "sigmoid")
    assert as_target(tumour_volume) is tumour_volume
    assert isinstance(ClassLogit(1), Target)
