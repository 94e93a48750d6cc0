"""Frame a slice with letters, scale bar, colour bar and legend; put pictures side by side.

Words and bars stand in black margins, so that they never cover the anatomy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from seg3dcam.review.pictures.display import Letters
from seg3dcam.review.pictures.draw import LINES, Colour, Palette, Picture, draw_heat
from seg3dcam.review.pictures.text import (
    AMBER,
    GAP,
    GREY,
    LETTER_SIZE,
    MARGIN,
    TEXT_SIZE,
    WHITE,
    line_height,
    paste_text,
    put_centred,
    put_text,
    text_mask,
    text_width,
    wrap_items,
)

BLACK: Colour = (0, 0, 0)
POINTER = 5  # length of an arrowhead in pixels, which does not reach the letters
BAR_WIDTH = 122  # of the colour bar with its ticks and words
BAR_HEIGHT = 300  # enough for the words beside it
TICKS, SIGNED_TICKS = (0, 0.2, 0.4, 0.6, 0.8, 1), (-1, -0.5, 0, 0.5, 1)


def scale_length(longest_mm: float) -> float:
    """Return the largest of ..., 1, 2, 5, 10, 20, 50, ... that is not above `longest_mm`.

    >>> scale_length(70), scale_length(0.3)
    (50.0, 0.2)
    """
    power = 10.0 ** math.floor(math.log10(longest_mm))
    step = next(step for step in (5, 2, 1) if step * power <= longest_mm * (1 + 1e-9) or step == 1)
    return float(f"{step * power:.6g}")


def frame_picture(
    picture: Picture, letters: Letters, pixels_per_mm: float, cell: tuple[int, int]
) -> Picture:
    """Put a picture into a black cell with letters and a scale bar in the margins.

    Args:
        picture: (height, width, 3).
        letters: the sides of the patient at the edges.
        pixels_per_mm: the scale of the picture, for the scale bar.
        cell: smallest (height, width) inside the margins. A smaller picture is centred.
    """
    height, width = picture.shape[:2]
    top, left = corner_in_cell((height, width), cell)
    full_height = max(cell[0], height) + 2 * MARGIN
    full_width = max(cell[1], width) + 2 * MARGIN
    framed = np.zeros((full_height, full_width, 3), np.uint8)
    framed[top : top + height, left : left + width] = picture
    middle_x, middle_y = left + width // 2, top + height // 2
    put_centred(framed, letters.top, middle_x, top - MARGIN // 2)
    put_centred(framed, letters.bottom, middle_x, top + height + MARGIN // 2)
    put_centred(framed, letters.left, left - MARGIN // 2, middle_y)
    put_centred(framed, letters.right, left + width + MARGIN // 2, middle_y)
    _put_scale_bar(framed, pixels_per_mm, max(cell[1], width), middle_x)
    return framed


def corner_in_cell(shape: tuple[int, int], cell: tuple[int, int]) -> tuple[int, int]:
    """Return row and column of a picture's top left corner in its framed cell."""
    top, left = (MARGIN + max(0, room - size) // 2 for size, room in zip(shape, cell, strict=True))
    return top, left


def put_pointers(
    framed: Picture, shape: tuple[int, int], cell: tuple[int, int], point: tuple[float, float]
) -> None:
    """Draw four small arrowheads just outside of a framed picture, which point to a place in it.

    Args:
        framed: from `frame_picture`.
        shape: (height, width) of the picture in it.
        cell: as given to `frame_picture`.
        point: row and column in pixels from the picture's top left corner.
    """
    top, left = corner_in_cell(shape, cell)
    bottom, right = top + shape[0] - 1, left + shape[1] - 1
    y, x = top + int(point[0]), left + int(point[1])
    for step in range(POINTER):
        framed[y - step : y + step + 1, [left - 1 - step, right + 1 + step]] = AMBER
        framed[[top - 1 - step, bottom + 1 + step], x - step : x + step + 1] = AMBER


def put_label(framed: Picture, label: str) -> None:
    """Write a short label into the top margin of a framed picture."""
    put_text(framed, label, MARGIN, (MARGIN - line_height()) // 2, GREY)


def _put_scale_bar(framed: Picture, pixels_per_mm: float, room: int, middle: int) -> None:
    """Draw the scale bar in the bottom margin, to the left of the letter in the middle."""
    length = scale_length(0.22 * room / pixels_per_mm)
    pixels = max(1, round(length * pixels_per_mm))
    y = framed.shape[0] - MARGIN // 2
    cv2.rectangle(framed, (MARGIN, y - 1), (MARGIN + pixels - 1, y + 1), WHITE, cv2.FILLED)
    for x in (MARGIN, MARGIN + pixels - 1):
        cv2.line(framed, (x, y - 4), (x, y + 4), WHITE, 1)
    text = f"{length:g} mm"
    left = MARGIN + pixels + GAP
    if left + text_width(text) > middle - LETTER_SIZE // 2:  # too narrow
        left = middle + LETTER_SIZE // 2 + GAP
    put_text(framed, text, left, y - line_height() // 2, WHITE)


def draw_colour_bar(palette: Palette, threshold: float) -> Picture:
    """Draw the colour bar with its ticks, threshold and words, (BAR_HEIGHT, BAR_WIDTH, 3)."""
    bar = np.zeros((BAR_HEIGHT, BAR_WIDTH, 3), np.uint8)
    top, bottom = 12, BAR_HEIGHT - 13
    left, middle, right = 8, 22, 44
    look, (low, high) = palette.look, palette.look.ends
    value = np.linspace(high, low, bottom - top + 1, dtype=np.float32)[:, None]
    strip = cv2.applyColorMap(palette.levels(value), palette.pure)
    strip[look.strength(value) < threshold] = BLACK
    bar[top : bottom + 1, left:middle] = strip
    # Beside the pure colours, the same colours over grey values from black to white.
    grey = np.linspace(0, 255, right - middle).astype(np.uint8)[None].repeat(len(value), 0)
    heat = draw_heat(grey, value.repeat(right - middle, 1), threshold, palette)
    bar[top : bottom + 1, middle:right] = heat
    cv2.rectangle(bar, (left - 1, top - 1), (right, bottom + 1), GREY, 1)

    def put_tick(number: float, text: str, colour: Colour) -> None:
        y = round(bottom - (number - low) / (high - low) * (bottom - top))
        cv2.line(bar, (right, y), (right + 4, y), colour, 1)
        put_text(bar, text, right + 8, y - line_height() // 2 + 1, colour)

    shown_from = {threshold, -threshold} if look.signed else {threshold}
    for tick in SIGNED_TICKS if look.signed else TICKS:
        if min(abs(tick - limit) for limit in shown_from) > 0.07 * (high - low):
            put_tick(tick, f"{tick:.1f}", WHITE)
    for limit in shown_from:
        put_tick(limit, f"{limit:.2f}", AMBER)
    if not look.signed:
        _put_upwards(bar, "CAM: relative, not a probability", BAR_HEIGHT // 2)
        return bar
    _put_upwards(bar, "against", bottom - text_width("against") // 2)
    _put_upwards(bar, "CAM: relative", BAR_HEIGHT // 2)
    _put_upwards(bar, "for", top + text_width("for") // 2)
    return bar


def _put_upwards(bar: Picture, words: str, middle: int) -> None:
    """Write words beside a colour bar, from bottom to top, centred on a row."""
    mask = np.rot90(text_mask(words, TEXT_SIZE - 1))
    paste_text(bar, mask, BAR_WIDTH - 26, middle - mask.shape[0] // 2, WHITE)


def draw_legend(words: Mapping[str, str], width: int) -> Picture:
    """Draw a sample of each outline with the words about it, (height, width, 3)."""
    legend = np.zeros((GAP + line_height(), width, 3), np.uint8)
    x, y = MARGIN, GAP + line_height() // 2
    for name, text in words.items():
        line = LINES[name]
        for offset in range(38):
            if offset % (line.dash + line.gap) < line.dash:
                legend[y - 1 : y + 1, x + offset] = line.colour
        put_text(legend, text, x + 46, GAP, WHITE)
        x += 46 + text_width(text) + 3 * MARGIN // 2
    return legend


def put_notice(framed: Picture, shape: tuple[int, int], cell: tuple[int, int], text: str) -> None:
    """Write a sentence on a dark box into the upper part of a framed picture.

    If the picture is too flat for the box, the sentence is written below it, so that no letter is
    covered. For the arguments see `put_pointers`.
    """
    lines = wrap_items([text], framed.shape[1] - 2 * MARGIN)
    wide = max(text_width(line) for line in lines) + 2 * GAP
    tall = line_height() * len(lines) + GAP
    left, (top, _) = (framed.shape[1] - wide) // 2, corner_in_cell(shape, cell)
    top += GAP if shape[0] >= tall + 2 * GAP else shape[0] + MARGIN
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
    """Put pictures below each other, aligned at the left."""
    width = max(row.shape[1] for row in rows)
    return np.vstack([pad_to(row, row.shape[0], width) for row in rows])


def stack_columns(columns: Sequence[Picture], gap: int = 0) -> Picture:
    """Put pictures beside each other, aligned at the top, with black gaps between them."""
    height = max(column.shape[0] for column in columns)
    widths = [column.shape[1] + gap for column in columns[:-1]] + [columns[-1].shape[1]]
    return np.hstack([pad_to(c, height, w) for c, w in zip(columns, widths, strict=True)])
