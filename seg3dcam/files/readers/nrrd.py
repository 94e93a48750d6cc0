"""Read headers of NRRD, 3D Slicer's format: `.nrrd`, or `.nhdr` with the voxels in another file."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from seg3dcam.errors import ScanError, tell
from seg3dcam.files.readers.fields import beside, choice, illegal, needed, numbers, whole_numbers
from seg3dcam.files.readers.plan import Packing, Plan
from seg3dcam.geometry import LPS_TO_RAS, checked_affine

__all__ = ["plan_nrrd"]

_LONGEST_LINE, _LONGEST_HEADER = 2**20, 2**24

_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": (
        *("longlong", "long long", "long long int", "signed long long"),
        *("signed long long int", "int64", "int64_t"),
    ),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_TYPE_OF = {word: kind for kind, words in _TYPES.items() for word in words}
_PACKING: dict[str, Packing] = {"raw": "plain", "gzip": "gzip", "gz": "gzip"}
_ENDIAN = {"little": "<", "big": ">"}

_FLIP_X = np.diag([-1.0, 1.0, 1.0, 1.0])
#: Name of a patient's space -> matrix from there to RAS.
_SPACES = {
    "left-posterior-superior": LPS_TO_RAS,
    "lps": LPS_TO_RAS,
    "right-anterior-superior": np.eye(4),
    "ras": np.eye(4),
    "left-anterior-superior": _FLIP_X,
    "las": _FLIP_X,
}
#: Spaces that are not a patient's. They are read as LPS, as ITK does, with a warning.
_OTHER_SPACES = ("scanner-xyz", "3d-right-handed", "3d-left-handed")
_OTHER_NAMES = {
    **{"datafile": "data file", "byteskip": "byte skip", "lineskip": "line skip"},
    **{"axismins": "axis mins", "axismaxs": "axis maxs", "centerings": "centers"},
}


def plan_nrrd(path: Path) -> Plan:
    """Read the header of an NRRD file."""
    fields, words, end = _header(path)
    axes = whole_numbers(needed(fields, "dimension", path), 1, path, "dimension")[0]
    if axes > 16:
        raise illegal(path, "dimension", axes, "1 to 16, of which 3 are space")
    sizes = whole_numbers(needed(fields, "sizes", path), axes, path, "sizes")
    spatial, affine = _place(fields, sizes, path)
    kind = choice(needed(fields, "type", path), list(_TYPE_OF), path, "type")
    dtype = np.dtype(_TYPE_OF[kind])
    if dtype.itemsize > 1:
        order = choice(needed(fields, "endian", path), list(_ENDIAN), path, "endian")
        dtype = np.dtype(_ENDIAN[order] + dtype.str[1:])
    encoding = needed(fields, "encoding", path).strip().lower()
    if encoding not in _PACKING:
        raise illegal(path, "encoding", encoding, "raw, gzip. Save it again with one of these")
    shape = tuple(sizes[axis] for axis in spatial)
    voxels = None
    if "data file" in fields:
        voxels, end = beside(fields["data file"], path, "data file"), 0
    plan = Plan(
        path=path,
        shape=(1, *shape),  # type: ignore[arg-type]
        affine=affine,
        dtype=dtype,
        voxels=voxels,
        start=end,
        packing=_PACKING[encoding],
        segments=any(re.fullmatch(r"Segment\d+_ID", word) for word in words),
    )
    return _skipped(plan, fields)


def _header(path: Path) -> tuple[dict[str, str], dict[str, str], int]:
    """Return the fields, the keys that a program added, and the byte where the voxels start."""
    fields: dict[str, str] = {}
    words: dict[str, str] = {}
    with path.open("rb") as file:
        if not re.match(rb"NRRD000[1-5]\s*$", file.readline(64)):
            raise ScanError(
                f"{path}: not an NRRD file: it does not start with NRRD0001 to NRRD0005. Check "
                "that it is the right file."
            )
        while line := file.readline(_LONGEST_LINE):
            if len(line) == _LONGEST_LINE or file.tell() > _LONGEST_HEADER:
                raise ScanError(f"{path}: damaged: the header does not end. Copy it again.")
            text = line.decode("utf-8", errors="replace").rstrip("\r\n")
            if not text:
                break
            _sort(text, fields, words, path)
            if fields.get("data file", "").startswith("LIST"):  # file names follow
                break
        return fields, words, file.tell()


def _sort(text: str, fields: dict[str, str], words: dict[str, str], path: Path) -> None:
    """Add a line of a header to the fields, or to the keys that a program added."""
    if text.startswith("#"):
        return
    word, is_word, value = text.partition(":=")
    name, is_field, found = text.partition(": ")
    if is_word and len(word) < len(name):
        words[word] = value
        return
    if not is_field:
        raise illegal(path, "line", text, "'field: value', 'key:=value', '# comment'")
    name = _OTHER_NAMES.get(name.lower(), name.lower())
    if name in fields:
        raise illegal(path, name, found, f"one value; it is there twice, as {fields[name]!r} too")
    fields[name] = found.strip()


def _skipped(plan: Plan, fields: dict[str, str]) -> Plan:
    """Skip the bytes that, as the header says, come before the voxels."""
    path = plan.path
    if fields.get("line skip", "0") != "0":
        raise illegal(path, "line skip", fields["line skip"], "0. Save it again as one .nrrd")
    skip = whole_numbers(fields.get("byte skip", "0"), 1, path, "byte skip", low=-1)[0]
    if skip == -1:
        if plan.packing != "plain":
            raise illegal(path, "byte skip", skip, "-1 with encoding raw alone")
        size = (plan.voxels or path).stat().st_size
        return replace(plan, start=max(size - plan.voxel_bytes, plan.start))
    return replace(plan, skip=skip)


# ---------------------------------------------------------------------------------------- place


def _place(
    fields: dict[str, str], sizes: Sequence[int], path: Path
) -> tuple[list[int], npt.NDArray[np.float64]]:
    """Return the three spatial axes, and the affine to RAS."""
    to_ras, unsure = _space(fields, path)
    _refuse_two_grids(fields, path)
    directions = _directions(fields, len(sizes), path)
    spatial = _spatial_axes(fields, sizes, directions, path)
    matrix = np.eye(4)
    if directions is None:
        steps = np.array(_per_axis(fields, "spacings", len(sizes), path))[spatial]
        if (steps <= 0).any():
            raise illegal(path, "spacings", fields["spacings"], "distances above 0")
        matrix[:3, :3] = np.diag(np.where(np.isnan(steps), 1, steps))  # 1 where it is not said
        matrix[:3, 3] = _first_voxel(fields, steps, spatial, len(sizes), path)
        unsure = unsure or "space directions"
    else:
        matrix[:3, :3] = np.array([directions[axis] for axis in spatial]).T
    if "space origin" in fields:
        matrix[:3, 3] = _vector(fields["space origin"], path, "space origin")
    else:
        unsure = unsure or "space origin"
    if unsure:
        tell(
            f"{path}: the header has no usable {unsure!r}, so it does not say where the scan lies. "
            "It is read as ITK and 3D Slicer do, with axes to the left, back and up: left and "
            "right may be swapped. Write space, space directions and space origin into it."
        )
    return spatial, checked_affine(to_ras @ matrix, str(path), ScanError)


def _space(fields: dict[str, str], path: Path) -> tuple[npt.NDArray[np.float64], str]:
    """Return the matrix from a header's space to RAS; and the field that is missing, or ""."""
    for unit in re.findall(r'"([^"]*)"', fields.get("space units", "")):
        if unit.strip().lower() not in ("", "mm", "millimeter", "millimeters", "millimetre", "???"):
            raise illegal(path, "space units", unit, "mm. Bring it to mm and save it again")
    if "space" not in fields:
        for key in ("space directions", "space origin"):
            if key in fields and "space dimension" not in fields:
                raise illegal(path, key, fields[key], "no such field where there is no 'space'")
        return LPS_TO_RAS, "space"
    space = fields["space"].strip().lower()
    if space in _SPACES:
        return _SPACES[space], ""
    if space in _OTHER_SPACES:
        return LPS_TO_RAS, "space"
    if re.fullmatch(r".*-time|rast|last|lpst", space):
        raise illegal(
            path,
            "space",
            space,
            "a space of three axes, as left-posterior-superior. Save each time point as a volume",
        )
    legal = "left-posterior-superior, right-anterior-superior, left-anterior-superior"
    raise illegal(path, "space", space, legal)


