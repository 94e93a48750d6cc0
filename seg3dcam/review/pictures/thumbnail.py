"""Draw a small picture of an explanation, for a page that lists many."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
from PIL import Image

from seg3dcam.files import atomic
from seg3dcam.review.pictures import display
from seg3dcam.review.pictures.page import file_to_write
from seg3dcam.review.pictures.slices import draw_pair
from seg3dcam.review.plan import Review

#: The shorter and the longest side of the picture, in pixels.
SHORT, LONG = 160, 320

_QUALITY = 80


def save_thumbnail(path: str | os.PathLike[str], review: Review) -> Path:
    """Save the slice through the CAM's peak with heat and outlines, without letters, as WebP.

    Without a CAM it is the first slice of the review.

    Args:
        path: the file, ending in .webp. Its folder is created if it is missing.
        review: from `review_explanation` or `review_volumes`.

    Returns:
        The file.

    Raises:
        ConfigError: the path does not end in .webp.
        OutputError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from seg3dcam.review import review_volumes
        >>> volume = np.random.rand(16, 16, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = save_thumbnail(folder + "/a.webp", review_volumes(volume, volume, np.eye(4)))
        ...     with Image.open(file) as picture:
        ...         picture.size
        (160, 160)
    """
    file = file_to_write(path, ".webp", "thumbnail's")
    index = review.indices[0] if review.peak_slice is None else review.peak_slice
    size = display.picture_size(review.view, SHORT, long_side=LONG)
    _, overlay = draw_pair(review, index, size)
    with atomic(file) as temporary:
        picture = Image.fromarray(cv2.cvtColor(overlay, cv2.COLOR_BGR2RGB))
        picture.save(temporary, format="WEBP", quality=_QUALITY)
    return file
