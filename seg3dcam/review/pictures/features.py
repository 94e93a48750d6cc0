"""Feature maps as PNG files: a picture for each channel, and a mosaic of them all.

A feature voxel is a block of equal pixels, nothing is interpolated. Where the layer's place in the
patient is known, pictures are turned as a radiologist expects them (see
`seg3dcam.review.pictures.display`); else rows and columns are those of the array.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from seg3dcam.errors import ConfigError, InputError, nearest
from seg3dcam.geometry import size_text
from seg3dcam.review.look import colours
from seg3dcam.review.pictures import display, frame, text
from seg3dcam.review.pictures.draw import Colour, Picture
from seg3dcam.review.pictures.montage import MONTAGE_PIXELS, MONTAGE_SHAPE
from seg3dcam.review.pictures.page import RESEARCH_ONLY, make_folder, write_png

if TYPE_CHECKING:
    from seg3dcam.cams.feature_maps import FeatureMaps


FeatureScale = Literal["channel", "layer"]

# Longest side of a channel's own picture, and of a tile in the mosaic, in pixels.
PICTURE = 512
TILE, SMALLEST_TILE = 256, 96
# Tiles shrink, down to the smallest, to keep a mosaic near this many pixels; where a layer's full
# resolution needs more, the limit is MONTAGE_PIXELS.
MOSAIC_PIXELS = 7_000_000

LABEL_SIZE = 12
NARROWEST = 640  # of a mosaic, so that its header can be read
FRAME: Colour = (70, 70, 70)

# A channel that varies by less than this fraction of its values is constant: the rest is rounding.
ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class Sheet:
    """What all pictures of one layer share; made by `prepare`.

    Attributes:
        planes: (C, rows, columns), turned for display.
        pixel: height and width of a voxel.
        lows, highs: (C,) each channel's own range; NaN where it holds NaN or infinity.
        scale: (low, high) of the whole layer; None: each channel's own.
        colours: (256, 3), blue, green, red.
        chosen: the channels that are drawn, in this order.
    """

    features: FeatureMaps
    planes: NDArray[Any]
    pixel: tuple[float, float]
    view: display.View | None
    lows: NDArray[np.float64]
    highs: NDArray[np.float64]
    scale: tuple[float, float] | None
    colours: NDArray[np.uint8]
    chosen: list[int]


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
    """Save each channel as a picture, and all of them as one labelled mosaic.

    Args:
        folder: where to write `channel_000.png` (with a target, whose weights rank the channels,
            `rank_000_channel_017.png`) and `mosaic.png`; made if missing. Of a layer with more
            channels than fit on 12 million pixels the mosaic has pages, `mosaic_1.png` and so on.
        features: what `seg3dcam.cams.feature_maps.feature_maps` returned.
        colormap: any colormap of matplotlib or OpenCV.
        scale: "channel": from each channel's own minimum to its maximum, a constant channel is
            black; "layer": one scale for all channels of the slice, a constant layer is black.
            A channel with NaN or infinite values is black and labelled so.
        channels: the numbers of those to draw, in this order; None: all, in `features.order`.
        top: draw only the first so many of them.
        columns: tiles in a row of the mosaic; None: chosen for a wide page.

    Returns:
        The files: the channels in the order drawn, then the pages of the mosaic.

    Raises:
        InputError: a channel that the layer does not have, values that are not (C, h, w).
        ConfigError: an unknown colormap or scale, or an illegal number.
        OutputError: a file cannot be written; there is never half a file.

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
    _check_count(columns, "columns")
    place = make_folder(Path(folder))
    files = []
    for channel in sheet.chosen:
        files.append(place / f"{_file_name(features, channel)}.png")
        write_png(files[-1], draw_channel(sheet, channel))
    pages = _pages(sheet, columns)
    for number in range(len(pages)):
        name = "mosaic.png" if len(pages) == 1 else f"mosaic_{number + 1}.png"
        files.append(place / name)
        write_png(files[-1], draw_mosaic(sheet, columns, page=number))
    return files


