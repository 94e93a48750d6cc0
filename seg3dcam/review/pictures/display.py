"""Cut a volume into slices and turn them as a radiologist expects.

Nothing is drawn here. `plan_view` reads the affine once and plans how to cut a volume, and `cut`
applies this plan to any array on the same grid. The other functions choose slices and say where
they lie.

Radiological display: the patient's right is on the left of the picture. Anterior is up in axial
pictures, and on the left in sagittal ones. Superior is up in coronal and sagittal pictures.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import nibabel
import numpy as np
from numpy.typing import ArrayLike, NDArray

from seg3dcam.errors import ConfigError, InputError, nearest
from seg3dcam.geometry import checked_affine, spacing_of

# The setting "relevant" shows at most this many slices.
MAX_RELEVANT = 20

OPPOSITE = dict(zip("RLAPSI", "LRPAIS", strict=True))


class Plane(NamedTuple):
    """Towards which side of the patient slices, columns and rows follow one another."""

    across: str
    columns: str
    rows: str


PLANES = {
    "axial": Plane(across="S", columns="L", rows="P"),
    "coronal": Plane(across="A", columns="L", rows="I"),
    "sagittal": Plane(across="R", columns="P", rows="I"),
}


class Letters(NamedTuple):
    """The side of the patient at each edge of a picture."""

    left: str
    right: str
    top: str
    bottom: str


class Size(NamedTuple):
    """The size of a picture in pixels, and the number of pixels per mm."""

    height: int
    width: int
    pixels_per_mm: float


@dataclass(frozen=True, eq=False)
class View:
    """How to cut volumes of one grid into slices of one plane; made by `plan_view`."""

    axis: str
    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    slice_axis: int
    row_axis: int
    column_axis: int
    flip_rows: bool
    flip_columns: bool

    @property
    def slice_count(self) -> int:
        """Number of slices along the array axis."""
        return self.shape[self.slice_axis]

    @property
    def index_name(self) -> str:
        """The usual letter of the array axis along which slices are counted: i, j or k."""
        return "ijk"[self.slice_axis]


# ---------------------------------------------------------------- geometry


def plan_view(shape: Sequence[int], affine: ArrayLike, axis: str) -> View:
    """Plan how to cut volumes of `shape` into pictures of one anatomical plane.

    The slices follow the array axis that is closest to the anatomical one, so nothing has to be
    interpolated. An oblique scan is shown along its own axes.

    Args:
        shape: (X, Y, Z) of the volumes.
        affine: (4, 4), voxel index -> RAS mm.
        axis: "axial", "coronal" or "sagittal".

    Raises:
        ConfigError: the axis is unknown.
        InputError: the affine is not (4, 4), not finite or cannot be inverted.

    Example:
        >>> view = plan_view((4, 5, 6), np.eye(4), "coronal")
        >>> view.slice_axis, view.slice_count
        (1, 5)
        >>> edge_letters(view)
        Letters(left='R', right='L', top='S', bottom='I')
    """
    if axis not in PLANES:
        raise ConfigError(f"unknown axis {axis!r}; {nearest(str(axis), PLANES)}")
    matrix = checked_affine(affine, "the volume to be drawn")
    plane = PLANES[axis]
    codes = nibabel.aff2axcodes(matrix)
    slice_axis, _ = _find_axis(codes, plane.across)
    row_axis, flip_rows = _find_axis(codes, plane.rows)
    column_axis, flip_columns = _find_axis(codes, plane.columns)
    x, y, z = (int(n) for n in shape)
    return View(
        axis=axis,
        shape=(x, y, z),
        affine=matrix,
        slice_axis=slice_axis,
        row_axis=row_axis,
        column_axis=column_axis,
        flip_rows=flip_rows,
        flip_columns=flip_columns,
    )


def _find_axis(codes: Sequence[str], towards: str) -> tuple[int, bool]:
    """Return the array axis along a direction, and whether it runs in the opposite direction."""
    if towards in codes:
        return codes.index(towards), False
    return codes.index(OPPOSITE[towards]), True


def edge_letters(view: View) -> Letters:
    """Return which side of the patient is at each edge of a view's pictures.

    The letters are those of the nearest anatomical axes, with the view's flips applied.
    """
    codes = nibabel.aff2axcodes(view.affine)
    right, bottom = codes[view.column_axis], codes[view.row_axis]
    if view.flip_columns:
        right = OPPOSITE[right]
    if view.flip_rows:
        bottom = OPPOSITE[bottom]
    return Letters(left=OPPOSITE[right], right=right, top=OPPOSITE[bottom], bottom=bottom)


def cut(view: View, volume: NDArray[Any], index: int) -> NDArray[Any]:
    """Return a slice as a view (rows, columns); `index` counts from 0 along the array axis.

    >>> volume = np.arange(8).reshape(2, 2, 2)
    >>> cut(plan_view((2, 2, 2), np.eye(4), "axial"), volume, 0)  # x to the right, y up: flip both
    array([[6, 2],
           [4, 0]])
    """
    plane = np.moveaxis(volume, (view.slice_axis, view.row_axis, view.column_axis), (0, 1, 2))[
        index
    ]
    if view.flip_rows:
        plane = plane[::-1]
    if view.flip_columns:
        plane = plane[:, ::-1]
    return plane


def pixel_of(view: View, voxel: Sequence[float], size: Size) -> tuple[float, float]:
    """Return row and column of a voxel's centre in a picture, in pixels from its top left corner.

    >>> view = plan_view((4, 4, 4), np.eye(4), "axial")  # x to the right, y up: both flipped
    >>> pixel_of(view, (0, 3, 2), Size(40, 40, 10.0))
    (5.0, 35.0)
    """

    def along(axis: int, pixels: int, flipped: bool) -> float:
        part = (voxel[axis] + 0.5) / view.shape[axis]
        return pixels * (1 - part if flipped else part)

    return (
        along(view.row_axis, size.height, view.flip_rows),
        along(view.column_axis, size.width, view.flip_columns),
    )


def spacing_mm(view: View) -> tuple[float, float]:
    """Return height and width in mm of a voxel in a view's pictures."""
    sizes = spacing_of(view.affine)
    return sizes[view.row_axis], sizes[view.column_axis]


