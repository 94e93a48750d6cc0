"""Review pictures as PNG files: one per slice, or a montage of several.

`prepare` checks and plans once; `draw_slice` and `draw_montage` return pictures; `save_slices` and
`save_montage` are thin shells that write files. A report or a film can start from `prepare`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from seg3dcam.errors import ConfigError, InputError, OutputError
from seg3dcam.files import atomic
from seg3dcam.look import Window, choose_window
from seg3dcam.review import display, draw

Axis = Literal["axial", "coronal", "sagittal"]
WindowSetting = str | Sequence[float] | None
SliceSetting = str | int | Sequence[int]

# Sides of a picture in pixels.
SLICE_SHORT, SLICE_LONG = 400, 1024
MONTAGE_SHORT, MONTAGE_SMALLEST = 256, 128
MONTAGE_PIXELS = 12_000_000  # tiles shrink, down to the smallest, to keep near this
MONTAGE_SHAPE = 1.6  # width / height when the number of columns is free

OBLIQUE_NOTE = 10  # degrees from which the footer speaks of it
RESEARCH_ONLY = "research use only, not for diagnosis"


@dataclass(frozen=True, eq=False)
class Review:
    """Everything that the pictures of one case share; made by `prepare`.

    `cam` is None where there is nothing to draw; `notice` then says why.
    """

    view: display.View
    scan: NDArray[Any]
    cam: NDArray[Any] | None
    masks: dict[str, NDArray[np.bool_]]
    notice: str
    window: Window
    threshold: float
    opacity: float
    palette: draw.Palette
    colour_bar: draw.Picture
    letters: display.Letters
    slice_max: NDArray[Any] | None
    peak: int | None
    indices: list[int]
    title: str
    caption: list[str]


# ---------------------------------------------------------------- public


def save_slices(
    folder: str | os.PathLike[str],
    scan: ArrayLike,
    cam: ArrayLike,
    affine: ArrayLike,
    *,
    prediction: ArrayLike | None = None,
    truth: ArrayLike | None = None,
    axis: Axis = "axial",
    slices: SliceSetting = "relevant",
    window: WindowSetting = None,
    threshold: float = 0.2,
    opacity: float = 0.5,
    colormap: str = "inferno",
    title: str = "",
    caption: Mapping[str, object] | None = None,
) -> list[Path]:
    """Save one PNG per slice: the scan, and beside it the scan with the CAM and the outlines.

    Radiological display (the patient's right on the left, see `seg3dcam.review.display`), square
    pixels, scale bar, colour bar and a footer. The CAM is drawn on one scale: the same value has
    the same colour in every slice.

    Args:
        folder: where to write `axial_045.png` and so on; made if missing.
        scan: (X, Y, Z), any real numbers.
        cam: (X, Y, Z) in [0, 1], already scaled once for the whole volume. All zero, or with NaN:
            no heat is drawn and the picture says so.
        affine: (4, 4), voxel index -> RAS mm.
        prediction: (X, Y, Z) mask, drawn as a dashed cyan outline.
        truth: (X, Y, Z) mask, drawn as a solid green outline.
        axis: "axial", "coronal" or "sagittal"; an oblique scan is cut along its own axes.
        slices: voxel indices along the scan's own array axis that is closest to the anatomical
            one (what a NIfTI viewer shows, also in the file names); "all"; or "relevant": where
            the CAM reaches the threshold or the prediction is present, at most 20, with the peak.
        window: (width, level), or "brain", "lung", "soft tissue", "abdomen", "bone" (CT), or None:
            0.5–99.5 percentile of the voxels that are not zero, over the volume.
        threshold: lower CAM values are not drawn.
        opacity: of the heat where the CAM is 0.5 or more; less below.
        colormap: any colormap of matplotlib.
        title: the first line of the picture.
        caption: more for the footer, e.g. {"class": "tumour", "layer": "encoder.4"}.

    Returns:
        The files, in the order of the slices.

    Raises:
        InputError: shapes that differ, an index outside the scan, a CAM outside [0, 1].
        ConfigError: an unknown axis, window or colormap, or an illegal number.
        OutputError: a file cannot be written. Files are written under another name and renamed,
            so there is never half a file.

    Example:
        >>> import tempfile
        >>> scan, cam = np.random.rand(24, 24, 12), np.zeros((24, 24, 12))
        >>> cam[5:9, 5:9, 6] = 1
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = save_slices(folder, scan, cam, np.diag([1, 1, 3, 1]))
        >>> [file.name for file in files]
        ['axial_006.png']
    """
    review = prepare(
        scan,
        cam,
        affine,
        prediction=prediction,
        truth=truth,
        axis=axis,
        slices=slices,
        window=window,
        threshold=threshold,
        opacity=opacity,
        colormap=colormap,
        title=title,
        caption=caption,
    )
    target = make_folder(Path(folder))
    digits = max(3, len(str(review.view.slice_count - 1)))
    files = []
    for index in review.indices:
        file = target / f"{axis}_{index:0{digits}d}.png"
        write_png(file, draw_slice(review, index))
        files.append(file)
    return files


def save_montage(
    path: str | os.PathLike[str],
    scan: ArrayLike,
    cam: ArrayLike,
    affine: ArrayLike,
    *,
    prediction: ArrayLike | None = None,
    truth: ArrayLike | None = None,
    axis: Axis = "axial",
    slices: SliceSetting = "relevant",
    window: WindowSetting = None,
    threshold: float = 0.2,
    opacity: float = 0.5,
    colormap: str = "inferno",
    title: str = "",
    caption: Mapping[str, object] | None = None,
    columns: int | None = None,
) -> Path:
    """Save several slices in one PNG, each as a pair: the scan, and the scan with the CAM.

    Args:
        path: the file, ending in .png; its folder is made if missing.
        scan: as for `save_slices`, and so are the other arguments.
        cam: see `save_slices`.
        affine: see `save_slices`.
        prediction: see `save_slices`.
        truth: see `save_slices`.
        axis: see `save_slices`.
        slices: see `save_slices`.
        window: see `save_slices`.
        threshold: see `save_slices`.
        opacity: see `save_slices`.
        colormap: see `save_slices`.
        title: see `save_slices`.
        caption: see `save_slices`.
        columns: pairs per row; None: chosen for a wide page.

    Returns:
        The file.

    Raises:
        InputError: as `save_slices`.
        ConfigError: as `save_slices`, and a path that does not end in .png.
        OutputError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> volume = np.random.rand(16, 16, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_montage(folder + "/case.png", volume, volume, np.eye(4), slices=[2, 5]).name
        'case.png'
    """
    file = Path(path)
    if file.suffix.lower() != ".png":
        raise ConfigError(f"the montage's path must end in .png, not {file.name!r}")
    if columns is not None and columns < 1:
        raise ConfigError(f"columns must be 1 or more, or None, not {columns!r}")
    review = prepare(
        scan,
        cam,
        affine,
        prediction=prediction,
        truth=truth,
        axis=axis,
        slices=slices,
        window=window,
        threshold=threshold,
        opacity=opacity,
        colormap=colormap,
        title=title,
        caption=caption,
    )
    make_folder(file.parent)
    write_png(file, draw_montage(review, columns))
    return file


# ---------------------------------------------------------------- plan


def prepare(
    scan: ArrayLike,
    cam: ArrayLike,
    affine: ArrayLike,
    *,
    prediction: ArrayLike | None = None,
    truth: ArrayLike | None = None,
    axis: Axis = "axial",
    slices: SliceSetting = "relevant",
    window: WindowSetting = None,
    threshold: float = 0.2,
    opacity: float = 0.5,
    colormap: str = "inferno",
    title: str = "",
    caption: Mapping[str, object] | None = None,
) -> Review:
    """Check everything and choose what all pictures of a case share; arguments: `save_slices`."""
    image = _check_volume(scan, "scan")
    heat = _check_volume(cam, "cam", image.shape)
    masks = {
        name: _check_mask(mask, name, image.shape)
        for name, mask in (("truth", truth), ("prediction", prediction))
        if mask is not None
    }
    _check_fraction(threshold, "threshold")
    _check_fraction(opacity, "opacity")
    view = display.plan_view(image.shape, affine, axis)
    palette = draw.make_palette(colormap, opacity)

    slice_max, slice_sum = display.slice_profile(view, heat)
    low, high = float(heat.min()), float(slice_max.max())
    notice = _cam_notice(low, high, threshold)
    drawable = math.isfinite(low) and math.isfinite(high) and high > 0
    relevant = np.zeros(view.slice_count, bool)
    peak = None
    if drawable:
        peak = display.peak_slice(slice_max, slice_sum)
        relevant |= slice_max >= max(threshold, np.finfo(np.float32).tiny)
    if "prediction" in masks:
        relevant |= display.slice_profile(view, masks["prediction"])[0]

    return Review(
        view=view,
        scan=image,
        cam=heat if drawable else None,
        masks=masks,
        notice=notice,
        window=choose_window(image, window),
        threshold=threshold,
        opacity=opacity,
        palette=palette,
        colour_bar=draw.draw_colour_bar(palette, threshold),
        letters=display.edge_letters(view),
        slice_max=slice_max if drawable else None,
        peak=peak,
        indices=display.choose_slices(slices, relevant, peak),
        title=draw.clean_text(title),
        caption=[f"{draw.clean_text(k)}: {draw.clean_text(v)}" for k, v in (caption or {}).items()],
    )


def _check_volume(
    volume: ArrayLike, name: str, shape: tuple[int, ...] | None = None
) -> NDArray[Any]:
    array = np.asarray(volume)
    if shape is not None and array.shape != shape:
        raise InputError(
            f"{name} and scan must have one shape: {name} is {array.shape}, scan is {shape}"
        )
    if array.ndim != 3 or array.size == 0:
        raise InputError(f"{name} must be (X, Y, Z) with at least one voxel, not {array.shape}")
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name} must hold real numbers, not {array.dtype}")
    return array


def _check_mask(mask: ArrayLike, name: str, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    array = _check_volume(mask, name, shape)
    if array.dtype == bool:
        return array
    inside = array == 1
    if not (inside | (array == 0)).all():
        raise InputError(
            f"{name} must be a mask of 0 and 1; of a label map take one class: {name} == label"
        )
    return inside


def _check_fraction(value: float, name: str) -> None:
    if not 0 <= value <= 1:  # also refuses NaN
        raise ConfigError(f"{name} must be in 0..1, not {value!r}")


def _cam_notice(low: float, high: float, threshold: float) -> str:
    """Say in words why there is no heat, or nothing where there is; refuse another scale."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "no CAM: the map holds NaN or infinite values"
    if low < -1e-3 or high > 1 + 1e-3:
        raise InputError(
            f"cam must be in 0..1, but goes from {low:.4g} to {high:.4g}: scale it once for the "
            "whole volume, for example cam.clip(0) / cam.max()"
        )
    if high <= 0:
        return "no CAM: the map is zero"
    if high < threshold:
        return f"no CAM at the threshold {threshold:.2f}: the map's maximum is {high:.2g}"
    return ""


# ---------------------------------------------------------------- pictures


def draw_slice(review: Review, index: int) -> draw.Picture:
    """Draw one slice with everything around it, (height, width, 3) uint8 in OpenCV's order.

    All slices of one review give pictures of one size.
    """
    size = display.picture_size(review.view, SLICE_SHORT, long_side=SLICE_LONG)
    framed = _frame_pair(review, draw_pair(review, index, size), size, SLICE_SHORT)
    for cell, label in zip(framed, ("scan", "scan + CAM"), strict=True):
        draw.put_label(cell, label)
    bar = np.pad(review.colour_bar, ((draw.MARGIN, 0), (0, 0), (0, 0)))
    body = draw.stack_columns([*framed, bar], draw.GAP)
    width = body.shape[1]
    first = draw.text_block([_slice_text(review, index)], width)
    return draw.stack_rows(
        [*_header(review, width), body, *_legend(review, width), first, _footer(review, width)]
    )


def draw_pair(review: Review, index: int, size: display.Size) -> tuple[draw.Picture, draw.Picture]:
    """Draw the scan alone, and with heat and outlines, each (height, width, 3) and nothing else."""
    grey = draw.draw_grey(display.cut(review.view, review.scan, index), review.window, size)
    raw = cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)
    if review.cam is None:
        overlay = raw.copy()
    else:
        heat = draw.resize_smooth(display.cut(review.view, review.cam, index), size)
        overlay = draw.draw_heat(grey, heat, review.threshold, review.palette)
    for name, mask in review.masks.items():
        plane = draw.resize_mask(display.cut(review.view, mask, index), size)
        draw.draw_outline(overlay, plane, draw.LINES[name])
    return raw, overlay


def draw_montage(review: Review, columns: int | None = None) -> draw.Picture:
    """Draw the review's slices as pairs in a grid, (height, width, 3) uint8."""
    count = len(review.indices)
    side = _montage_side(count)
    size = display.picture_size(review.view, side, long_side=3 * side, keep_detail=False)
    tiles = [_draw_tile(review, index, size, side) for index in review.indices]
    height, width = tiles[0].shape[:2]
    if columns is None:
        columns = max(1, round(math.sqrt(count * MONTAGE_SHAPE * height / width)))
    columns = min(columns, count)
    rows = [
        draw.stack_columns(tiles[n : n + columns], 4 * draw.GAP) for n in range(0, count, columns)
    ]
    body = draw.stack_columns([draw.stack_rows(rows), review.colour_bar], draw.GAP)
    width = body.shape[1]
    return draw.stack_rows(
        [*_header(review, width), body, *_legend(review, width), _footer(review, width)]
    )


def _draw_tile(review: Review, index: int, size: display.Size, side: int) -> draw.Picture:
    pair = _frame_pair(review, draw_pair(review, index, size), size, side)
    text = f"{review.view.index_name} = {index},  {display.position_text(review.view, index)}"
    if review.slice_max is not None:
        text += f",  max {review.slice_max[index]:.2f}"
    if index == review.peak:
        text += " (peak)"
    body = draw.stack_columns(pair, draw.GAP)
    return draw.stack_rows([draw.text_block([text], body.shape[1]), body])


def _montage_side(count: int) -> int:
    """Shrink the pictures where there are many; a tile is about twice as wide as high."""
    side = math.isqrt(MONTAGE_PIXELS // (2 * count)) - 2 * draw.MARGIN
    return min(MONTAGE_SHORT, max(MONTAGE_SMALLEST, side))


def _frame_pair(
    review: Review, pair: tuple[draw.Picture, draw.Picture], size: display.Size, side: int
) -> list[draw.Picture]:
    """Put letters and a scale bar around both pictures, and the notice onto the second."""
    framed = [
        draw.frame_picture(picture, review.letters, size.pixels_per_mm, (side, side))
        for picture in pair
    ]
    if review.notice:
        draw.put_notice(framed[1], review.notice)
    return framed


# ---------------------------------------------------------------- words


def _header(review: Review, width: int) -> list[draw.Picture]:
    if not review.title:
        return []
    lines = draw.wrap_items([review.title], width - 2 * draw.MARGIN, draw.TITLE_SIZE, bold=True)
    return [draw.text_block(lines, width, size=draw.TITLE_SIZE, bold=True)]


def _legend(review: Review, width: int) -> list[draw.Picture]:
    return [draw.draw_legend(list(review.masks), width)] if review.masks else []


def _slice_text(review: Review, index: int) -> str:
    """One line; its number is counted from 1, the voxel index from 0."""
    view = review.view
    words = [
        f"{view.axis} slice {index + 1}/{view.slice_count}"
        f" (voxel index {view.index_name} = {index})",
        display.position_text(view, index),
    ]
    if review.slice_max is not None:
        words.append(f"CAM max in slice {review.slice_max[index]:.2f}")
    if index == review.peak:
        words.append("peak slice")
    return "  ·  ".join(words)


def _footer(review: Review, width: int) -> draw.Picture:
    """What is the same in all slices, so that their pictures have one size."""
    degrees = display.obliquity_degrees(review.view.affine)
    items = [f"window {review.window.text}"]
    if degrees > OBLIQUE_NOTE:
        items.append(f"oblique scan: {degrees:.0f}° off the axes, letters are the nearest")
    items += review.caption
    items += [
        f"CAM shown from {review.threshold:.2f}, opacity {review.opacity:.2f}",
        "one scale for the volume",
    ]
    room = width - 2 * draw.MARGIN
    lines = draw.text_block(draw.wrap_items(items, room), width, draw.GREY)
    last = draw.text_block([RESEARCH_ONLY, ""], width, draw.AMBER)
    return draw.stack_rows([lines, last[: -draw.line_height() // 2]])


# ---------------------------------------------------------------- files


def make_folder(folder: Path) -> Path:
    """Make a folder and those above it; OutputError where that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror or error}") from error
    return folder


def write_png(file: Path, picture: draw.Picture) -> None:
    """Write a picture under a temporary name and rename it; OutputError where that fails."""
    # Little compression: much faster, files a little larger.
    done, data = cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not done:
        raise OutputError(f"cannot encode {file} as PNG: size {picture.shape[:2]}")
    with atomic(file) as temporary:
        temporary.write_bytes(data.tobytes())
