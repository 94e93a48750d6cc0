"""Damage, by a seed: bytes of a file, or nested plain data as YAML and JSON hold it.

    mutated_bytes(content, random.Random(7))     # the same damage for the same seed
    mutated_data({"roi_size": [96, 96]}, random.Random(7))

Nothing here knows a format. Most damage of a file falls on its start, where headers are.
"""

from __future__ import annotations

import copy
import math
import random
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["EXTREME_NUMBERS", "EXTREME_VALUES", "mutated_bytes", "mutated_data", "places"]

#: Numbers at the edge of what types and arithmetic bear.
EXTREME_NUMBERS: tuple[int | float, ...] = (
    *(0, 1, -1, 2, 3, 7, 8, 127, 128, 255, 256, 32767, -32768, 65535),
    *(2**31 - 1, -(2**31), 2**32, 2**63 - 1, -(2**63), 2**64),
    *(0.5, -0.0, 1e-45, 1e-300, 1e38, 1e300, -1e300, math.nan, math.inf, -math.inf),
)

#: Values of every plain type, for a place that expects another one.
EXTREME_VALUES: tuple[Any, ...] = (
    *EXTREME_NUMBERS,
    *(None, True, False, "", " ", "0", "nan", "-1", "a\0b", "ä肝\u202e", "../..", "$x", "x" * 5000),
    *([], {}, [[]], [None], {"": None}, [1, 2, 3, 4, 5, 6, 7], {"a": {"a": {"a": []}}}),
)

_WORDS = (
    *(b"", b"-1", b"0", b"nan", b"inf", b"1e300", b"9" * 40, b"9" * 5000, b"none", b"True"),
    *(b"%s", b"\0", b"\xff\xfe", b"../../etc/hosts", b"1,2", b"LIST", b"()", b"'"),
)


# ------------------------------------------------------------------------------------------ bytes


def mutated_bytes(content: bytes, rng: random.Random, head: int = 400) -> bytes:
    """Return bytes with one to three faults.

    Args:
        head: so many first bytes take most of the damage.
    """
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if damaged:
            rng.choice(_FAULTS)(damaged, rng, head)
    return bytes(damaged)


def _place(content: bytearray, rng: random.Random, head: int) -> int:
    """A byte, mostly one of the header, often at the start of a number."""
    within = min(head, len(content)) if rng.random() < 0.9 else len(content)
    place = rng.randrange(within)
    return place - place % rng.choice((1, 2, 4))


def _flip(content: bytearray, rng: random.Random, head: int) -> None:
    content[_place(content, rng, head)] ^= 1 << rng.randrange(8)


def _number(content: bytearray, rng: random.Random, head: int) -> None:
    """Write an extreme number as a machine does."""
    place, kind = _place(content, rng, head), rng.choice(("bB", "hH", "iI", "qQ", "f", "d"))
    while True:
        number = rng.choice(EXTREME_NUMBERS)
        try:
            number = float(number) if kind in "fd" else int(number)
            raw = struct.pack(rng.choice("<>") + rng.choice(kind), number)
        except (struct.error, ValueError, OverflowError):  # does not fit: take another
            continue
        content[place : place + len(raw)] = raw
        return


def _word(content: bytearray, rng: random.Random, head: int) -> None:
    """Replace a number or a word of a text."""
    words = list(re.finditer(rb"[-+.\w]+", bytes(content[:head])))
    if words:
        found = rng.choice(words)
        other = rng.choice(words)[0] if rng.random() < 0.3 else rng.choice(_WORDS)
        content[found.start() : found.end()] = other


def _truncate(content: bytearray, rng: random.Random, head: int) -> None:
    del content[rng.randrange(len(content)) if rng.random() < 0.5 else _place(content, rng, head) :]


def _cut(content: bytearray, rng: random.Random, head: int) -> None:
    place = _place(content, rng, head)
    del content[place : place + rng.randint(1, 40)]


def _repeat(content: bytearray, rng: random.Random, head: int) -> None:
    place = _place(content, rng, head)
    content[place:place] = content[place : place + rng.randint(1, 80)]


def _swap(content: bytearray, rng: random.Random, head: int) -> None:
    one, other = _place(content, rng, head), _place(content, rng, head)
    size = rng.choice((1, 2, 4, 8))
    content[one : one + size], content[other : other + size] = (
        content[other : other + size],
        content[one : one + size],
    )


def _fill(content: bytearray, rng: random.Random, head: int) -> None:
    place, size = _place(content, rng, head), rng.randint(1, 64)
    size = min(size, len(content) - place)
    content[place : place + size] = bytes([rng.choice((0, 0xFF, 0x20))]) * size


_FAULTS: tuple[Callable[[bytearray, random.Random, int], None], ...] = (
    *(_flip, _number, _number, _number, _word, _word),
    *(_truncate, _cut, _repeat, _swap, _fill),
)


# ------------------------------------------------------------------------------------- plain data


def mutated_data(data: Any, rng: random.Random) -> Any:
    """Return a copy of nested dicts and lists with one or two faults; the given one is kept."""
    damaged = copy.deepcopy(data)
    for _ in range(rng.choice((1, 1, 2))):
        found = list(places(damaged))
        if not found:
            return rng.choice(EXTREME_VALUES)
        holder, key = rng.choice(found)
        rng.choice(_CHANGES)(holder, key, rng, found)
    return damaged


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each (container, key) of nested dicts and lists."""
    keys = list(data) if isinstance(data, dict) else range(len(data))
    for key in keys if isinstance(data, (dict, list)) else ():
        yield data, key
        if isinstance(data[key], (dict, list)):
            yield from places(data[key])


def _replace(holder: Any, key: Any, rng: random.Random, found: list) -> None:
    holder[key] = copy.deepcopy(rng.choice(EXTREME_VALUES))


def _delete(holder: Any, key: Any, rng: random.Random, found: list) -> None:
    del holder[key]


def _wrap(holder: Any, key: Any, rng: random.Random, found: list) -> None:
    holder[key] = rng.choice(([holder[key]], {"x": holder[key]}, [holder[key]] * 3))


def _of_another(holder: Any, key: Any, rng: random.Random, found: list) -> None:
    other, place = rng.choice(found)
    holder[key] = copy.deepcopy(other[place])


def _rename(holder: Any, key: Any, rng: random.Random, found: list) -> None:
    if isinstance(holder, dict):
        holder[rng.choice(("", "x", f"{key}s", str(key).upper(), 5, None))] = holder.pop(key)


def _as_text(holder: Any, key: Any, rng: random.Random, found: list) -> None:
    holder[key] = str(holder[key])


_CHANGES = (_replace, _replace, _replace, _delete, _wrap, _of_another, _rename, _as_text)
