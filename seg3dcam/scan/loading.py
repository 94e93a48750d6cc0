"""Load scans from files, folders and memory, and refuse those that cannot be explained."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from seg3dcam.checks import is_meta_tensor
from seg3dcam.errors import InputError, ScanError, tell
from seg3dcam.files.readers import READABLE, Frame, Plan, plan_file, read_voxels, stem
from seg3dcam.files.readers.plan import not_real, reading, refuse_empty_grid
from seg3dcam.files.series import is_dicom, read_series
from seg3dcam.files.torchio_images import images_of, is_torchio
from seg3dcam.geometry import (
    SAME_GRID_MM,
    checked_affine,
    corner_gap,
    ras_affine,
    same_grid,
    spacing_of,
)
from seg3dcam.scan.scan import Scan

__all__ = ["load_labels", "load_scan"]

_NNUNET_CHANNEL = re.compile(r"(.+)_\d{4}")


PathLike: TypeAlias = str | os.PathLike[str]
Source: TypeAlias = PathLike | Sequence[PathLike] | torch.Tensor | npt.NDArray | Scan | Any


def load_scan(
    source: Source, affine: npt.ArrayLike | None = None, *, frame: Frame | None = None
) -> Scan:
    """Read a scan; refuse one that cannot be explained.

    `source` is one of
    - a path to a NIfTI file, `.nii` or `.nii.gz`: (X, Y, Z), or (X, Y, Z, C) with channels last;
    - a path to a volume of 3D Slicer or ITK (`.nrrd`, `.nhdr`, `.mha`, `.mhd`) or FreeSurfer
      (`.mgh`, `.mgz`), whose affine is converted to RAS;
    - a list of such paths, one file per channel, all on the same grid (within 0.001 mm);
    - a folder that holds one DICOM series, or a list of its files (see `seg3dcam.files.series`);
    - a MONAI `MetaTensor`, (X, Y, Z) or (C, X, Y, Z), with its own affine;
    - a TorchIO `ScalarImage`, or a `Subject`, whose images (without label maps) are the channels;
    - a numpy array or a tensor of these shapes; it needs `affine`, (4, 4) voxel -> RAS mm;
    - a `Scan`, which is returned as it is.

    The scaling in a file's header is applied. Voxels become float32; to read a file takes no more
    memory than this float32 copy. An array is copied. A tensor that is float32 already shares its
    memory with the scan, and a tensor on a GPU is copied to the CPU.

    A NIfTI header gives the place twice, as sform and as qform, and `frame` chooses one of them.
    Without `frame` the sform is taken if the file has one, as nibabel does, and a warning tells if
    the two differ.

    Raises `ScanError` for a file that is missing, damaged or of another format, for complex,
    colour, 2-D or 5-D data, for a `frame` that the file does not have, for a DICOM series with
    gaps, for several series, for an illegal affine, and for voxels that are all zero or not finite.
    Raises `MissingExtraError` for DICOM if pydicom or SimpleITK is not installed. Warns
    (`Seg3dcamWarning`) if the header does not say where the scan lies, gives two different places
    or other units than mm, and if a channel has the same value everywhere.

    >>> scan = load_scan(np.arange(24.0).reshape(2, 3, 4), affine=np.diag([1, 1, 3, 1]))
    >>> scan
    Scan('scan', 1 channel(s), 2 x 3 x 4 voxels of 1 x 1 x 3 mm)
    """
    paths = _paths_of(source)
    if frame is not None and paths is None:
        raise ScanError(
            f"frame {frame!r} chooses between the two forms of a NIfTI file's header; "
            f"{_described(source)} has one place alone. Leave frame out."
        )
    if isinstance(source, np.ndarray) or (
        isinstance(source, torch.Tensor) and not is_meta_tensor(source)
    ):
        if affine is None:
            raise ScanError(
                f"an array or a plain tensor, here {tuple(source.shape)}, does not say where it "
                "lies in the patient. Give load_scan(array, affine=...), the (4, 4) matrix from "
                "voxel index to RAS mm (nibabel's `image.affine`), of an array (X, Y, Z) or "
                "(C, X, Y, Z), or a file or a MONAI MetaTensor."
            )
        return _from_memory(source, affine, "scan")
    if affine is not None:
        raise ScanError(
            "affine= is for arrays and plain tensors; a file, a MetaTensor and a Scan bring their "
            "own. Leave affine= out, or pass the voxels as an array."
        )
    if isinstance(source, Scan):
        return source
    if isinstance(source, torch.Tensor):
        return _from_meta_tensor(source)
    if is_torchio(source):
        return _from_torchio(source)
    if paths is not None:
        return _checked(paths, frame)
    raise ScanError(
        f"a scan cannot be made of {_described(source)}. Legal: a path to a file ({READABLE}), "
        "a list of such paths (one per channel), a folder with one DICOM series, a MONAI "
        "MetaTensor, a numpy array or tensor with affine=, a Scan."
    )


def _paths_of(source: Source) -> list[Path] | None:
    """Return the paths in a source, None if it is neither a path nor a list of paths."""
    given: Sequence[Any] = source if isinstance(source, (list, tuple)) else [source]
    if not given or not all(isinstance(path, (str, os.PathLike)) for path in given):
        return None
    return [Path(path) for path in given]


def load_labels(path: PathLike, *, frame: Frame | None = None) -> Scan:
    """Read a label map or mask: one channel of whole numbers, which may all be 0.

    The formats are those of `load_scan`, and segmentations of 3D Slicer (`.seg.nrrd`) whose
    segments do not overlap. `frame` is the one that was chosen for the scan. A file that has only
    the other form, or no forms, is read with the place that it has.

    Raises `ScanError` as `load_scan` does, and for several channels or values that are no whole
    numbers.
    """
    labels = _from_files([plan_file(Path(path), frame, must=False)], frame, labels=True)
    if len(labels.data) > 1:
        raise ScanError(
            f"{path}: a label map has one channel, this file {len(labels.data)}. Save the labels "
            "as one volume (X, Y, Z)."
        )
    if not torch.isfinite(labels.data).all():
        _refuse_nonfinite(labels.data, str(path))
    between = labels.data != labels.data.round()
    if between.any():
        raise ScanError(
            f"{path}: {int(between.sum())} voxels hold no whole number, such as "
            f"{float(labels.data[between][0]):g}, so this is no label map. Was one interpolated? "
            "Resample it with nearest neighbour; a map of probabilities, threshold it."
        )
    return labels


# ---------------------------------------------------------------------------------- from memory


def _from_meta_tensor(tensor: torch.Tensor) -> Scan:
    meta: dict = tensor.meta  # type: ignore[attr-defined]
    files = meta.get("filename_or_obj") or "scan"
    first = files[0] if isinstance(files, (list, tuple)) else files
    name = stem(Path(str(first)))
    affine = torch.as_tensor(tensor.affine, device="cpu").detach()  # type: ignore[attr-defined]
    checked = checked_affine(affine.to(torch.float64).numpy(), name, ScanError)
    try:
        affine_ras = ras_affine(checked, meta.get("space"))
    except InputError as error:
        raise ScanError(f"{name}: {error}") from error
    return _from_memory(tensor.as_subclass(torch.Tensor), affine_ras, name)


def _from_torchio(source: Any) -> Scan:
    images = images_of(source)
    (first, (voxels, affine)), *others = images.items()
    scan = _from_memory(voxels, affine, "scan")
    for name, (more, other) in others:
        same_shape = more.shape[1:] == voxels.shape[1:]
        if not same_shape or not same_grid(affine, other, scan.shape):
            raise ScanError(
                f"the subject's images {first} {tuple(voxels.shape[1:])} and {name} "
                f"{tuple(more.shape[1:])} lie on different grids. Bring them to one, with "
                f"torchio.ToReference or torchio.Resample({first!r}), or pass one image"
            )
    if not others:
        return scan
    return _from_memory(torch.cat([v.float() for v, _ in images.values()]), affine, "scan")


def _from_memory(array: torch.Tensor | npt.NDArray, affine: npt.ArrayLike, name: str) -> Scan:
    placed = checked_affine(affine, name, ScanError)
    shape = tuple(array.shape)
    if len(shape) not in (3, 4):
        raise ScanError(
            f"{name}: the array has {len(shape)} axes, shape {shape}. Legal: (X, Y, Z) or "
            "(C, X, Y, Z). " + _axes_advice(len(shape))
        )
    refuse_empty_grid(shape, name)
    data = _to_float32(array, name)
    if data.ndim == 3:
        data = data[None]
    _check_voxels(data, name)
    return Scan(data, placed, name)


def _axes_advice(axes: int) -> str:
    if axes < 3:
        return "A single slice is a volume with one slice: shape (X, Y, 1)."
    return "Pass one case at a time, without a batch axis."


def _to_float32(array: torch.Tensor | npt.NDArray, name: str) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        if array.is_complex():
            raise not_real(name, str(array.dtype))
        return array.detach().to("cpu", torch.float32)
    if array.dtype.kind not in "biuf":
        raise not_real(name, str(array.dtype))
    with np.errstate(over="ignore"):  # the check of the voxels refuses infinity
        return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))


# ----------------------------------------------------------------------------------- from files


def _checked(paths: list[Path], frame: Frame | None) -> Scan:
    if len(paths) == 1 and _is_folder(paths[0]):
        return _from_series(paths[0], frame)
    if all(is_dicom(path) for path in paths):
        return _from_series(paths, frame)
    scan = _from_files([plan_file(path, frame) for path in paths], frame)
    _check_voxels(scan.data, ", ".join(map(str, paths)))
    return scan


def _is_folder(path: Path) -> bool:
    with suppress(OSError, ValueError):  # an illegal name: whoever reads the file gets the error
        return path.is_dir()
    return False


def _from_series(source: Path | list[Path], frame: Frame | None) -> Scan:
    if frame is not None:
        raise ScanError(
            f"frame {frame!r} chooses between the two forms of a NIfTI header; a DICOM series has "
            "one place alone. Leave frame out."
        )
    series = read_series(source)
    voxels = torch.from_numpy(series.voxels)[None]
    _check_voxels(voxels, "the DICOM series")
    return Scan(voxels, series.affine, "scan", None, series.headers)


def _from_files(plans: list[Plan], frame: Frame | None, *, labels: bool = False) -> Scan:
    first = plans[0]
    for plan in plans[1:]:
        _check_same_grid(first, plan)
    if len(plans) > 1:
        for plan in plans:
            _refuse_channels(plan)
    for plan in plans:
        if plan.segments and not labels:
            raise ScanError(
                f"{plan.path}: this is a segmentation of 3D Slicer, not a scan. Give the scan that "
                "was segmented; a segmentation may be the truth."
            )
    channels = sum(plan.shape[0] for plan in plans)
    with reading(first.path):
        voxels = np.empty((channels, *first.shape[1:]), dtype=np.float32)
    start = 0
    for plan in plans:
        stop = start + plan.shape[0]
        read_voxels(plan, voxels[start:stop])
        start = stop
    name = _common_name([plan.path for plan in plans])
    return Scan(torch.from_numpy(voxels), first.affine, name, first.header, frame=frame)


def _common_name(paths: list[Path]) -> str:
    """Return `case` for case_0000.nii.gz and case_0001.nii.gz, else the first file's name."""
    names = [stem(path) for path in paths]
    stems = {match[1] if (match := _NNUNET_CHANNEL.fullmatch(name)) else name for name in names}
    return stems.pop() if len(names) > 1 and len(stems) == 1 else names[0]


