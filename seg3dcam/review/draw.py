"""Compositing with OpenCV: a slice, its heat, its outlines, and what is written around them.

Pictures are (height, width, 3) uint8 in OpenCV's order blue, green, red. Letters, scale bar and
text stand in black margins beside the picture, never on the anatomy.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from seg3dcam.errors import ConfigError, nearest
from seg3dcam.look import Window
from seg3dcam.review.display import Letters, Size

Picture = NDArray[np.uint8]
Colour = tuple[int, int, int]

WHITE: Colour = (235, 235, 235)
GREY: Colour = (165, 165, 165)
AMBER: Colour = (60, 190, 255)
BLACK: Colour = (0, 0, 0)

MARGIN = 24  # around a picture, for the letters and the scale bar
GAP = 6
TEXT_SIZE = 14
LETTER_SIZE = 17
TITLE_SIZE = 17
BAR_WIDTH = 122  # the colour bar with its ticks and words
BAR_HEIGHT = 300  # enough for the words beside it


class Line(NamedTuple):
    """How an outline is drawn: colour, and pixels drawn and left out in turn (0: solid)."""

    colour: Colour
    dash: int
    gap: int


# Told apart by colour and by style, so also on a grey printout.
LINES = {
    "prediction": Line(colour=(255, 255, 0), dash=7, gap=5),
    "truth": Line(colour=(60, 220, 60), dash=1, gap=0),
}


class Palette(NamedTuple):
    """Heat colours for the levels 0..255.

    `pure` (256, 1, 3): the colormap. `heat` (256, 1, 3): the colormap times alpha.
    `keep` (256,): how much of the grey shows through, 255 = all of it.
    """

    pure: Picture
    heat: Picture
    keep: Picture


# ---------------------------------------------------------------- the slice


def make_palette(colormap: str, opacity: float) -> Palette:
    """Make the colours of the heat: alpha is opacity * min(1, value / 0.5).

    Raises:
        ConfigError: a colormap that matplotlib does not know.
    """
    if colormap not in matplotlib.colormaps:
        raise ConfigError(f"unknown colormap {colormap!r}; {nearest(colormap, _colormap_names())}")
    value = np.linspace(0, 1, 256)
    rgb = matplotlib.colormaps[colormap](value)[:, :3]
    bgr = rgb[:, None, ::-1] * 255
    alpha = opacity * np.minimum(1, value / 0.5)
    return Palette(
        pure=bgr.round().astype(np.uint8),
        heat=(bgr * alpha[:, None, None]).round().astype(np.uint8),
        keep=((1 - alpha) * 255).round().astype(np.uint8),
    )


def _colormap_names() -> list[str]:
    return [name for name in matplotlib.colormaps if not name.endswith("_r")]


def resize_smooth(plane: NDArray[Any], size: Size) -> NDArray[np.float32]:
    """Resize linearly to (height, width); when only shrinking, average instead."""
    plane = np.ascontiguousarray(plane, dtype=np.float32)
    shrink = plane.shape[0] >= size.height and plane.shape[1] >= size.width
    how = cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
    return cv2.resize(plane, (size.width, size.height), interpolation=how)


def resize_mask(plane: NDArray[np.bool_], size: Size) -> Picture:
    """Resize a mask to (height, width) as 0 and 1; when shrinking, no voxel gets lost."""
    mask = np.ascontiguousarray(plane, dtype=np.uint8)
    if mask.shape[0] >= size.height and mask.shape[1] >= size.width:
        covered = cv2.resize(mask * 255, (size.width, size.height), interpolation=cv2.INTER_AREA)
        return (covered > 0).astype(np.uint8)
    # The exact kind puts voxel centres where the linear one puts them.
    return cv2.resize(mask, (size.width, size.height), interpolation=cv2.INTER_NEAREST_EXACT)


def draw_grey(plane: NDArray[Any], window: Window, size: Size) -> Picture:
    """Draw a slice of the scan in its window, (height, width) uint8; NaN is black."""
    values = np.ascontiguousarray(plane, dtype=np.float32)
    if not np.isfinite(values).all():
        values = np.nan_to_num(values, nan=window.low, posinf=window.high, neginf=window.low)
    values = resize_smooth(values, size)
    scaled = (values - np.float32(window.low)) * np.float32(255 / (window.high - window.low))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def draw_heat(
    grey: Picture, cam: NDArray[np.float32], threshold: float, palette: Palette
) -> Picture:
    """Lay the heat over a grey picture; below the threshold the picture is unchanged.

    Args:
        grey: (height, width) uint8.
        cam: (height, width) float32 in [0, 1], on the scale of the whole volume.
        threshold: lower values are fully transparent.
        palette: from `make_palette`.
    """
    level = cv2.convertScaleAbs(cam, alpha=255)
    level[cam < threshold - 1e-6] = 0  # 1e-6: interpolation of equal values may round down
    kept = cv2.multiply(grey, cv2.LUT(level, palette.keep), scale=1 / 255)
    return cv2.add(cv2.cvtColor(kept, cv2.COLOR_GRAY2BGR), cv2.applyColorMap(level, palette.heat))


def draw_outline(picture: Picture, mask: Picture, line: Line) -> None:
    """Draw the outline of a mask onto the picture, just outside the region, with a dark rim."""
    if not mask.any():
        return
    outside = cv2.dilate(mask, np.ones((3, 3), np.uint8))
    found, _ = cv2.findContours(outside, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    drawn = np.zeros(mask.shape, np.uint8)
    for points in found:
        x, y = points[:, 0].T
        kept = np.arange(len(x)) % (line.dash + line.gap) < line.dash
        drawn[y[kept], x[kept]] = 1
    drawn = cv2.dilate(drawn, np.ones((2, 2), np.uint8))
    picture[cv2.dilate(drawn, np.ones((3, 3), np.uint8)) > 0] //= 3
    picture[drawn > 0] = line.colour


# ---------------------------------------------------------------- text


@functools.lru_cache(maxsize=16)
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: the same letters on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=1024)
def text_mask(text: str, size: int = TEXT_SIZE, bold: bool = False) -> Picture:
    """Render one line of text, (height, width) uint8, 255 = fully covered; do not change it."""
    font = _font(size, bold)
    ascent, descent = font.getmetrics()
    canvas = Image.new("L", (max(1, math.ceil(font.getlength(text))), ascent + descent))
    ImageDraw.Draw(canvas).text((0, 0), text, fill=255, font=font)
    return np.asarray(canvas)


def text_width(text: str, size: int = TEXT_SIZE, bold: bool = False) -> int:
    """Width of a line of text in pixels."""
    return math.ceil(_font(size, bold).getlength(text))


def line_height(size: int = TEXT_SIZE) -> int:
    """Height of a line of text in pixels, with some air."""
    return sum(_font(size, False).getmetrics()) + 3


def paste_text(picture: Picture, mask: Picture, left: int, top: int, colour: Colour) -> None:
    """Blend rendered text into the picture; what lies outside the picture is left out."""
    left, top = max(0, left), max(0, top)
    place = picture[top : top + mask.shape[0], left : left + mask.shape[1]]
    alpha = mask[: place.shape[0], : place.shape[1], None].astype(np.float32) / 255
    place[:] = (place + (np.array(colour, np.float32) - place) * alpha).round()


def put_text(
    picture: Picture,
    text: str,
    left: int,
    top: int,
    colour: Colour = WHITE,
    size: int = TEXT_SIZE,
    bold: bool = False,
) -> None:
    """Write one line of text, its top left corner at (left, top)."""
    paste_text(picture, text_mask(text, size, bold), left, top, colour)


def put_centred(picture: Picture, text: str, x: int, y: int) -> None:
    """Write a bold letter around a point."""
    mask = text_mask(text, LETTER_SIZE, True)
    paste_text(picture, mask, x - mask.shape[1] // 2, y - mask.shape[0] // 2, WHITE)


def clean_text(text: object) -> str:
    """Make any value one line: line breaks and control characters become spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def wrap_items(
    items: Iterable[str], width: int, size: int = TEXT_SIZE, bold: bool = False
) -> list[str]:
    """Join items with dots into lines of at most `width` pixels; too long items are broken."""
    lines: list[str] = []
    for item in items:
        joined = f"{lines[-1]}  ·  {item}" if lines else item
        if text_width(joined, size, bold) <= width:
            lines[-1:] = [joined]
        else:
            lines.extend(_break_text(item, width, size, bold))
    return lines


