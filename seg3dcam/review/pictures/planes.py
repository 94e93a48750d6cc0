"""Draw the three planes through the CAM's peak in one picture, as a whole and close up."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from seg3dcam.geometry import spacing_of, to_world
from seg3dcam.review.pictures import display, frame
from seg3dcam.review.pictures.closeup import closeup_of, draw_closeup
from seg3dcam.review.pictures.draw import Picture
from seg3dcam.review.pictures.page import build_page, file_to_write, write_png
from seg3dcam.review.pictures.slices import draw_framed_pair
from seg3dcam.review.pictures.text import GAP, MARGIN, text_block, wrap_items
from seg3dcam.review.plan import Review

# Pixels for the scan's middle extent, the most for its longest extent, and the least for a cell.
PLANE_MIDDLE, PLANE_LONG, CELL_SHORT = 460, 900, 220


def save_planes(path: str | os.PathLike[str], review: Review) -> Path:
    """Save the axial, coronal and sagittal planes through the CAM's peak in one PNG.

    The scan alone is above the scan with the CAM, and close-ups of both are below. All pictures of
    a row have the same scale. Arrowheads in the margins show where the other two planes cut.
    Without a CAM, the planes go through the middle of the prediction or explained region, or else
    of the scan.

    Args:
        path: the file, ending in .png. Its folder is created if it is missing.
        review: from `review_explanation` or `review_volumes`, along any axis.

    Returns:
        The file.

    Raises:
        ConfigError: the path does not end in .png.
        OutputError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> from seg3dcam.review import review_volumes
        >>> volume = np.random.rand(16, 16, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_planes(folder + "/planes.png", review_volumes(volume, volume, np.eye(4))).name
        'planes.png'
    """
    file = file_to_write(path, ".png", "planes'")
    return write_png(file, draw_planes(review))


def draw_planes(review: Review) -> Picture:
    """Draw the three planes, (height, width, 3) uint8 in OpenCV's order of colours."""
    voxel, words = _focus(review)
    closer = closeup_of(review, voxel)
    planes = [review.along(axis) for axis in ("axial", "coronal", "sagittal")]
    sizes = _sizes(planes)
    cell = (
        max(CELL_SHORT, *(size.height for size in sizes)),
        max(CELL_SHORT, *(size.width for size in sizes)),
    )
    columns = [
        _draw_plane(plane, voxel, size, cell, closer)
        for plane, size in zip(planes, sizes, strict=True)
    ]
    bar = np.pad(review.colour_bar, ((2 * MARGIN, 0), (0, 0), (0, 0)))
    body = frame.stack_columns([*columns, bar], 4 * GAP)
    place = zip("RAS", to_world(review.affine, voxel), strict=True)
    at = ", ".join(display.side_text(side, mm) for side, mm in place)
    lines = [f"planes through {words}", f"{at} mm", f"voxel {voxel}", "arrowheads point to it"]
    return build_page(review, body, wrap_items(lines, body.shape[1] - 2 * MARGIN))


def _focus(review: Review) -> tuple[tuple[int, ...], str]:
    """Return the voxel to look at, and what it is in words."""
    if review.peak is not None and review.cam is not None:
        against = " against the target" if review.cam[review.peak] < 0 else ""
        return review.peak, f"the CAM's peak{against}"
    for name in review.masks.keys() - {"truth"}:
        mask = review.masks[name]
        if mask.any():
            counts = (np.count_nonzero(mask, axis=others) for others in ((1, 2), (0, 2), (0, 1)))
            middle = tuple(round(np.average(np.arange(len(n)), weights=n)) for n in counts)
            return middle, f"the middle of the {name}"
    return tuple(n // 2 for n in review.scan.shape), "the middle of the scan"


def _sizes(planes: Sequence[Review]) -> list[display.Size]:
    """Return the sizes of all three planes, with the same number of pixels per mm."""
    views = [plane.view for plane in planes]
    extents = np.multiply(spacing_of(views[0].affine), views[0].shape)
    _, middle, longest = sorted(extents)
    zoom = min(PLANE_MIDDLE / middle, PLANE_LONG / longest)
    pixels = [max(1, round(mm * zoom)) for mm in extents]
    return [display.Size(pixels[v.row_axis], pixels[v.column_axis], zoom) for v in views]


def _draw_plane(
    plane: Review,
    voxel: Sequence[int],
    size: display.Size,
    cell: tuple[int, int],
    closer: float,
) -> Picture:
    """Draw one plane: a title, the scan, the scan with the CAM, and close-ups of both."""
    view = plane.view
    index = voxel[view.slice_axis]
    framed = draw_framed_pair(plane, index, size, cell)
    for picture, words in zip(framed, ("scan", "scan + CAM"), strict=True):
        point = display.pixel_of(view, voxel, size)
        frame.put_pointers(picture, (size.height, size.width), cell, point)
        frame.put_label(picture, words)
    label = f"{view.axis}  {view.index_name} = {index},  {display.position_text(view, index)}"
    above = text_block([label], framed[0].shape[1])
    closeups = draw_closeup(plane, voxel, closer, (framed[0].shape[1] - GAP) // 2 - 2 * MARGIN)
    for picture, words in zip(closeups, ("close-up", "+ CAM"), strict=True):
        frame.put_label(picture, words)
    below = frame.stack_columns(closeups, GAP)
    gap = np.zeros_like(above[:GAP])
    return frame.stack_rows([above, framed[0], gap, framed[1], gap, below])
