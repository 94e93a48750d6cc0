"""Write feature maps as PNG files: a picture for each channel, and a mosaic of all channels.

A feature voxel is drawn as a block of equal pixels, and nothing is interpolated. If the place of
the layer in the patient is known, pictures are turned as a radiologist expects (see
`seg3dcam.review.pictures.display`). Otherwise rows and columns are those of the array.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from seg3dcam.review.pictures import frame, text
from seg3dcam.review.pictures.draw import Colour, Picture
from seg3dcam.review.pictures.feature_sheet import (
    FeatureScale,
    Sheet,
    check_count,
    facts_of,
    file_name,
    label_of,
    prepare,
    varies,
)
from seg3dcam.review.pictures.montage import MONTAGE_PIXELS, MONTAGE_SHAPE
from seg3dcam.review.pictures.page import RESEARCH_ONLY, make_folder, write_png

if TYPE_CHECKING:
    from seg3dcam.cams.feature_maps import FeatureMaps

# Longer side in pixels of a channel's own picture, and of a tile in the mosaic.
PICTURE = 512
TILE, SMALLEST_TILE = 256, 96
# Tiles shrink, down to SMALLEST_TILE, so that a mosaic has about this many pixels. If the layer's
# full resolution needs more, the limit is MONTAGE_PIXELS.
MOSAIC_PIXELS = 7_000_000

LABEL_SIZE = 12
NARROWEST = 640  # of a mosaic, so that there is room for its header
FRAME: Colour = (70, 70, 70)


# ---------------------------------------------------------------- public


def save_features(
    folder: str | os.PathLike[str],
    features: FeatureMaps,
    *,
    colormap: str = "viridis",
    scale: FeatureScale = "channel",
    channels: Sequence[int] | None = None,
    top: int | None = None,
    columns: int | None = None,
) -> list[Path]:
    """Save each channel as a picture, and all channels as one labelled mosaic.

    Args:
        folder: where to write `mosaic.png` and `channel_000.png` and so on; created if it is
            missing. With a target, whose weights rank the channels, the names are like
            `rank_000_channel_017.png`. If the channels do not fit on 12 million pixels, the mosaic
            has several pages, `mosaic_1.png` and so on.
        features: what `seg3dcam.cams.feature_maps.feature_maps` returned.
        colormap: any colormap of matplotlib or OpenCV.
        scale: "channel" draws each channel from its own minimum to its maximum; a constant channel
            is black. "layer" uses one scale for all channels of the slice; a constant layer is
            black. A channel with NaN or infinite values is black and labelled so.
        channels: the numbers of the channels to draw, in this order; None draws all channels in
            the order `features.order`.
        top: draw only the first so many of them.
        columns: tiles in a row of the mosaic; None chooses a number for a wide page.

    Returns:
        The files: first the channels in the order drawn, then the pages of the mosaic.

    Raises:
        InputError: the layer has no such channel, or the values are not (C, h, w).
        ConfigError: colormap or scale is unknown, or a number is illegal.
        OutputError: a file cannot be written. There is never an incomplete file.

    Example:
        >>> import tempfile
        >>> from seg3dcam.cams.feature_maps import FeatureMaps
        >>> from seg3dcam.geometry import FeatureGrid
        >>> features = FeatureMaps(np.random.rand(2, 8, 6), "0", FeatureGrid.of_voxels((8, 6)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = save_features(folder, features)
        >>> [file.name for file in files]
        ['channel_000.png', 'channel_001.png', 'mosaic.png']
    """
    sheet = prepare(features, colormap=colormap, scale=scale, channels=channels, top=top)
    check_count(columns, "columns")
    place = make_folder(Path(folder))
    files = []
    for channel in sheet.chosen:
        files.append(place / f"{file_name(features, channel)}.png")
        write_png(files[-1], draw_channel(sheet, channel))
    pages = _pages(sheet, columns)
    for number in range(len(pages)):
        name = "mosaic.png" if len(pages) == 1 else f"mosaic_{number + 1}.png"
        files.append(place / name)
        write_png(files[-1], draw_mosaic(sheet, columns, page=number))
    return files


def draw_channel(sheet: Sheet, channel: int) -> Picture:
    """Draw a channel without words, (height, width, 3) uint8 in OpenCV's order of colours."""
    size = block_size(sheet.planes.shape[1:], sheet.pixel, PICTURE, shrink=False)
    return _draw_plane(sheet, channel, size)


def draw_mosaic(sheet: Sheet, columns: int | None = None, *, page: int = 0) -> Picture:
    """Draw a page of the mosaic: a header, and labelled tiles in rows."""
    size, cell = _layout(sheet)
    pages = _pages(sheet, columns)
    across = _columns(sheet, columns, cell)
    tiles = [_draw_tile(sheet, channel, size, cell) for channel in pages[page]]
    rows = [
        frame.stack_columns(tiles[n : n + across], 2 * text.GAP)
        for n in range(0, len(tiles), across)
    ]
    body = frame.stack_rows(rows)
    body = np.pad(body, ((text.GAP, 0), (text.MARGIN, text.MARGIN), (0, 0)))
    width = max(NARROWEST, body.shape[1])
    footer = text.text_block([RESEARCH_ONLY, ""], width, text.AMBER)
    number = f"page {page + 1} of {len(pages)}" if len(pages) > 1 else ""
    return frame.stack_rows(
        [*_header(sheet, width, size, number), body, footer[: -text.line_height() // 2]]
    )


# ---------------------------------------------------------------- plan


def block_size(
    shape: Sequence[int], pixel: tuple[float, float], side: int, *, shrink: bool
) -> tuple[int, int]:
    """Return the (height, width) in pixels for a plane of voxels, with a longer side near `side`.

    Along the finer axis a voxel takes a whole number of pixels, so square voxels become equal
    blocks. Along the other axis the size follows the shape of the voxels, rounded to pixels.

    Args:
        shape: number of voxels (rows, columns).
        pixel: height and width of a voxel in any unit.
        side: pixels of the longer side.
        shrink: whether the picture may have fewer pixels than voxels.

    >>> block_size((10, 20), (2.5, 1.0), 128, shrink=False)
    (125, 100)
    """
    finest = min(pixel)
    height, width = (n * size / finest for n, size in zip(shape, pixel, strict=True))
    zoom = side / max(height, width)
    if zoom >= 1 or not shrink:
        zoom = max(1, math.floor(zoom))
    return max(1, round(height * zoom)), max(1, round(width * zoom))


def _layout(sheet: Sheet) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the size of the tiles, and of the cells that hold a tile and its label."""
    shape = sheet.planes.shape[1:]
    finest = min(sheet.pixel)
    native = max(math.ceil(n * s / finest) for n, s in zip(shape, sheet.pixel, strict=True))
    words = [label_of(sheet, channel) for channel in sheet.chosen]
    tall = text.line_height(LABEL_SIZE) * len(words[0]) + 2
    usual, most = (
        math.isqrt(pixels // len(sheet.chosen)) - tall - 2 * text.GAP
        for pixels in (MOSAIC_PIXELS, MONTAGE_PIXELS)
    )
    side = max(SMALLEST_TILE, min(TILE, usual), min(native, most))
    height, width = block_size(shape, sheet.pixel, side, shrink=True)
    widest = max(text.text_width(line, LABEL_SIZE, True) for lines in words for line in lines)
    return (height, width), (height + 2 + tall, max(width + 2, widest))


def _columns(sheet: Sheet, columns: int | None, cell: tuple[int, int]) -> int:
    height, width = (n + 2 * text.GAP for n in cell)
    count = min(len(sheet.chosen), max(1, MONTAGE_PIXELS // (height * width)))
    wide = max(1, round(math.sqrt(count * MONTAGE_SHAPE * height / width)))
    return min(wide if columns is None else columns, len(sheet.chosen))


def _pages(sheet: Sheet, columns: int | None) -> list[list[int]]:
    """Return the channels of each page, which has as many full rows as its pixels allow."""
    _, cell = _layout(sheet)
    across = _columns(sheet, columns, cell)
    height, width = (n + 2 * text.GAP for n in cell)
    size = across * max(1, MONTAGE_PIXELS // (height * width * across))
    return [sheet.chosen[n : n + size] for n in range(0, len(sheet.chosen), size)]


# ---------------------------------------------------------------- pictures


def _draw_plane(sheet: Sheet, channel: int, size: tuple[int, int]) -> Picture:
    """Draw a channel with (height, width) pixels; each shows the voxel under its centre."""
    low, high = sheet.scale or (sheet.lows[channel], sheet.highs[channel])
    if not varies(low, high) or not np.isfinite(sheet.lows[channel]):
        return np.zeros((*size, 3), np.uint8)
    values = sheet.planes[channel].astype(np.float64)
    level = np.rint((values - low) / (high - low) * 255).astype(np.uint8)
    rows, columns = (
        ((np.arange(pixels) + 0.5) * voxels / pixels).astype(int)
        for pixels, voxels in zip(size, level.shape, strict=True)
    )
    return sheet.colours[level[np.ix_(rows, columns)]]


def _draw_tile(sheet: Sheet, channel: int, size: tuple[int, int], cell: tuple[int, int]) -> Picture:
    """Draw a channel in a thin frame below its label; space below it separates the rows."""
    tile = np.zeros((cell[0] + 2 * text.GAP, cell[1], 3), np.uint8)
    lines = label_of(sheet, channel)
    for row, line in enumerate(lines):
        top, first = row * text.line_height(LABEL_SIZE), row == 0
        text.put_text(tile, line, 0, top, text.WHITE if first else text.GREY, LABEL_SIZE, first)
    top = cell[0] - size[0] - 2
    tile[top : cell[0], : size[1] + 2] = FRAME
    tile[top + 1 : cell[0] - 1, 1 : size[1] + 1] = _draw_plane(sheet, channel, size)
    return tile


def _colour_bar(sheet: Sheet) -> Picture:
    """Draw a strip of the colours between the numbers or words for its ends."""
    low, high = (f"{n:.3g}" for n in sheet.scale) if sheet.scale else ("its minimum", "its maximum")
    left = text.MARGIN + text.text_width(low) + text.GAP
    right = left + 160
    bar = np.zeros(
        (text.GAP + text.line_height(), right + 2 * text.GAP + text.text_width(high), 3), np.uint8
    )
    text.put_text(bar, low, text.MARGIN, text.GAP)
    strip = np.linspace(0, 255, right - left).round().astype(np.uint8)
    bar[text.GAP + 4 : text.GAP + 16, left:right] = sheet.colours[strip]
    cv2.rectangle(bar, (left - 1, text.GAP + 3), (right, text.GAP + 16), text.GREY, 1)
    text.put_text(bar, high, right + text.GAP, text.GAP)
    return bar


def _header(sheet: Sheet, width: int, size: tuple[int, int], page: str) -> list[Picture]:
    """Draw the header: which layer and slice this is, and what the colours mean."""
    room = width - 2 * text.MARGIN
    features = sheet.features
    count, shown = len(features.values), len(sheet.chosen)
    several = f"{count} channel{'s' * (count > 1)}"
    title = [
        text.clean_text(f"layer {features.layer}"),
        several if shown == count else f"{shown} of {several}",
        *([page] if page else []),
    ]
    title = text.wrap_items(title, room, text.TITLE_SIZE, bold=True)
    blocks = [
        text.text_block(title, width, size=text.TITLE_SIZE, bold=True),
        text.text_block(text.wrap_items(facts_of(sheet), room), width, text.GREY),
    ]
    rows, columns = sheet.planes.shape[1:]
    if size[0] < rows or size[1] < columns:
        notice = (
            f"shrunk to {size[0]} x {size[1]} of {rows} x {columns} voxels by leaving some out: "
            "the channels' own pictures show all"
        )
        blocks.append(text.text_block(text.wrap_items([notice], room), width, text.AMBER))
    return [*blocks, _colour_bar(sheet)]