def _fitting_length(text: str, width: int, size: int, bold: bool) -> int:
    """How many characters fit into the width; at least one."""

    def width_of(count: int) -> int:
        return text_width(text[:count], size, bold)

    return max(1, bisect.bisect_right(range(1, len(text)), width, key=width_of))


def _break_text(text: str, width: int, size: int, bold: bool) -> list[str]:
    """Break at spaces where possible, else anywhere: nothing is cut off."""
    lines: list[str] = []
    while text_width(text, size, bold) > width and len(text) > 1:
        end = _fitting_length(text, width, size, bold)
        space = text.rfind(" ", 1, end + 1)
        end = space if space > end // 2 else end
        lines.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return [*lines, text] if text else lines


def text_block(
    lines: Sequence[str],
    width: int,
    colour: Colour = WHITE,
    size: int = TEXT_SIZE,
    bold: bool = False,
) -> Picture:
    """Write lines one below the other on black, with a gap above, (height, width, 3)."""
    block = np.zeros((GAP + line_height(size) * len(lines), width, 3), np.uint8)
    for row, line in enumerate(lines):
        put_text(block, line, MARGIN, GAP + row * line_height(size), colour, size, bold)
    return block


# ---------------------------------------------------------------- around the slice


def scale_length(longest_mm: float) -> float:
    """Choose the longest of ... 1, 2, 5, 10, 20, 50 ... mm that is not above `longest_mm`.

    >>> scale_length(70), scale_length(0.3)
    (50.0, 0.2)
    """
    power = 10.0 ** math.floor(math.log10(longest_mm))
    step = next(step for step in (5, 2, 1) if step * power <= longest_mm * (1 + 1e-9) or step == 1)
    return float(f"{step * power:.6g}")


