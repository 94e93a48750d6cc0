"""Where is a map, compared with a region? Each figure stands beside what a random map gets.

A map may be true and lie outside of the mask: the network may look there. So these figures say
where a map is, and not whether it is right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, stats

from seg3dcam.checks import check_whole_number
from seg3dcam.errors import EvaluationError, InputError
from seg3dcam.evaluate.arrays import map_array, mask_array, refuse_constant
from seg3dcam.evaluate.controls import random_maps
from seg3dcam.geometry import FeatureGrid

Values = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Figure:
    """A figure, and what random maps of the same resolution get.

    Attributes:
        value: the map's.
        chance: the mean of the random maps.
        interval: between these two values lie 95 % of the random maps.
    """

    value: float
    chance: float
    interval: tuple[float, float]

    @property
    def is_chance(self) -> bool:
        """Whether a random map may well get this value."""
        return self.interval[0] <= self.value <= self.interval[1]


@dataclass(frozen=True)
class Localisation:
    """Where a map is, compared with a region.

    Attributes:
        energy: the part of the sum of the positive values that lies inside (energy-based pointing
            game of Wang et al., Score-CAM); NaN without any.
        mass: the same of the absolute values, evidence against the target included (relevance mass
            accuracy of Arras et al.).
        pointing: whether the highest voxel lies inside; of several, the part that does (pointing
            game of Zhang et al.).
        rank: of as many highest voxels as the region has, the part that lies inside (relevance
            rank accuracy of Arras et al.). Of equal voxels it counts the part that is expected.
        roc_auc: the chance that a voxel inside has a higher value than one outside, where equal
            values count a half.
        peak_distance: from the highest voxel to the region, 0 inside of it, in mm (in voxels
            without `spacing`); the mean over several.
    """

    energy: Figure
    mass: Figure
    pointing: Figure
    rank: Figure
    roc_auc: Figure
    peak_distance: Figure


def localisation(
    values: torch.Tensor | NDArray[np.floating],
    region: torch.Tensor | NDArray[np.bool_],
    *,
    spacing: Sequence[float] | None = None,
    grid: FeatureGrid | None = None,
    draws: int = 200,
    seed: int = 0,
) -> Localisation:
    """Return where a map is, compared with a region, by several measures.

    Args:
        values: the map, (*S).
        region: (*S), zero and nonzero.
        spacing: mm from voxel to voxel along every axis.
        grid: of the layer, in voxels of the map. Random maps have its resolution; None gives every
            voxel a value of its own.
        draws: how many random maps the chance comes from.

    Raises:
        EvaluationError: undefined, since the region is empty or fills everything, or the map is
            constant.

    >>> values = torch.zeros(4, 4)
    >>> values[1, 1], values[3, 3] = 3, 1
    >>> found = localisation(values, torch.arange(4)[:, None].expand(4, 4) == 1)
    >>> found.energy.value, found.pointing.value, round(found.energy.chance, 1)
    (0.75, 1.0, 0.3)
    """
    check_whole_number("draws", draws)
    array, mask = checked_places(values, region)
    measures = _measures(mask, spacing)
    own = {name: measure(array) for name, measure in measures.items()}
    grid = grid or FeatureGrid.of_voxels(array.shape)
    by_chance: dict[str, list[float]] = {name: [] for name in measures}
    for drawn in random_maps(grid, array.shape, draws=draws, seed=seed):
        for name, measure in measures.items():
            by_chance[name].append(measure(drawn.numpy()))
    return Localisation(**{name: _figure(own[name], by_chance[name]) for name in measures})


def mass_inside(
    values: torch.Tensor | NDArray[np.floating],
    masks: Mapping[str, torch.Tensor | NDArray[np.bool_] | None],
) -> dict[str, float]:
    """Return which part of a map's positive values lies in each mask, and "outside" of all.

    Args:
        masks: name -> (*S); those that are None are left out.

    >>> mass_inside(np.array([3.0, 1, -5]), {"prediction": np.array([1, 0, 0]), "truth": None})
    {'prediction': 0.75, 'outside': 0.25}
    """
    array = np.clip(map_array(values), 0, None)
    total = array.sum()
    if total <= 0:
        raise EvaluationError("undefined: the map has no positive value")
    given = {name: mask_array(m) for name, m in masks.items() if m is not None}
    found = {name: float(array[mask].sum() / total) for name, mask in given.items()}
    covered = np.logical_or.reduce(list(given.values())) if given else np.zeros(array.shape, bool)
    return found | {"outside": float(array[~covered].sum() / total)}


def _measures(mask: Mask, spacing: Sequence[float] | None) -> dict[str, Callable[[Values], float]]:
    distance = ndimage.distance_transform_edt(~mask, sampling=spacing)
    return {
        "energy": lambda values: _part(np.clip(values, 0, None), mask),
        "mass": lambda values: _part(np.abs(values), mask),
        "pointing": lambda values: float(mask[values == values.max()].mean()),
        "rank": lambda values: _rank(values, mask),
        "roc_auc": lambda values: _roc_auc(values, mask),
        "peak_distance": lambda values: float(distance[values == values.max()].mean()),
    }


def _part(values: Values, mask: Mask) -> float:
    total = values.sum()
    return float(values[mask].sum() / total) if total > 0 else float("nan")


def _rank(values: Values, mask: Mask) -> float:
    """Return the part of the highest voxels inside; of equal ones at the end, as expected."""
    count = int(mask.sum())
    last = np.partition(values, values.size - count, axis=None)[values.size - count]
    above, equal = values > last, values == last
    left = count - int(above.sum())
    return float(((above & mask).sum() + left * mask[equal].mean()) / count)


def _roc_auc(values: Values, mask: Mask) -> float:
    """Return the area by the rank sum of Mann and Whitney."""
    inside = int(mask.sum())
    ranks = stats.rankdata(values, axis=None).reshape(values.shape)
    pairs = inside * (values.size - inside)
    return float((ranks[mask].sum() - inside * (inside + 1) / 2) / pairs)


def _figure(value: float, by_chance: Sequence[float]) -> Figure:
    low, high = np.quantile(by_chance, (0.025, 0.975))
    return Figure(value, float(np.mean(by_chance)), (float(low), float(high)))


def on_one_grid(values: Any, region: Any) -> tuple[Values, Mask]:
    """Return a map and a region as arrays; InputError unless they share a grid and are finite."""
    array, mask = map_array(values), mask_array(region)
    if array.shape != mask.shape:
        raise InputError(
            f"the map has shape {array.shape} and the region {mask.shape}: give both on one grid"
        )
    return array, mask


def checked_places(values: Any, region: Any) -> tuple[Values, Mask]:
    """Return a map and a region as arrays; EvaluationError where a place means nothing."""
    array, mask = on_one_grid(values, region)
    if not mask.any() or mask.all():
        fault = "is empty" if not mask.any() else "fills the whole volume"
        raise EvaluationError(f"undefined: the region {fault}, so no map can lie in or out of it")
    refuse_constant(array)
    return array, mask
