"""Where the CAMs of many patients lie: maps of a group, in a space that their scans share.

    found = group_map("explained", "lesion", space="template.nii.gz", transforms="to_template.csv")
    found.mean, found.peaks      # NIfTI files on the template's grid

Scans that were registered before share a space as they are. For others a table names an affine
transform for each case.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from seg3dcam.checks import check_number
from seg3dcam.cohort.comparing import explained_cases
from seg3dcam.errors import ConfigError, InputError, MissingExtraError, nearest, some
from seg3dcam.files import check_writable, unique_names
from seg3dcam.files.writers.nifti import write_nifti
from seg3dcam.geometry import checked_affine, resample
from seg3dcam.job.read_back import written_map
from seg3dcam.job.record import Entry, Record
from seg3dcam.progress import Progress, silent

#: The space that has a name of its own.
TEMPLATE = "icbm152"

#: With fewer cases at a voxel its z-value says nothing, and is NaN.
FEWEST = 8

#: A scan has to fill this part of the space, or it lies somewhere else.
_LEAST_SHARED = 0.05


@dataclass(frozen=True)
class GroupMap:
    """The files of a group map.

    Attributes:
        mean: the mean of the CAMs, each from 0 to 1, over the cases that see a voxel.
        peaks: the part of the cases whose peak lies at most a radius from a voxel.
        seen: how many cases see a voxel.
        z: case -> by how many standard deviations of the other cases its CAM lies above their
            mean, voxel by voxel; NaN where fewer than eight others see it, or where they are equal.
        cases: the cases that have the class.
        left_out: case -> why it could not be used.
    """

    mean: Path
    peaks: Path
    seen: Path
    z: Mapping[str, Path]
    cases: tuple[str, ...]
    left_out: Mapping[str, str]


def group_map(
    cohort: str | Path,
    target: str,
    *,
    method: str | None = None,
    out: str | Path | None = None,
    space: str | Path | None = None,
    transforms: str | Path | None = None,
    z: Sequence[str] = (),
    radius_mm: float = 5.0,
    progress: Progress | None = None,
) -> GroupMap:
    """Put the CAMs of a cohort's cases together in one space.

    Args:
        cohort: the folder that `seg3dcam cohort` wrote, with the format "nifti".
        target: what was explained, as the column `class` of cohort.csv has it.
        method: whose CAMs; needed where there are several.
        out: gets the files; None is a folder "group" in the cohort's.
        space: a volume whose grid they have; "icbm152" is the demo's brain template, at 1 mm; None
            takes that of the first case.
        transforms: a table (.csv) with the columns `case` and `transform`, the file of a matrix
            (4, 4) as text that leads from mm of the scan to mm of the space, both RAS. None takes
            the scans as they lie.
        z: cases that get a map of how unlike the others they are.
        radius_mm: of a peak.
        progress: called with ("cases", done, total).

    Raises:
        ConfigError: no cohort, no such target or case, a table that cannot be used, or scans that
            do not lie in the space.

    Example:
        >>> group_map("explained", "lesion", z=["case_07"]).mean  # doctest: +SKIP
        PosixPath('explained/group/mean_lesion.nii.gz')
    """
    check_number("radius_mm", radius_mm, above=0)
    records = explained_cases(Path(cohort))
    members = _members(Path(cohort), records, target, method)
    if unknown := [name for name in z if name not in members]:
        raise ConfigError(f"z: {nearest(unknown[0], list(members))}; no such case with {target!r}")
    folder = check_writable(Path(cohort) / "group" if out is None else out)
    moved = _transforms(transforms, list(members))
    grid = _grid_of(space, next(iter(members.values())))
    sums = _Sums.on(grid)
    left_out: dict[str, str] = {}
    for number, (name, member) in enumerate(members.items()):
        (progress or silent)("cases", number, len(members))
        try:
            cam, seen = _placed(member, grid, moved.get(name))
        except InputError as error:
            left_out[name] = str(error)
            continue
        sums.add(cam, seen, _peak_ball(member.entry, grid, moved.get(name), radius_mm))
    used = [name for name in members if name not in left_out]
    if not used:
        raise ConfigError(f"no case of {cohort} can be used: {next(iter(left_out.values()))}")
    short = unique_names([target if method is None else f"{target} {method}"])[0]
    of_cases = {}
    for name, file in zip(z, unique_names([f"{short} {name}" for name in z]), strict=True):
        if name in left_out:
            raise ConfigError(f"z of {name}: {left_out[name]}")
        values = sums.z_of(*_placed(members[name], grid, moved.get(name)))
        of_cases[name] = _written(folder / f"z_{file}.nii.gz", values, grid, None)
    seen_by = np.maximum(sums.seen, 1)
    return GroupMap(
        _written(folder / f"mean_{short}.nii.gz", sums.total / seen_by, grid, (0, 1)),
        _written(folder / f"peaks_{short}.nii.gz", sums.peaks / len(used), grid, (0, 1)),
        _written(folder / f"seen_{short}.nii.gz", sums.seen, grid, (0, len(used))),
        of_cases,
        tuple(used),
        left_out,
    )


class _Grid(NamedTuple):
    shape: tuple[int, ...]
    affine: NDArray[np.float64]


class _Member(NamedTuple):
    folder: Path
    record: Record
    entry: Entry


@dataclass
class _Sums:
    """Sums over cases, of which one alone is in memory at a time.

    Attributes:
        total, squares: of the CAMs, (*S).
        seen: how many cases see a voxel.
        peaks: how many cases have their peak near a voxel.
    """

    total: NDArray[np.float64]
    squares: NDArray[np.float64]
    seen: NDArray[np.float64]
    peaks: NDArray[np.float64]

    @classmethod
    def on(cls, grid: _Grid) -> _Sums:
        return cls(*(np.zeros(grid.shape) for _ in range(4)))

    def add(
        self, cam: NDArray[np.float64], seen: NDArray[np.bool_], peak: NDArray[np.bool_]
    ) -> None:
        self.total += cam
        self.squares += cam**2
        self.seen += seen
        self.peaks += peak

    def z_of(self, cam: NDArray[np.float64], seen: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return a case's deviation from the others, of which it is one itself in the sums."""
        others = self.seen - seen
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = (self.total - cam) / others
            variance = (self.squares - cam**2 - others * mean**2) / (others - 1)
            # Rounding leaves a little of what is zero.
            spread = np.sqrt(np.where(variance > 1e-9, variance, np.nan))
            return np.where(seen & (others >= FEWEST), (cam - mean) / spread, np.nan)


