"""A scan: voxels, where they lie in the patient, and a name.

    scan = load_scan("ct.nii.gz")
    scan.data       # (C, X, Y, Z) float32
    scan.affine     # (4, 4) voxel -> RAS mm

A file is planned first from its header alone (`_plan`), so that everything wrong with it is said
before a voxel is read; then the voxels go slab by slab into one float32 array (`_read_voxels`).
"""

from __future__ import annotations

import gzip
import itertools
import math
import os
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from nibabel.spatialimages import HeaderDataError

from seg3dcam.errors import InputError, ScanError, Seg3dcamWarning
from seg3dcam.geometry import ras_affine, spacing_of
from seg3dcam.series import is_dicom, read_series
from seg3dcam.torchio_images import images_of, is_torchio

__all__ = ["SAME_GRID_MM", "Scan", "corner_gap", "load_scan"]

SAME_GRID_MM = 1e-3
"""Two grids are the same if no voxel centre moves by more than this many mm."""

_SUFFIX = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
_NNUNET_CHANNEL = re.compile(r"(.+)_\d{4}")
_SLAB_VOXELS = 2**21
_MM_PER_UNIT = {1: ("metre", 1e3), 3: ("micron", 1e-3)}  # NIfTI codes; all others are read as mm
_GZIP_BEST_RATIO = 1032  # deflate cannot do better


