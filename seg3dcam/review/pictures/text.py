"""Draw lines of text into pictures, in a typeface that is the same on every machine.

A letter that the typeface lacks (Chinese, Japanese, Korean, emoji) is written as its code, such as
\\u809d, so that different names never look alike.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from seg3dcam.review.pictures.draw import Colour, Picture

WHITE: Colour = (235, 235, 235)
GREY: Colour = (165, 165, 165)
AMBER: Colour = (60, 190, 255)

MARGIN = 24  # to the left of a line, and around a picture, for letters and the scale bar
GAP = 6
TEXT_SIZE = 14
LETTER_SIZE = 17
TITLE_SIZE = 17


@functools.lru_cache(maxsize=16)
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which comes with matplotlib and so is there on every machine."""
    return ImageFont.truetype(_font_file(bold), size, layout_engine=ImageFont.Layout.BASIC)


def _font_file(bold: bool) -> str:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)


@functools.cache
def _letters(bold: bool) -> frozenset[int]:
    """Return the codes of all letters in the typeface."""
    return frozenset(FT2Font(_font_file(bold)).get_charmap())


def spelled(text: str, bold: bool = False) -> str:
    """Replace every letter that the typeface lacks by its code.

    >>> print(spelled("Läsion 肝"))
    Läsion \\u809d
    """
    if text.isascii():
        return text
    known = _letters(bold)
    return "".join(c if ord(c) in known else c.encode("unicode-escape").decode() for c in text)


@functools.lru_cache(maxsize=1024)
def text_mask(text: str, size: int = TEXT_SIZE, bold: bool = False) -> Picture:
    """Render a line of text, (height, width) uint8, 255 where it covers all; do not change it."""
    font, text = _font(size, bold), spelled(text, bold)
    ascent, descent = font.getmetrics()
    canvas = Image.new("L", (max(1, math.ceil(font.getlength(text))), ascent + descent))
    ImageDraw.Draw(canvas).text((0, 0), text, fill=255, font=font)
    return np.asarray(canvas)


def text_width(text: str, size: int = TEXT_SIZE, bold: bool = False) -> int:
    """Return the width of a line of text in pixels."""
    return math.ceil(_font(size, bold).getlength(spelled(text, bold)))


def line_height(size: int = TEXT_SIZE) -> int:
    """Return the height of a line of text in pixels, with some space."""
    return sum(_font(size, False).getmetrics()) + 3


def paste_text(picture: Picture, mask: Picture, left: int, top: int, colour: Colour) -> None:
    """Blend rendered text into a picture; parts outside of the picture are left out."""
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
    """Write a line of text with its top left corner at (left, top)."""
    paste_text(picture, text_mask(text, size, bold), left, top, colour)


def put_centred(picture: Picture, text: str, x: int, y: int) -> None:
    """Write a bold letter centred on a point."""
    mask = text_mask(text, LETTER_SIZE, True)
    paste_text(picture, mask, x - mask.shape[1] // 2, y - mask.shape[0] // 2, WHITE)


def clean_text(text: object) -> str:
    """Return any value as one line; line breaks and control characters become spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def wrap_items(
    items: Iterable[str], width: int, size: int = TEXT_SIZE, bold: bool = False
) -> list[str]:
    """Join items with dots into lines of at most `width` pixels; items too long are broken."""
    return list(_wrapped(tuple(items), width, size, bold))


@functools.lru_cache(maxsize=256)  # measuring text takes as long as drawing a slice's heat
def _wrapped(items: tuple[str, ...], width: int, size: int, bold: bool) -> tuple[str, ...]:
    lines: list[str] = []
    for item in items:
        joined = f"{lines[-1]}  ·  {item}" if lines else item
        if text_width(joined, size, bold) <= width:
            lines[-1:] = [joined]
        else:
            lines.extend(_break_text(item, width, size, bold))
    return tuple(lines)


def _fitting_length(text: str, width: int, size: int, bold: bool) -> int:
    """Return how many characters fit into the width, at least one."""

    def width_of(count: int) -> int:
        return text_width(text[:count], size, bold)

    return max(1, bisect.bisect_right(range(1, len(text)), width, key=width_of))


def _break_text(text: str, width: int, size: int, bold: bool) -> list[str]:
    """Break a text at spaces where possible, otherwise anywhere; nothing is cut off."""
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
