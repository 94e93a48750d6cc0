"""A detector's class score and map equal loops over its predictions, and a misfit says why."""

from __future__ import annotations

import re

import pytest
import torch
from reference import scores

from seg3dcam.errors import TargetError
from seg3dcam.targets import DetectionClass, Target, detection_map, fixed, name_of, score_and_seed

NAMES = ["car", "dog", "cat"]
LAYOUTS = {"one anchor": (2, 8, 3, 4), "three anchors": (2, 24, 2, 3), "flattened": (2, 11, 8)}


def random_head(layout="three anchors", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*LAYOUTS[layout], dtype=torch.float64, generator=generator)


def best(found, count):
    """The `count` largest predictions, or all."""
    return sorted(found, key=lambda one: -one[1].item())[: count or len(found)]


KEPT = [({}, None), ({"reduce": "max"}, 1), ({"top": 4}, 4), ({"top": 1}, 1)]
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@every_layout
@pytest.mark.parametrize(("settings", "count"), KEPT)
@pytest.mark.parametrize("index", range(3))
def test_score_and_gradient_are_those_of_loops(index, settings, count, layout):
    head = random_head(layout).requires_grad_()
    listed = scores.detections(head, index, 3)
    expected = torch.stack([sum(v for _, v in best(item, count)) for item in listed])
    (seed,) = torch.autograd.grad(expected.sum(), head)
    for which, classes in ((index, 3), (index, NAMES), (NAMES[index], tuple(NAMES))):
        target = DetectionClass(which, classes, **settings)
        found = score_and_seed(target, head.detach())
        torch.testing.assert_close(found, (expected.detach(), seed))


@every_layout
@pytest.mark.parametrize(("settings", "count"), KEPT)
def test_the_region_is_the_cells_that_count(settings, count, layout):
    head = random_head(layout)
    found = DetectionClass("dog", NAMES, **settings).regions(head)
    expected = torch.zeros_like(found)
    for item, listed in enumerate(scores.detections(head, 1, 3)):
        for place, _ in best(listed, count):
            expected[(item, *(place[1:] if head.ndim == 4 else place))] = True
    assert found.dtype == torch.bool
    assert torch.equal(found, expected)


@pytest.mark.parametrize("layout", ["one anchor", "three anchors"])
def test_the_map_is_the_best_anchor_of_each_cell(layout):
    head = random_head(layout)
    for index in range(3):
        expected = torch.zeros(2, *head.shape[2:], dtype=torch.float64)
        for item, listed in enumerate(scores.detections(head, index, 3)):
            for (_, y, x), value in listed:
                expected[item, y, x] = max(expected[item, y, x], value)
        torch.testing.assert_close(detection_map(head, index, 3), expected)
        torch.testing.assert_close(detection_map(head, NAMES[index], NAMES), expected)


def test_both_layouts_of_one_head_agree():
    head = random_head()
    flat = head.unflatten(1, (3, 8)).permute(0, 1, 3, 4, 2).flatten(1, 3)
    for settings, _ in KEPT:
        target = DetectionClass(2, NAMES, **settings)
        torch.testing.assert_close(target(head), target(flat))


def test_the_best_predictions_stay_when_fixed():
    head, other = random_head(), random_head(seed=1)
    for settings, count in KEPT:
        target = DetectionClass("cat", NAMES, **settings)
        held = fixed(target, head)
        torch.testing.assert_close(held(head), target(head))
        assert held.name == target.name
        kept = [{place for place, _ in best(i, count)} for i in scores.detections(head, 2, 3)]
        expected = [
            sum(value for place, value in item if place in places)
            for item, places in zip(scores.detections(other, 2, 3), kept, strict=True)
        ]
        torch.testing.assert_close(held(other), torch.stack(expected))
        assert torch.equal(held.regions(other), target.regions(head))


def test_as_many_of_the_best_as_there_are_is_all_of_them():
    head = random_head()  # of 18 predictions
    chosen, every = DetectionClass(0, 3, top=18), DetectionClass(0, 3)
    torch.testing.assert_close(chosen(head), every(head))
    assert torch.equal(chosen.regions(head), every.regions(head))


