"""Write maps and masks as NRRD, 3D Slicer's own format, in which even sheared places are exact.

    write_nrrd("cam.nrrd", cam, scan.affine)
    write_segments("masks.seg.nrrd", [segment(mask, "lesion", (0, 1, 1))], mask.shape, scan.affine)

The files are written here, since pynrrd can write neither letters beyond ASCII nor volumes that do
not fit into memory twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from seg3dcam.errors import OutputError
from seg3dcam.files.names import printable
from seg3dcam.files.writers.volumes import (
    as_stored,
    check_suffix,
    checked_volume,
    gzipped,
    slabs,
)
from seg3dcam.files.writing import as_path, atomic
from seg3dcam.geometry import LPS_TO_RAS, checked_affine

__all__ = ["Segment", "segment", "write_nrrd", "write_segments"]

#: numpy's type -> NRRD's.
_TYPES = {"float32": "float", "int16": "int16", "uint8": "uint8"}
_SLAB_VOXELS = 2**23
_MOST_LABELS = 255


def write_nrrd(
    path: str | os.PathLike[str],
    volume: npt.NDArray | torch.Tensor,
    affine: npt.ArrayLike,
    *,
    dtype: npt.DTypeLike = np.float32,
) -> Path:
    """Write a volume (X, Y, Z) as `.nrrd`, completely or not at all.

    - `affine`: (4, 4) voxel -> RAS mm. It is stored as LPS in full precision, including shear.
    - `dtype`: float32 for maps, which may hold NaN and infinity; int16 and uint8 for whole numbers
      that fit.

    Whatever the volume's size, about 16 MB of extra memory are needed. The same input gives the
    same bytes.

    Raises `OutputError` for another suffix, shape, affine or dtype, for values that do not fit, and
    where the file cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = write_nrrd(f"{folder}/cam.nrrd", np.ones((4, 5, 6)), np.diag([1, 1, 3, 1]))
    ...     path.read_bytes().splitlines()[5]
    b'space directions: (-1.0,0.0,0.0) (0.0,-1.0,0.0) (0.0,0.0,3.0)'
    """
    path, kind = as_path(path), np.dtype(dtype)
    check_suffix(path, "NRRD here", ".nrrd")
    if kind.name not in _TYPES:
        raise OutputError(f"{path}: dtype {kind} cannot be written. Legal: {', '.join(_TYPES)}.")
    volume = checked_volume(volume, path)
    matrix = checked_affine(affine, str(path), OutputError)
    header = _header(tuple(volume.shape), _TYPES[kind.name], matrix)
    return _write(path, header, {}, (as_stored(slab, kind, path) for slab in slabs(volume)))


# ----------------------------------------------------------------------------------- segmentations


@dataclass(frozen=True, eq=False)
class Segment:
    """One mask of a segmentation, cropped to its bounding box; made by `segment`.

    - `name`: the name that is shown; any letters are legal.
    - `colour`: red, green and blue in 0..1.
    - `box`: where `inside`, a boolean array, lies in the volume.
    """

    name: str
    colour: tuple[float, float, float]
    box: tuple[slice, ...]
    inside: npt.NDArray[np.bool_]


def segment(
    mask: npt.NDArray | torch.Tensor, name: str, colour: tuple[float, float, float]
) -> Segment:
    """Crop a boolean mask (X, Y, Z) to its bounding box; the mask itself is not kept.

    >>> mask = np.zeros((4, 4, 4), dtype=bool)
    >>> mask[1, 2, 3] = True
    >>> segment(mask, "lesion", (0, 1, 1)).box
    (slice(1, 2, None), slice(2, 3, None), slice(3, 4, None))
    """
    inside = np.asarray(mask, dtype=bool)
    found = ndimage.find_objects(inside.view(np.uint8))
    box = found[0] if found else (slice(0, 0),) * inside.ndim
    return Segment(name, colour, box, inside[box].copy())


def same_voxels(one: Segment, other: Segment) -> bool:
    """Return whether two segments cover the same voxels, whatever their names and colours.

    >>> mask = np.eye(3, dtype=bool)[None]
    >>> same_voxels(segment(mask, "a", (0, 0, 0)), segment(mask, "b", (1, 1, 1)))
    True
    """
    return one.box == other.box and np.array_equal(one.inside, other.inside)


def segment_id(number: int) -> str:
    """Return Slicer's identifier of a segment, given its number in the list, counted from 0."""
    return f"Segment_{number + 1}"


def write_segments(
    path: str | os.PathLike[str],
    segments: Sequence[Segment],
    shape: Sequence[int],
    affine: npt.ArrayLike,
) -> Path:
    """Write masks that may overlap as one segmentation of 3D Slicer, `.seg.nrrd`.

    Masks that do not overlap share a layer, as different labels of one volume.

    - `segments`: in the order of Slicer's list, which shows empty ones too.
    - `shape`, `affine`: the grid of the masks.

    Raises `OutputError` for another suffix or affine, if there is no segment, and where the file
    cannot be written.

    >>> import tempfile
    >>> one, other = np.array([[[1, 1, 0]]], bool), np.array([[[0, 1, 0]]], bool)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     both = [segment(one, "prediction", (0, 1, 1)), segment(other, "truth", (0, 1, 0))]
    ...     path = write_segments(f"{folder}/masks.seg.nrrd", both, one.shape, np.eye(4))
    ...     b"sizes: 2 1 1 3" in path.read_bytes()
    True
    """
    path = as_path(path)
    check_suffix(path, "NRRD here", ".seg.nrrd")
    if not segments:
        raise OutputError(f"{path}: a segmentation has at least one segment, here is none.")
    layers = _layers(segments)
    matrix = checked_affine(affine, str(path), OutputError)
    header = _header(tuple(shape), "uint8", matrix, layers=len(layers))
    return _write(path, header, _described(segments, layers), _painted(layers, shape))