def _members(
    cohort: Path, records: Mapping[str, Record], target: str, method: str | None
) -> dict[str, _Member]:
    """Return the cases with a target, each with its explanation of it."""
    every = [(name, entry) for name, record in records.items() for entry in record.explanations]
    alike = [(name, entry) for name, entry in every if entry.label == target]
    if not alike:
        labels = sorted({entry.label for _, entry in every})
        raise ConfigError(f"{cohort}: no {target!r}: {nearest(target, labels)}")
    methods = sorted({entry.method.name for _, entry in alike if entry.method})
    if method is None and len(methods) > 1:
        raise ConfigError(f"{target!r} was explained by {', '.join(methods)}: name one method")
    if method is not None and method not in methods:
        raise ConfigError(f"method {method!r}: {nearest(method, methods)}")
    return {
        name: _Member(cohort / name, records[name], entry)
        for name, entry in alike
        if method is None or (entry.method and entry.method.name == method)
    }


def _transforms(table: str | Path | None, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Return case -> matrix (4, 4) from mm of its scan to mm of the space."""
    if table is None:
        return {}
    path = Path(table)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: not a table that can be read: {error}") from error
    if rows and not {"case", "transform"} <= rows[0].keys():
        raise ConfigError(f"{path}: columns case and transform are needed; got {list(rows[0])}")
    if empty := [row["case"] for row in rows if not row["transform"]]:
        raise ConfigError(f"{path}: no transform is named for {some(empty)}")
    found = {row["case"]: _matrix(path.parent / row["transform"]) for row in rows}
    if missing := [name for name in names if name not in found]:
        raise ConfigError(f"{path}: no transform for {some(missing)}")
    return found


def _matrix(path: Path) -> NDArray[np.float64]:
    try:
        matrix = np.loadtxt(path, dtype=np.float64)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a matrix of four rows and columns: {error}") from error
    return checked_affine(matrix, str(path), ConfigError)


def _grid_of(space: str | Path | None, first: _Member) -> _Grid:
    if space is None:
        found = written_map(*first)
        return _Grid(tuple(found.cam.shape), np.asarray(found.affine, np.float64))
    try:
        volume = _template() if space == TEMPLATE else nib.load(space)
    except (OSError, nib.filebasedimages.ImageFileError) as error:
        raise ConfigError(f"space {space}: not a volume that can be read: {error}") from error
    if len(volume.shape) < 3:
        raise ConfigError(f"space {space}: {volume.shape} voxels; a volume (X, Y, Z) is needed")
    return _Grid(tuple(volume.shape[:3]), np.asarray(volume.affine, np.float64))


def _template() -> nib.Nifti1Image:
    """Return the ICBM152 brain template at 1 mm."""
    try:
        from nilearn import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"space {TEMPLATE} comes with nilearn: pip install 'seg3dcam[demo]'"
        ) from error
    return datasets.load_mni152_template(resolution=1)


def _placed(
    member: _Member, grid: _Grid, transform: NDArray[np.float64] | None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return a CAM on the grid, and the voxels that its scan sees."""
    written = written_map(*member)
    affine = written.affine if transform is None else transform @ written.affine
    cam = resample(written.cam, affine, grid.affine, grid.shape).double().numpy()
    ones = torch.ones_like(written.cam)
    seen = resample(ones, affine, grid.affine, grid.shape).numpy() > 0.5
    if seen.mean() < _LEAST_SHARED:
        raise InputError(
            f"its scan fills {100 * seen.mean():.1f} % of the space: it lies somewhere else. Give "
            "transforms"
        )
    return np.where(seen, cam, 0), seen


def _peak_ball(
    entry: Entry, grid: _Grid, transform: NDArray[np.float64] | None, radius_mm: float
) -> NDArray[np.bool_]:
    """Return the voxels at most a radius from a CAM's peak."""
    found = np.zeros(grid.shape, dtype=bool)
    peak = entry.found.get("peak_mm")
    if peak is None:
        return found
    place = np.append(np.asarray(peak, np.float64), 1)
    place = place if transform is None else transform @ place
    voxel = np.linalg.solve(grid.affine, place)[:3]
    # A box around the ball, so that few distances are needed.
    reach = radius_mm / np.linalg.svd(grid.affine[:3, :3])[1].min()
    low = [max(0, math.ceil(at - reach)) for at in voxel]
    high = [min(n, math.floor(at + reach) + 1) for n, at in zip(grid.shape, voxel, strict=True)]
    box = tuple(map(slice, low, high))
    inside = np.stack(np.meshgrid(*_ranges(low, high), indexing="ij"), -1)
    apart = np.linalg.norm((inside - voxel) @ grid.affine[:3, :3].T, axis=-1)
    found[box] = apart <= radius_mm
    return found


def _ranges(low: Sequence[int], high: Sequence[int]) -> Iterator[NDArray[np.int64]]:
    for start, stop in zip(low, high, strict=True):
        yield np.arange(start, max(start, stop))


def _written(
    path: Path, values: NDArray[np.float64], grid: _Grid, shown: tuple[float, float] | None
) -> Path:
    return write_nifti(path, values.astype(np.float32), grid.affine, display_range=shown)