@dataclass(frozen=True, eq=False, repr=False)
class Scan:
    """A scan on its own grid.

    - `data`: (C, X, Y, Z) float32, one entry of C per channel (modality).
    - `affine`: (4, 4) float64, voxel index -> mm in RAS (x to the right, y forward, z up).
    - `name`: the file name without folder and suffix, "scan" for a DICOM series; a folder may name
      a patient.
    - `header`: the source file's header (of the first file, if there were several), which a
      writer copies the geometry from. None for a scan made in memory.
    - `series`: the slices' DICOM headers without voxels, one for each index of the last axis. None
      for a scan that was no DICOM series.

    >>> scan = Scan(torch.zeros(1, 4, 5, 6), np.diag([0.5, 0.5, 2, 1]), "case")
    >>> scan.shape, scan.spacing
    ((4, 5, 6), (0.5, 0.5, 2.0))
    """

    data: torch.Tensor
    affine: npt.NDArray[np.float64]
    name: str
    header: nib.Nifti1Header | None = None
    series: Sequence[Any] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels per spatial axis."""
        return tuple(self.data.shape[1:])

    @property
    def spacing(self) -> tuple[float, ...]:
        """Distance between voxel centres along each spatial axis, in mm."""
        return spacing_of(self.affine)

    @property
    def title(self) -> str:
        """The scan in a sentence: "scan case_7", and "the scan" where it has no name of its own."""
        return "the scan" if self.name == "scan" else f"scan {self.name}"

    def __repr__(self) -> str:
        spacing = " x ".join(f"{step:.4g}" for step in self.spacing)
        shape = " x ".join(map(str, self.shape))
        return f"Scan({self.name!r}, {len(self.data)} channel(s), {shape} voxels of {spacing} mm)"


PathLike: TypeAlias = str | os.PathLike[str]
Source: TypeAlias = PathLike | Sequence[PathLike] | torch.Tensor | npt.NDArray | Scan | Any


def load_scan(source: Source, affine: npt.ArrayLike | None = None) -> Scan:
    """Read a scan and refuse what cannot be explained.

    `source` is one of
    - a path to a `.nii` or `.nii.gz` file: (X, Y, Z), or (X, Y, Z, C) with channels last;
    - a list of such paths, one file per channel, all on one grid (within 0.001 mm);
    - a folder that holds one DICOM series, or a list of its files: see `seg3dcam.series`;
    - a MONAI `MetaTensor`, (X, Y, Z) or (C, X, Y, Z), which knows its affine;
    - a TorchIO `ScalarImage`, or a `Subject` whose images, but no label maps, are the channels;
    - a numpy array or a tensor of these shapes, together with `affine`, (4, 4) voxel -> RAS mm;
    - a `Scan`, which is returned as it is.

    The scaling in a file's header is applied. Voxels become float32, and a file needs the memory of
    that one float32 copy. An array is copied; a tensor that is float32 already is shared, one on a
    GPU is brought to the CPU.

    Raises `ScanError` for a file that is missing, damaged or no NIfTI, for complex, colour, 2-D or
    5-D data, for a DICOM series with gaps, for several series, for an affine that is no affine, and
    for voxels that are all zero or not finite. Raises `MissingExtraError` for DICOM where pydicom
    or SimpleITK is not installed. Warns (`Seg3dcamWarning`) where the header does not say where the
    scan lies, measures in other units than mm, or where a channel has one single value.

    >>> scan = load_scan(np.arange(24.0).reshape(2, 3, 4), affine=np.diag([1, 1, 3, 1]))
    >>> scan
    Scan('scan', 1 channel(s), 2 x 3 x 4 voxels of 1 x 1 x 3 mm)
    """
    if isinstance(source, np.ndarray) or (
        isinstance(source, torch.Tensor) and not _is_meta_tensor(source)
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
    if isinstance(source, (str, os.PathLike)):
        return _checked([Path(source)])
    if (
        isinstance(source, (list, tuple))
        and source
        and all(isinstance(path, (str, os.PathLike)) for path in source)
    ):
        return _checked([Path(path) for path in source])
    raise ScanError(
        f"a scan cannot be made of {_described(source)}. Legal: a path to a .nii or .nii.gz file, "
        "a list of such paths (one per channel), a folder with one DICOM series, a MONAI "
        "MetaTensor, a numpy array or tensor with affine=, a Scan."
    )


def load_labels(path: PathLike) -> Scan:
    """Read a label map or mask, one channel of whole numbers; all of them may be 0.

    Raises `ScanError` as `load_scan`, for several channels, and for values between whole numbers.
    """
    labels = _from_files([Path(path)])
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


def corner_gap(one: npt.ArrayLike, other: npt.ArrayLike, shape: Sequence[int]) -> float:
    """Largest distance in mm between where two affines put the same voxel of a grid.

    It is reached at one of the corners, since the difference of two affines is affine.

    >>> corner_gap(np.diag([1, 1, 1, 1]), np.diag([1, 1, 1.5, 1]), (10, 10, 5))
    2.0
    """
    ends = [(0, size - 1) for size in shape]
    corners = np.array([(*corner, 1) for corner in itertools.product(*ends)], dtype=np.float64)
    moved = corners @ (np.asarray(one, np.float64) - np.asarray(other, np.float64)).T
    return float(np.linalg.norm(moved[:, :3], axis=1).max())


# ---------------------------------------------------------------------------------- from memory


def _is_meta_tensor(tensor: torch.Tensor) -> bool:
    # By what it carries: importing MONAI takes seconds, and a plain tensor has neither.
    return hasattr(tensor, "affine") and hasattr(tensor, "meta")


def _from_meta_tensor(tensor: torch.Tensor) -> Scan:
    meta: dict = tensor.meta  # type: ignore[attr-defined]
    files = meta.get("filename_or_obj") or "scan"
    first = files[0] if isinstance(files, (list, tuple)) else files
    name = _name(Path(str(first)))
    affine = torch.as_tensor(tensor.affine, device="cpu").detach()  # type: ignore[attr-defined]
    checked = _checked_affine(affine.to(torch.float64).numpy(), name)
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
        if not same_shape or corner_gap(affine, other, scan.shape) > SAME_GRID_MM:
            raise ScanError(
                f"the subject's images {first} {tuple(voxels.shape[1:])} and {name} "
                f"{tuple(more.shape[1:])} lie on different grids. Bring them to one, with "
                f"torchio.ToReference or torchio.Resample({first!r}), or pass one image"
            )
    if not others:
        return scan
    return _from_memory(torch.cat([v.float() for v, _ in images.values()]), affine, "scan")


def _from_memory(array: torch.Tensor | npt.NDArray, affine: npt.ArrayLike, name: str) -> Scan:
    checked_affine = _checked_affine(affine, name)
    shape = tuple(array.shape)
    if len(shape) not in (3, 4):
        raise ScanError(
            f"{name}: the array has {len(shape)} axes, shape {shape}. Legal: (X, Y, Z) or "
            "(C, X, Y, Z). " + _axes_advice(len(shape))
        )
    _refuse_empty_grid(shape, name)
    data = _to_float32(array, name)
    if data.ndim == 3:
        data = data[None]
    _check_voxels(data, name)
    return Scan(data, checked_affine, name)


def _axes_advice(axes: int) -> str:
    if axes < 3:
        return "A single slice is a volume with one slice: shape (X, Y, 1)."
    return "Pass one case at a time, without a batch axis."


def _to_float32(array: torch.Tensor | npt.NDArray, name: str) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        if array.is_complex():
            raise _not_real(name, str(array.dtype))
        return array.detach().to("cpu", torch.float32)
    if array.dtype.kind not in "biuf":
        raise _not_real(name, str(array.dtype))
    with np.errstate(over="ignore"):  # becomes inf, which the check of the voxels refuses
        return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))


# ----------------------------------------------------------------------------------- from files


@dataclass(frozen=True)
class _Plan:
    """What a file's header promises: `shape` is (C, X, Y, Z)."""

    path: Path
    header: nib.Nifti1Header
    shape: tuple[int, int, int, int]
    affine: npt.NDArray[np.float64]
    dtype: np.dtype
    offset: int
    slope: float
    intercept: float

    @property
    def voxel_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _checked(paths: list[Path]) -> Scan:
    if len(paths) == 1 and _is_folder(paths[0]):
        return _from_series(paths[0])
    if all(is_dicom(path) for path in paths):
        return _from_series(paths)
    scan = _from_files(paths)
    _check_voxels(scan.data, ", ".join(map(str, paths)))
    return scan


