"""Overlapping windows: every method by its definition, and what may not change its map.

A window's gradient carries the window's share; what contains it is summed over windows, while a map
of activations alone is blended by the shares. Sums of activations count every voxel by its share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import toy
from helpers_crossed import crossed
from helpers_engine import (
    EXACT,
    SCORES,
    STRIDES,
    Part,
    box_of,
    curved,
    each_method,
    importance_of,
    level,
    parts_of,
    signed_maps,
)
from reference import maps
from reference.methods import _first_kernel_component as kernel_component
from torch import nn
from toy import deviation

from seg3dcam import METHODS, WindowPlan, targets
from seg3dcam.cams.catalogue import CAMS
from seg3dcam.cams.result import CamResult

# ---------------------------------------------------------------------- methods by their definition


class Volume:
    """The windows of one item, and how they come together on the layer's grid."""

    def __init__(self, parts: Sequence[Part], plan: WindowPlan, stride: int) -> None:
        self.parts = parts
        size = parts[0].a.shape[1:]
        self.boxes = [box_of(part.start, size, stride) for part in parts]
        self.shape = tuple(max(box[axis].stop for box in self.boxes) for axis in range(len(size)))
        self.voxels = math.prod(self.shape)
        self.importance = importance_of(plan, [n * stride for n in size], stride)

    def total_importance(self, of: Sequence[int] | None = None) -> torch.Tensor:
        total = torch.zeros(self.shape).double()
        for number in range(len(self.parts)) if of is None else of:
            total[self.boxes[number]] += self.importance
        return total

    def shares(self) -> list[torch.Tensor]:
        total = self.total_importance()
        return [self.importance / total[box] for box in self.boxes]

    def summed(self, windows_maps: Sequence[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros(self.shape).double()
        for box, values in zip(self.boxes, windows_maps, strict=True):
            total[box] += values
        return total

    def blended(self, windows_maps: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.summed([m * s for m, s in zip(windows_maps, self.shares(), strict=True)])

    def weighted(self, weights: torch.Tensor) -> torch.Tensor:
        return self.blended([torch.einsum("c,c...->...", weights, p.a) for p in self.parts])

    def sum(self, function) -> torch.Tensor:
        """Sum a function of (a, g, share), (C, *s), over voxels and windows."""
        return sum(
            function(p.a, p.g, share).flatten(1).sum(1)
            for p, share in zip(self.parts, self.shares(), strict=True)
        )


def grad_cam(v: Volume) -> torch.Tensor:
    return v.weighted(v.sum(lambda a, g, share: g) / v.voxels)


def slice_grad_cam(v: Volume) -> torch.Tensor:
    """Windows that differ along the last two axes alone share the weights of their slices."""
    plane = math.prod(v.shape[1:])
    total = torch.zeros(v.shape).double()
    for start in {p.start[0] for p in v.parts}:
        group = [n for n, p in enumerate(v.parts) if p.start[0] == start]
        weights = sum(v.parts[n].g.sum((2, 3)) for n in group) / plane
        importance = v.total_importance(group)
        for n in group:
            share = v.importance / importance[v.boxes[n]]
            total[v.boxes[n]] += torch.einsum("cz,czyx->zyx", weights, v.parts[n].a) * share
    return total


def grad_cam_plus_plus(v: Volume) -> torch.Tensor:
    sums = v.sum(lambda a, g, share: a * share)[:, None, None, None]
    return v.weighted(v.sum(lambda a, g, share: g.relu() / (2 + sums * g.relu())))


def xgrad_cam(v: Volume) -> torch.Tensor:
    return v.weighted(v.sum(lambda a, g, share: g * a) / v.sum(lambda a, g, share: a * share))


def random(v: Volume) -> torch.Tensor:
    return v.blended([METHODS["random"](p.a[None])[0] for p in v.parts])


def fem(v: Volume) -> torch.Tensor:
    mean = v.sum(lambda a, g, share: a * share) / v.voxels
    mean = mean[:, None, None, None]
    variance = v.sum(lambda a, g, share: (a - mean) ** 2 * share) / v.voxels
    threshold = mean + 2 * variance.sqrt()[:, None, None, None]
    return v.blended([((p.a > threshold) * mean).sum(0) for p in v.parts])


def kpca_cam(v: Volume) -> torch.Tensor:
    """Every window's voxels are points; those that overlap count twice."""
    points = torch.cat([p.a.flatten(1) for p in v.parts], 1)
    component = torch.as_tensor(kernel_component(points.numpy(), "sigmoid"))
    pieces = component.reshape(len(v.parts), *v.parts[0].a.shape[1:])
    return largest_positive(v.blended(list(pieces)))


def eigen_cam(v: Volume) -> torch.Tensor:
    points = torch.cat([p.a.flatten(1) for p in v.parts], 1)
    counts = torch.cat([share.flatten() for share in v.shares()])
    mean, axis = principal_axis(points, counts, v.voxels)
    return largest_positive(v.weighted(axis) - mean @ axis)


def of_products(v: Volume, features: Sequence[torch.Tensor]) -> torch.Tensor:
    points = torch.cat([f.flatten(1) for f in features], 1)
    mean, axis = principal_axis(points, torch.ones(points.shape[1]).double(), v.voxels)
    return v.summed([torch.einsum("c,c...->...", axis, f) for f in features]) - mean @ axis


def seg_eigen_cam(v: Volume) -> torch.Tensor:
    return largest_positive(of_products(v, [p.g.abs() * p.a for p in v.parts]))


def eigen_grad_cam(v: Volume) -> torch.Tensor:
    found = of_products(v, [p.g * p.a for p in v.parts])
    hires = v.summed([(p.g * p.a).sum(0) for p in v.parts])
    return -found if ((found - found.mean()) * (hires - hires.mean())).sum() < 0 else found


def principal_axis(
    points: torch.Tensor, counts: torch.Tensor, voxels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and first axis of points (C, N), by their second moments over the volume."""
    mean = (points * counts).sum(1) / voxels
    covariance = (points * counts) @ points.T / voxels - torch.outer(mean, mean)
    values, vectors = np.linalg.eigh(covariance.numpy())
    assert values[-1] > 1.1 * values[-2], "the component is not well defined"
    return mean, torch.as_tensor(vectors[:, -1])


def largest_positive(values: torch.Tensor) -> torch.Tensor:
    return -values if -values.min() > values.max() else values


def summed_by(formula):
    def of(v: Volume) -> torch.Tensor:
        return v.summed([torch.as_tensor(formula(p.a[None], p.g[None])[0]) for p in v.parts])

    return of


DEFINITIONS = {
    "grad_cam": grad_cam,
    "slice_grad_cam": slice_grad_cam,
    "hires_cam": summed_by(maps.hires_cam),
    "xres_cam": summed_by(lambda a, g: maps.xres_cam(a, g, 2, "mean")),
    "grad_cam_plus_plus": grad_cam_plus_plus,
    "xgrad_cam": xgrad_cam,
    "layer_cam": summed_by(lambda a, g: (a * g.relu()).sum(1)),
    "grad_cam_elementwise": summed_by(lambda a, g: (a * g).relu().sum(1)),
    "eigen_cam": eigen_cam,
    "eigen_grad_cam": eigen_grad_cam,
    "seg_eigen_cam": seg_eigen_cam,
    "kpca_cam": kpca_cam,
    "fem": fem,
    "random": random,
}

#: layer -> plan and volume; windows start on the layer's grid.
LEVELS = {
    "1": (WindowPlan(4, overlap=0.4, sw_batch_size=2), (5, 6, 6)),
    "3": (WindowPlan((4, 8, 8), overlap=0.5), (8, 8, 12)),
}


@pytest.mark.few(7)
@signed_maps
@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("layer", STRIDES)
@each_method(DEFINITIONS, ["grad_cam", "xres_cam", "eigen_grad_cam", "kpca_cam", "fem"])
def test_map_is_the_definition(key, layer, score):
    plan, shape = LEVELS[layer]
    case = level(layer, toy.random_input(2, 1, *shape, seed=9))
    parts = parts_of(case, plan, score)
    expected = [
        DEFINITIONS[key](Volume([p for p in parts if p.item == item], plan, STRIDES[layer]))
        for item in range(2)
    ]
    found = CAMS[key](case.network, layer, sliding_window=plan)(case.x, score).layers[layer]
    assert deviation(found.values, torch.stack(expected)) < EXACT


# --------------------------------------------------------------------------------------- invariants


def pointwise() -> nn.Sequential:
    """Return a network that sees each voxel alone, with a linear head behind layer "1"."""
    layers = [nn.Conv3d(1, 4, 1), nn.Softplus(), nn.Conv3d(4, 3, 1)]
    return toy.seeded(nn.Sequential(*layers), seed=1)


#: Not linear in the gradient, so its shares do not add up: Grad-CAM++ and the components of
#: products. KPCA-CAM counts voxels of two windows twice.
LINEAR = [
    key
    for key in DEFINITIONS
    if key not in ("grad_cam_plus_plus", "eigen_grad_cam", "seg_eigen_cam", "kpca_cam")
]


#: These count every voxel alike, also those of padding.
COUNTING = ("grad_cam", "slice_grad_cam", "xgrad_cam", "eigen_cam", "fem", "shapley_cam")


@pytest.mark.few(2)
@signed_maps
@each_method([*LINEAR, "shapley_cam", "full_grad", "score_cam", "ablation_cam"])
def test_how_a_network_that_sees_each_voxel_alone_is_cut_does_not_matter(key):
    network, target = toy.shared(pointwise), targets.ClassLogit(1, "volume")
    x = toy.random_input(2, 1, 6, 10, 8)
    (expected,) = CAMS[key](network, "1")(x, target).maps.values()
    plans = [
        WindowPlan((4, 8, 4), overlap=0.5),  # starts on blocks of 2, as XResCAM needs
        WindowPlan((4, 4, 8), overlap=0.5, mode="constant", sw_batch_size=4),
    ]
    if key not in COUNTING:
        plans += [WindowPlan((10, 10, 6), overlap=0.5), WindowPlan((10, 14, 12))]
    for plan in plans:
        (found,) = CAMS[key](network, "1", sliding_window=plan)(x, target).maps.values()
        assert deviation(found, expected) < EXACT


def assert_same(found: CamResult, expected: CamResult) -> None:
    assert found.maps.keys() == expected.maps.keys()
    assert found.status == expected.status
    for name, map_ in expected.maps.items():
        assert deviation(found.maps[name], map_) < EXACT
    assert deviation(found.score, expected.score) < EXACT


@signed_maps
@each_method(CAMS)
def test_one_window_is_no_window(key):
    case = level("3", toy.random_input(2, 1, 6, 4, 8))
    plain = CAMS[key](case.network, ["1", "3"])(case.x, curved)
    for plan in (WindowPlan((6, 4, 8)), WindowPlan(-1, overlap=0.9, mode="constant")):
        found = CAMS[key](case.network, ["1", "3"], sliding_window=plan)(case.x, curved)
        assert_same(found, plain)
        for name, map_ in plain.native.items():
            assert deviation(found.native[name], map_) < EXACT


VARIANTS = {
    "several windows at once": {"sw_batch_size": 5},
    "activations computed again": {"cache_gb": 0.0},
    "some of them kept": {"cache_gb": 2e-5, "sw_batch_size": 2},
}


@pytest.mark.few(3)
@signed_maps
@pytest.mark.parametrize(("key", "variant"), crossed(CAMS, VARIANTS, rows=9))
def test_how_the_windows_are_worked_through_does_not_matter(key, variant):
    case = level("3", toy.random_input(2, 1, 6, 4, 10, seed=2))
    sizes = {"roi_size": (4, 4, 6), "overlap": 0.5}
    for score in SCORES.values():
        plain, other = (
            CAMS[key](case.network, ["1", "3"], sliding_window=WindowPlan(**sizes, **more))
            for more in ({}, VARIANTS[variant])
        )
        assert_same(other(case.x, score), plain(case.x, score))


@pytest.mark.few(5)
@signed_maps
@pytest.mark.parametrize("plan", [None, WindowPlan((4, 4, 6), overlap=0.5)], ids=["one", "many"])
@each_method(CAMS)
def test_a_batch_gives_what_its_items_give_alone(key, plan):
    case = level("3", toy.random_input(3, 1, 6, 4, 10, seed=2))
    cam = CAMS[key](case.network, ["1", "3"], sliding_window=plan)
    together = cam(case.x, curved)
    for item in range(3):
        alone = cam(case.x[item : item + 1], curved)
        for name, map_ in alone.maps.items():
            assert deviation(together.maps[name][item], map_[0]) < EXACT
        assert together.score[item] == pytest.approx(alone.score.item(), rel=EXACT)


@signed_maps
@pytest.mark.parametrize("key", ["hires_cam", "xgrad_cam"])
def test_map_sums_to_the_score_of_a_linear_head(key):
    """Whatever the windows: the shares sum to 1 at every voxel."""
    case = toy.shared(toy.linear_head_case)
    plan = WindowPlan((4, 3, 5), overlap=0.4)
    target = targets.ClassLogit(1, "volume")
    result = CAMS[key](case.network, "3", sliding_window=plan)(case.x, target)
    bias = case.network[-1].bias[1].detach() * case.x[0].numel()
    assert deviation(result.layers["3"].values.flatten(1).sum(1), result.score - bias) < EXACT


@signed_maps
def test_layer_cam_in_favour_less_against_is_hires_cam():
    """In every window ReLU(G) - ReLU(-G) = G."""
    case = level("1", toy.random_input(2, 1, 7, 6, 8))
    hires, favour, against = (
        CAMS[key](case.network, "1", sliding_window=WindowPlan(4, overlap=0.4))(case.x, score)
        for key, score in (
            ("hires_cam", curved),
            ("layer_cam", curved),
            ("layer_cam", lambda logits: -curved(logits)),
        )
    )
    assert deviation(favour.maps["1"] - against.maps["1"], hires.maps["1"]) < EXACT
