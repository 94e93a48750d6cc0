"""Draw several slices in one picture, each as a pair: the scan, and the scan with the CAM."""

from __future__ import annotations

import math
import os
from pathlib import Path

from seg3dcam.errors import ConfigError
from seg3dcam.review.pictures import display, frame
from seg3dcam.review.pictures.closeup import closeup_of, draw_closeup
from seg3dcam.review.pictures.draw import Picture
from seg3dcam.review.pictures.page import (
    build_page,
    each_slice,
    file_to_write,
    write_png,
)
from seg3dcam.review.pictures.slices import draw_framed_pair
from seg3dcam.review.pictures.text import GAP, MARGIN, text_block
from seg3dcam.review.plan import Review

# Sides of a picture in pixels.
MONTAGE_SHORT, MONTAGE_SMALLEST = 256, 128
MONTAGE_PIXELS = 12_000_000  # pictures shrink, down to the smallest, to stay near this
MONTAGE_SHAPE = 1.6  # width / height, if the number of columns may be chosen


def save_montage(path: str | os.PathLike[str], review: Review, columns: int | None = None) -> Path:
    """Save the review's slices in one PNG, each as a pair: the scan, and the scan with the CAM.

    A close-up of the CAM's peak is on the right.

    Args:
        path: the file, ending in .png. Its folder is created if it is missing.
        review: from `review_explanation` or `review_volumes`.
        columns: pairs per row; None chooses a number for a wide page.

    Returns:
        The file.

    Raises:
        ConfigError: the path does not end in .png, or `columns` is below 1.
        OutputError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from seg3dcam.review import review_volumes
        >>> volume = np.random.rand(16, 16, 8)
        >>> review = review_volumes(volume, volume, np.eye(4), slices=[2, 5])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_montage(folder + "/case.png", review).name
        'case.png'
    """
    if columns is not None and columns < 1:
        raise ConfigError(f"columns must be 1 or more, or None, not {columns!r}")
    file = file_to_write(path, ".png", "montage's")
    return write_png(file, draw_montage(review, columns))


def draw_montage(review: Review, columns: int | None = None) -> Picture:
    """Draw the review's slices as pairs in a grid, (height, width, 3) uint8."""
    count = len(review.indices)
    side = _tile_side(count)
    size = display.picture_size(review.view, side, long_side=3 * side, keep_detail=False)
    tiles = each_slice(lambda index: _draw_tile(review, index, size, side), review.indices)
    height, width = tiles[0].shape[:2]
    if columns is None:
        columns = max(1, round(math.sqrt(count * MONTAGE_SHAPE * height / width)))
    columns = min(columns, count)
    rows = [frame.stack_columns(tiles[n : n + columns], 4 * GAP) for n in range(0, count, columns)]
    closer = _draw_closeup(review, beside=len(rows) == 1)
    body = frame.stack_columns([frame.stack_rows(rows), *closer, review.colour_bar], GAP)
    return build_page(review, body)


def _draw_closeup(review: Review, *, beside: bool) -> list[Picture]:
    """Draw close-ups of the CAM's peak, without and with the CAM; none if there is no CAM."""
    if review.peak is None:
        return []
    framed = draw_closeup(review, review.peak, closeup_of(review, review.peak), MONTAGE_SHORT)
    stack = frame.stack_columns if beside else frame.stack_rows
    pair = stack(framed)
    text = f"close-up of the peak, {review.view.index_name} = {review.peak_slice}"
    return [frame.stack_rows([text_block([text], pair.shape[1]), pair])]


def _draw_tile(review: Review, index: int, size: display.Size, side: int) -> Picture:
    body = frame.stack_columns(draw_framed_pair(review, index, size, (side, side)), GAP)
    text = f"{review.view.index_name} = {index},  {display.position_text(review.view, index)}"
    if shown := review.range_in(index):
        text += f",  {shown}"
    if index == review.peak_slice:
        text += " (peak)"
    return frame.stack_rows([text_block([text], body.shape[1]), body])


def _tile_side(count: int) -> int:
    """Return the side of the pictures: smaller for many tiles, which are twice as wide as high."""
    side = math.isqrt(MONTAGE_PIXELS // (2 * count)) - 2 * MARGIN
    return min(MONTAGE_SHORT, max(MONTAGE_SMALLEST, side))
