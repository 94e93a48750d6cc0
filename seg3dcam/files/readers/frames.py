"""The two forms in which a NIfTI header says where its voxels lie, and which one counts.

The sform can be any affine; the qform is a rotation, with `pixdim` as spacing. Programs do not all
read the same form: nibabel, MONAI and FSL take the sform, ITK and 3D Slicer mostly take the qform,
and nnU-Net takes the spacing from `pixdim` in any case. If the forms differ, one scan lies in two
places.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.spatialimages import HeaderDataError

from seg3dcam.checks import Frame
from seg3dcam.errors import InputError, ScanError, tell
from seg3dcam.geometry import checked_affine, corner_gap, size_text, spacing_of

__all__ = ["FORMS_AGREE_MM", "FRAMES", "Frame", "agree", "best_affine", "form_of"]

Affine = npt.NDArray[np.float64]

#: In the order in which they are taken where both are there.
FRAMES: tuple[Frame, ...] = get_args(Frame)

#: Two forms mean the same place if no voxel lies further apart than this and a tenth of a voxel.
FORMS_AGREE_MM = 0.05
_AGREE_SPACING = 1e-3  # relative to the spacing
_ORTHONORMAL = 1e-4  # ITK refuses axes that are further from right angles


def best_affine(path: Path, header: nib.Nifti1Header, frame: Frame | None, *, must: bool) -> Affine:
    """Return a header's affine, (4, 4) voxel -> RAS, and warn if its two forms differ.

    - `frame`: the form to take. None chooses as nibabel does: the sform if there is one, otherwise
      the qform, and without either an affine made from `pixdim`.
    - `must`: whether a header without that form is refused; otherwise use the form that exists,
      and warn.
    """
    if frame is not None and frame not in FRAMES:
        raise ScanError(f"frame {frame!r}. Legal: 'sform', 'qform', or none to do as nibabel does.")
    there = [form for form in FRAMES if header[f"{form}_code"] > 0]
    if frame is not None and frame not in there:
        has = f"only a {there[0]}" if there else "neither form (both codes are 0)"
        if must or not there:
            raise ScanError(
                f"{path}: frame {frame!r} was chosen, and the header has {has}. Legal here: "
                f"{' or '.join([*map(repr, there), 'none'])}. Leave frame out."
            )
        tell(f"{path}: frame {frame!r} was chosen, and the header has {has}, which is taken.")
        frame = there[0]
    if not there:
        tell(
            f"{path}: qform and sform codes are both 0, so the file does not say where the scan "
            "lies. Left and right may be swapped, and ITK and 3D Slicer will not show a map over "
            "this file: set the codes with the program that made it."
        )
        return np.array(header.get_best_affine(), dtype=np.float64)
    taken = frame or there[0]
    affine = form_of(header, taken)
    if affine is None:
        raise _unusable(path, header, taken)
    if frame is None:
        _tell_of_two_places(path, header, taken, affine, there)
    return affine


def _unusable(path: Path, header: nib.Nifti1Header, form: Frame) -> ScanError:
    """Return the error for a form that is no affine; it names the other form if that is usable."""
    other = FRAMES[1 - FRAMES.index(form)]
    usable = header[f"{other}_code"] > 0 and form_of(header, other) is not None
    advice = f" Or choose the other form: frame={other!r} (--frame {other})." if usable else ""
    found = f"{path}: the header cannot be used: its {form} is none: {_found(header, form)}."
    if form == "sform":
        try:
            checked_affine(header.get_sform(), str(path), ScanError)
        except ScanError as error:
            found = str(error)
    return ScanError(f"{found} Repair the header with the program that made it.{advice}")


def form_of(header: nib.Nifti1Header, form: Frame) -> Affine | None:
    """Return the affine of one form, whatever its code; None if that is no legal affine."""
    try:
        found = header.get_sform() if form == "sform" else header.get_qform()
        return checked_affine(found, form)
    except (InputError, HeaderDataError, ValueError, ArithmeticError):  # it is no rotation
        return None


def agree(sform: Affine, qform: Affine, shape: Sequence[int]) -> bool:
    """Tell whether two forms of one header mean the same place, as far as a qform can express it.

    A qform cannot express shear (gantry tilt). Near 180 degrees, its float32 quaternion cannot
    express turns more finely than to a thousandth.
    """
    spacings = np.array([spacing_of(sform), spacing_of(qform)])
    same_spacing = np.ptp(spacings, axis=0) <= _AGREE_SPACING * spacings.max(axis=0)
    if not same_spacing.all() or np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0:
        return False
    gap, tolerance = corner_gap(sform, qform, shape), min(FORMS_AGREE_MM, spacings.min() / 10)
    header = nib.Nifti1Header()
    header.set_qform(sform, code=1)
    nearest = form_of(header, "qform")
    if nearest is None or gap <= tolerance:
        return bool(gap <= tolerance)
    rounding = 0.0 if is_sheared(sform) else corner_gap(nearest, sform, shape)
    return bool(corner_gap(nearest, qform, shape) <= tolerance or gap <= tolerance + 2 * rounding)


def is_sheared(affine: Affine) -> bool:
    """Tell whether the axes are so far from right angles that ITK refuses such a NIfTI file."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(directions.T @ directions - np.eye(3)).max() > _ORTHONORMAL)