def _directions(fields: dict[str, str], axes: int, path: Path) -> list[list[float] | None] | None:
    """Return a vector per axis, None for an axis that is not spatial; None without the field."""
    text = fields.get("space directions")
    if text is None:
        return None
    parts = re.findall(r"none|\([^)]*\)", text)
    if len(parts) != axes or re.sub(r"none|\([^)]*\)|\s", "", text):
        raise illegal(path, "space directions", text, f"{axes} of (x,y,z) or none")
    return [None if p == "none" else _vector(p, path, "space directions") for p in parts]


def _vector(text: str, path: Path, key: str) -> list[float]:
    found = re.fullmatch(r"\s*\(([^()]*)\)\s*", text)
    if not found or found[1].count(",") != 2:
        raise illegal(path, key, text, "(x,y,z), three finite numbers")
    return numbers(found[1].replace(",", " "), 3, path, key)


def _refuse_two_grids(fields: dict[str, str], path: Path) -> None:
    """Refuse a header that gives its grid twice, in space and axis by axis; so does ITK."""
    in_space = [key for key in ("space", "space dimension", "space directions") if key in fields]
    for key in ("spacings", "axis mins", "axis maxs"):
        if in_space and any(word.lower() != "nan" for word in fields.get(key, "").split()):
            legal = f"nan, or no such field, beside {in_space[0]!r}, as the grid is in "
            raise illegal(path, key, fields[key], f"{legal}space directions and space origin")