def _is_folder(path: Path) -> bool:
    with suppress(OSError):  # a name too long: said where the file is read
        return path.is_dir()
    return False


def _from_series(source: Path | list[Path]) -> Scan:
    series = read_series(source)
    _check_voxels(torch.from_numpy(series.voxels)[None], "the DICOM series")
    return Scan(torch.from_numpy(series.voxels)[None], series.affine, "scan", None, series.headers)


def _from_files(paths: list[Path]) -> Scan:
    plans = [_plan(path) for path in paths]
    first = plans[0]
    for plan in plans[1:]:
        _check_same_grid(first, plan)
    if len(plans) > 1:
        for plan in plans:
            _refuse_channels(plan)
    channels = sum(plan.shape[0] for plan in plans)
    voxels = np.empty((channels, *first.shape[1:]), dtype=np.float32)
    start = 0
    for plan in plans:
        stop = start + plan.shape[0]
        _read_voxels(plan, voxels[start:stop])
        start = stop
    return Scan(torch.from_numpy(voxels), first.affine, _common_name(paths), first.header)


def _name(path: Path) -> str:
    return _SUFFIX.sub("", path.name)


def _common_name(paths: list[Path]) -> str:
    """`case` for case_0000.nii.gz, case_0001.nii.gz; else the first file's name."""
    names = [_name(path) for path in paths]
    stems = {match[1] if (match := _NNUNET_CHANNEL.fullmatch(name)) else name for name in names}
    return stems.pop() if len(names) > 1 and len(stems) == 1 else names[0]


def _plan(path: Path) -> _Plan:
    _check_path(path)
    header = _read_header(path)
    dtype = _checked_dtype(header, path)
    try:
        slope, intercept = header.get_slope_inter()
        affine = header.get_best_affine()
    except (HeaderDataError, ValueError) as error:
        raise ScanError(
            f"{path}: the header cannot be used ({error}). Legal: a finite scaling and a valid "
            "qform or sform. Write the file again with the program that made it."
        ) from error
    affine = _in_mm(_checked_affine(affine, str(path)), header, path)
    if header["qform_code"] == 0 and header["sform_code"] == 0:
        _warn(
            f"{path}: qform and sform codes are both 0, so the file does not say where the scan "
            "lies. Left and right may be swapped, and ITK and 3D Slicer will not show a map over "
            "this file: set the codes with the program that made it."
        )
    plan = _Plan(
        path=path,
        header=header,
        shape=_channels_first(header.get_data_shape(), path),
        affine=affine,
        dtype=dtype,
        offset=max(int(header.get_data_offset()), header.single_vox_offset),
        slope=1.0 if slope is None else slope,
        intercept=0.0 if slope is None else intercept,
    )
    _check_length(plan)
    return plan


def _check_path(path: Path) -> None:
    with _errors_explained(path):
        if path.is_dir():
            raise ScanError(
                f"{path} is a folder. Legal here: one .nii or .nii.gz file, or a list of them, one "
                "per channel. Name the files; a DICOM folder is given alone, as a scan."
            )
        path.stat()
    if not _SUFFIX.search(path.name):
        raise ScanError(
            f"{path}: the name ends with {path.suffix!r}. Legal: .nii, .nii.gz. Convert the scan "
            "to NIfTI (dcm2niix for DICOM, SimpleITK for other formats)."
        )


