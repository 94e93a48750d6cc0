"""Put slices together to a volume, or refuse them and say what was found.

Slices are ordered and placed by their positions alone, never by their number or file name. All
checks need only the headers, so errors come before any voxel is read. If a slice is missing, the
series is refused; other programs stretch such a series without a word.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from seg3dcam.errors import ScanError, some, tell
from seg3dcam.files.series.elements import in_words
from seg3dcam.files.series.slices import Array, Slice, check_pixels, read_headers, read_pixels
from seg3dcam.geometry import LPS_TO_RAS, size_text

__all__ = ["Series", "read_series"]

#: In mm: a voxel may lie this far from its place in an even grid, since files round positions.
TOLERANCE_MM = 0.05
#: The same as a fraction of the distance between slices, which is stricter for very thin slices.
TOLERANCE_STEPS = 0.1
#: Slices that are closer together than this, in mm, have the same position.
SAME_PLACE_MM = 1e-3

#: Elements in which several images of one position usually differ.
_PHASES = (
    "AcquisitionNumber",
    "EchoTime",
    "TemporalPositionIdentifier",
    "TriggerTime",
    "DiffusionBValue",
    "InversionTime",
    "FlipAngle",
    "ConvolutionKernel",
    "ImageType",
    "AcquisitionTime",
)
_HOW_TO_CHOOSE = (
    "Legal: the slices of one series. Move them to a folder of their own, or give them as a list "
    "of files."
)
#: Slices that are read at a time, so that whole cache lines of the volume are written.
_TOGETHER = 16


class Series(NamedTuple):
    """Voxels (columns, rows, slices), their affine, and the slices' headers without pixels."""

    voxels: npt.NDArray[np.float32]
    affine: Array
    headers: list[Any]


def read_series(source: Path | Sequence[Path]) -> Series:
    """Read the one DICOM series of a folder, or of a list of files.

    Files in a folder that are not DICOM are ignored. Slices are ordered along their normal, the
    cross product of the directions of rows and columns. So those of a usual axial series go from
    the feet to the head.

    Raises:
        ScanError: there are several series, several images at one position, missing, uneven or
            different slices, only one slice, multi-frame, colour or localizer images, no image at
            all, or a damaged file. The message says what was found.
        MissingExtraError: pydicom or SimpleITK is not installed.

    Warns (`Seg3dcamWarning`) if a tilted gantry has sheared the volume. The affine is exact all the
    same.
    """
    where = str(source) if isinstance(source, Path) else f"the list of {len(source)} files"
    images = read_headers(source)
    _check_one_series(images, where)
    _check_images(images, where)
    images = _in_order(images, where)
    affine = _affine(images, where)
    return Series(_read_voxels(images), affine, [image.header for image in images])


# ------------------------------------------------------------------------------------ one series


def _check_one_series(images: Sequence[Slice], where: str) -> None:
    """Refuse several series, and say what each of them holds."""
    series: dict[str, list[Slice]] = {}
    for image in images:
        series.setdefault(str(image.value("SeriesInstanceUID")), []).append(image)
    if len(series) > 1:
        largest_first = sorted(series.values(), key=len, reverse=True)
        each = [f"{_in_words(part)}, such as {part[0].path.name}" for part in largest_first]
        found = some(each, 8, "; ")
        raise ScanError(f"{where} holds {len(series)} series: {found}. {_HOW_TO_CHOOSE}")


def _in_words(images: Sequence[Slice]) -> str:
    """Describe a series without names and free text, which may hold data of the patient.

    For example "series 3 (CT): 120 images of 512 x 512".
    """
    kinds = Counter(_kind_in_words(image) for image in images).most_common(3)
    counts = ", ".join(kind.format(n=n, s="s" * (n > 1)) for kind, n in kinds)
    number = in_words(images[0].header, "SeriesNumber")
    name = "a series without number" if number in ("none", "None", "") else f"series {number}"
    return f"{name} ({images[0].value('Modality') or 'no modality'}): {counts}"


def _kind_in_words(image: Slice) -> str:
    if not image.is_image:
        return "{n} object{s} without an image"
    columns, rows = image.size
    many = f" with {image.frames} frames" if image.frames > 1 else ""
    return f"{{n}} image{{s}} of {columns} x {rows}{many}"


