"""Damage, by a seed, to the bytes of a file.

    mutated_bytes(content, random.Random(7))     # the same damage for the same seed

Nothing here knows a format. Most damage of a file falls on its start, where headers are.
"""

from __future__ import annotations

import math
import random
import re
import struct
from collections.abc import Callable
from typing import Any

__all__ = ["EXTREME_NUMBERS", "EXTREME_VALUES", "mutated_bytes"]

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