def frame_picture(
    picture: Picture, letters: Letters, pixels_per_mm: float, cell: tuple[int, int]
) -> Picture:
    """Put a picture into a black cell with its letters and a scale bar in the margins.

    Args:
        picture: (height, width, 3).
        letters: the sides of the patient.
        pixels_per_mm: for the scale bar.
        cell: smallest (height, width) inside the margins; a smaller picture is centred.
    """
    height, width = picture.shape[:2]
    top = MARGIN + max(0, cell[0] - height) // 2
    left = MARGIN + max(0, cell[1] - width) // 2
    full_height = max(cell[0], height) + 2 * MARGIN
    full_width = max(cell[1], width) + 2 * MARGIN
    framed = np.zeros((full_height, full_width, 3), np.uint8)
    framed[top : top + height, left : left + width] = picture
    middle_x, middle_y = left + width // 2, top + height // 2
    put_centred(framed, letters.top, middle_x, top - MARGIN // 2)
    put_centred(framed, letters.bottom, middle_x, top + height + MARGIN // 2)
    put_centred(framed, letters.left, left - MARGIN // 2, middle_y)
    put_centred(framed, letters.right, left + width + MARGIN // 2, middle_y)
    _put_scale_bar(framed, pixels_per_mm, max(cell[1], width))
    return framed


def put_label(framed: Picture, label: str) -> None:
    """Write a word or two into the top margin of a framed picture."""
    put_text(framed, label, MARGIN, (MARGIN - line_height()) // 2, GREY)


def _put_scale_bar(framed: Picture, pixels_per_mm: float, room: int) -> None:
    """Draw the bar in the bottom margin, left of the middle letter."""
    length = scale_length(0.22 * room / pixels_per_mm)
    pixels = max(1, round(length * pixels_per_mm))
    y = framed.shape[0] - MARGIN // 2
    cv2.rectangle(framed, (MARGIN, y - 1), (MARGIN + pixels - 1, y + 1), WHITE, cv2.FILLED)
    for x in (MARGIN, MARGIN + pixels - 1):
        cv2.line(framed, (x, y - 4), (x, y + 4), WHITE, 1)
    text = f"{length:g} mm"
    put_text(framed, text, MARGIN + pixels + GAP, y - line_height() // 2, WHITE)


def draw_colour_bar(palette: Palette, threshold: float) -> Picture:
    """Draw the colour bar with its ticks, threshold and words, (BAR_HEIGHT, BAR_WIDTH, 3)."""
    bar = np.zeros((BAR_HEIGHT, BAR_WIDTH, 3), np.uint8)
    top, bottom = 12, BAR_HEIGHT - 13
    left, middle, right = 8, 22, 44
    value = np.linspace(1, 0, bottom - top + 1, dtype=np.float32)[:, None]
    strip = cv2.applyColorMap(cv2.convertScaleAbs(value, alpha=255), palette.pure)
    strip[value < threshold] = BLACK
    bar[top : bottom + 1, left:middle] = strip
    # Beside the pure colours, as they look on the scan, from black to white.
    grey = np.linspace(0, 255, right - middle).astype(np.uint8)[None].repeat(len(value), 0)
    heat = draw_heat(grey, value.repeat(right - middle, 1), threshold, palette)
    bar[top : bottom + 1, middle:right] = heat
    cv2.rectangle(bar, (left - 1, top - 1), (right, bottom + 1), GREY, 1)

    def put_tick(number: float, text: str, colour: Colour) -> None:
        y = round(bottom - number * (bottom - top))
        cv2.line(bar, (right, y), (right + 4, y), colour, 1)
        put_text(bar, text, right + 8, y - line_height() // 2 + 1, colour)

    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        if abs(tick - threshold) > 0.07:
            put_tick(tick, f"{tick:.1f}", WHITE)
    put_tick(threshold, f"{threshold:.2f}", AMBER)
    words = np.rot90(text_mask("CAM: relative, not a probability", TEXT_SIZE - 1))
    paste_text(bar, words, BAR_WIDTH - 26, (BAR_HEIGHT - words.shape[0]) // 2, WHITE)
    return bar


def draw_legend(names: Sequence[str], width: int) -> Picture:
    """Draw a sample of each outline with its name, (height, width, 3)."""
    legend = np.zeros((GAP + line_height(), width, 3), np.uint8)
    x, y = MARGIN, GAP + line_height() // 2
    for name in names:
        line = LINES[name]
        for offset in range(38):
            if offset % (line.dash + line.gap) < line.dash:
                legend[y - 1 : y + 1, x + offset] = line.colour
        put_text(legend, name, x + 46, GAP, WHITE)
        x += 46 + text_width(name) + 3 * MARGIN // 2
    return legend


def put_notice(framed: Picture, text: str) -> None:
    """Write a sentence into the upper part of a framed picture, on a dark box."""
    lines = wrap_items([text], framed.shape[1] - 2 * MARGIN)
    wide = max(text_width(line) for line in lines) + 2 * GAP
    tall = line_height() * len(lines) + GAP
    left, top = (framed.shape[1] - wide) // 2, MARGIN + GAP
    framed[top : top + tall, left : left + wide] //= 4
    for row, line in enumerate(lines):
        put_text(framed, line, left + GAP, top + GAP // 2 + row * line_height(), AMBER)


def pad_to(picture: Picture, height: int, width: int) -> Picture:
    """Add black at the bottom and the right."""
    missing = height - picture.shape[0], width - picture.shape[1]
    if missing == (0, 0):
        return picture
    return np.pad(picture, ((0, missing[0]), (0, missing[1]), (0, 0)))


def stack_rows(rows: Sequence[Picture]) -> Picture:
    """Put pictures below each other, at the left."""
    width = max(row.shape[1] for row in rows)
    return np.vstack([pad_to(row, row.shape[0], width) for row in rows])


def stack_columns(columns: Sequence[Picture], gap: int = 0) -> Picture:
    """Put pictures beside each other, at the top, with black between them."""
    height = max(column.shape[0] for column in columns)
    widths = [column.shape[1] + gap for column in columns[:-1]] + [columns[-1].shape[1]]
    return np.hstack([pad_to(c, height, w) for c, w in zip(columns, widths, strict=True)])
