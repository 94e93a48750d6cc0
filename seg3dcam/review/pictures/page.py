"""What all pages of a case have in common: header, legend, footer, and how they are written."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import cv2

from seg3dcam.errors import ConfigError, OutputError
from seg3dcam.files import as_path, atomic
from seg3dcam.review.pictures import display, frame
from seg3dcam.review.pictures.draw import Picture
from seg3dcam.review.pictures.text import (
    AMBER,
    GREY,
    MARGIN,
    TITLE_SIZE,
    line_height,
    text_block,
    wrap_items,
)
from seg3dcam.review.plan import Review

OBLIQUE_NOTE = 10  # degrees above which the footer mentions it
RESEARCH_ONLY = "research use only, not for diagnosis"

# OpenCV and the disk work without Python's lock. More threads would only need more memory.
WORKERS = min(4, os.cpu_count() or 1)

# Low compression and, if this OpenCV can choose it, one fixed filter for all rows: that takes half
# the time and makes files 2 % larger.
PNG_SETTINGS = [cv2.IMWRITE_PNG_COMPRESSION, 1]
if hasattr(cv2, "IMWRITE_PNG_FILTER"):
    PNG_SETTINGS += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_SUB]

Result = TypeVar("Result")


def build_page(review: Review, body: Picture, lines: Sequence[str] = ()) -> Picture:
    """Put the title above a picture, and below it the legend, more lines, and the footer."""
    width = body.shape[1]
    own = [text_block(lines, width)] if lines else []
    return frame.stack_rows(
        [*_header(review, width), body, *_legend(review, width), *own, _footer(review, width)]
    )


def each_slice(work: Callable[[int], Result], indices: Sequence[int]) -> list[Result]:
    """Do the same for every slice, several at a time; return results in the order of the slices.

    After an error no further slice is begun, and the error is raised.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(work, indices))


def _header(review: Review, width: int) -> list[Picture]:
    if not review.title:
        return []
    lines = wrap_items([review.title], width - 2 * MARGIN, TITLE_SIZE, bold=True)
    return [text_block(lines, width, size=TITLE_SIZE, bold=True)]


def _legend(review: Review, width: int) -> list[Picture]:
    words = {
        name: name if volumes.any() else f"{name}: empty"
        for name, volumes in review.profile.volumes.items()
    }
    return [frame.draw_legend(words, width)] if words else []


def _footer(review: Review, width: int) -> Picture:
    """Draw facts that are the same in all slices, so that all pictures have the same size."""
    degrees = display.obliquity_degrees(review.affine)
    items = [f"window {review.window.text}"]
    if degrees > OBLIQUE_NOTE:
        items += [
            f"oblique scan: {degrees:.0f}° off the axes, letters are the nearest",
            "mm at a slice's centre",
        ]
    items += review.caption
    if review.cam is not None:
        items += [
            f"CAM shown from {review.look.from_text}, opacity {review.look.opacity:.2f}",
            "one scale for the volume",
        ]
    lines = text_block(wrap_items(items, width - 2 * MARGIN), width, GREY)
    last = text_block([RESEARCH_ONLY, ""], width, AMBER)
    return frame.stack_rows([lines, last[: -line_height() // 2]])


# ---------------------------------------------------------------- files


def file_to_write(path: str | os.PathLike[str], suffix: str, what: str) -> Path:
    """Return the path of a file that is to be written, and make its folder.

    Args:
        suffix: what the path must end in.
        what: what the file shows, for messages, such as "montage's".

    Raises:
        ConfigError: the path ends in something else.
        OutputError: it is no path, or its folder cannot be made.
    """
    file = as_path(path)
    if file.suffix.lower() != suffix:
        raise ConfigError(f"the {what} path must end in {suffix}, not {file.name!r}")
    make_folder(file.parent)
    return file


def make_folder(folder: Path) -> Path:
    """Make a folder and those above it; raise OutputError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror or error}") from error
    return folder


def write_png(file: Path, picture: Picture) -> Path:
    """Write a picture as PNG, completely or not at all; raise OutputError if that fails."""
    done, data = cv2.imencode(".png", picture, PNG_SETTINGS)
    if not done:
        raise OutputError(f"cannot encode {file} as PNG: size {picture.shape[:2]}")
    with atomic(file) as temporary:
        temporary.write_bytes(data.tobytes())
    return file
