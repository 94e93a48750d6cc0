"""MetaImage, ITK's own format: `.mha`, and `.mhd` with the voxels in a file beside it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from seg3dcam.errors import ScanError, tell
from seg3dcam.geometry import LPS_TO_RAS, checked_affine
from seg3dcam.readers.fields import beside, choice, illegal, numbers, whole_numbers
from seg3dcam.readers.plan import Plan, channels_first

__all__ = ["plan_meta"]

_LONGEST_LINE, _LONGEST_HEADER = 2**16, 2**20

_TYPES = {
    "met_char": "i1",
    "met_uchar": "u1",
    "met_short": "i2",
    "met_ushort": "u2",
    "met_int": "i4",
    "met_uint": "u4",
    "met_long": "i4",  # of four bytes, whatever the machine
    "met_ulong": "u4",
    "met_long_long": "i8",
    "met_ulong_long": "u8",
    "met_float": "f4",
    "met_double": "f8",
}
#: Names for one thing: ITK's own first.
_SAME = {
    "Position": "Offset",
    "Origin": "Offset",
    "Orientation": "TransformMatrix",
    "Rotation": "TransformMatrix",
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}


def plan_meta(path: Path) -> Plan:
    """Read the header of a MetaImage."""
    fields, end = _header(path)
    axes = whole_numbers(_needed(fields, "NDims", path), 1, path, "NDims")[0]
    if axes > 10:
        raise illegal(path, "NDims", axes, "3")
    sizes = whole_numbers(_needed(fields, "DimSize", path), axes, path, "DimSize")
    channels, *shape = channels_first(sizes, path)
    per_voxel = fields.get("ElementNumberOfChannels", "1")
    if channels > 1 or whole_numbers(per_voxel, 1, path, "ElementNumberOfChannels") != [1]:
        raise ScanError(
            f"{path}: the image holds several values per voxel, DimSize {sizes}, "
            f"ElementNumberOfChannels {per_voxel}: colours, vectors, time points or channels. "
            "Legal: one value. Save each channel as a file of its own and give the list of them."
        )
    kind = choice(_needed(fields, "ElementType", path), list(_TYPES), path, "ElementType")
    order = ">" if _is_true(fields, "BinaryDataByteOrderMSB", path) else "<"
    if not _is_true(fields, "BinaryData", path):
        raise illegal(path, "BinaryData", fields.get("BinaryData", "missing"), "True")
    place = fields["ElementDataFile"]
    voxels = None if place.upper() == "LOCAL" else beside(place, path, "ElementDataFile")
    packed = _is_true(fields, "CompressedData", path)
    plan = Plan(
        path=path,
        shape=(1, *shape),  # type: ignore[arg-type]
        affine=_place(fields, axes, path),
        dtype=np.dtype(order + _TYPES[kind]),
        voxels=voxels,
        start=end if voxels is None else 0,
        packing="zlib" if packed else "plain",
    )
    return plan if voxels is None else _after_foreign_header(plan, fields)


def _header(path: Path) -> tuple[dict[str, str], int]:
    """Return the fields, of which `ElementDataFile` is the last, and where the voxels start."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        while "ElementDataFile" not in fields:
            line = file.readline(_LONGEST_LINE)
            found = re.fullmatch(r"\s*(\w+)\s*[=:]\s*(.*?)\s*", line.decode("latin-1"))
            if (not found and line.strip()) or not line or file.tell() > _LONGEST_HEADER:
                raise ScanError(
                    f"{path}: not a MetaImage: its header is no list of 'Key = Value' that ends "
                    "with ElementDataFile. Check that it is the right file, or copy it again."
                )
            if found:
                key, value = _SAME.get(found[1], found[1]), found[2]
                if key in fields:
                    raise illegal(path, key, value, f"one value; another one is {fields[key]!r}")
                fields[key] = value
        return fields, file.tell()


def _needed(fields: dict[str, str], key: str, path: Path) -> str:
    if key not in fields:
        raise ScanError(
            f"{path}: the header has no {key!r}. The file is damaged: copy it again, or write it "
            "again with the program that made it."
        )
    return fields[key]


def _is_true(fields: dict[str, str], key: str, path: Path) -> bool:
    return choice(fields.get(key, "False"), ("true", "false", "1", "0"), path, key) in ("true", "1")


def _after_foreign_header(plan: Plan, fields: dict[str, str]) -> Plan:
    """Leave out the bytes before the voxels in a file of their own; -1: they are its last."""
    path = plan.path
    size = whole_numbers(fields.get("HeaderSize", "0"), 1, path, "HeaderSize", low=-1)[0]
    if size == -1 and plan.voxels is not None:
        size = max(plan.voxels.stat().st_size - plan.voxel_bytes, 0)
    return Plan(**{**vars(plan), "start": size})


def _place(fields: dict[str, str], axes: int, path: Path) -> npt.NDArray[np.float64]:
    """Return the affine to RAS: a MetaImage's own place is LPS."""
    key = "ElementSpacing" if "ElementSpacing" in fields else "ElementSize"
    steps = np.ones(axes)
    if key in fields:
        steps = np.array(numbers(fields[key], axes, path, key))
        if steps.min() <= 0:
            raise illegal(path, key, fields[key], "distances above 0")
    if (unit := fields.get("DistanceUnits", "?").lower()) not in ("?", "", "mm", "millimeter"):
        raise illegal(path, "DistanceUnits", unit, "mm. Bring it to mm and save it again")
    lost = [name for name in ("Offset", "TransformMatrix") if name not in fields]
    if lost or key not in fields:
        tell(
            f"{path}: the header has no {' and no '.join(lost or ['ElementSpacing'])}, so it does "
            "not say where the scan lies. It is read as ITK does, with axes to the left, back and "
            "up: left and right may be swapped."
        )
    lps = np.eye(4)
    directions = np.eye(axes)
    if "TransformMatrix" in fields:
        turns = numbers(fields["TransformMatrix"], axes * axes, path, "TransformMatrix")
        directions = np.array(turns).reshape(axes, axes)  # a row is the direction of one axis
    lps[:3, :3] = directions[:3, :3].T * steps[:3]
    if "Offset" in fields:
        lps[:3, 3] = numbers(fields["Offset"], axes, path, "Offset")[:3]
    return checked_affine(LPS_TO_RAS @ lps, str(path), ScanError)