def prepare(
    features: FeatureMaps,
    *,
    colormap: str = "viridis",
    scale: FeatureScale = "channel",
    channels: Sequence[int] | None = None,
    top: int | None = None,
) -> Sheet:
    """Check everything and choose what all pictures share; arguments: `save_features`."""
    values = np.asarray(features.values)
    if values.ndim != 3 or values.size == 0 or values.dtype.kind not in "biuf":
        raise InputError(
            f"feature maps must be real numbers (C, h, w), not {values.dtype} {values.shape}"
        )
    if scale not in ("channel", "layer"):
        raise ConfigError(f"scale {scale!r}: {nearest(str(scale), ('channel', 'layer'))}")
    _check_count(top, "top")
    lows, highs = (
        np.where(np.isfinite(values).all((1, 2)), extreme, np.nan).astype(np.float64)
        for extreme in (values.min((1, 2)), values.max((1, 2)))
    )
    known = np.isfinite(lows)
    view = _view_of(features)
    return Sheet(
        features=features,
        planes=values if view is None else _turned(values, view),
        pixel=features.pixel_size if view is None else display.spacing_mm(view),
        view=view,
        lows=lows,
        highs=highs,
        scale=(
            (float(lows[known].min()), float(highs[known].max()))
            if scale == "layer" and known.any()
            else None
        ),
        colours=colours(colormap)[:, ::-1],
        chosen=_chosen_channels(features, channels)[:top],
    )


def draw_channel(sheet: Sheet, channel: int) -> Picture:
    """Draw a channel and nothing else, (height, width, 3) uint8 in OpenCV's order."""
    size = block_size(sheet.planes.shape[1:], sheet.pixel, PICTURE, shrink=False)
    return _draw_plane(sheet, channel, size)


def draw_mosaic(sheet: Sheet, columns: int | None = None, *, page: int = 0) -> Picture:
    """Draw a page of the mosaic: labelled tiles in rows, below a header."""
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
    """Choose the (height, width) in pixels of a plane of voxels, its longer side near `side`.

    Along the finer axis a voxel is a whole number of pixels, so blocks are equal where voxels are
    square; along the other they follow the voxel's shape, to a pixel.

    Args:
        shape: voxels (rows, columns).
        pixel: height and width of a voxel, in any unit.
        side: pixels.
        shrink: whether a plane may get fewer pixels than voxels.

    >>> block_size((10, 20), (2.5, 1.0), 128, shrink=False)
    (125, 100)
    """
    finest = min(pixel)
    height, width = (n * size / finest for n, size in zip(shape, pixel, strict=True))
    zoom = side / max(height, width)
    if zoom >= 1 or not shrink:
        zoom = max(1, math.floor(zoom))
    return max(1, round(height * zoom)), max(1, round(width * zoom))


def _view_of(features: FeatureMaps) -> display.View | None:
    """Return how the slice is turned for display, if its place in the patient is known."""
    if features.affine is None or features.axis is None or features.index is None:
        return None
    views = (
        display.plan_view(features.grid.shape, features.affine, name) for name in display.PLANES
    )
    return next(view for view in views if view.slice_axis == features.axis)


def _turned(planes: NDArray[Any], view: display.View) -> NDArray[Any]:
    """Turn (C, h, w) as `display.cut` turns the slices of a volume."""
    if view.row_axis > view.column_axis:
        planes = planes.swapaxes(1, 2)
    if view.flip_rows:
        planes = planes[:, ::-1]
    return planes[:, :, ::-1] if view.flip_columns else planes


def _chosen_channels(features: FeatureMaps, channels: Sequence[int] | None) -> list[int]:
    if channels is None:
        return [int(channel) for channel in features.order]
    count = len(features.values)
    for channel in channels:
        if channel not in range(count):
            raise InputError(
                f"channel {channel!r} of layer '{features.layer}': legal are 0 to {count - 1}"
            )
    if not len(channels):
        raise InputError(f"no channel given: name some of 0 to {count - 1}, or None for all")
    return [int(channel) for channel in dict.fromkeys(channels)]


def _check_count(number: int | None, name: str) -> None:
    if number is not None and number < 1:
        raise ConfigError(f"{name} must be 1 or more, or None, not {number!r}")


