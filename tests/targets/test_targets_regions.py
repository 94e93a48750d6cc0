"""Regions hold the voxels that they name, for every number of axes, and say why they are empty."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from reference import scores
from torch import nn

from seg3dcam.errors import EmptyRegionError, TargetError
from seg3dcam.targets import (
    Boundary,
    Box,
    ClassLogit,
    ClassLogOdds,
    Component,
    FalseNegatives,
    FalsePositives,
    MaskOutput,
    TruePositives,
    components,
    score_and_seed,
)
from seg3dcam.targets.regions import MaskRegion, Predicted, Volume

SHAPES = [(12,), (5, 6), (3, 4, 5), (2, 3, 2, 3)]
TRUTHS = [FalseNegatives, FalsePositives, TruePositives]


def random_logits(shape, classes=3, batch=2):
    generator = torch.Generator().manual_seed(sum(shape) + classes)
    return 3 * torch.randn(batch, classes, *shape, dtype=torch.float64, generator=generator)


def random_labels(shape, classes=3, batch=2):
    generator = torch.Generator().manual_seed(sum(shape) - classes)
    return torch.randint(classes, (batch, *shape), generator=generator)


def logits_that_predict(labels, classes=3):
    """Softmax logits (B, K, *S) of a label map (B, *S)."""
    hot = nn.functional.one_hot(torch.as_tensor(labels).long(), classes)
    return hot.movedim(-1, 1).double() * 9 - 4


def predicted(logits, c, activation="softmax"):
    return scores.predicted(logits, c, sigmoid=activation == "sigmoid" or logits.shape[1] == 1)


def filled(shape, *voxels):
    mask = np.zeros(shape, dtype=bool)
    for voxel in voxels:
        mask[voxel] = True
    return mask


# -------------------------------------------------------------------------------------- components


def connectivities(shape):
    return range(1, len(shape) + 1)


@pytest.mark.parametrize(
    ("shape", "connectivity"), [(s, c) for s in SHAPES for c in connectivities(s)]
)
def test_components_are_those_of_a_flood_fill(shape, connectivity):
    mask = random_logits(shape, 1, 1)[0, 0] > 0.5
    expected = scores.components(mask.numpy(), connectivity)
    ranks, sizes = components(mask, connectivity)
    assert sizes == [len(component) for component in expected]
    found = [set(map(tuple, torch.nonzero(ranks == r).tolist())) for r in range(len(sizes))]
    assert found == expected  # equal sizes in the order of memory
    assert torch.equal(ranks >= 0, mask)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_component_by_rank_or_by_one_of_its_voxels(shape, activation):
    logits = random_logits(shape)
    items = [scores.components(mask) for mask in predicted(logits, 1, activation)]
    count = min(map(len, items))
    assert count > 0
    for rank in range(count):
        expected = np.stack([filled(shape, *item[rank]) for item in items])
        target = ClassLogit(1, Component(rank), activation)
        assert np.array_equal(target.regions(logits).numpy(), expected)
        for voxel in items[0][rank]:
            by_voxel = ClassLogit(1, Component(voxel=voxel), activation)
            found = by_voxel.regions(logits[:1])
            assert np.array_equal(found.numpy(), expected[:1])


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_components_partition_the_predicted_mask(activation):
    logits = random_logits((4, 5, 6), batch=1)
    _, sizes = components(torch.from_numpy(predicted(logits, 2, activation)[0]), 2)
    parts = [
        ClassLogit(2, Component(rank, connectivity=2), activation) for rank in range(len(sizes))
    ]
    count = sum(part.regions(logits).int() for part in parts)
    assert np.array_equal(count.numpy(), predicted(logits, 2, activation).astype(int))
    assert sizes == sorted(sizes, reverse=True)
    pairs = [score_and_seed(part, logits) for part in parts]
    whole = score_and_seed(ClassLogit(2, activation=activation), logits)
    torch.testing.assert_close(tuple(sum(half) for half in zip(*pairs, strict=True)), whole)


def test_connectivity_joins_across_corners():
    """Two voxels that touch by a corner, in 2D and in 3D."""
    for axes in (2, 3):
        labels = np.eye(2, dtype=int) if axes == 2 else np.zeros((2, 2, 2), dtype=int)
        labels[(0,) * axes] = labels[(1,) * axes] = 1
        logits = logits_that_predict(labels[None])
        for connectivity in range(1, axes + 1):
            target = ClassLogit(1, Component(0, connectivity=connectivity))
            joined = connectivity == axes
            assert target.regions(logits).sum() == (2 if joined else 1)


def test_the_components_of_nothing():
    ranks, sizes = components(torch.zeros(3, 4, dtype=torch.bool))
    assert sizes == []
    assert (ranks == -1).all()


@pytest.mark.parametrize("region", [Component(0), Component(0, connectivity=2), Boundary(2)])
def test_regions_turn_with_the_scan(region):
    """A flip or a permutation of the axes does to the region what it does to the logits."""
    labels = np.zeros((6, 7, 5), dtype=int)
    labels[1:4, 2:5, 1:3] = 1
    labels[5, 6, 4] = labels[0, 0, 0] = 1
    labels[4:, :2, 3:] = 2
    logits = logits_that_predict(labels[None])
    region = ClassLogit(1, region).regions
    for order in itertools.permutations((2, 3, 4)):
        moved = [0, *(axis - 1 for axis in order)]
        assert torch.equal(region(logits.permute(0, 1, *order)), region(logits).permute(moved))
    for axis in (1, 2, 3):
        assert torch.equal(region(logits.flip(axis + 1)), region(logits).flip(axis))


def two_lesions():
    """Class 1 in 3 voxels and in 1 voxel, of a 5 x 5 plane; class 2 in a corner."""
    labels = np.zeros((5, 5), dtype=int)
    labels[1, 1:4] = labels[4, 0] = 1
    labels[0, 4] = 2
    return logits_that_predict(labels[None])


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (
            Component(2),
            "logit of class 1 over component 2 of the predicted mask: the region is empty. "
            "The predicted mask has 2 components of 3, 1 voxels, so ranks 0 to 1 are legal",
        ),
        (
            Component(voxel=(0, 4)),
            "over the component of the predicted mask at voxel [0, 4]: the region is empty. At "
            "voxel [0, 4] class 2 is predicted; the nearest component has rank 0 and 3 voxels, the "
            "nearest of them is [1, 3], 1.41 voxels away",
        ),
        (Component(voxel=(3, 0)), "rank 1 and 1 voxels, the nearest of them is [4, 0], 1 voxels"),
        (Component(voxel=(5, 0)), "does not lie in a volume of (5, 5) voxels"),
        (Component(voxel=(1, 1, 1)), "does not lie in a volume of (5, 5) voxels"),
        (Component(0, connectivity=3), "connectivity 3: legal with 2 axes are 1 to 2"),
    ],
)
def test_a_component_that_is_not_there(region, message):
    with pytest.raises(TargetError, match=re.escape(message)):
        ClassLogit(1, region)(two_lesions())


def test_a_component_of_an_empty_prediction():
    logits = logits_that_predict([[0, 0, 2]], classes=4)
    for region in (Component(0), Component(voxel=(1,)), Boundary()):
        with pytest.raises(EmptyRegionError, match="Predicted: class 0 in 2 voxels, class 2 in 1"):
            ClassLogit(1, region)(logits)


def test_a_component_of_the_second_item_only():
    logits = logits_that_predict([[1, 0, 1], [1, 0, 0]])
    with pytest.raises(EmptyRegionError, match=r"in item 1 of the batch\. .* 1 component of 1 vox"):
        ClassLogit(1, Component(1))(logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"by its rank or by a voxel in it; neither given. Write Component\(rank=0\)"),
        ({"rank": 0, "voxel": (1, 1)}, "both given"),
        ({"rank": -1}, "a component's rank is a whole number from 0; got -1"),
        ({"rank": 1.0}, r"a component's rank is a whole number from 0; got 1\.0"),
        ({"rank": True}, "got True"),
        ({"voxel": (1.5, 2)}, r"voxel \(1.5, 2\): legal is a whole number per axis"),
        ({"voxel": 3}, "voxel 3: legal is a whole number per axis"),
        ({"rank": 0, "connectivity": 0}, "connectivity is a whole number from 1; got 0"),
    ],
)
def test_a_component_that_makes_no_sense(settings, message):
    with pytest.raises(TargetError, match=message):
        Component(**settings)


def test_a_classifier_has_one_component_where_it_predicts_the_class():
    logits = torch.tensor([[1.0, 5.0, 2.0]])
    for region in (Component(0), Component(voxel=())):
        assert ClassLogit(1, region)(logits).tolist() == [5.0]
        with pytest.raises(EmptyRegionError, match="Predicted: class 1 in 1 voxels"):
            ClassLogit(2, region)(logits)
    with pytest.raises(EmptyRegionError, match="has no boundary"):
        ClassLogit(1, Boundary())(logits)


# ---------------------------------------------------------------------------------------- boundary


@pytest.mark.parametrize("thickness", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_boundary_is_near_both_inside_and_outside(shape, thickness):
    logits = random_logits(shape)
    logits[:, 1, : shape[0] // 2] += 9  # a mask with an inside
    expected = [scores.boundary(mask, thickness) for mask in predicted(logits, 1)]
    found = ClassLogit(1, Boundary(thickness)).regions(logits)
    assert np.array_equal(found.numpy(), np.stack(expected))


def test_the_boundary_of_a_box_by_hand():
    labels = np.zeros((7, 7), dtype=int)
    labels[2:5, 2:5] = 1
    shell = [
        "0000000",
        "0011100",
        "0111110",
        "0110110",
        "0111110",
        "0011100",
        "0000000",
    ]
    expected = torch.tensor([[char == "1" for char in row] for row in shell])
    found = ClassLogit(1, Boundary()).regions(logits_that_predict(labels[None]))
    assert torch.equal(found[0], expected)


def test_the_border_of_the_volume_is_no_boundary():
    labels = torch.zeros(1, 4, 6, dtype=torch.int64)
    labels[:, :, :3] = 1
    found = ClassLogit(1, Boundary()).regions(logits_that_predict(labels))
    assert found[0].any(0).tolist() == [False, False, True, True, False, False]
    assert found[0].all(0).tolist() == [False, False, True, True, False, False]
    full = logits_that_predict(torch.ones(1, 4, 6))
    with pytest.raises(EmptyRegionError, match="fills the whole volume, so it has no boundary"):
        ClassLogit(1, Boundary())(full)


@pytest.mark.parametrize("thickness", [0, -1, 1.5, True, None])
def test_a_boundary_that_makes_no_sense(thickness):
    with pytest.raises(TargetError, match="thickness is a whole number from 1; got"):
        Boundary(thickness)


# ----------------------------------------------------------------------------------- ground truth


@pytest.mark.parametrize("shape", [*SHAPES, ()])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_prediction_and_truth_are_compared_voxel_by_voxel(shape, activation):
    logits, truth = random_logits(shape, batch=4), random_labels(shape, batch=4)
    for c in range(3):
        says = predicted(logits, c, activation)
        is_c = truth.numpy() == c
        for kind, expected in (
            (FalseNegatives, is_c & ~says),
            (FalsePositives, says & ~is_c),
            (TruePositives, is_c & says),
        ):
            keep = np.flatnonzero(expected.reshape(4, -1).any(1))  # items with such a voxel
            for given in (
                kind(truth[keep], label=c),
                kind((truth + 7)[keep].numpy(), label=c + 7),
                kind(truth[keep] == c),
            ):
                target = ClassLogit(c, given, activation)
                if len(keep):
                    found = target.regions(logits[keep])
                    assert np.array_equal(found.numpy(), expected[keep])


def test_misses_and_hits_are_the_truth_inventions_and_hits_the_prediction():
    logits, truth = random_logits((4, 5, 6)), random_labels((4, 5, 6))
    for c in range(3):
        missed, invented, hit = (ClassLogit(c, kind(truth)).regions(logits) for kind in TRUTHS)
        assert torch.equal(missed | hit, truth == c)
        assert torch.equal(invented | hit, logits.argmax(1) == c)
        assert not ((missed & hit) | (invented & hit) | (missed & invented)).any()


def test_the_score_over_the_misses_is_that_of_the_loops():
    logits, truth = random_logits((3, 4)), random_labels((3, 4))
    mask = (truth.numpy() == 1) & ~predicted(logits, 1)
    leaf = logits.clone().requires_grad_()
    expected = scores.score(leaf, scores.log_odds, 1, mask)
    (seed,) = torch.autograd.grad(expected.sum(), leaf)
    found = score_and_seed(ClassLogOdds(1, FalseNegatives(truth)), logits)
    torch.testing.assert_close(found, (expected.detach(), seed))


@pytest.mark.parametrize("kind", TRUTHS)
def test_truth_of_any_kind_is_the_same(kind):
    logits, truth = random_logits((3, 4, 5)), random_labels((3, 4, 5))
    expected = ClassLogit(2, kind(truth)).regions(logits)
    for given in (
        truth[:, None],
        truth.to(torch.uint8),
        truth.float(),
        truth.numpy().astype(">i2"),
        truth.numpy().astype(np.uint16),
        truth.to(torch.uint16),
        np.asfortranarray(truth.numpy())[:, ::1],
        MetaTensor(truth),
        truth == 2,
        (truth == 2).numpy(),
    ):
        assert torch.equal(ClassLogit(2, kind(given)).regions(logits), expected)
    one = kind(truth[0])
    assert torch.equal(ClassLogit(2, one).regions(logits[:1]), expected[:1])


def test_any_foreground_against_truth():
    logits, truth = random_logits((3, 4, 5)), random_labels((3, 4, 5))
    missed = MaskOutput(FalseNegatives(truth)).regions(logits)
    assert torch.equal(missed, (truth != 0) & (logits.argmax(1) == 0))


def test_one_channel_knows_0_and_1_and_needs_a_label_for_more():
    logits = random_logits((3, 4, 5), classes=1)
    truth = random_labels((3, 4, 5))
    binary = (truth == 1).int()
    expected = (truth == 1) & ~(logits[:, 0] > 0)
    assert torch.equal(ClassLogit(0, FalseNegatives(binary)).regions(logits), expected)
    assert torch.equal(ClassLogit(0, FalseNegatives(truth, label=1)).regions(logits), expected)
    with pytest.raises(TargetError, match=r"channel 0 of a sigmoid .* label 2 in \d+ .*label=1"):
        ClassLogit(0, FalseNegatives(truth))(logits)


def test_channels_of_a_sigmoid_are_not_taken_for_labels():
    logits, truth = random_logits((3, 4, 5)), random_labels((3, 4, 5))
    for index in range(3):
        message = f"channel {index} of a sigmoid output need not be label {index} of the truth"
        with pytest.raises(TargetError, match=message):
            ClassLogit(index, FalsePositives(truth, None), "sigmoid")(logits)


def test_an_empty_comparison_says_what_the_truth_holds():
    logits = logits_that_predict([[1, 1, 0, 0]])
    message = (
        "The truth has class 1 in 1 voxels and the network predicts it in 2, 1 of them in common. "
        "The truth holds label 0 in 1 voxels, label 1 in 1 voxels, label 40 in 2 voxels. "
        "Predicted: class 0 in 2 voxels, class 1 in 2 voxels. "
    )
    with pytest.raises(EmptyRegionError, match=message):
        ClassLogit(1, FalseNegatives(np.array([1, 0, 40, 40])))(logits)
    with pytest.raises(EmptyRegionError, match=r"class 2 in 0 voxels .* label 40 in 2 .* label="):
        ClassLogit(2, FalseNegatives(np.array([1, 0, 40, 40])))(logits)
    assert ClassLogit(2, FalseNegatives(np.array([1, 0, 40, 40]), label=40)).regions(
        logits
    ).tolist() == [[False, False, True, True]]
    with pytest.raises(EmptyRegionError, match="holds a boolean mask"):
        ClassLogit(1, FalseNegatives(np.zeros(4, dtype=bool)))(logits)


@pytest.mark.parametrize(("labels", "more"), [(12, ""), (13, " and 1 more"), (15, " and 3 more")])
def test_of_many_labels_in_a_truth_twelve_are_listed(labels, more):
    logits = logits_that_predict([[0] * 20])
    truth = np.minimum(np.arange(100, 120), 99 + labels)
    listed = ", ".join(f"label {label} in 1 voxels" for label in range(100, 111))
    message = rf"The truth holds {listed}, label 111 in \d voxels{more}\. "
    with pytest.raises(EmptyRegionError, match=message):
        ClassLogit(1, FalseNegatives(truth))(logits)


@pytest.mark.parametrize("kind", TRUTHS)
@pytest.mark.parametrize("shape", [(3, 4), (5, 4, 3), (3, 3, 4, 5)])
def test_truth_of_another_shape_is_refused(kind, shape):
    given = rf"the truth has shape \({', '.join(map(str, shape))}\); "
    with pytest.raises(TargetError, match=given + r"legal for these logits are \(3, 4, 5\)"):
        ClassLogit(1, kind(np.ones(shape, dtype=int)))(random_logits((3, 4, 5)))


@pytest.mark.parametrize("odd", [0.5, float("nan"), float("inf")])
def test_truth_that_is_no_whole_number_is_refused(odd):
    truth = torch.ones(3, 4, 5)
    truth[0, 0, 0] = odd
    message = f"1 values that are no whole numbers, such as {odd:g}; .* nearest neighbour"
    with pytest.raises(TargetError, match=message):
        ClassLogit(1, FalseNegatives(truth))(random_logits((3, 4, 5)))


@pytest.mark.parametrize("dtype", ["U3", object, complex, "datetime64[s]"])
def test_an_array_of_what_is_no_number_is_refused(dtype):
    array = np.zeros((3, 4, 5), dtype=dtype)
    for region in (FalseNegatives(array), array):
        with pytest.raises(TargetError, match=r"is an array of .*; legal are numbers or bool"):
            ClassLogit(1, region)(random_logits((3, 4, 5)))


def test_a_tensor_of_what_is_no_number_is_refused():
    tensor = torch.zeros(3, 4, 5, dtype=torch.complex64)
    for region in (FalseNegatives(tensor), tensor):
        with pytest.raises(TargetError, match=r"is a tensor of .*; legal are numbers or bool"):
            ClassLogit(1, region)(random_logits((3, 4, 5)))


@pytest.mark.parametrize("kind", TRUTHS)
def test_truth_that_makes_no_sense(kind):
    with pytest.raises(TargetError, match="legal are a label map or boolean mask"):
        kind("truth.nii.gz")
    with pytest.raises(TargetError, match=r"label is a whole number; got 1\.0"):
        kind(torch.ones(3), label=1.0)
    with pytest.raises(TargetError, match="label 1 of a truth that is a boolean mask"):
        ClassLogit(1, kind(torch.ones(3, 4, 5).bool(), label=1))(random_logits((3, 4, 5)))


# ---------------------------------------------------------------------------------- every region


REGIONS = {
    "predicted": Predicted(),
    "volume": Volume(),
    "mask": MaskRegion(torch.arange(60).reshape(3, 4, 5) % 7),
    "box": Box((0, 1, 0), (2, 3, 5)),
    "component": Component(0),
    "no component": Component(99),
    "outside of all components": Component(voxel=(0, 0, 0)),
    "boundary": Boundary(),
    "misses": FalseNegatives(torch.arange(60).reshape(3, 4, 5) % 3),
}


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
def test_every_region_is_a_boolean_mask_of_every_item_even_if_it_is_empty(region):
    logits = random_logits((3, 4, 5))
    logits[:, 0, 0, 0, 0] = 9  # not class 1
    found = region.masks(ClassLogit(1).prediction(logits))
    assert (found.dtype, found.shape) == (torch.bool, (len(logits), 3, 4, 5))


# ------------------------------------------------------------------------------------------- names


@dataclass
class OnAnotherGrid:
    """As much of a Scan as a target needs to know."""

    data: torch.Tensor
    affine: np.ndarray


def a_scan():
    return OnAnotherGrid(torch.ones(1, 6, 6, 6), np.eye(4))


@pytest.mark.parametrize(
    ("region", "name", "truth"),
    [
        (Component(0), "component 0 of the predicted mask", False),
        (
            Component(1, connectivity=3),
            "component 1 (connectivity 3) of the predicted mask",
            False,
        ),
        (Component(voxel=(1, 2)), "the component of the predicted mask at voxel [1, 2]", False),
        (Boundary(), "the boundary (thickness 1) of the predicted mask", False),
        (Box((0,), (1,)), "the box [0] to [1]", False),
        (FalseNegatives(torch.ones(1)), "the false negatives", True),
        (FalsePositives(a_scan()), "the false positives", True),
        (TruePositives(torch.ones(1), 4), "the true positives (label 4 of the truth)", True),
        (torch.ones(1), "the given mask", False),
        (a_scan(), "the given mask", False),
    ],
)
def test_a_target_names_its_region_and_says_if_it_knows_the_truth(region, name, truth):
    target = ClassLogOdds(1, region)
    assert target.name == f"log-odds of class 1 over {name}"
    assert target.uses_truth is truth


@pytest.mark.parametrize("region", [a_scan(), FalseNegatives(a_scan())])
def test_a_scan_on_a_grid_of_its_own_is_refused_without_explain(region):
    with pytest.raises(TargetError, match=r"OnAnotherGrid on a grid of its own\. explain\(\)"):
        ClassLogit(1, region)(random_logits((3, 4, 5)))


# ---------------------------------------------------------------------------------- the prediction


def test_of_equal_logits_the_first_class_is_predicted_as_by_argmax():
    logits = torch.randint(3, (2, 4, 6, 5), generator=torch.Generator().manual_seed(0)).double()
    for c in range(4):
        expected = logits.argmax(1) == c
        assert np.array_equal(expected.numpy(), scores.predicted(logits, c))
        assert torch.equal(ClassLogit(c).regions(logits), expected)
    assert torch.equal(MaskOutput("predicted").regions(logits), logits.argmax(1) != 0)


def test_a_logit_of_zero_does_not_predict_its_class_among_classes_that_may_overlap():
    logits = torch.tensor([[[-1.0, 0.0, 1.0], [-1.0, 0.0, -1.0]]])
    for target in (ClassLogit(0, activation="sigmoid"), MaskOutput("predicted", "sigmoid")):
        assert target.regions(logits).tolist() == [[False, False, True]]


def test_a_logit_that_is_not_a_number_is_not_left_out_unnoticed():
    logits = logits_that_predict([[1, 0]])
    logits[0, 1, 0] = float("nan")
    assert ClassLogit(1)(logits).isnan().all()