def obliquity_degrees(affine: ArrayLike) -> float:
    """Return the largest angle between an axis of the voxels and its nearest anatomical axis.

    >>> obliquity_degrees(np.diag([-1, -1, 2, 1]))
    0.0
    """
    matrix = np.asarray(affine, dtype=np.float64)[:3, :3]
    world = nibabel.io_orientation(affine)[:, 0].astype(int)
    along = np.abs(matrix[world, range(3)]) / np.linalg.norm(matrix, axis=0)
    return float(np.degrees(np.arccos(np.clip(along, 0, 1))).max())


def position_mm(view: View, index: float) -> float:
    """Return the position of a slice's centre, in mm towards `PLANES[view.axis].across`."""
    centre = (np.array(view.shape) - 1) / 2
    centre[view.slice_axis] = index
    world = "RAS".index(PLANES[view.axis].across)
    return float(view.affine[world, :3] @ centre + view.affine[world, 3])


def position_text(view: View, index: int) -> str:
    """Return the position of a slice's centre as a text, from the origin of the patient's space.

    >>> position_text(plan_view((9, 9, 9), np.diag([1, 1, 2, 1]), "axial"), 3)
    'S 6.0 mm'
    """
    return f"{side_text(PLANES[view.axis].across, position_mm(view, index))} mm"


def side_text(side: str, mm: float) -> str:
    """Return how far something lies from the origin as a text, with the side and without a sign.

    >>> side_text("R", 12.04), side_text("S", -3.5)
    ('R 12.0', 'I 3.5')
    """
    return f"{side if mm >= 0 else OPPOSITE[side]} {abs(mm):.1f}"