def _layout(sheet: Sheet) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the size of the tiles and of the cells that hold them with their labels."""
    shape = sheet.planes.shape[1:]
    finest = min(sheet.pixel)
    native = max(math.ceil(n * s / finest) for n, s in zip(shape, sheet.pixel, strict=True))
    words = [_label(sheet, channel) for channel in sheet.chosen]
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
    """Return the channels of each page: full rows, as many as its pixels allow."""
    _, cell = _layout(sheet)
    across = _columns(sheet, columns, cell)
    height, width = (n + 2 * text.GAP for n in cell)
    size = across * max(1, MONTAGE_PIXELS // (height * width * across))
    return [sheet.chosen[n : n + size] for n in range(0, len(sheet.chosen), size)]


# ---------------------------------------------------------------- pictures


def _draw_plane(sheet: Sheet, channel: int, size: tuple[int, int]) -> Picture:
    """Draw a channel with (height, width) pixels, each of the voxel under its centre."""
    low, high = sheet.scale or (sheet.lows[channel], sheet.highs[channel])
    if not _varies(low, high) or not np.isfinite(sheet.lows[channel]):
        return np.zeros((*size, 3), np.uint8)
    values = sheet.planes[channel].astype(np.float64)
    level = np.rint((values - low) / (high - low) * 255).astype(np.uint8)
    rows, columns = (
        ((np.arange(pixels) + 0.5) * voxels / pixels).astype(int)
        for pixels, voxels in zip(size, level.shape, strict=True)
    )
    return sheet.colours[level[np.ix_(rows, columns)]]


def _draw_tile(sheet: Sheet, channel: int, size: tuple[int, int], cell: tuple[int, int]) -> Picture:
    """Draw a channel in a thin frame below its label; what is left below separates the rows."""
    tile = np.zeros((cell[0] + 2 * text.GAP, cell[1], 3), np.uint8)
    lines = _label(sheet, channel)
    for row, line in enumerate(lines):
        top, first = row * text.line_height(LABEL_SIZE), row == 0
        text.put_text(tile, line, 0, top, text.WHITE if first else text.GREY, LABEL_SIZE, first)
    top = cell[0] - size[0] - 2
    tile[top : cell[0], : size[1] + 2] = FRAME
    tile[top + 1 : cell[0] - 1, 1 : size[1] + 1] = _draw_plane(sheet, channel, size)
    return tile


def _colour_bar(sheet: Sheet) -> Picture:
    """Draw a strip of the colours between the words for its ends."""
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


# ---------------------------------------------------------------- words


def _file_name(features: FeatureMaps, channel: int) -> str:
    digits = max(3, len(str(len(features.values) - 1)))
    name = f"channel_{channel:0{digits}d}"
    if features.weights is None:
        return name
    rank = int(np.flatnonzero(features.order == channel)[0])
    return f"rank_{rank:0{digits}d}_{name}"


def _varies(low: float, high: float) -> bool:
    return bool(high - low > ROUNDING * max(abs(low), abs(high)))


def _label(sheet: Sheet, channel: int) -> list[str]:
    low, high = sheet.lows[channel], sheet.highs[channel]
    if not np.isfinite(low):
        extent = "NaN or infinite"
    elif not _varies(low, high):
        extent = f"{low:.3g}, constant"
    else:
        extent = f"{low:.3g} … {high:.3g}"
    weights = sheet.features.weights
    weight = [] if weights is None else [f"weight {weights[channel]:+.3g}"]
    return [f"channel {channel}", *weight, extent]


def _header(sheet: Sheet, width: int, size: tuple[int, int], page: str) -> list[Picture]:
    """Say which layer and slice this is, and what the colours mean."""
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
        text.text_block(text.wrap_items(_facts(sheet), room), width, text.GREY),
    ]
    rows, columns = sheet.planes.shape[1:]
    if size[0] < rows or size[1] < columns:
        notice = (
            f"shrunk to {size[0]} x {size[1]} of {rows} x {columns} voxels by leaving some out: "
            "the channels' own pictures show all"
        )
        blocks.append(text.text_block(text.wrap_items([notice], room), width, text.AMBER))
    return [*blocks, _colour_bar(sheet)]


def _facts(sheet: Sheet) -> list[str]:
    features, view = sheet.features, sheet.view
    grid = features.grid
    facts = [
        f"grid {size_text(grid.shape, 6)}",
        f"stride {size_text(grid.stride, 6)} input voxels{'' if grid.measured else ' (assumed)'}",
    ]
    if features.axis is not None and features.index is not None:
        where = float(grid.positions(features.axis)[features.index])
        facts.append(
            f"slice {features.index} of 0–{grid.shape[features.axis] - 1} along axis "
            f"{features.axis} (input voxel {where:g})"
        )
        if view is None:
            rows, columns = (axis for axis in range(3) if axis != features.axis)
            facts.append(f"axis {rows} runs down, axis {columns} to the right")
    if view is not None and features.index is not None:
        edges = display.edge_letters(view)
        facts.append(f"{view.axis}, {display.position_text(view, features.index)}")
        facts.append(f"left {edges.left}, right {edges.right}, top {edges.top}")
    if features.weights is not None:
        facts.append(text.clean_text(f"ranked by Grad-CAM weight for {features.target}"))
    own = "each channel on its own scale, constant channels are black"
    return [*facts, "one scale for all channels" if sheet.scale else own]
