"""Draw a picture for each slice: the scan, and beside it the scan with heat and outlines."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from seg3dcam.review.pictures import display, draw, frame
from seg3dcam.review.pictures.draw import Picture
from seg3dcam.review.pictures.page import build_page, each_slice, make_folder, write_png
from seg3dcam.review.pictures.text import GAP, MARGIN, wrap_items
from seg3dcam.review.plan import Review

# Sides of a picture in pixels.
SLICE_SHORT, SLICE_LONG = 400, 1024

# Width in pixels of the longest line about a slice.
LONGEST_LINE = 950


def save_slices(folder: str | os.PathLike[str], review: Review) -> list[Path]:
    """Save one PNG for each of the review's slices: the scan beside the scan with the CAM.

    Pictures have radiological display (the patient's right is on the left, see `display`), square
    pixels, a scale bar, a colour bar and a footer. A value of the CAM has the same colour in every
    slice.

    Args:
        folder: where to write `axial_045.png` and so on; created if it is missing.
        review: from `review_explanation` or `review_volumes`.

    Returns:
        The files, in the order of the slices.

    Raises:
        OutputError: a file cannot be written. There is never an incomplete file.

    Example:
        >>> import tempfile
        >>> from seg3dcam.review import review_volumes
        >>> scan, cam = np.random.rand(24, 24, 12), np.zeros((24, 24, 12))
        >>> cam[5:9, 5:9, 6] = 1
        >>> review = review_volumes(scan, cam, np.diag([1, 1, 3, 1]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = save_slices(folder, review)
        >>> [file.name for file in files]
        ['axial_006.png']
    """
    view = review.view
    target = make_folder(Path(folder))
    digits = max(3, len(str(view.slice_count - 1)))

    def save(index: int) -> Path:
        return write_png(target / f"{view.axis}_{index:0{digits}d}.png", draw_slice(review, index))

    return each_slice(save, review.indices)


def draw_slice(review: Review, index: int) -> Picture:
    """Draw a slice with everything around it, (height, width, 3) uint8 in OpenCV's colour order.

    All slices of a review give pictures of the same size.
    """
    size = display.picture_size(review.view, SLICE_SHORT, long_side=SLICE_LONG)
    return draw_slice_page(review, index, size, SLICE_SHORT)


def draw_slice_page(review: Review, index: int, size: display.Size, side: int) -> Picture:
    """Draw a page about one slice.

    `size` is that of the two pictures, and `side` the least height and width of their cells.
    """
    framed = draw_framed_pair(review, index, size, (side, side))
    for cell, label in zip(framed, ("scan", "scan + CAM"), strict=True):
        frame.put_label(cell, label)
    bar = np.pad(review.colour_bar, ((MARGIN, 0), (0, 0), (0, 0)))
    body = frame.stack_columns([*framed, bar], GAP)
    return build_page(review, body, _slice_lines(review, index, body.shape[1] - 2 * MARGIN))


def draw_framed_pair(
    review: Review, index: int, size: display.Size, cell: tuple[int, int]
) -> tuple[Picture, Picture]:
    """Draw both pictures of a slice with letters and scale bars; the second one gets the notice.

    `cell` is the least height and width inside the margins.
    """
    letters = display.edge_letters(review.view)
    raw, overlay = (
        frame.frame_picture(picture, letters, size.pixels_per_mm, cell)
        for picture in draw_pair(review, index, size)
    )
    if review.notice:
        frame.put_notice(overlay, (size.height, size.width), cell, review.notice)
    return raw, overlay


def draw_pair(
    review: Review, index: int, size: display.Size, part: Any = ...
) -> tuple[Picture, Picture]:
    """Draw the scan, and the scan with heat and outlines, each (height, width, 3), without frames.

    `part` is an index of the rows and columns of the slice that are drawn, by default all.
    """
    view = review.view

    def cut(volume: NDArray[Any]) -> NDArray[Any]:
        return display.cut(view, volume, index)[part]

    grey = draw.draw_grey(cut(review.scan), review.window, size)
    raw = cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)
    if review.cam is None:
        overlay = raw.copy()
    else:
        heat = draw.resize_smooth(cut(review.cam), size)
        overlay = draw.draw_heat(grey, heat, review.look.threshold, review.palette)
    masks = {
        name: draw.resize_mask(cut(mask), size)
        for name, mask in review.masks.items()
        if review.profile.volumes[name][index]
    }
    draw.draw_outlines(overlay, masks)
    return raw, overlay


def _slice_lines(review: Review, index: int, room: int) -> list[str]:
    """Return lines about a slice, with its number counted from 1, and its voxel index from 0.

    Every slice gets the same number of lines, so that all pictures have the same size.
    """
    view = review.view
    words = [
        f"{view.axis} slice {index + 1}/{view.slice_count}"
        f" (voxel index {view.index_name} = {index})",
        display.position_text(view, index),
    ]
    if shown := review.range_in(index):
        words.append("CAM " + shown.replace("max", "max in slice"))
    if index == review.peak_slice:
        words.append("peak slice")
    lines = wrap_items(words, room)
    return lines + [""] * (math.ceil(LONGEST_LINE / room) - len(lines))
