"""Contrast, Finer-CAM, soft Dice, sums and families equal their formulas, in value and gradient."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
import torch
from reference import scores
from torch import nn

from seg3dcam.errors import EmptyRegionError, TargetError
from seg3dcam.targets import (
    Boundary,
    Box,
    ClassLogit,
    ClassLogOdds,
    ClassProbability,
    Component,
    Contrast,
    EveryClass,
    EveryComponent,
    Finer,
    MaskOutput,
    SoftDice,
    TargetFamily,
    WeightedSum,
    as_target,
    as_targets,
    fixed,
    name_of,
    score_and_seed,
)

SHAPES = [(), (7,), (3, 4), (2, 3, 4)]
HEADS = [("softmax", 2), ("softmax", 4), ("sigmoid", 4)]


def random_logits(shape=(2, 3, 4), classes=4, batch=2):
    generator = torch.Generator().manual_seed(classes + len(shape))
    return 3 * torch.randn(batch, classes, *shape, dtype=torch.float64, generator=generator)


def random_mask(shape=(2, 3, 4), batch=2):
    generator = torch.Generator().manual_seed(len(shape))
    mask = torch.rand(batch, *shape, generator=generator) > 0.4
    mask.view(batch, -1)[:, 0] = True
    return mask


def logits_that_predict(labels, classes=3):
    hot = nn.functional.one_hot(torch.as_tensor(labels), classes)
    return hot.movedim(-1, 1).double() * 9 - 4


def slow(score, logits):
    """Value and gradient of a score with a graph of its own."""
    leaf = logits.clone().requires_grad_()
    value = score(leaf)
    (seed,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), seed


def regions_of(logits, c, activation):
    """(what the target is given, the mask that it means) for some regions."""
    batch, _, *shape = logits.shape
    everywhere = np.ones((batch, *shape), dtype=bool)
    mask = random_mask(shape, batch)
    yield "volume", everywhere
    yield mask, mask.numpy()
    if shape:
        yield "predicted", scores.predicted(logits, c, sigmoid=activation == "sigmoid")
    else:  # a classifier has but one place
        yield "predicted", everywhere


# ------------------------------------------------------------------------------------ the formulas


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("activation", "classes"), HEADS)
def test_a_contrast_is_the_difference_of_two_logits(activation, classes, shape):
    for c, d in ((0, 1), (classes - 1, 0)):
        logits = random_logits(shape, classes)
        logits[:, c].view(len(logits), -1)[:, 0] = 20  # predicted somewhere in every item
        value = partial(scores.contrast, against=d)
        for region, mask in regions_of(logits, c, activation):
            expected = slow(partial(scores.score, value=value, c=c, mask=mask), logits)
            found = score_and_seed(Contrast(c, d, region, activation), logits)
            torch.testing.assert_close(found, expected)


@pytest.mark.few(13)
@pytest.mark.parametrize("alpha", [1.0, 0.6, 0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("activation", "classes"), HEADS)
def test_finer_weighs_the_rivals_by_their_probability(activation, classes, shape, alpha):
    for c in (0, classes - 1):
        logits = random_logits(shape, classes)
        logits[:, c].view(len(logits), -1)[:, 0] = 20
        probability = scores.sigmoid if activation == "sigmoid" else scores.softmax
        value = partial(scores.finer, alpha=alpha, probability=probability)
        for region, mask in regions_of(logits, c, activation):
            expected = slow(partial(scores.score, value=value, c=c, mask=mask), logits)
            found = score_and_seed(Finer(c, alpha, region, activation), logits)
            torch.testing.assert_close(found, expected)


def test_finer_agrees_with_pytorch_grad_cam(pytorch_grad_cam):
    from pytorch_grad_cam.utils.model_targets import FinerWeightedTarget

    logits = random_logits(())
    theirs = FinerWeightedTarget(2, [0, 1, 3], 0.7)
    expected = torch.stack([theirs(item) for item in logits])
    torch.testing.assert_close(Finer(2, 0.7)(logits), expected, rtol=1e-6, atol=1e-6)  # an epsilon


def test_finer_of_two_classes_is_their_contrast_and_stays_finite():
    logits = random_logits(classes=2)
    torch.testing.assert_close(
        score_and_seed(Finer(1), logits), score_and_seed(Contrast(1, 0), logits)
    )
    for activation in ("softmax", "sigmoid"):  # every rival's probability rounds to zero
        sure = torch.tensor([[[4000.0], [-3000.0], [-3000.0]]])
        score, seed = score_and_seed(Finer(0, activation=activation), sure)
        assert score.tolist() == [7000.0]
        assert seed.flatten().tolist() == [1.0, -0.5, -0.5]


def test_what_changes_no_prediction_changes_neither_contrast_nor_finer():
    logits = random_logits()
    common = random_logits(classes=1) * 10
    for target in (Contrast(1, 2), Finer(1), ClassLogOdds(1, Component(0))):
        torch.testing.assert_close(target(logits + common), target(logits))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("activation", "classes"), [*HEADS, ("softmax", 1), ("sigmoid", 1)])
def test_soft_dice_of_the_whole_volume(activation, classes, shape):
    logits, mask = random_logits(shape, classes), random_mask(shape)
    value = scores.sigmoid if activation == "sigmoid" or classes == 1 else scores.softmax
    for c in range(classes):
        expected = slow(partial(scores.soft_dice, value=value, c=c, mask=mask.numpy()), logits)
        for given in (mask, mask[:, None].float(), mask.numpy().astype(np.int16) * 5):
            target = SoftDice(c, given, activation)
            torch.testing.assert_close(score_and_seed(target, logits), expected)
        assert target.regions(logits).all()
        assert target.regions(logits).shape == mask.shape


def test_the_soft_dice_of_a_sure_and_right_prediction_is_one():
    labels = torch.tensor([[0, 1, 1, 2]])
    dice = SoftDice(1, labels[0] == 1)(100 * logits_that_predict(labels))
    assert dice.item() == pytest.approx(1)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_a_weighted_sum_is_linear_in_scores_and_seeds(shape):
    logits = random_logits(shape)
    parts = [
        (2.0, ClassLogOdds(1, "volume")),
        (-0.5, SoftDice(2, random_mask(shape))),
        (3, lambda z: (z[:, 0] ** 2).flatten(1).sum(1)),
    ]
    found = score_and_seed(WeightedSum(parts), logits)
    alone = [score_and_seed(target, logits) for _, target in parts]
    for index in (0, 1):
        expected = sum(w * pair[index] for (w, _), pair in zip(parts, alone, strict=True))
        torch.testing.assert_close(found[index], expected)


# ---------------------------------------------------------------------- graphs, batches, precision


TARGETS = {
    "contrast": Contrast(1, 2),
    "contrast in a component": Contrast(1, 2, Component(0)),
    "finer": Finer(1, 0.5),
    "finer in a box": Finer(1, 1, Box((0, 0, 0), (2, 2, 2))),
    "dice": SoftDice(1, torch.ones(2, 3, 4)),
    "boundary": ClassProbability(1, Boundary()),
    "sum": WeightedSum([(1, Finer(1)), (2, SoftDice(0, torch.ones(2, 3, 4)))]),
}
every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


@every_target
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_items_of_a_batch_do_not_mix(target, activation):
    logits = random_logits(batch=3)
    target = as_target(target, activation)
    score, seed = score_and_seed(target, logits)
    for item in range(3):
        alone = score_and_seed(target, logits[item : item + 1])
        torch.testing.assert_close((score[item : item + 1], seed[item : item + 1]), alone)


@every_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_is_kept(target, dtype):
    score, seed = score_and_seed(target, random_logits().to(dtype))
    assert {score.dtype, seed.dtype} == {dtype}
    torch.testing.assert_close(score, target(random_logits()).to(dtype))


@pytest.mark.parametrize(
    "target",
    [
        ClassLogOdds(1, Component(0)),
        ClassProbability(1, Boundary()),
        SoftDice(1, random_mask()),
        WeightedSum([(1, ClassLogOdds(1)), (-2, SoftDice(0, random_mask()))]),
    ],
)
def test_second_derivatives_are_those_of_finite_differences(target):
    logits = random_logits().requires_grad_()
    (gradient,) = torch.autograd.grad(target(logits).sum(), logits, create_graph=True)
    along = torch.randn_like(logits)
    (found,) = torch.autograd.grad((gradient * along).sum(), logits)
    step = 1e-6
    _, ahead = score_and_seed(target, logits + step * along)
    _, behind = score_and_seed(target, logits - step * along)
    assert found.abs().max() > 1e-4
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-7)


# -------------------------------------------------------------------------------------- activation


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "make",
    [
        lambda **s: Contrast(1, 2, **s),
        lambda **s: Finer(1, **s),
        lambda **s: SoftDice(1, torch.ones(2, 3, 4), **s),
        lambda **s: ClassLogOdds(1, Boundary(), **s),
        lambda **s: WeightedSum([(2, ClassLogOdds(1, Component(0), **s))]),
    ],
)
def test_a_target_takes_the_activation_from_the_model_unless_given(make, activation):
    logits = random_logits()
    expected = make(activation=activation)(logits)
    torch.testing.assert_close(as_target(make(), activation)(logits), expected)
    other = "softmax" if activation == "sigmoid" else "sigmoid"
    torch.testing.assert_close(as_target(make(activation=activation), other)(logits), expected)
    assert not torch.equal(as_target(make(), other)(logits), expected)


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Contrast(4, 1), "class 4 does not exist: .* has 4 channels, so classes 0 to 3 are legal"),
        (Contrast(1, 7), "class 7 does not exist: .* classes 0 to 3 are legal"),
        (Contrast(1, -1), "class -1 does not exist"),
        (Finer(4), "class 4 does not exist"),
        (SoftDice(9, torch.ones(2, 3, 4)), "class 9 does not exist"),
        (EveryComponent(4).expand, "class 4 does not exist"),
        (ClassLogit(4, Component(0)).regions, "class 4 does not exist"),
        (WeightedSum([(1, ClassLogit(4))]), "class 4 does not exist"),
        (SoftDice(1, torch.ones(2, 3)), r"the mask has shape \(2, 3\); legal .* \(2, 3, 4\)"),
        (WeightedSum([(1, lambda z: z.sum())]), r"'<lambda>' must return one score per item"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(target, message):
    with pytest.raises(TargetError, match=message):
        target(random_logits())


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("target", [Contrast(0, 1), Finer(0)])
def test_one_channel_has_no_other_class(target, activation):
    with pytest.raises(TargetError, match=r"class 0 with another .* one channel.*ClassLogOdds\(0"):
        as_target(target, activation)(random_logits(classes=1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Contrast(1, 1), "class 1 against itself: give two different classes"),
        (lambda: Contrast(1, True), "by its index, a whole number; got True"),
        (lambda: Contrast("liver", 1), "by its index, a whole number; got 'liver'"),
        (lambda: Contrast(1, 2, "bondary"), "region 'bondary': .*Boundary"),
        (lambda: Finer(1, float("nan")), "alpha is a finite number; got nan"),
        (lambda: Finer(1, "volume"), "alpha is a finite number; got 'volume'"),
        (lambda: SoftDice(1, "predicted"), "mask 'predicted': legal are a tensor, an array or"),
        (lambda: SoftDice(1.0, torch.ones(1)), r"a whole number; got 1\.0"),
        (lambda: SoftDice(1, torch.ones(1), "relu"), "legal are 'softmax' and 'sigmoid'"),
        (lambda: WeightedSum([]), r"give at least one \(weight, target\)"),
        (lambda: WeightedSum([ClassLogit(1)]), r"legal are \(weight, target\) pairs"),
        (lambda: WeightedSum([("1", ClassLogit(1))]), "weight of a target is a finite number"),
        (lambda: WeightedSum([(float("inf"), ClassLogit(1))]), "finite number; got inf"),
        (lambda: WeightedSum([(1, 2)]), r"2 in a sum of targets: give a target such as targets\."),
        (lambda: WeightedSum([(1, EveryClass())]), "expand a family first"),
        (lambda: EveryComponent(1, ClassLogit(1)), "give the class of a target, such as ClassLog"),
        (lambda: EveryComponent(1, min_voxels=0), "min_voxels is a whole number from 1; got 0"),
        (lambda: EveryComponent(1, connectivity=0), "connectivity is a whole number from 1"),
        (lambda: EveryComponent(True), "a whole number; got True"),
        (lambda: EveryClass("logit"), "score 'logit': give the class of a target"),
        (lambda: EveryClass(activation="relu"), "legal are 'softmax' and 'sigmoid'"),
        (lambda: as_target(EveryComponent(1)), r"stands for several targets: as_targets\(\)"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(TargetError, match=message):
        make()


def test_the_dice_with_an_empty_mask_is_no_score():
    mask = torch.stack([torch.ones(2, 3, 4), torch.zeros(2, 3, 4)])
    with pytest.raises(EmptyRegionError, match="the mask is empty, so every prediction has a Dice"):
        SoftDice(1, mask)(random_logits())


# ---------------------------------------------------------------------------------------- families


def two_lesions_and_an_organ():
    labels = np.zeros((1, 6, 6), dtype=int)
    labels[0, 0, :4] = labels[0, 3, 3] = 1
    labels[0, 4:, :2] = 2
    return logits_that_predict(labels)


def test_every_component_is_one_target_and_together_they_are_the_class():
    logits = two_lesions_and_an_organ()
    family = EveryComponent(1, min_voxels=1)
    assert isinstance(family, TargetFamily)
    expanded = family.expand(logits)
    assert [target.name for target in expanded] == [
        f"log-odds of class 1 over component {rank} of the predicted mask" for rank in (0, 1)
    ]
    assert [int(target.regions(logits).sum()) for target in expanded] == [4, 1]
    for rank, target in enumerate(expanded):
        by_rank = ClassLogOdds(1, Component(rank))
        torch.testing.assert_close(score_and_seed(target, logits), score_and_seed(by_rank, logits))
        other = random_logits((6, 6), 3, 1)  # the same voxels of another prediction
        torch.testing.assert_close(target(other), fixed(by_rank, logits)(other))
        assert torch.equal(fixed(target, other)(other), target(other))
    torch.testing.assert_close(sum(t(logits) for t in expanded), ClassLogOdds(1)(logits))
    assert len(EveryComponent(1, min_voxels=2).expand(logits)) == 1


@pytest.mark.parametrize(
    ("score", "name"),
    [
        (ClassLogit, "logit of class 1 over component 0 of the predicted mask"),
        (partial(Finer, alpha=0.5), "logit of class 1 less 0.5 x its rivals over component 0 of"),
        (partial(Contrast, against=2), "logit of class 1 against class 2 over component 0 of the"),
    ],
)
def test_the_score_of_a_family_may_be_another(score, name):
    logits = two_lesions_and_an_organ()
    first = EveryComponent(1, score).expand(logits)[0]
    assert first.name.startswith(name)
    assert first(logits).shape == (1,)


def test_every_component_follows_connectivity_and_activation():
    labels = np.eye(4, dtype=int)[None]
    logits = logits_that_predict(labels)
    assert len(EveryComponent(1).expand(logits)) == 4
    (joined,) = EveryComponent(1, connectivity=2).expand(logits)
    assert joined.regions(logits).sum() == 4
    logits[:, 2, 0] = 20  # the first row: class 2 of a softmax, but still above 0 for a sigmoid
    assert len(EveryComponent(1).expand(logits)) == 3
    found = as_targets([EveryComponent(1)], logits, "sigmoid")
    assert len(found) == 4
    assert {target.activation for target in found} == {"sigmoid"}


def test_every_component_needs_the_same_number_in_every_item():
    logits = logits_that_predict([[1, 0, 1, 0], [1, 1, 0, 0]])
    with pytest.raises(TargetError, match=r"have 2, 1 components of class 1.* one by one"):
        EveryComponent(1).expand(logits)
    both = logits_that_predict([[1, 0, 1, 1], [1, 1, 0, 1]])
    sizes = [target.regions(both).sum(1).tolist() for target in EveryComponent(1).expand(both)]
    assert sizes == [[2, 2], [1, 1]]


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (EveryComponent(2, min_voxels=3), "2 components of 2, 1 voxels, none of at least 3"),
        (EveryComponent(1), "there is none. Predicted: class 0 in 1 voxels, class 2 in 3 voxels"),
    ],
)
def test_a_family_without_a_member(family, message):
    with pytest.raises(EmptyRegionError, match=re.escape(message)):
        family.expand(logits_that_predict([[2, 0, 2, 2]]))


def test_every_predicted_class_but_the_background():
    logits = logits_that_predict([[2, 0, 2, 2, 3]], classes=5)
    assert [t.index for t in EveryClass().expand(logits)] == [2, 3]
    found = as_targets([EveryClass(ClassLogit)], logits, "sigmoid")
    assert [(type(t), t.index, t.activation) for t in found] == [
        (ClassLogit, c, "sigmoid") for c in (0, 2, 3)
    ]
    assert [t.index for t in EveryClass().expand(torch.ones(1, 1, 3))] == [0]
    assert [t.index for t in EveryClass().expand(torch.tensor([[5.0, 1.0]]))] == [0]  # classifier
    with pytest.raises(EmptyRegionError, match="predicts no foreground class anywhere"):
        EveryClass().expand(logits_that_predict([[0, 0]]))
    with pytest.raises(TargetError, match=r"the classes \[1\], \[1, 2\].* one by one"):
        EveryClass().expand(logits_that_predict([[0, 1], [1, 2]]))


def test_a_list_of_targets_becomes_flat():
    logits = two_lesions_and_an_organ()

    class Mine:
        def expand(self, logits):
            return [0, ClassLogit(1)]

    def own(z):
        return z.flatten(1).sum(1)

    found = as_targets([2, None, EveryComponent(1), own, Mine()], logits, "sigmoid")
    assert [name_of(target) for target in found] == [
        "log-odds of class 2 over the predicted mask",
        "mask output (all channels) over the whole volume",
        "log-odds of class 1 over component 0 of the predicted mask",
        "log-odds of class 1 over component 1 of the predicted mask",
        "own",
        "log-odds of class 0 over the predicted mask",
        "logit of class 1 over the predicted mask",
    ]
    assert all(t.activation == "sigmoid" for t in found if t is not own)
    with pytest.raises(TargetError, match="give a class index"):
        as_targets(["1"], logits)


# ------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (Contrast(1, 2), "logit of class 1 against class 2 over the predicted mask"),
        (Finer(3, 1), "logit of class 3 less 1 x its rivals over the predicted mask"),
        (SoftDice(1, torch.ones(1)), "soft Dice of class 1 with the given mask"),
        (
            WeightedSum([(-1, MaskOutput()), (-0.25, ClassLogit(0, "volume")), (2, Finer(0))]),
            "-1 x [mask output (all channels) over the whole volume] "
            "- 0.25 x [logit of class 0 over the whole volume] "
            "+ 2 x [logit of class 0 less 1 x its rivals over the predicted mask]",
        ),
    ],
)
def test_names(target, name):
    assert target.name == name