def test_second_derivatives_exist():
    head = random_head().requires_grad_()
    target = DetectionClass(0, NAMES, top=3)
    (gradient,) = torch.autograd.grad(target(head).sum(), head, create_graph=True)
    (second,) = torch.autograd.grad((gradient**2).sum(), head)
    assert second.any()


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (DetectionClass(1, 80), "detection of class 1 over all predictions"),
        (DetectionClass("dog", NAMES), "detection of class 1 (dog) over all predictions"),
        (DetectionClass(0, NAMES, "max"), "detection of class 0 (car) over the best prediction"),
        (DetectionClass(0, 2, top=9), "detection of class 0 over the 9 best predictions"),
    ],
)
def test_names(target, name):
    assert name_of(target) == name
    assert isinstance(target, Target)


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("index", "classes", "message"),
    [
        (3, NAMES, "class 3 does not exist: there are 3 classes, so 0 to 2 are legal: 0 (car), 1"),
        (-1, 5, "class -1 does not exist: there are 5 classes, so 0 to 4 are legal"),
        (80, [f"c{n}" for n in range(80)], "11 (c11) and 68 more"),
        ("dogs", NAMES, "class 'dogs': did you mean 'dog'?"),
        ("zebra", NAMES, "class 'zebra': legal: 'car', 'dog', 'cat'"),
        ("dog", 3, "class 'dog' by name, and the 3 classes have none: give a number from 0 to 2"),
        (True, NAMES, "a class's index is a whole number; got True"),
        (1.0, NAMES, "a class's index is a whole number; got 1.0"),
        (0, 0, "the number of classes is a whole number from 1; got 0"),
        (0, [], "the number of classes is a whole number from 1; got 0"),
        (0, "car", "classes 'car': give the list of their names, or their number"),
        (0, 2.5, "classes 2.5: give the list"),
    ],
)
def test_a_class_that_does_not_exist_is_refused(index, classes, message):
    for make in (
        lambda: DetectionClass(index, classes),
        lambda: detection_map(torch.zeros(1, 8, 2, 2), index, classes),
    ):
        with pytest.raises(TargetError, match=re.escape(message)):
            make()


@pytest.mark.parametrize(
    ("classes", "shape", "anchors", "message"),
    [
        (
            20,
            (1, 255, 13, 13),
            None,
            "the head has 255 channels, and 20 classes need a multiple of 25 (4 for the box, 1 "
            "objectness, 20 classes). 255 would mean 250 classes with 1 anchor or 80 classes with "
            "3 anchors or 46 classes with 5 anchors",
        ),
        (10, (1, 75, 2, 2), 3, "10 classes need 3 times 15 (4 for the box, 1 objectness, 10 cl"),
        (3, (1, 4, 2, 2), None, "4 would mean no class with any number of anchors"),
        (20, (1, 100, 85), None, "85 numbers per prediction; 20 classes need 25 (4 for the box"),
        (20, (1, 100, 85), None, "85 would mean 80 classes"),
        (20, (1, 100, 3), None, "Is its layout (B, n, 5 + classes)?"),
        (20, (1, 3, 13, 13, 25), None, "becomes the latter by head.flatten(1, 3)"),
        (20, (1, 25), None, "legal are (B, anchors * (5 + classes), h, w) and (B, n, 5 + classes)"),
    ],
)
def test_a_head_that_does_not_fit_says_what_it_would_mean(classes, shape, anchors, message):
    with pytest.raises(TargetError, match=re.escape(message)):
        DetectionClass(0, classes, anchors=anchors)(torch.zeros(shape))


def test_a_number_of_anchors_that_fits():
    head = random_head()
    torch.testing.assert_close(
        DetectionClass(0, 3, anchors=3)(head), DetectionClass(0, NAMES)(head)
    )


def test_a_map_needs_cells():
    with pytest.raises(TargetError, match=r"a map needs a head .* shape \(2, 11, 8\)"):
        detection_map(random_head("flattened"), 0, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduce": "mean"}, "reduce 'mean': legal are 'sum' and 'max'"),
        ({"top": 0}, "top is a whole number from 1; got 0"),
        ({"top": 2, "reduce": "max"}, "top goes with reduce='sum'"),
        ({"anchors": 0}, "anchors is a whole number from 1; got 0"),
        ({"top": 19}, "top 19: the head has 18 predictions, so 1 to 18 are legal"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(TargetError, match=message):
        DetectionClass(0, 3, **settings)(random_head())