@contextmanager
def _errors_explained(path: Path) -> Iterator[None]:
    """What goes wrong while reading becomes a `ScanError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise ScanError(
            f"{path}: there is no such file. Check the spelling and the folder."
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ScanError(
            f"{path}: the compressed file is damaged or cut short ({error}). Copy or download it "
            "again; `gzip -t` tests it."
        ) from error
    except OSError as error:
        raise ScanError(
            f"{path}: the file cannot be read ({error.strerror or error}). Check its permissions "
            "and the disk."
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open for reading, unzipped."""
    with _errors_explained(path), path.open("rb") as file:
        yield cast(BinaryIO, gzip.GzipFile(fileobj=file)) if _is_zipped(file) else file


def _is_zipped(file: BinaryIO) -> bool:
    magic = file.read(2)  # by content: a wrong suffix does no harm
    file.seek(0)
    return magic == b"\x1f\x8b"


def _read_header(path: Path) -> nib.Nifti1Header:
    with _opened(path) as file:
        start = file.read(540)
    header_class, size = _header_class(start, path)
    # The constructor leaves out header extensions, which may hold patient data.
    try:
        return header_class(start[:size], check=True)
    except HeaderDataError as error:
        raise ScanError(
            f"{path}: the NIfTI header cannot be used ({error}). Write the file again with the "
            "program that made it."
        ) from error


def _header_class(start: bytes, path: Path) -> tuple[type[nib.Nifti1Header], int]:
    sizes = {int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big")}
    if 348 in sizes and start[344:348] == b"n+1\0":
        return nib.Nifti1Header, 348
    if 540 in sizes and len(start) == 540 and start[4:8] == b"n+2\0":
        return nib.Nifti2Header, 540
    if start[344:347] == b"ni1" or start[4:7] == b"ni2":
        found = "it is one half of a .hdr/.img pair"
    elif len(start) < 348:
        found = f"it holds only {len(start)} bytes"
    else:
        found = "it does not start with a NIfTI header"
    raise ScanError(
        f"{path}: not a NIfTI file: {found}. Legal: NIfTI-1 or NIfTI-2 in one file, .nii or "
        ".nii.gz. Check that it is the right file, or convert it."
    )


def _checked_dtype(header: nib.Nifti1Header, path: Path) -> np.dtype:
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        label = header["datatype"].item()
        kind = "colour (RGB)" if dtype.names else str(dtype)
        raise _not_real(str(path), f"{kind}, NIfTI datatype {label}")
    return dtype


def _channels_first(found: tuple[int, ...], path: Path) -> tuple[int, int, int, int]:
    shape = tuple(int(size) for size in found)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) < 3:
        raise ScanError(
            f"{path}: the image is {len(shape)}-D, shape {found}. Legal: (X, Y, Z), or (X, Y, Z, C)"
            " with channels last. Join the slices to one volume; a single slice has shape "
            "(X, Y, 1)."
        )
    if len(shape) > 4:
        raise ScanError(
            f"{path}: the image is {len(shape)}-D, shape {found}. Legal: (X, Y, Z), or (X, Y, Z, C)"
            " with channels last. Split it into one file per case; a vector image has its channels "
            "on axis 5 and a 1 on axis 4, which is to be dropped."
        )
    _refuse_empty_grid(shape, str(path))
    x, y, z, *channels = shape
    return (*channels, x, y, z) if channels else (1, x, y, z)  # type: ignore[return-value]


def _in_mm(
    affine: npt.NDArray[np.float64], header: nib.Nifti1Header, path: Path
) -> npt.NDArray[np.float64]:
    code = int(header["xyzt_units"]) & 7
    if code not in _MM_PER_UNIT:
        return affine
    unit, factor = _MM_PER_UNIT[code]
    _warn(
        f"{path}: the header measures in {unit}, so the affine was multiplied by {factor:g} to "
        "become mm, as ITK and Slicer do; other programs ignore the unit. If the scan is in mm "
        "after all, correct xyzt_units in the file."
    )
    return np.diag([factor, factor, factor, 1.0]) @ affine


