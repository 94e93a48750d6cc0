"""What all writers of volumes need: checks, slabs of a volume, and compression."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from isal import igzip

from seg3dcam.errors import OutputError

_LONGEST_AXIS = 32767  # NIfTI-1 counts voxels in int16
_SLAB_BYTES = 2**23


def check_suffix(path: Path, kind: str, *legal: str) -> None:
    """Raise OutputError for a file name that does not end as files of its kind do.

    >>> check_suffix(Path("cam.nrrd"), "NIfTI", ".nii", ".nii.gz")
    Traceback (most recent call last):
        ...
    seg3dcam.errors.OutputError: cam.nrrd ends with '.nrrd'. Legal for NIfTI: .nii, .nii.gz.
    """
    if not path.name.lower().endswith(legal):
        raise OutputError(
            f"{path} ends with {path.suffix!r}. Legal for {kind}: {', '.join(legal)}."
        )


def checked_volume(volume: npt.NDArray | torch.Tensor, path: Path) -> npt.NDArray | torch.Tensor:
    """Return the volume without its graph; raise OutputError if no file can hold it."""
    if isinstance(volume, torch.Tensor):
        volume = volume.detach().as_subclass(torch.Tensor)
    shape = tuple(volume.shape)
    if len(shape) != 3 or min(shape) < 1:
        raise OutputError(
            f"{path}: the volume has shape {shape}. Legal: (X, Y, Z), each at least 1. Write one "
            "file per class, layer and channel; viewers refuse 4-D files."
        )
    if max(shape) > _LONGEST_AXIS:
        raise OutputError(
            f"{path}: the volume has shape {shape}, and NIfTI-1 can hold {_LONGEST_AXIS} voxels "
            "per axis. Write it in parts."
        )
    return volume


def gzipped(file: BinaryIO) -> igzip.IGzipFile:
    """Return a fast compressor for a file; the same input always gives the same bytes."""
    # Level 3 is as fast as level 1. Level 1 does not always give the same bytes.
    return igzip.IGzipFile(filename="", mode="wb", compresslevel=3, fileobj=file, mtime=0)


def slabs(volume: npt.NDArray | torch.Tensor) -> Iterator[npt.NDArray]:
    """Yield the volume in pieces along z, fetched from the GPU one at a time."""
    x, y, z = volume.shape
    depth = max(1, _SLAB_BYTES // (4 * x * y))
    for start in range(0, z, depth):
        slab = volume[:, :, start : start + depth]
        if isinstance(slab, torch.Tensor):
            slab = slab.cpu()
            slab = (slab.float() if slab.dtype == torch.bfloat16 else slab).numpy()
        yield slab


def as_stored(slab: npt.NDArray, dtype: np.dtype, path: Path) -> memoryview:
    """Return the bytes of a slab in the order of the file: x runs fastest, then y, then z."""
    if dtype.kind == "f":
        return np.ascontiguousarray(slab.T, dtype=dtype).data
    with np.errstate(invalid="ignore"):  # a NaN is caught by the comparison
        stored = np.ascontiguousarray(slab.T, dtype=dtype)
    wrong = slab != stored.T
    if wrong.any():
        raise OutputError(
            f"{path}: the value {slab[wrong][0]} does not fit the label type {dtype}. Labels are "
            "whole numbers: choose a wider dtype, or write a map as float32."
        )
    return stored.data