def _per_axis(fields: dict[str, str], key: str, axes: int, path: Path) -> list[float]:
    """Return one number for each axis, NaN where the header gives none."""
    words = fields.get(key, "nan " * axes).split()
    if len(words) != axes:
        raise illegal(path, key, fields[key], f"{axes} numbers, one per axis")
    return [math.nan if word.lower() == "nan" else numbers(word, 1, path, key)[0] for word in words]


def _first_voxel(
    fields: dict[str, str],
    steps: npt.NDArray[np.float64],
    spatial: Sequence[int],
    axes: int,
    path: Path,
) -> npt.NDArray[np.float64]:
    """Return the centre of the first voxel, for a header that gives its grid axis by axis.

    As in ITK, `axis mins` is where the first voxel starts, or its centre if `centers` says node.
    Without `axis mins` the origin is 0.
    """
    words = fields.get("centers", "??? " * axes).lower().split()
    if len(words) != axes or not {*words} <= {"cell", "node", "none", "???"}:
        raise illegal(
            path, "centers", fields["centers"], f"{axes} of cell, node, ???, one per axis"
        )
    starts = np.array(_per_axis(fields, "axis mins", axes, path))[spatial]
    if np.isnan(starts).all():
        return np.zeros(3)
    if np.isnan(starts).any():
        raise illegal(path, "axis mins", fields["axis mins"], "a finite number per axis of space")
    if np.isnan(steps).any():  # ITK would take 1 mm, whatever `axis maxs` says
        raise illegal(
            path, "axis mins", fields["axis mins"], "axis mins beside spacings of every axis"
        )
    return np.array(
        [
            start if words[axis] == "node" else start + step / 2
            for axis, start, step in zip(spatial, starts, steps, strict=True)
        ]
    )


def _spatial_axes(
    fields: dict[str, str],
    sizes: Sequence[int],
    directions: Sequence[list[float] | None] | None,
    path: Path,
) -> list[int]:
    """Return the axes that are x, y and z; refuse an image with several values per voxel."""
    kinds = fields.get("kinds", "").split()
    if kinds and len(kinds) != len(sizes):
        raise illegal(path, "kinds", fields["kinds"], f"{len(sizes)} words, one per axis")
    if directions is not None:
        spatial = [axis for axis, vector in enumerate(directions) if vector is not None]
    else:
        of_space = {"domain", "space", "???", "none"}
        spatial = [n for n in range(len(sizes)) if not kinds or kinds[n].lower() in of_space]
    others = [axis for axis in range(len(sizes)) if axis not in spatial]
    # If there are more than three, axes of one voxel at the end do not count as spatial.
    while len(spatial) > 3 and sizes[spatial[-1]] == 1:
        spatial.pop()
    several = [axis for axis in others if sizes[axis] > 1]
    if len(spatial) == 3 and not several:
        return spatial
    if len(spatial) < 3 and not several:
        raise ScanError(
            f"{path}: the image is {len(spatial)}-D, sizes {list(sizes)}. Legal: a volume. Join "
            "the slices to one; a single slice has sizes X Y 1."
        )
    which = ", ".join(kinds[axis] if kinds else "no space" for axis in several) or "4-D"
    raise ScanError(
        f"{path}: the image holds several values per voxel, sizes {list(sizes)} ({which}): "
        "colours, vectors, time points, channels, or segments that overlap. Legal: one value. "
        "Save each channel as a file of its own and give the list of them; of a segmentation, "
        "export a label map."
    )
