"""Film of the slices, the scan beside the scan with the CAM, which every browser can play."""

from __future__ import annotations

import math
import os
from pathlib import Path

import cv2
from PIL import Image

from seg3dcam.files import atomic
from seg3dcam.review.pictures import display
from seg3dcam.review.pictures.page import each_slice, file_to_write
from seg3dcam.review.pictures.slices import draw_slice_page
from seg3dcam.review.pictures.text import MARGIN
from seg3dcam.review.plan import Review

# The largest and the smallest side of a picture in pixels; in a long film pictures are smaller.
CINE_SHORT, CINE_SMALLEST = 384, 256
CINE_PIXELS = 80_000_000  # of all frames together, which are in memory at once
MOST_FRAMES = 300

# Milliseconds: about the length of the film, and the limits for the time of one frame.
FILM_MS, FASTEST_MS, SLOWEST_MS = 15_000, 50, 200

QUALITY, EFFORT = 80, 2


def save_cine(path: str | os.PathLike[str], review: Review) -> Path:
    """Save the review's slices in their order as an animated WebP, which repeats for ever.

    Args:
        path: the file, ending in .webp. Its folder is created if it is missing.
        review: from `review_explanation` or `review_volumes`, preferably with all slices:
            `review.along("axial", "all")`. If there are more than 300 slices, 300 are shown.

    Returns:
        The file.

    Raises:
        ConfigError: the path does not end in .webp.
        OutputError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from seg3dcam.review import review_volumes
        >>> volume = np.random.rand(16, 16, 3)
        >>> review = review_volumes(volume, volume, np.eye(4), slices="all")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Image.open(save_cine(folder + "/case.webp", review)) as film:
        ...         film.n_frames, film.info["loop"]
        (3, 0)
    """
    file = file_to_write(path, ".webp", "film's")
    first, *others = draw_frames(review)
    with atomic(file) as temporary:
        first.save(
            temporary,
            format="WEBP",
            save_all=True,
            append_images=others,
            duration=_frame_ms(1 + len(others)),
            loop=0,
            quality=QUALITY,
            method=EFFORT,
        )
    return file


def draw_frames(review: Review) -> list[Image.Image]:
    """Draw the frames, which all have the same size."""
    indices = display.thin_out(review.indices, MOST_FRAMES, keep=review.peak_slice)
    side = _frame_side(len(indices))
    size = display.picture_size(review.view, side, long_side=2 * side, keep_detail=False)

    def draw_frame(index: int) -> Image.Image:
        page = draw_slice_page(review, index, size, side)
        return Image.fromarray(cv2.cvtColor(page, cv2.COLOR_BGR2RGB))

    return each_slice(draw_frame, indices)


def _frame_side(count: int) -> int:
    """Return the side of the pictures: smaller for many frames, which are twice as wide as high."""
    side = math.isqrt(CINE_PIXELS // (2 * count)) - 2 * MARGIN
    return min(CINE_SHORT, max(CINE_SMALLEST, side))


def _frame_ms(count: int) -> int:
    return min(SLOWEST_MS, max(FASTEST_MS, FILM_MS // count))
