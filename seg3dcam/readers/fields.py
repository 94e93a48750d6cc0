"""Numbers in the text headers of NRRD and MetaImage, checked one by one."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from seg3dcam.errors import ScanError, nearest

__all__ = ["beside", "choice", "illegal", "numbers", "whole_numbers"]

_MOST_DIGITS = 12


def illegal(path: Path, key: str, found: object, legal: str) -> ScanError:
    """Return the error for a field outside of its schema."""
    shown = str(found) if len(str(found)) <= 80 else f"{str(found)[:80]}…"
    return ScanError(
        f"{path}: the header's {key!r} is {shown!r}. Legal: {legal}. Write the file again with the "
        "program that made it."
    )


def numbers(text: str, count: int, path: Path, key: str) -> list[float]:
    """Return exactly `count` finite numbers."""
    try:
        found = [float(part) for part in text.split() if text.isascii()]
    except ValueError:
        found = []
    if len(found) != count or not all(map(math.isfinite, found)):
        raise illegal(path, key, text, f"{count} finite number{'s' * (count > 1)}")
    return found


def whole_numbers(text: str, count: int, path: Path, key: str, low: int = 1) -> list[int]:
    """Return exactly `count` whole numbers from `low` up."""
    parts = text.split()
    plain = text.isascii() and all(
        re.fullmatch(rf"[+-]?\d{{1,{_MOST_DIGITS}}}", part) for part in parts
    )
    found = [int(part) for part in parts] if plain else []
    if len(found) != count or min(found) < low:
        many = "a whole number" if count == 1 else f"{count} whole numbers"
        raise illegal(path, key, text, f"{many} from {low} up")
    return found


def choice(text: str, legal: Sequence[str], path: Path, key: str) -> str:
    """Return a word that is one of those that are known, in small letters."""
    word = text.strip().lower()
    if word not in legal:
        raise illegal(path, key, text, nearest(word, legal).removeprefix("legal: "))
    return word


def beside(name: str, path: Path, key: str) -> Path:
    """Return the file of the voxels that a header names: one that lies beside it, no other.

    A header from a stranger must not choose which file of this machine is read.
    """
    if name.startswith("./"):
        name = name[2:]
    if name in ("", ".", "..") or "\0" in name or Path(name).name != name or "\\" in name:
        raise illegal(path, key, name, "the name of one file in the same folder")
    voxels = path.with_name(name)
    if not voxels.is_file():
        raise ScanError(
            f"{path}: its voxels should be in the file {name!r} beside it, and there is no such "
            "file. Copy both."
        )
    return voxels
