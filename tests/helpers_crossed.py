"""Tests over all combinations of several lists, of which a default run takes a few."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def crossed(names: str, *axes: Iterable[Any], rows: int | None = None) -> Any:
    """Parametrise a test over all combinations of the values of its arguments.

    A default run takes a diagonal, in which every value is met at least once: the first value of
    each axis, then the second of each, and so on; the shorter axes begin again. The other
    combinations are slow. A value that is added to an axis later is in the diagonal, too.

    Args:
        names: of the arguments, with commas between them.
        axes: the values of each argument.
        rows: the length of the diagonal, where not every value of the longer axes is needed by
            default; those that are taken are spread over the axis.
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
    combinations = itertools.product(*(range(len(column)) for column in columns))
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(
                *(column[n] for column, n in zip(columns, places, strict=True)),
                id="-".join(
                    _id(column[n], f"{name.strip()}{n}")
                    for name, column, n in zip(names.split(","), columns, places, strict=True)
                ),
                marks=[pytest.mark.slow] * (places not in quick),
            )
            for places in combinations
        ],
    )


def _id(value: Any, otherwise: str) -> str:
    """Return what names a value in a test's id, as pytest itself would."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return str(value)
    return getattr(value, "__name__", otherwise)