def _check_length(plan: _Plan) -> None:
    """Refuse a short file before memory is taken for it."""
    with _errors_explained(plan.path), plan.path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        most = size * _GZIP_BEST_RATIO if _is_zipped(file) else size
    if most < plan.offset + plan.voxel_bytes:
        raise _cut_short(plan, f"at most {max(most - plan.offset, 0)}")


def _cut_short(plan: _Plan, found: str) -> ScanError:
    return ScanError(
        f"{plan.path}: the file is cut short: it holds {found} of the {plan.voxel_bytes} bytes of "
        "voxels that its header announces. Copy or download it again."
    )


def _check_same_grid(one: _Plan, other: _Plan) -> None:
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


def _origin(affine: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return affine[:3, 3]


def _mm(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"


def _refuse_channels(plan: _Plan) -> None:
    if plan.shape[0] > 1:
        raise ScanError(
            f"{plan.path}: the file holds {plan.shape[0]} channels, but it is one of a list. "
            "Legal: one file with all channels, or a list of files with one channel each."
        )


def _read_voxels(plan: _Plan, out: npt.NDArray[np.float32]) -> None:
    """Fill `out`, (C, X, Y, Z), slab by slab along z: on disk x runs fastest, then y, z, C."""
    channels, x, y, z = plan.shape
    depth = max(1, _SLAB_VOXELS // (x * y))
    scaled = (plan.slope, plan.intercept) != (1.0, 0.0)
    with _opened(plan.path) as file:
        file.seek(plan.offset)
        read = 0
        for channel, start in itertools.product(range(channels), range(0, z, depth)):
            stop = min(start + depth, z)
            wanted = x * y * (stop - start) * plan.dtype.itemsize
            raw = file.read(wanted)
            read += len(raw)
            if len(raw) < wanted:
                raise _cut_short(plan, str(read))
            slab = np.frombuffer(raw, plan.dtype).reshape((x, y, stop - start), order="F")
            with np.errstate(over="ignore"):  # becomes inf, which the check of the voxels refuses
                # The scaling is done in float64, for one slab at a time.
                out[channel, :, :, start:stop] = (
                    slab.astype(np.float64) * plan.slope + plan.intercept if scaled else slab
                )
        while file.read(2**20):  # to the end, where gzip keeps its checksum
            pass


# --------------------------------------------------------------------------------------- checks


def _checked_affine(affine: npt.ArrayLike, name: str) -> npt.NDArray[np.float64]:
    advice = "Legal: a (4, 4) invertible matrix from voxel index to RAS mm, last row (0, 0, 0, 1)."
    try:
        matrix = np.array(affine, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ScanError(f"{name}: the affine is not a matrix of numbers. {advice}") from error
    repair = f"{advice} Correct the sform or qform of the file, or the affine that you pass."
    if matrix.shape != (4, 4):
        raise ScanError(f"{name}: the affine has shape {matrix.shape}. {repair}")
    if not np.isfinite(matrix).all():
        raise ScanError(f"{name}: the affine holds NaN or infinite values. {repair}")
    if not np.array_equal(matrix[3], [0, 0, 0, 1]):
        raise ScanError(f"{name}: the affine's last row is {matrix[3].tolist()}. {repair}")
    steps = np.array(spacing_of(matrix))
    if not steps.any():
        raise ScanError(f"{name}: the affine is all zero. {repair}")
    if not steps.all() or abs(np.linalg.det(matrix[:3, :3] / steps)) < 1e-6:
        raise ScanError(
            f"{name}: the affine is singular, it flattens the volume "
            f"(spacing {_mm(steps)} mm). {repair}"
        )
    return matrix


def _refuse_empty_grid(shape: tuple[int, ...], name: str) -> None:
    if min(shape) < 1:
        raise ScanError(
            f"{name}: the volume has no voxels, shape {shape}. Every axis must have at least 1: "
            "check how the file was cropped."
        )


def _not_real(name: str, found: str) -> ScanError:
    return ScanError(
        f"{name}: the voxels are {found}. Legal: integers or real floating point numbers. "
        "Save the magnitude, or one grey channel, and load that."
    )


def _check_voxels(data: torch.Tensor, name: str) -> None:
    # Minimum and maximum say it all, NaN included, and take no memory.
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
            _warn(
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


def _warn(message: str) -> None:
    warnings.warn(message, Seg3dcamWarning, stacklevel=2)
