"""Tests over all combinations of several lists, of which a default run takes a few."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def crossed(
    *axes: Iterable[Any],
    rows: int | None = None,
    also: Iterable[tuple[Any, ...]] = (),
    pairs: bool = False,
) -> list[Any]:
    """Return combinations of the axes' values, to parametrise a test by; most are slow.

    A default run takes a diagonal, in which every value is met at least once: the first value of
    each axis, then the second of each, and so on; the shorter axes begin again. A value that is
    added to an axis later is in the diagonal, too.

    Args:
        rows: the length of the diagonal, where not every value of the longer axes is needed by
            default; those that are taken are spread over the axis.
        also: more combinations for a default run. The diagonal couples axes: where two of them have
            an even length, the first value of one never meets the second of the other.
        pairs: True takes as many combinations as are needed for each value of an axis to meet each
            value of every other; False takes all.

    >>> [case.values for case in crossed("abc", "xy") if not case.marks]
    [('a', 'x'), ('b', 'y'), ('c', 'x')]
    >>> len(crossed("abcd", "xyz", "12")), len(crossed("abcd", "xyz", "12", pairs=True))
    (24, 12)
    """
    columns = [list(axis) for axis in axes]
    rows = rows or max(map(len, columns))
    quick = {
        tuple(
            row * len(column) // rows if len(column) > rows else row % len(column)
            for column in columns
        )
        for row in range(rows)
    }
    chosen = list(also)
    every = list(itertools.product(*(range(len(column)) for column in columns)))

    def at(places: tuple[int, ...]) -> tuple[Any, ...]:
        return tuple(column[place] for column, place in zip(columns, places, strict=True))

    quick |= {places for places in every if at(places) in chosen}
    return [
        pytest.param(*at(places), marks=[pytest.mark.slow] * (places not in quick))
        for places in (_of_all_pairs(every, quick) if pairs else every)
    ]


def _of_all_pairs(
    every: list[tuple[int, ...]], first: set[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """Return combinations in which each two values of different axes meet, `first` among them."""

    def met(places: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(places), 2))

    missing = set[tuple[tuple[int, int], ...]]().union(*map(met, every))
    taken = set(first)
    for places in first:
        missing -= met(places)
    while missing:
        best = max(every, key=lambda places: len(met(places) & missing))
        taken.add(best)
        missing -= met(best)
    return sorted(taken)