def picture_size(view: View, short_side: int, *, long_side: int, keep_detail: bool = True) -> Size:
    """Choose the size of the view's pictures, with square pixels.

    Args:
        view: the plan of the cut.
        short_side: smallest height and width in pixels.
        long_side: largest height and width in pixels, which takes precedence over `short_side`.
        keep_detail: whether the picture may be larger than `short_side`, so that every voxel gets
            at least one pixel.
    """
    row_mm, column_mm = spacing_mm(view)
    height_mm = row_mm * view.shape[view.row_axis]
    width_mm = column_mm * view.shape[view.column_axis]
    zoom = short_side / min(height_mm, width_mm)
    if keep_detail:
        zoom = max(zoom, 1 / min(row_mm, column_mm))
    zoom = min(zoom, long_side / max(height_mm, width_mm))
    return Size(max(1, round(height_mm * zoom)), max(1, round(width_mm * zoom)), zoom)


# ---------------------------------------------------------------- slices


def slice_profile(view: View, volume: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return the largest value and the sum of every slice, each (N,)."""
    others = (view.row_axis, view.column_axis)
    with np.errstate(invalid="ignore"):  # the caller checks for values that are not finite
        return volume.max(axis=others), volume.sum(axis=others, dtype=np.float64)


def choose_slices(
    slices: str | int | Sequence[int],
    relevant: NDArray[np.bool_],
    peak: int | None,
    limit: int = MAX_RELEVANT,
) -> list[int]:
    """Turn the `slices` setting into slice indices.

    Args:
        slices: "relevant", "all", one index or several.
        relevant: (N,), which slices are worth looking at.
        peak: a slice that "relevant" must contain, or None.
        limit: "relevant" gives at most this many slices, evenly spread. If no slice is relevant,
            they are spread over the whole volume.

    Raises:
        ConfigError: the word is unknown.
        InputError: an index is outside of 0 .. N-1, or there is none.

    >>> choose_slices("relevant", np.array([0, 1, 1, 1, 0], dtype=bool), peak=2, limit=2)
    [2, 3]
    """
    count = len(relevant)
    if isinstance(slices, str):
        if slices == "all":
            return list(range(count))
        if slices == "relevant":
            return _spread(relevant, peak, limit)
        hint = nearest(slices, ("relevant", "all"))
        raise ConfigError(f"unknown slices {slices!r}; {hint}; or one index, or a list of them")
    wanted: list[Any] = [slices] if np.ndim(slices) == 0 else list(slices)  # type: ignore[arg-type]
    if not wanted:
        raise InputError("slices is empty: give at least one index, 'relevant' or 'all'")
    return list(dict.fromkeys(_check_index(index, count) for index in wanted))


def _check_index(index: Any, count: int) -> int:
    try:
        number = operator.index(index)
    except TypeError:
        raise InputError(f"a slice index must be a whole number, not {index!r}") from None
    if isinstance(index, (bool, np.bool_)) or not 0 <= number < count:
        raise InputError(f"slice index {index} is outside 0..{count - 1} (the scan's own axis)")
    return number


def _spread(relevant: NDArray[np.bool_], peak: int | None, limit: int) -> list[int]:
    candidates = relevant.copy()
    if peak is not None:
        candidates[peak] = True
    if not candidates.any():
        candidates[:] = True
    return thin_out(np.flatnonzero(candidates).tolist(), limit, keep=peak)


def thin_out(indices: Sequence[int], limit: int, keep: int | None = None) -> list[int]:
    """Return at most `limit` of the indices, evenly spread; `keep`, if among them, stays.

    >>> thin_out([1, 2, 3, 4, 5], 3), thin_out([1, 2, 3, 4, 5], 3, keep=4)
    ([1, 3, 5], [1, 4, 5])
    """
    if len(indices) <= limit:
        return list(indices)
    chosen = np.array(indices)[np.linspace(0, len(indices) - 1, limit).round().astype(int)]
    if keep is not None and keep in indices and keep not in chosen:
        chosen[np.abs(chosen - keep).argmin()] = keep
    return [int(index) for index in chosen]