def _tell_of_two_places(
    path: Path, header: nib.Nifti1Header, taken: Frame, affine: Affine, there: Sequence[Frame]
) -> None:
    """Warn where another program, which reads the header otherwise, would put the voxels."""
    shape = [max(int(size), 1) for size in (*header.get_data_shape()[:3], 1, 1)][:3]
    for form in there:
        other = form_of(header, form)
        if other is None:
            tell(
                f"{path}: the {form} cannot be used: {_found(header, form)}. The {taken} is taken; "
                "programs that read the other (ITK, 3D Slicer) may place the scan elsewhere or "
                "refuse it. What is written from it says one place in both forms. Repair the "
                "header with the program that made it."
            )
        elif form != taken and not agree(affine, other, shape):
            tell(
                f"{path}: the header says two places. sform and qform lie up to "
                f"{corner_gap(affine, other, shape):.4g} mm apart{_differences(affine, other)}. "
                f"The {taken} (code {int(header[f'{taken}_code'])}) is taken, as nibabel and MONAI "
                f"do; ITK and 3D Slicer may show the scan by the {form} (code "
                f"{int(header[f'{form}_code'])}). What is written from it says one place in both "
                f"forms. Choose with frame={form!r} (--frame {form}) or frame={taken!r}, or repair "
                "the header."
            )
        elif form == "qform" and taken == "sform" and is_sheared(affine):
            gap = corner_gap(affine, other, shape)
            if gap > min(FORMS_AGREE_MM, min(spacing_of(affine)) / 10):
                tell(
                    f"{path}: the sform is sheared (gantry tilt, or an affine registration), which "
                    f"a qform cannot say. The sform is taken; ITK and 3D Slicer read the qform of "
                    f"NIfTI files, which lies up to {gap:.3g} mm off, in what is written as well. "
                    "Resample the scan onto a grid without shear if that matters."
                )
    pixdim = np.abs(np.array(header["pixdim"][1:4], dtype=np.float64))
    spacing = np.array(spacing_of(affine))
    if "qform" not in there and (np.abs(pixdim - spacing) > _AGREE_SPACING * spacing).any():
        tell(
            f"{path}: the header says two voxel sizes: the sform {size_text(spacing, 6)} mm, "
            f"pixdim {size_text(pixdim, 6)} mm. The sform is taken, as nibabel and MONAI do; ITK, "
            "3D Slicer and nnU-Net take pixdim. Repair the header: both must be the same."
        )


def _differences(one: Affine, other: Affine) -> str:
    found = ""
    sizes = spacing_of(one), spacing_of(other)
    if not np.allclose(*sizes, rtol=_AGREE_SPACING, atol=0):
        found += f", with voxels of {size_text(sizes[0], 6)} and {size_text(sizes[1], 6)} mm"
    if np.linalg.det(one[:3, :3]) * np.linalg.det(other[:3, :3]) < 0:
        found += ", and one is the other's mirror image"
    return found


def _found(header: nib.Nifti1Header, form: Frame) -> str:
    """Say in words what a form holds."""
    if form == "sform":
        rows = [[float(x) for x in header[row]] for row in ("srow_x", "srow_y", "srow_z")]
        return f"its rows {rows} are no affine that is finite and can be inverted"
    parts = [float(header[f"quatern_{axis}"]) for axis in "bcd"]
    place = [float(header[f"qoffset_{axis}"]) for axis in "xyz"]
    return (
        f"its quaternion {parts}, offset {place} and pixdim "
        f"{[float(x) for x in header['pixdim'][:4]]} are no rotation and place"
    )
