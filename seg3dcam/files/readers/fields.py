"""Check the fields in the text headers of NRRD and MetaImage, and convert them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from seg3dcam.errors import ScanError, nearest

__all__ = ["beside", "choice", "illegal", "needed", "numbers", "whole_numbers"]

_MOST_DIGITS = 12


def illegal(path: Path, key: str, found: object, legal: str) -> ScanError:
    """Return the error for a field with an illegal value."""
    shown = str(found) if len(str(found)) <= 80 else f"{str(found)[:80]}…"
    return ScanError(
        f"{path}: the header's {key!r} is {shown!r}. Legal: {legal}. Write the file again with the "
        "program that made it."
    )


def needed(fields: dict[str, str], key: str, path: Path) -> str:
    """Return a field; raise ScanError if the header lacks it."""
    if key not in fields:
        raise ScanError(
            f"{path}: the header has no field {key!r}. The file is damaged: copy it again, or "
            "write it again with the program that made it."
        )
    return fields[key]


def numbers(text: str, count: int, path: Path, key: str) -> list[float]:
    """Return the numbers in a text; raise ScanError unless they are `count` finite ones."""
    try:
        found = [float(part) for part in text.split() if text.isascii()]
    except ValueError:
        found = []
    if len(found) != count or not all(map(math.isfinite, found)):
        raise illegal(path, key, text, f"{count} finite number{'s' * (count > 1)}")
    return found


def whole_numbers(text: str, count: int, path: Path, key: str, low: int = 1) -> list[int]:
    """Return the whole numbers in a text; raise ScanError unless they are `count` from `low` up."""
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
    """Return a word in small letters; raise ScanError unless it is one of the legal ones."""
    word = text.strip().lower()
    if word not in legal:
        raise illegal(path, key, text, nearest(word, legal).removeprefix("legal: "))
    return word


def beside(name: str, path: Path, key: str) -> Path:
    """Return the file that a header names for its voxels; it must lie beside the header.

    A header from a stranger must not choose which file of this machine is read, and a link that
    came with it must not do so either. So, once all links are followed, the file must lie in the
    header's folder. If the path of the header is itself a link, the folder of the link and the
    folder that it leads to are both legal. git-annex and DataLad keep the files of a data set in a
    store under its .git, and links to them in its folders. Such links are followed too.
    """
    if name.startswith("LIST") or "%" in name:  # how ITK recognises several files
        legal = "the name of one file; voxels in several files are not read. Save one .nrrd or .mha"
        raise illegal(path, key, name, legal)
    name = name.removeprefix("./")
    if name in ("", ".", "..") or "\0" in name or Path(name).name != name or "\\" in name:
        raise illegal(path, key, name, "the name of one file in the same folder")
    voxels = path.with_name(name)
    if not voxels.is_file():
        lost = "the link there leads to no file" if voxels.is_symlink() else "there is no such file"
        raise ScanError(
            f"{path}: its voxels should be in the file {name!r} beside it, and {lost}. Copy both; "
            "in a data set of git-annex or DataLad, get both."
        )
    if not _lies_there(voxels.resolve(), path):
        raise ScanError(
            f"{path}: its voxels should be in the file {name!r} beside it, and that is a link to "
            f"{voxels.resolve()}. Legal: a file in the header's own folder; a header must not "
            "choose which file of this machine is read. If it is the right one, copy it there."
        )
    return voxels


def _lies_there(voxels: Path, path: Path) -> bool:
    """Tell whether a file, whose links were followed, lies where the header may name it."""
    folder = path.parent.resolve()
    if voxels.parent in (folder, path.resolve().parent):
        return True
    # If .git is a link, the resolved path of the file does not lie in it, and does not match here.
    sets = [above for above in (folder, *folder.parents) if voxels.is_relative_to(above / ".git")]
    return any("/annex/objects/" in voxels.relative_to(above).as_posix() for above in sets)