def _layers(segments: Iterable[Segment]) -> list[list[Segment]]:
    """Put every segment into the first layer in which it overlaps no other.

    The label of a segment is its number in the layer, counted from 1.

    >>> one, other = np.array([[[1, 1, 0]]], bool), np.array([[[0, 0, 1]]], bool)
    >>> a, b, c = [segment(mask, "", (0, 0, 0)) for mask in (one, one, other)]
    >>> _layers([a, b, c]) == [[a, c], [b]]
    True
    """
    layers: list[list[Segment]] = []
    for new in segments:
        free = (
            layer
            for layer in layers
            if len(layer) < _MOST_LABELS and not any(_overlap(new, other) for other in layer)
        )
        layer = next(free, None)
        if layer is None:
            layers.append([new])
        else:
            layer.append(new)
    return layers


def _overlap(one: Segment, other: Segment) -> bool:
    common = [
        slice(max(a.start, b.start), min(a.stop, b.stop))
        for a, b in zip(one.box, other.box, strict=True)
    ]
    if any(part.start >= part.stop for part in common):
        return False
    return bool((_part(one, common) & _part(other, common)).any())


def _part(of: Segment, box: Iterable[slice]) -> npt.NDArray[np.bool_]:
    """Return the part of a segment's mask in a box that lies within the segment's own box."""
    moved = (
        slice(part.start - own.start, part.stop - own.start)
        for part, own in zip(box, of.box, strict=True)
    )
    return of.inside[tuple(moved)]


def _described(segments: Sequence[Segment], layers: Sequence[Sequence[Segment]]) -> dict[str, str]:
    """Return Slicer's own header fields, which describe each label of each layer."""
    place = {
        id(one): (number, label)
        for number, layer in enumerate(layers)
        for label, one in enumerate(layer, 1)
    }
    fields = {
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    for number, one in enumerate(segments):
        layer, label = place[id(one)]
        extent = " ".join(f"{part.start} {part.stop - 1}" for part in one.box)
        fields |= {
            f"Segment{number}_ID": segment_id(number),
            f"Segment{number}_Name": one.name,
            f"Segment{number}_NameAutoGenerated": "0",
            f"Segment{number}_Color": " ".join(f"{part:.6g}" for part in one.colour),
            f"Segment{number}_ColorAutoGenerated": "0",
            f"Segment{number}_LabelValue": str(label),
            f"Segment{number}_Layer": str(layer),
            f"Segment{number}_Extent": extent,
        }
    return fields


def _painted(
    layers: Sequence[Sequence[Segment]], shape: Sequence[int]
) -> Iterator[bytes | memoryview]:
    """Yield all layers in the order of the file, slab by slab: layers run fastest, then x, y, z."""
    x, y, z = shape
    depth = max(1, _SLAB_VOXELS // (x * y * len(layers)))
    for start in range(0, z, depth):
        stop = min(z, start + depth)
        slab = np.zeros((stop - start, y, x, len(layers)), dtype=np.uint8)
        for number, layer in enumerate(layers):
            for label, one in enumerate(layer, 1):
                low, high = max(start, one.box[2].start), min(stop, one.box[2].stop)
                if low < high:
                    box = (*one.box[:2], slice(low, high))
                    where = (*one.box[:2], slice(low - start, high - start))
                    slab[..., number].T[where][_part(one, box)] = label
        yield slab.data


# ------------------------------------------------------------------------------------------- file


def _header(
    shape: tuple[int, ...], kind: str, affine: npt.NDArray[np.float64], *, layers: int = 1
) -> dict[str, Any]:
    lps = LPS_TO_RAS @ affine
    several = layers > 1
    return {
        "type": kind,
        "dimension": len(shape) + several,
        "space": "left-posterior-superior",
        "sizes": " ".join(map(str, (layers, *shape) if several else shape)),
        "space directions": "none " * several + " ".join(map(_vector, lps[:3, :3].T)),
        "kinds": "list " * several + "domain domain domain",
        "endian": "little",
        "encoding": "gzip",
        "space origin": _vector(lps[:3, 3]),
    }


def _vector(numbers: Iterable[float]) -> str:
    """Write a vector so that reading it gives exactly the same numbers.

    >>> _vector(np.array([0.1, -2.0, 0.0]))
    '(0.1,-2.0,0.0)'
    """
    return f"({','.join(repr(float(number)) for number in numbers)})"


def _write(
    path: Path,
    header: Mapping[str, Any],
    fields: Mapping[str, str],
    voxels: Iterable[bytes | memoryview],
) -> Path:
    """Write the header of NRRD itself, the fields that Slicer adds to it, and the voxels."""
    lines = [f"{key}: {value}" for key, value in header.items()]
    lines += [f"{key}:={_escaped(value)}" for key, value in fields.items()]
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write("\n".join(["NRRD0005", *lines, "", ""]).encode())
        with gzipped(file) as stream:
            for piece in voxels:
                stream.write(piece)
    return path


def _escaped(text: str) -> str:
    return printable(text).replace("\\", "\\\\")
