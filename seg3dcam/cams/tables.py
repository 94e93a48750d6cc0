"""The maps of all targets and methods of a call in one table, and what is done to all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from seg3dcam.engine.head_check import Similarities
from seg3dcam.engine.layer_map import LayerMap
from seg3dcam.engine.maps import Maps
from seg3dcam.engine.run import TargetScore
from seg3dcam.methods.base import Formula
from seg3dcam.network.layers import LayerRef
from seg3dcam.network.layouts import INPUT

#: For every target a list with every method's maps.
Table = list[list[Maps]]


def without_numbers(table: Table, targets: Sequence[TargetScore]) -> Table:
    """Blank the maps of items whose score is no number, which a gradient may not show."""

    def blanked(one: TargetScore, map_: LayerMap) -> LayerMap:
        bad = ~torch.isfinite(one.score).to(map_.values.device)
        if not bad.any():
            return map_
        shape = (-1, *[1] * (map_.values.ndim - 1))
        return replace(map_, values=map_.values.masked_fill(bad.view(shape), math.nan))

    return [
        [{layer: blanked(one, map_) for layer, map_ in maps.items()} for maps in row]
        for one, row in zip(targets, table, strict=True)
    ]


def with_gaps(
    table: Table, formulas: Sequence[Formula], gaps: Mapping[LayerRef, float], reason: str
) -> Table:
    """Note in the maps that are made of gradients which part of the score they miss.

    Args:
        gaps: layer -> that part; layers that could not be checked are left out.
        reason: why they could not.
    """

    def noted(formula: Formula, maps: Maps) -> Maps:
        if formula.gradients_at == "nothing":
            return maps
        of_input = formula.gradients_at == "input"
        places = {layer: INPUT if of_input else layer for layer in maps}
        return {
            layer: replace(
                map_,
                missing=gaps.get(places[layer], 0.0),
                unchecked="" if places[layer] in gaps else reason or "no input suited the check",
            )
            for layer, map_ in maps.items()
        }

    return [[noted(f, maps) for f, maps in zip(formulas, row, strict=True)] for row in table]


def with_heads(table: Table, heads: Sequence[Similarities]) -> Table:
    """Note in the maps how like they are to those of a network whose last layer is random.

    Args:
        heads: for every target, what is known of its maps.
    """
    return [
        [
            {layer: replace(map_, head=of.get((number, layer))) for layer, map_ in maps.items()}
            for number, maps in enumerate(row)
        ]
        for of, row in zip(heads, table, strict=True)
    ]


def combined(combine: Callable[..., LayerMap], *tables: Table) -> Table:
    """Combine the maps at each place of several tables; a layer that one lacks is left out."""
    return [
        [
            {
                layer: combine(*(maps[layer] for maps in cells))
                for layer in cells[0]
                if all(layer in maps for maps in cells)
            }
            for cells in zip(*rows, strict=True)
        ]
        for rows in zip(*tables, strict=True)
    ]
