"""Boxes, average precision, Gini and entropy equal slow definitions and other libraries."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import toy
from scipy import ndimage

from seg3dcam.errors import EvaluationError, InputError
from seg3dcam.evaluate.boxes import (
    OVERLAPS,
    mass_concentration,
    max_box_accuracy,
    max_box_overlap,
    voxel_average_precision,
)
from seg3dcam.evaluate.complexity import entropy, gini

SHAPE = (6, 5, 7)


def blobs(seed: int, ties: bool = False) -> np.ndarray:
    values = ndimage.gaussian_filter(toy.random_input(1, 1, *SHAPE, seed=seed)[0, 0].numpy(), 1)
    return np.round(values, 1) if ties else values


def region(seed: int = 9) -> np.ndarray:
    values = blobs(seed)
    return values > np.quantile(values, 0.8)


def box_of(mask):
    labels, count = ndimage.label(mask, np.ones((3, 3, 3)))
    voxels = np.argwhere(labels == 1 + np.argmax([(labels == n + 1).sum() for n in range(count)]))
    return {tuple(v) for v in itertools.product(*map(range, voxels.min(0), voxels.max(0) + 1))}


@pytest.mark.parametrize("seed", range(4))
def test_boxes_are_those_of_the_definition(seed):
    values, mask = blobs(seed), region()
    scaled = (values - values.min()) / (values.max() - values.min())
    own, best = box_of(mask), 0.0
    for number in range(40):
        found = box_of(scaled >= number / 40)
        best = max(best, len(found & own) / len(found | own))
    assert max_box_overlap(values, mask, thresholds=40) == pytest.approx(best, abs=1e-12)
    accuracy = max_box_accuracy(values, mask, overlaps=OVERLAPS, thresholds=40)
    assert accuracy == pytest.approx(np.mean([best >= overlap for overlap in OVERLAPS]))
    assert max_box_accuracy(values, mask, thresholds=40) == float(best >= 0.5)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_that_of_scikit_learn(seed, ties):
    metrics = pytest.importorskip("sklearn.metrics")
    values, mask = blobs(seed, ties), region()
    expected = metrics.average_precision_score(mask.ravel(), values.ravel())
    assert voxel_average_precision(values, mask) == pytest.approx(expected, abs=1e-12)


def test_a_random_map_has_the_precision_of_the_region():
    mask = region()
    found = [
        voxel_average_precision(np.random.default_rng(seed).random(SHAPE), mask)
        for seed in range(300)
    ]
    assert np.mean(found) == pytest.approx(mask.mean(), abs=0.03)
    assert voxel_average_precision(mask.astype(float), mask) == 1


def test_mass_concentration_is_the_part_inside():
    values, mask = blobs(1), region()
    positive = np.maximum(values, 0)
    assert mass_concentration(values, mask) == pytest.approx(
        (positive * mask).sum() / positive.sum()
    )


def test_gini_and_entropy_are_those_of_the_definition():
    values = np.abs(blobs(2)).ravel()
    pairs = np.abs(values[:, None] - values).sum() / (2 * len(values) ** 2 * values.mean())
    assert gini(blobs(2)) == pytest.approx(pairs, abs=1e-12)
    parts = values / values.sum()
    expected = -sum(p * np.log(p) for p in parts) / np.log(len(parts))
    assert entropy(blobs(2)) == pytest.approx(expected, abs=1e-12)


def test_what_is_known_of_gini_and_entropy():
    noise = torch.rand(40, 40, 40, generator=torch.Generator().manual_seed(0))
    assert gini(noise) == pytest.approx(1 / 3, abs=0.005)
    assert gini(torch.ones(9)) == pytest.approx(0, abs=1e-12)
    assert entropy(torch.ones(9)) == pytest.approx(1)
    one = torch.zeros(1000)
    one[3] = -2
    assert gini(one) == pytest.approx(0.999)
    assert entropy(one) == 0


@pytest.mark.parametrize(
    "measure", [max_box_overlap, max_box_accuracy, voxel_average_precision, mass_concentration]
)
def test_what_is_undefined_says_why(measure):
    values, mask = blobs(1), region()
    with pytest.raises(EvaluationError, match="region is empty"):
        measure(values, mask & False)
    with pytest.raises(EvaluationError, match="2 everywhere"):
        measure(values * 0 + 2, mask)
    with pytest.raises(InputError, match="on one grid"):
        measure(values[1:], mask)
    with pytest.raises(InputError, match="NaN"):
        measure(values * np.nan, mask)


def test_complexity_of_nothing_is_undefined():
    with pytest.raises(EvaluationError, match="zero everywhere"):
        gini(torch.zeros(3))
    with pytest.raises(EvaluationError, match="one voxel"):
        entropy(torch.ones(1))
    with pytest.raises(EvaluationError, match="no positive value"):
        mass_concentration(-np.abs(blobs(1)), region())