def _check_images(images: Sequence[Slice], where: str) -> None:
    """Refuse everything except single grey slices whose place is known."""
    found = f"{where} holds {_in_words(images)}"
    for image in images:
        name, modality = image.path.name, image.value("Modality")
        if not image.is_image or modality in {"SEG", "RTDOSE"}:
            raise ScanError(
                f"{found}. {name} is no scan but a {modality} object. Give the "
                "series that it belongs to: slices of CT, MR or PET."
            )
        if image.frames > 1 or "PerFrameFunctionalGroupsSequence" in image.header:
            raise ScanError(
                f"{found}. {name} is a multi-frame (enhanced) image. Legal: one file per slice. "
                "Export the series as single-frame (classic) DICOM, or convert it to NIfTI "
                "(dcm2niix)."
            )
        check_pixels(image)
    if scouts := [image for image in images if image.is_localizer]:
        raise ScanError(
            f"{found}; {len(scouts)} of them are localizers (scouts), such as "
            f"{scouts[0].path.name}. Take them out of the folder."
        )
    for keyword, value in (
        ("ImagePositionPatient", "position"),
        ("ImageOrientationPatient", "directions"),
        ("PixelSpacing", "steps"),
    ):
        lost = [image for image in images if not np.isfinite(getattr(image, value)).all()]
        if lost:
            raise ScanError(
                f"{found}; {len(lost)} of them have no usable {keyword}, such as "
                f"{lost[0].path.name}, so nobody can say where they lie in the patient. Export the "
                "series again from the archive, with its geometry."
            )
    if len(images) == 1:
        raise ScanError(
            f"{found}. One slice is no volume: give the folder of all slices of the series."
        )
    _check_alike(images, found)


def _check_alike(images: Sequence[Slice], found: str) -> None:
    """Refuse slices of different size, spacing or orientation, and axes without a right angle."""
    if len({image.size for image in images}) > 1:
        raise ScanError(f"{found}. All slices must have one size. {_HOW_TO_CHOOSE}")
    extent = np.array(images[0].size, dtype=np.float64)
    steps = np.array([image.steps for image in images])
    if (np.ptp(steps, axis=0) * extent).max() > TOLERANCE_MM:
        spacings = sorted({size_text(step, 6) for step in steps.tolist()})
        raise ScanError(
            f"{found}. They have different pixel spacings: {some(spacings, 4)} mm. {_HOW_TO_CHOOSE}"
        )
    directions = np.array([image.directions for image in images])
    apart = np.linalg.norm(directions - directions[0], axis=2).max()
    if apart * (steps[0] * extent).max() > TOLERANCE_MM:
        turned = {tuple(each.ravel().round(2).tolist()) for each in directions}
        degrees = np.degrees(2 * np.arcsin(min(1, apart / 2)))
        raise ScanError(
            f"{found}. They have {len(turned)} orientations, up to {degrees:.3g} degrees apart (a "
            f"localizer, or reformats?). {_HOW_TO_CHOOSE}"
        )
    row, column = directions[0]
    lengths = np.linalg.norm(directions[0], axis=1)
    if np.abs(lengths - 1).max() > 1e-2 or abs(row @ column) > 1e-2 or steps.min() <= 0:
        raise ScanError(
            f"{found}. ImageOrientationPatient {size_text(directions[0].ravel(), 6)} or "
            f"PixelSpacing {size_text(steps[0], 6)} is wrong: two unit vectors at a right angle, "
            "and spacings above 0 are legal. Export the series again from the archive."
        )


# ----------------------------------------------------------------------------------------- order


def _in_order(images: Sequence[Slice], where: str) -> list[Slice]:
    """Sort slices along their normal; refuse positions that repeat, leave gaps or are uneven."""
    depths = _positions(images) @ _normal(images)
    order = np.argsort(depths, kind="stable").tolist()
    images, depths = [images[n] for n in order], depths[order]
    steps = np.diff(depths)
    if steps.min() < SAME_PLACE_MM:
        raise _several_at_one_place(images, depths, where)
    step = float(np.percentile(steps, 50, method="lower"))
    tolerance = min(TOLERANCE_MM, TOLERANCE_STEPS * step)
    missing = np.rint(steps / step) - 1
    if missing.any() and np.abs(steps - (missing + 1) * step).max() <= 4 * tolerance:
        raise _gaps(depths, missing, step, where)
    even = np.linspace(depths[0], depths[-1], len(depths))
    if np.abs(depths - even).max() > tolerance:
        raise ScanError(
            f"{where}: the slices are not evenly spaced: {len(images)} slices, with "
            f"{steps.min():.4g} to {steps.max():.4g} mm from one to the next. Legal: one distance, "
            f"within {tolerance:.2g} mm. Are slices missing, or two series in one? Export the "
            "series again, or resample it to even slices (dcm2niix)."
        )
    return images


