"""Combinations of values for tests, of which a quick run tries a part."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def thinned(*axes: Iterable[Any], every: int = 3) -> list[Any]:
    """Return every combination of the axes' values, to parametrize a test by; most are slow.

    A quick run tries those whose values have numbers, from 0 on, with a sum that `every` divides.
    Of axes that are as long as `every`, each two values of two axes still meet once.

    >>> [case.values for case in thinned("abc", "xyz") if not case.marks]
    [('a', 'x'), ('b', 'z'), ('c', 'y')]
    """
    numbered = [list(enumerate(axis)) for axis in axes]
    cases = []
    for case in product(*numbered):
        numbers, values = zip(*case, strict=True)
        slow = [pytest.mark.slow] * (sum(numbers) % every > 0)
        cases.append(pytest.param(*values, marks=slow))
    return cases