def _check_same_grid(one: Plan, other: Plan) -> None:
    differences = []
    if one.shape[1:] != other.shape[1:]:
        differences.append(f"shape {one.shape[1:]} and {other.shape[1:]}")
    gap = corner_gap(one.affine, other.affine, one.shape[1:])
    if gap > SAME_GRID_MM:
        differences.append(f"the same voxel lies up to {gap:.4g} mm apart")
        for what, of in (("spacing", spacing_of), ("origin", _origin)):
            if not np.allclose(of(one.affine), of(other.affine), rtol=0, atol=SAME_GRID_MM):
                differences.append(f"{what} {_mm(of(one.affine))} and {_mm(of(other.affine))} mm")
    if differences:
        raise ScanError(
            f"{one.path} and {other.path} are not on the same grid: {'; '.join(differences)}. "
            f"The channels of one scan must agree within {SAME_GRID_MM:g} mm: resample the second "
            "onto the first."
        )


def _mm(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"


def _origin(affine: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return affine[:3, 3]


def _refuse_channels(plan: Plan) -> None:
    if plan.shape[0] > 1:
        raise ScanError(
            f"{plan.path}: the file holds {plan.shape[0]} channels, but it is one of a list. "
            "Legal: one file with all channels, or a list of files with one channel each."
        )


# --------------------------------------------------------------------------------------- checks


def _check_voxels(data: torch.Tensor, name: str) -> None:
    # Minimum and maximum show NaN as well, and finding them needs no memory.
    ranges = [tuple(map(float, torch.aminmax(channel))) for channel in data]
    if not all(math.isfinite(low) and math.isfinite(high) for low, high in ranges):
        _refuse_nonfinite(data, name)
    if all(low == high == 0 for low, high in ranges):
        raise ScanError(
            f"{name}: the scan is empty: all voxels are 0. Check that it is the right file and "
            "that the step before wrote its result."
        )
    for channel, (low, high) in enumerate(ranges):
        if low == high:
            which = f"channel {channel}" if len(ranges) > 1 else "the scan"
            tell(
                f"{name}: {which} is constant: all voxels are {low:g}, so there is nothing in it "
                "that a model could have looked at. Check that it is the right file."
            )


def _refuse_nonfinite(data: torch.Tensor, name: str) -> None:
    bad = ~torch.isfinite(data)
    channel, x, y, z = bad.nonzero()[0].tolist()
    where = f"voxel ({x}, {y}, {z})" + (f" of channel {channel}" if len(data) > 1 else "")
    raise ScanError(
        f"{name}: {int(bad.sum())} of {data.numel()} voxels are NaN or infinite as float32, the "
        f"first is {where}. Every voxel must be finite: replace them, for example by the "
        "background's value, and save the scan again."
    )


def _described(source: object) -> str:
    if isinstance(source, (list, tuple)):
        if not source:
            return "an empty list"
        wrong = next(item for item in source if not isinstance(item, (str, os.PathLike)))
        return f"a list that holds {type(wrong).__name__}"
    return type(source).__name__
