"""Targets are fixed at a prediction, placed on a grid, and tell which voxels they look at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from reference import scores

from seg3dcam.errors import EmptyRegionError, TargetError
from seg3dcam.scan import Scan
from seg3dcam.targets import (
    Boundary,
    Box,
    ClassLogit,
    ClassLogOdds,
    ClassProbability,
    Component,
    Contrast,
    DetectionClass,
    FalseNegatives,
    FalsePositives,
    Finer,
    MaskOutput,
    OnItsGrid,
    SoftDice,
    TruePositives,
    WeightedSum,
    fixed,
    placed,
    region_of,
    score_and_seed,
    uses_truth,
)

SHAPE = (3, 4, 5)


def random_logits(seed, shape=SHAPE, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(batch, 3, *shape, dtype=torch.float64, generator=generator)


TRUTH = torch.randint(3, (2, *SHAPE), generator=torch.Generator().manual_seed(5))
MASK = TRUTH == 1


def own(logits):
    return logits.flatten(1).sum(1)


#: Those that the prediction decides something of, and those that it does not.
DECIDED = {
    "log-odds": ClassLogOdds(1),
    "sigmoid": ClassLogit(1, activation="sigmoid"),
    "probability in a component": ClassProbability(1, Component(1)),
    "boundary": ClassLogit(1, Boundary()),
    "misses": ClassLogOdds(1, FalseNegatives(TRUTH)),
    "inventions": ClassLogOdds(1, FalsePositives(TRUTH)),
    "hits": Contrast(1, 0, TruePositives(TRUTH)),
    "foreground": MaskOutput("predicted"),
    "finer": Finer(1, 0.5),
    "finer in the volume": Finer(1, 1, "volume"),
    "finer of a sigmoid": Finer(1, 1, MASK, "sigmoid"),
    "sum": WeightedSum([(1, ClassLogit(2)), (-3, Finer(1)), (2, own)]),
}
UNDECIDED = {
    "volume": ClassLogOdds(1, "volume"),
    "box": ClassLogit(1, Box((0, 0, 0), (1, 2, 3))),
    "mask": ClassProbability(1, MASK),
    "recipe": MaskOutput(),
    "dice": SoftDice(1, MASK),
    "sum of such": WeightedSum([(1, ClassLogit(2, "volume")), (2, own)]),
    "own": own,
}


# ------------------------------------------------------------------------------------------- fixed


@pytest.mark.parametrize("name", [*DECIDED, *UNDECIDED])
def test_a_fixed_target_is_the_same_where_it_was_fixed(name):
    target = {**DECIDED, **UNDECIDED}[name]
    logits = random_logits(0)
    held = fixed(target, logits)
    torch.testing.assert_close(score_and_seed(held, logits), score_and_seed(target, logits))
    assert getattr(held, "name", None) == getattr(target, "name", None)
    assert uses_truth(held) == uses_truth(target)
    region, held_region = region_of(target, logits), region_of(held, logits)
    assert (region is None) == (held_region is None)
    assert region is None or torch.equal(region, held_region)


@pytest.mark.parametrize("name", DECIDED)
def test_a_fixed_target_means_the_same_voxels_of_other_logits(name):
    target, logits, others = DECIDED[name], random_logits(0), random_logits(1)
    held = fixed(target, logits)
    assert not torch.isclose(held(others), target(others)).all()
    region = region_of(held, logits)
    if region is not None:
        assert torch.equal(region_of(held, others), region)


@pytest.mark.parametrize("name", UNDECIDED)
def test_what_the_prediction_does_not_decide_stays_open(name):
    target, others = UNDECIDED[name], random_logits(1)
    held = fixed(target, random_logits(0))
    assert torch.equal(held(others), target(others))
    if name == "own":
        assert held is own


def test_fixed_scores_are_those_of_the_first_predictions_voxels():
    logits, others = random_logits(0), random_logits(1)
    mask = scores.predicted(logits, 1)
    for target, value in ((ClassLogOdds(1), scores.log_odds), (ClassLogit(1), scores.logit)):
        expected = scores.score(others, value, 1, mask)
        torch.testing.assert_close(fixed(target, logits)(others), expected)
        again = fixed(fixed(target, logits), others)  # what is fixed stays fixed
        torch.testing.assert_close(again(others), expected)


def test_fixed_finer_keeps_its_probabilities():
    """It is linear then: the score of a sum is the sum of the scores."""
    logits, others = random_logits(0), random_logits(1)
    for region in ("predicted", "volume"):
        held = fixed(Finer(1, 0.7, region), logits)
        seed = score_and_seed(held, logits)[1]
        torch.testing.assert_close(score_and_seed(held, others)[1], seed)
        torch.testing.assert_close(held(others), (seed * others).flatten(1).sum(1))


def test_a_fixed_target_holds_no_graph_and_still_gives_one():
    logits = random_logits(0).requires_grad_()
    held = fixed(Finer(1), logits * 2)
    assert not any(share.requires_grad for share in held._shares)
    (gradient,) = torch.autograd.grad(held(logits).sum(), logits)
    assert gradient.any()


def test_a_fixed_target_is_shown_without_what_was_fixed():
    finer, head = Finer(1, 0.5, "volume"), torch.zeros(2, 14, 3, 4)
    assert repr(fixed(finer, random_logits(0))) == repr(finer)
    best = DetectionClass(0, 2, top=3)
    assert repr(fixed(best, head)) == repr(best)


def test_a_target_is_fixed_only_where_it_has_a_region():
    nothing = random_logits(0)
    nothing[:, 0] = 100
    with pytest.raises(EmptyRegionError, match="Predicted: class 0 in 60 voxels"):
        fixed(ClassLogOdds(1), nothing)


def test_a_fixed_target_of_another_shape_is_refused():
    held = fixed(ClassLogit(1), random_logits(0))
    message = r"fixed for logits of 2 items of \(3, 4, 5\) voxels; these have 2 of \(3, 4\)"
    with pytest.raises(TargetError, match=message):
        held(random_logits(0, (3, 4)))


def test_a_classifiers_target_is_fixed_too():
    logits, others = random_logits(0, ()), random_logits(1, ())
    torch.testing.assert_close(fixed(ClassLogOdds(1), logits)(others), ClassLogOdds(1)(others))
    assert not torch.isclose(fixed(Finer(1), logits)(others), Finer(1)(others)).any()


# ------------------------------------------------------------------------------------------ placed


@dataclass
class AMask:
    """A mask on a grid of its own, as a Scan is."""

    data: torch.Tensor
    affine: np.ndarray


def on_its_grid():
    """MASK of the first item with each axis reversed, and what brings it back."""
    flipped = TRUTH[:1].flip(1, 2, 3)
    return [AMask(flipped, np.eye(4)), Scan(flipped.float(), np.eye(4), "truth")]


def move(mask):
    return mask.data[0].flip(0, 1, 2)


def test_scans_and_meta_tensors_know_where_they_lie_and_arrays_do_not():
    assert all(isinstance(mask, OnItsGrid) for mask in (*on_its_grid(), MetaTensor(MASK)))
    assert not isinstance(MASK, OnItsGrid)
    assert not isinstance(MASK.numpy(), OnItsGrid)


PLACEABLE = {
    "region": lambda mask: ClassLogit(1, mask),
    "recipe": lambda mask: MaskOutput(mask),
    "misses": lambda mask: ClassLogOdds(1, FalseNegatives(mask)),
    "misses by label": lambda mask: ClassLogOdds(1, FalseNegatives(mask, label=2)),
    "hits": lambda mask: Finer(1, 0.5, TruePositives(mask)),
    "dice": lambda mask: SoftDice(1, mask),
    "sum": lambda mask: WeightedSum([(2, SoftDice(1, mask)), (-1, ClassLogit(1, mask)), (1, own)]),
}


@pytest.mark.parametrize("make", PLACEABLE.values(), ids=PLACEABLE)
@pytest.mark.parametrize("kind", [0, 1])
def test_a_placed_target_is_the_one_of_the_moved_mask(make, kind):
    logits = random_logits(0, batch=1)
    target = make(on_its_grid()[kind])
    expected = score_and_seed(make(TRUTH[0]), logits)
    torch.testing.assert_close(score_and_seed(placed(target, move), logits), expected)
    with pytest.raises(TargetError, match=r"a grid of its own\. explain\(\) brings it onto"):
        target(logits)
    assert placed(target, move).name == target.name


@pytest.mark.parametrize("make", PLACEABLE.values(), ids=PLACEABLE)
def test_a_meta_tensor_is_moved_only_when_placed(make):
    logits = random_logits(0, batch=1)
    target = make(MetaTensor(TRUTH[0]))
    torch.testing.assert_close(target(logits), make(TRUTH[0])(logits))
    found = placed(target, lambda mask: mask.as_tensor().flip(2))(logits)
    torch.testing.assert_close(found, make(TRUTH[0].flip(2))(logits))


@pytest.mark.parametrize("name", [*DECIDED, *UNDECIDED])
def test_a_target_without_a_scan_is_left_in_its_place(name):
    def never(mask):
        raise AssertionError

    target, logits = {**DECIDED, **UNDECIDED}[name], random_logits(0)
    torch.testing.assert_close(placed(target, never)(logits), target(logits))


def test_a_mask_that_was_moved_to_a_wrong_shape_is_refused():
    target = placed(ClassLogit(1, on_its_grid()[0]), lambda mask: mask.data)
    with pytest.raises(TargetError, match=r"the mask has shape \(1, 3, 4, 5\); legal"):
        target(random_logits(0))


# ------------------------------------------------------------------------- which voxels, and truth


def test_the_region_of_a_sum_is_that_of_its_parts():
    logits = random_logits(0)
    box = Box((0, 0, 0), (1, 2, 3))
    both = WeightedSum([(1, ClassLogit(1, box)), (-2, ClassLogit(2))])
    expected = box.mask(SHAPE) | (logits.argmax(1) == 2)
    assert torch.equal(region_of(both, logits), expected)
    nested = WeightedSum([(1, both), (1, SoftDice(1, MASK))])
    assert region_of(nested, logits).all()
    assert region_of(WeightedSum([(1, both), (1, own)]), logits) is None


def test_the_region_of_any_other_function_is_what_it_says():
    logits = random_logits(0).requires_grad_()
    assert region_of(own, logits) is None
    assert region_of(partial(own), logits) is None

    class Says:
        def regions(self, logits):
            return logits[:, 0] > 0

    assert torch.equal(region_of(Says(), logits), logits[:, 0] > 0)
    head = torch.zeros(2, 14, 3, 4)
    assert region_of(DetectionClass(0, 2), head).shape == (2, 3, 4)


def test_whether_truth_chose_the_voxels():
    misses = ClassLogit(1, FalseNegatives(TRUTH))
    assert uses_truth(misses)
    assert uses_truth(WeightedSum([(1, own), (2, misses)]))
    for target in (own, ClassLogit(1), WeightedSum([(1, own)]), DetectionClass(0, 2)):
        assert not uses_truth(target)
