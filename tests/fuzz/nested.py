"""Seeded mutations of nested plain data: what is in JSON and YAML files and in checkpoints."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

Place = tuple[Any, ...]

#: What a value may be replaced by: other types, and the ends of each.
EXTREMES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 99, 10**6, -(10**9), 2**63, 10**30, 10**400),
    *(0.5, -0.5, 1e-9, 1e9, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", " ", "0", "1", "-1", "None", "a", "é", "\x00", "\r\n", "../..", "os.system", "x" * 3000),
    *([], {}, [[]], [None], [0], [1, 2], [1, 1], [-1], ["a"], [10**30], list(range(40))),
    *({"a": 1}, {"": None}, {"0": {}}, {"background": 0}),
)


#: What may happen to a value.
CHANGES = ("drop", "replace", "replace", "replace", "wrap", "swap", "rename", "twice")


def mutated(
    content: Any, rng: random.Random, extremes: Sequence[Any] = EXTREMES
) -> tuple[Any, str]:
    """Return a copy with one thing changed, and what was changed in it."""
    place, change, value = _a_place(content, rng), rng.choice(CHANGES), rng.choice(extremes)
    shown = f"{value!r:.60}" if type(value) in (str, float, list, dict) else type(value).__name__
    return changed(content, place, change, value), f"{change} {place} by {shown}"


def _a_place(content: Any, rng: random.Random) -> Place:
    """Return where some value lies; what has few neighbours is as likely as what has many."""
    place: list[Any] = []
    while isinstance(content, dict | list | tuple) and content:
        keys = list(content) if isinstance(content, dict) else range(len(content))
        place.append(rng.choice(keys))
        content = content[place[-1]]
        if rng.random() < 0.25:
            break
    return tuple(place)


def changed(content: Any, place: Place, change: str, value: Any = None) -> Any:
    """Return a copy in which the value at a place is dropped, replaced and so on."""
    content = copy.copy(content)  # along the way alone: tensors stay as they are
    was_tuple = isinstance(content, tuple)
    content = list(content) if was_tuple else content
    key, *rest = place
    if rest:
        content[key] = changed(content[key], tuple(rest), change, value)
    elif change == "drop":
        del content[key]
    elif change == "wrap":
        content[key] = [content[key]]
    elif change == "swap":
        content[key] = _of_another_type(content[key])
    elif change == "rename" and isinstance(content, dict):
        content[value if isinstance(value, str | int | None) else str(value)] = content.pop(key)
    elif change == "twice" and isinstance(content, list):
        content.insert(key, content[key])
    else:
        content[key] = value
    return tuple(content) if was_tuple else content


def _of_another_type(value: Any) -> Any:
    """Return the same value as it is written by somebody who takes another type."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return float(value)
    if isinstance(value, float):
        return str(value)
    if isinstance(value, str):
        return int(value) if value.isdecimal() else [value]
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list | tuple):
        return {str(key): item for key, item in enumerate(value)}
    return str(value)
