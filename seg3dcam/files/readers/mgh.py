"""Read headers of FreeSurfer's formats `.mgh` and `.mgz`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from nibabel.freesurfer.mghformat import MGHHeader

from seg3dcam.errors import ScanError, tell
from seg3dcam.files.readers.plan import Plan, channels_first, read_start
from seg3dcam.geometry import checked_affine

__all__ = ["plan_mgh"]

_DATA_START = 284
_HAS_PLACE = slice(28, 30)  # goodRASFlag
_TYPES = {0: "uint8", 1: "int32", 3: "float32", 4: "int16", 10: "uint16"}


def plan_mgh(path: Path) -> Plan:
    """Read the header of an MGH file, which is big-endian, and may be gzipped (.mgz)."""
    start, zipped = read_start(path, _DATA_START)
    if len(start) < _DATA_START or start[:4] != b"\0\0\0\1":
        raise ScanError(
            f"{path}: not an MGH file: it does not start with version 1 and a header of "
            f"{_DATA_START} bytes. Check that it is the right file."
        )
    header = MGHHeader(start.ljust(MGHHeader.template_dtype.itemsize, b"\0"), check=False)
    sizes = [int(size) for size in header["dims"]]
    if min(sizes) < 1:
        raise ScanError(f"{path}: the MGH header's dims are {sizes}. Legal: whole numbers from 1.")
    kind = int(header["type"])
    if kind not in _TYPES:
        raise ScanError(
            f"{path}: the MGH header's type is {kind}. Legal: "
            f"{', '.join(f'{code} ({name})' for code, name in _TYPES.items())}."
        )
    if not any(start[_HAS_PLACE]):  # nibabel sets the flag when it fills the place in
        tell(
            f"{path}: goodRASFlag is 0, so the file does not say where the scan lies. It is read "
            "as FreeSurfer does, coronal with voxels of 1 mm: left and right may be swapped."
        )
    with np.errstate(over="ignore", invalid="ignore"):  # `checked_affine` refuses the result
        affine = checked_affine(np.array(header.get_affine()), str(path), ScanError)
    return Plan(
        path=path,
        shape=channels_first(sizes, path),
        affine=affine,
        dtype=np.dtype(_TYPES[kind]).newbyteorder(">"),
        packing="gzip" if zipped else "plain",
        skip=_DATA_START,
    )
