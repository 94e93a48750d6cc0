"""Figures of localisation equal slow definitions, and a random map is at chance in all of them."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import toy

from seg3dcam.errors import EvaluationError, InputError
from seg3dcam.evaluate import localisation, mass_inside
from seg3dcam.evaluate.controls import (
    input_alone,
    mask_alone,
    nearness,
    random_maps,
    rank_p_value,
)
from seg3dcam.geometry import FeatureGrid

SHAPE = (5, 7, 6)
NAMES = ("energy", "mass", "pointing", "rank", "roc_auc", "peak_distance")


def region(fraction: float = 0.2) -> torch.Tensor:
    return toy.random_input(1, 1, *SHAPE, seed=4)[0, 0] > np.quantile(
        toy.random_input(1, 1, *SHAPE, seed=4)[0, 0], 1 - fraction
    )


MAPS = {
    "signed": toy.random_input(1, 1, *SHAPE, seed=1)[0, 0],
    "with ties": (2 * toy.random_input(1, 1, *SHAPE, seed=2)[0, 0]).round(),
    "two peaks": torch.where(toy.random_input(1, 1, *SHAPE, seed=2)[0, 0] > 1.5, 3.0, 0.1),
}


def by_hand(values, mask, spacing):
    """Every figure by its definition, voxel by voxel."""
    values, mask = values.double().numpy(), mask.numpy()
    voxels = list(itertools.product(*map(range, SHAPE)))
    inside = [v for v in voxels if mask[v]]
    top = [v for v in voxels if values[v] == values.max()]
    wins = [
        (values[a] > values[b]) + 0.5 * (values[a] == values[b])
        for a in inside
        for b in voxels
        if not mask[b]
    ]
    # As a mean over many orders of equal voxels.
    ranks = []
    for seed in range(4000):
        order = np.random.default_rng(seed).permutation(values.size)
        highest = order[np.argsort(-values.flat[order], kind="stable")][: len(inside)]
        ranks.append(mask.flat[highest].mean())
    positive = sum(max(values[v], 0) for v in voxels)
    return {
        "energy": sum(max(values[v], 0) for v in inside) / positive,
        "mass": sum(abs(values[v]) for v in inside) / sum(abs(values[v]) for v in voxels),
        "pointing": sum(mask[v] for v in top) / len(top),
        "rank": np.mean(ranks),
        "roc_auc": np.mean(wins),
        "peak_distance": np.mean(
            [
                min(
                    math.dist(*(np.array(place) * spacing for place in (peak, other)))
                    for other in inside
                )
                for peak in top
            ]
        ),
    }


@pytest.mark.parametrize("name", MAPS)
def test_figures_are_those_of_the_definition(name):
    spacing = (0.8, 0.8, 5.0)
    found = localisation(MAPS[name], region(), spacing=spacing, draws=2)
    expected = by_hand(MAPS[name], region(), spacing)
    assert [field.name for field in dataclasses.fields(found)] == list(expected) == list(NAMES)
    for figure, value in expected.items():
        exact = 1e-9 if figure != "rank" or name == "signed" else 0.01
        assert getattr(found, figure).value == pytest.approx(value, abs=exact), figure


@pytest.mark.parametrize("grid", [None, FeatureGrid((3, 4, 3), (2.0,) * 3, (0.5,) * 3)])
def test_a_random_map_is_at_chance(grid):
    """200 draws, of which 95 % lie in the interval, whose mean is that of a random map."""
    own = grid or FeatureGrid.of_voxels(SHAPE)
    inside = {name: 0 for name in NAMES}
    for values in random_maps(own, SHAPE, draws=200, seed=11):
        found = localisation(values, region(), grid=grid, draws=1)
        for name in NAMES:
            inside[name] += (
                getattr(CHANCE[grid is None], name).interval[0]
                <= getattr(found, name).value
                <= getattr(CHANCE[grid is None], name).interval[1]
            )
    assert all(180 <= count <= 200 for count in inside.values()), inside
    share = float(region().float().mean())
    chance = CHANCE[grid is None]
    # The peak of a coarse map lies at the middle of one of few feature voxels.
    for name in ("energy", "mass", "rank", *["pointing"] * (grid is None)):
        assert getattr(chance, name).chance == pytest.approx(share, abs=0.05), name
    assert chance.roc_auc.chance == pytest.approx(0.5, abs=0.05)


CHANCE = {
    fine: localisation(
        MAPS["signed"],
        region(),
        grid=None if fine else FeatureGrid((3, 4, 3), (2.0,) * 3, (0.5,) * 3),
        draws=400,
        seed=3,
    )
    for fine in (True, False)
}


def test_the_region_itself_is_found():
    found = localisation(region().float(), region(), draws=50)
    for name in NAMES:
        figure = getattr(found, name)
        assert figure.value == (0 if name == "peak_distance" else 1)
    for name in ("energy", "mass", "rank", "roc_auc"):
        assert not getattr(found, name).is_chance


def test_mass_inside_adds_up():
    mask, truth = region(), region(0.4)
    found = mass_inside(MAPS["signed"], {"prediction": mask, "truth": truth, "none": None})
    positive = MAPS["signed"].clamp(min=0)
    assert found["prediction"] == pytest.approx(float(positive[mask].sum() / positive.sum()))
    assert found["truth"] + found["outside"] == pytest.approx(1)  # the truth holds the mask
    assert list(found) == ["prediction", "truth", "outside"]


def test_what_is_undefined_says_why():
    values = MAPS["signed"]
    for mask, words in ((region() & False, "is empty"), (region() | True, "fills the whole")):
        with pytest.raises(EvaluationError, match=words):
            localisation(values, mask)
    with pytest.raises(EvaluationError, match=r"0\.5 everywhere"):
        localisation(values * 0 + 0.5, region())
    with pytest.raises(EvaluationError, match="no positive value"):
        mass_inside(-values.abs(), {"region": region()})
    with pytest.raises(InputError, match="on one grid"):
        localisation(values[1:], region())
    with pytest.raises(InputError, match="NaN"):
        localisation(values * torch.nan, region())


# ---------------------------------------------------------------------------- controls


def test_controls_know_the_mask_or_the_input_alone():
    x = toy.random_input(1, 2, *SHAPE, seed=1)
    assert torch.equal(input_alone(x), x[0].double().abs().sum(0))
    assert torch.equal(mask_alone(region()) > 0, region())
    near = nearness(region(), (1, 1, 3))
    assert (near[region()] == 1).all()
    assert near.min() == 0
    places = torch.nonzero(region())
    for voxel in torch.nonzero(~region())[::7]:
        distance = ((places - voxel) * torch.tensor([1, 1, 3])).double().norm(dim=1).min()
        farthest = distance / (1 - near[tuple(voxel)])
        assert farthest == pytest.approx(float(FARTHEST))


FARTHEST = max(
    float(((torch.nonzero(region()) - v) * torch.tensor([1, 1, 3])).double().norm(dim=1).min())
    for v in torch.nonzero(~region())
)


def test_random_maps_have_the_resolution_of_the_layer():
    grid = FeatureGrid((3, 2), (4.0, 4.0), (1.5, 1.5))
    first, second = random_maps(grid, (12, 8), draws=2, seed=1)
    assert not torch.equal(first, second)
    assert torch.equal(first, next(random_maps(grid, (12, 8), draws=2, seed=1)))
    slopes = first.diff(dim=0)[2:5]  # between the centres of two feature voxels
    torch.testing.assert_close(slopes, slopes[:1].expand_as(slopes))


def test_the_p_value_counts_random_maps_that_are_as_good():
    assert rank_p_value(0.1, [0.2] * 99) == 0.01
    assert rank_p_value(0.2, [0.1, 0.2, 0.3]) == 0.75
    assert rank_p_value(0.9, [0.1, 0.2, 0.3], low_is_good=False) == 0.25
