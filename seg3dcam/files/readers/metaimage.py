"""Read headers of MetaImage, ITK's format: `.mha`, or `.mhd` with the voxels in another file."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from seg3dcam.errors import ScanError, tell
from seg3dcam.files.readers.fields import beside, choice, illegal, needed, numbers, whole_numbers
from seg3dcam.files.readers.plan import Plan, channels_first
from seg3dcam.geometry import LPS_TO_RAS, checked_affine

__all__ = ["plan_meta"]

_LONGEST_LINE, _LONGEST_HEADER = 2**16, 2**20

_TYPES = {
    "met_char": "i1",
    "met_uchar": "u1",
    "met_short": "i2",
    "met_ushort": "u2",
    "met_int": "i4",
    "met_uint": "u4",
    "met_long": "i4",  # always of four bytes, on every machine
    "met_ulong": "u4",
    "met_long_long": "i8",
    "met_ulong_long": "u8",
    "met_float": "f4",
    "met_double": "f8",
}
#: Other names of a field -> the name that ITK writes.
_SAME = {
    "Position": "Offset",
    "Origin": "Offset",
    "Orientation": "TransformMatrix",
    "Rotation": "TransformMatrix",
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}
#: The fields that are read; others are ignored.
_KNOWN = {
    *("NDims", "DimSize", "ElementType", "ElementNumberOfChannels", "ElementSpacing"),
    *("ElementSize", "Offset", "TransformMatrix", "DistanceUnits", "BinaryData"),
    *("BinaryDataByteOrderMSB", "CompressedData", "HeaderSize", "ElementDataFile"),
}


def plan_meta(path: Path) -> Plan:
    """Read the header of a MetaImage."""
    fields, end = _header(path)
    axes = whole_numbers(needed(fields, "NDims", path), 1, path, "NDims")[0]
    if axes > 10:
        raise illegal(path, "NDims", axes, "3")
    sizes = whole_numbers(needed(fields, "DimSize", path), axes, path, "DimSize")
    channels, *shape = channels_first(sizes, path)
    per_voxel = fields.get("ElementNumberOfChannels", "1")
    if channels > 1 or whole_numbers(per_voxel, 1, path, "ElementNumberOfChannels") != [1]:
        raise ScanError(
            f"{path}: the image holds several values per voxel, DimSize {sizes}, "
            f"ElementNumberOfChannels {per_voxel}: colours, vectors, time points or channels. "
            "Legal: one value. Save each channel as a file of its own and give the list of them."
        )
    kind = choice(needed(fields, "ElementType", path), list(_TYPES), path, "ElementType")
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
        packing="zlib" if packed else "plain",
    )
    return replace(plan, start=_start(plan, fields, end if voxels is None else 0))


def _header(path: Path) -> tuple[dict[str, str], int]:
    """Return the known fields, and the byte at which the header ends, after `ElementDataFile`.

    ITK also writes whatever else it knows about an image, such as `0008|0008 = ORIGINAL`. Such a
    field may have any name and any text, even one of several lines.
    """
    fields: dict[str, str] = {}
    torn = b""
    with path.open("rb") as file:
        while "ElementDataFile" not in fields:
            line = file.readline(_LONGEST_LINE)
            if not line or len(line) == _LONGEST_LINE or file.tell() > _LONGEST_HEADER:
                raise ScanError(
                    f"{path}: not a MetaImage: it does not start with lines of text, 'Key = Value',"
                    " the last of which is ElementDataFile. Check that it is the right file, or "
                    "copy it again."
                )
            found = _split(line)
            if not found:  # a blank line, or a line inside a longer text
                torn = torn or line.strip()
                continue
            key, value = found
            if key in _KNOWN:
                if torn:
                    raise _lost(path, torn, key)
                if key in fields:
                    raise illegal(path, key, value, f"one value; another one is {fields[key]!r}")
                fields[key] = value
            torn = b""
        return fields, file.tell()


def _split(line: bytes) -> tuple[str, str] | None:
    """Return the name and the value on either side of the first = or :, None if there is none."""
    found = re.fullmatch(rb"([^=:]*)[=:](.*)", line, re.DOTALL)
    if not found:
        return None
    key, value = (part.strip().decode("latin-1") for part in found.groups())
    return _SAME.get(key, key), value


def _lost(path: Path, torn: bytes, key: str) -> ScanError:
    """Return the error for a line without = or :. ITK would give it the value of the next line."""
    legal = f"'Key = Value'. ITK takes the value of the field behind it, so that {key!r} is lost"
    return illegal(path, "line", torn.decode("latin-1"), legal)


def _is_true(fields: dict[str, str], key: str, path: Path) -> bool:
    return choice(fields.get(key, "False"), ("true", "false", "1", "0"), path, key) in ("true", "1")


def _start(plan: Plan, fields: dict[str, str], end: int) -> int:
    """Return the byte of the file at which the voxels start.

    - `end`: where the header ends in that file; 0 if the voxels have a file of their own.

    As in ITK, `HeaderSize` counts from the start of the file, and -1 means that the voxels are the
    last bytes of the file.
    """
    path = plan.path
    size = whole_numbers(fields.get("HeaderSize", "0"), 1, path, "HeaderSize", low=-1)[0]
    if size == -1 and plan.packing == "plain":
        return max((plan.voxels or path).stat().st_size - plan.voxel_bytes, end)
    if size == -1:
        raise illegal(path, "HeaderSize", size, "-1 where CompressedData is False alone")
    if 0 < size < end:
        raise illegal(path, "HeaderSize", size, f"0, -1, or from {end} up, where the header ends")
    return size or end


def _place(fields: dict[str, str], axes: int, path: Path) -> npt.NDArray[np.float64]:
    """Return the affine to RAS mm; a MetaImage gives its place in LPS."""
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