def _positions(images: Sequence[Slice]) -> Array:
    return np.array([image.position for image in images])


def _unit_directions(images: Sequence[Slice]) -> Array:
    directions = images[0].directions
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


def _normal(images: Sequence[Slice]) -> Array:
    return np.cross(*_unit_directions(images))


def _several_at_one_place(images: Sequence[Slice], depths: Array, where: str) -> ScanError:
    uids = Counter(str(image.value("SOPInstanceUID")) for image in images)
    uid, copies = uids.most_common(1)[0]
    if copies > 1 and uid != "None":
        names = [i.path.name for i in images if i.value("SOPInstanceUID") == uid]
        return ScanError(
            f"{where}: the same image is there twice: {' and '.join(names[:2])}. Remove one of "
            "them."
        )
    starts = np.flatnonzero(np.diff(depths, prepend=-np.inf) >= SAME_PLACE_MM).tolist()
    groups = [images[a:b] for a, b in itertools.pairwise([*starts, len(images)])]
    most = max(groups, key=len)
    tells = "; ".join(_differences(most)) or "their headers do not say what they differ in"
    return ScanError(
        f"{where}: {len(images)} images, but only {len(groups)} positions; up to {len(most)} "
        f"images share one ({tells}). These are several phases, echoes or time points. "
        f"{_HOW_TO_CHOOSE}"
    )


def _differences(images: Sequence[Slice]) -> Iterator[str]:
    for keyword in _PHASES:
        values = {in_words(image.header, keyword) for image in images}
        if len(values) > 1:
            yield f"{keyword} {some(sorted(values), 4)}"


def _gaps(depths: Array, missing: Array, step: float, where: str) -> ScanError:
    gaps = [
        f"{int(missing[n])} between {depths[n]:.4g} and {depths[n + 1]:.4g} mm"
        for n in np.flatnonzero(missing)
    ]
    total = int(missing.sum())
    return ScanError(
        f"{where}: {total} slice{'s are' if total > 1 else ' is'} missing: {some(gaps, 6)} along "
        f"the slices' normal, where slices are {step:.4g} mm apart. {len(depths)} slices were "
        "found. Copy or export the series again: all slices between the first and the last are "
        "needed."
    )


# ------------------------------------------------------------------------------------------ place


def _affine(images: Sequence[Slice], where: str) -> Array:
    """Return the affine from (column, row, slice) to RAS mm, by the positions of the slices."""
    positions = _positions(images)
    step = (positions[-1] - positions[0]) / (len(images) - 1)
    straight = positions[0] + np.arange(len(images))[:, None] * step
    off = np.linalg.norm(positions - straight, axis=1).max()
    if off > TOLERANCE_MM:
        raise ScanError(
            f"{where}: the slices do not lie in a straight line: one is {off:.3g} mm to the side "
            f"of it. Legal: {TOLERANCE_MM} mm. Resample the series to a straight stack "
            "(dcm2niix), or give only the slices that belong together."
        )
    _warn_of_tilt(images, positions[-1] - positions[0], where)
    lps = np.eye(4)
    lps[:3, :2] = (_unit_directions(images) * images[0].steps[:, None]).T
    lps[:3, 2] = step
    lps[:3, 3] = positions[0]
    return LPS_TO_RAS @ lps


def _warn_of_tilt(images: Sequence[Slice], across: Array, where: str) -> None:
    sideways = np.linalg.norm(_unit_directions(images) @ across)
    if sideways > TOLERANCE_MM:
        tilt = np.degrees(np.arctan2(sideways, _normal(images) @ across))
        tell(
            f"{where}: the slices are stacked at {tilt:.3g} degrees to their normal (gantry tilt). "
            "The affine is exact, but a network sees sheared anatomy, and programs that know only "
            "a qform cannot place the result: resample the scan to a right-angled grid if that "
            "matters."
        )


# ----------------------------------------------------------------------------------------- voxels


def _read_voxels(images: Sequence[Slice]) -> npt.NDArray[np.float32]:
    """Read all slices into a volume (columns, rows, slices)."""
    columns, rows = images[0].size
    voxels = np.empty((columns, rows, len(images)), dtype=np.float32)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(images), _TOGETHER):
            planes = np.stack(list(pool.map(read_pixels, images[start : start + _TOGETHER])))
            voxels[:, :, start : start + _TOGETHER] = planes.transpose(2, 1, 0)
    return voxels
