"""Draw slices for DICOM viewers: scan, heat and outlines in colour, with words in the margins.

`plan_picture` prepares once what all slices of a series share, and `draw_picture` adds one slice. A
picture keeps the rows and columns of its slice. Small slices are enlarged by a whole number, so the
place in the patient stays exact. Letters and words stand in black margins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from seg3dcam.explaining.explanation import Explanation
from seg3dcam.review.look import GreyWindow, Look, choose_window
from seg3dcam.review.pictures.display import OPPOSITE, Letters, Size
from seg3dcam.review.pictures.draw import (
    Palette,
    Picture,
    draw_grey,
    draw_heat,
    draw_outlines,
    make_palette,
    resize_mask,
    resize_smooth,
)
from seg3dcam.review.pictures.frame import draw_legend, stack_rows
from seg3dcam.review.pictures.text import (
    AMBER,
    GAP,
    GREY,
    MARGIN,
    clean_text,
    put_centred,
    put_text,
    text_block,
    text_width,
    wrap_items,
)

#: A slice with fewer pixels along its longer side is enlarged, to make room for the words.
SMALLEST_SIDE = 400

CAUTION = "CAM, research use only, not for diagnosis"
_BAR = (120, 10)  # the colour bar's width and height


@dataclass(frozen=True, eq=False)
class PicturePlan:
    """What all pictures of a series share.

    Attributes:
        rows, columns: size of the source slices.
        zoom: how many pixels of the picture show one pixel of the source along each side.
        blank: a picture without its slice, (height, width, 3), in OpenCV's order of colours.
        letters: the sides of the patient at the edges.
        look, window, palette: how scan and heat are drawn.
    """

    rows: int
    columns: int
    zoom: int
    blank: Picture
    letters: Letters
    look: Look
    window: GreyWindow
    palette: Palette

    @property
    def corner(self) -> tuple[float, float]:
        """Position of the picture's first pixel as (column, row) of the source, outside of it."""
        # If pixels are enlarged 2 times, the first half of one lies 1/4 to the left of its centre.
        outside = -(MARGIN + (self.zoom - 1) / 2) / self.zoom
        return outside, outside


def plan_picture(explanation: Explanation, look: Look, case: str) -> PicturePlan:
    """Plan the pictures of an explanation, whose arrays have the axes columns, rows, slices."""
    columns, rows, _ = explanation.scan.shape
    zoom = max(1, math.ceil(SMALLEST_SIDE / max(rows, columns)))
    letters = _edge_letters(explanation.affine)
    palette = make_palette(look)
    window = choose_window(explanation.scan.data[0].numpy(), look.window)
    return PicturePlan(
        rows=rows,
        columns=columns,
        zoom=zoom,
        blank=_blank(explanation, look, case, window, palette, letters, zoom),
        letters=letters,
        look=look,
        window=window,
        palette=palette,
    )


def draw_picture(
    plan: PicturePlan,
    scan: NDArray[np.float32],
    heat: NDArray[np.float32] | None,
    masks: Mapping[str, NDArray[np.bool_]],
    title: str,
) -> Picture:
    """Draw one slice, (height, width, 3) uint8 in the order red, green, blue.

    Args:
        scan, heat: (rows, columns).
        masks: name in `review.pictures.draw.LINES` -> mask (rows, columns).
        title: words above the slice, at the left, which say which slice it is.
    """
    height, width = plan.rows * plan.zoom, plan.columns * plan.zoom
    size = Size(height, width, 1.0)
    grey = draw_grey(scan, plan.window, size)
    if heat is None:
        picture = cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)
    else:
        smooth = resize_smooth(heat, size)
        picture = draw_heat(grey, smooth, plan.look.threshold, plan.palette)
    draw_outlines(picture, {name: resize_mask(mask, size) for name, mask in masks.items()})
    page = plan.blank.copy()
    page[MARGIN : MARGIN + height, MARGIN : MARGIN + width] = picture
    put_text(page, title, MARGIN, 3)
    return cv2.cvtColor(page, cv2.COLOR_BGR2RGB)


def _edge_letters(affine: NDArray[np.float64]) -> Letters:
    right, bottom = nib.aff2axcodes(affine)[:2]
    return Letters(left=OPPOSITE[right], right=right, top=OPPOSITE[bottom], bottom=bottom)


def _blank(
    explanation: Explanation,
    look: Look,
    case: str,
    window: GreyWindow,
    palette: Palette,
    letters: Letters,
    zoom: int,
) -> Picture:
    """Draw everything except the slice: the letters beside it and the words below it."""
    columns, rows, _ = explanation.scan.shape
    height, width = rows * zoom + 2 * MARGIN, columns * zoom + 2 * MARGIN
    frame = np.zeros((height, width, 3), np.uint8)
    middle_x, middle_y = width // 2, height // 2
    put_centred(frame, letters.top, middle_x, MARGIN // 2)
    put_centred(frame, letters.bottom, middle_x, height - MARGIN // 2)
    put_centred(frame, letters.left, MARGIN // 2, middle_y)
    put_centred(frame, letters.right, width - MARGIN // 2, middle_y)

    room = width - 2 * MARGIN
    notice = explanation.notice(scale=look.scale)
    blocks = [frame]
    if notice:
        blocks.append(text_block(wrap_items([notice], room), width, AMBER))
    else:
        blocks.append(_colour_bar(palette, width))
    if outlined := [name for name, mask in masks_of(explanation).items() if mask.any()]:
        blocks.append(draw_legend({name: name for name in outlined}, width))
    facts = [case, *shown_words(explanation, look), f"window {window.text}"]
    if not notice:
        facts.append(f"CAM shown from {look.from_text}")
    blocks.append(text_block(wrap_items([clean_text(fact) for fact in facts], room), width))
    blocks.append(text_block([CAUTION, ""], width, AMBER))
    return stack_rows(blocks)


def _colour_bar(palette: Palette, width: int) -> Picture:
    """Draw a horizontal colour bar; values that are not shown stay black."""
    look = palette.look
    first, last = ("against -1", "1 for, relative") if look.signed else ("0", "1   relative")
    line = text_block([first], width)
    wide, tall = _BAR
    left, top = MARGIN + text_width(f"{first} ") + 4, (line.shape[0] - tall) // 2 + 2
    value = np.linspace(*look.ends, wide, dtype=np.float32)[None].repeat(tall, 0)
    bar = cv2.applyColorMap(palette.levels(value), palette.pure)
    bar[look.strength(value) < look.threshold] = 0
    line[top : top + tall, left : left + wide] = bar
    cv2.rectangle(line, (left - 1, top - 1), (left + wide, top + tall), GREY, 1)
    put_text(line, f"{last}, not a probability", left + wide + GAP, GAP)
    return line


def shown_words(explanation: Explanation, look: Look) -> list[str]:
    """Return class, layer, method, layers left out of the mean, a caution and the verdict."""
    words = [
        explanation.label or explanation.class_name,
        explanation.layer_name(),
        explanation.method,
    ]
    if explanation.notice(scale=look.scale):  # then nothing more is to be said about the map
        return words
    if silent := explanation.left_out(scale=look.scale):
        words.append(f"without {', '.join(silent)}, whose map is not usable")
    if caution := explanation.caution():
        words.append(caution)
    if said := explanation.verdict():
        words.append(said.words)
    return words


def masks_of(explanation: Explanation) -> dict[str, NDArray[np.bool_]]:
    """Return truth, and prediction or explained region, if known: (columns, rows, slices)."""
    masks = {"truth": explanation.truth, explanation.measured_as: explanation.measured}
    return {name: mask.numpy() for name, mask in masks.items() if mask is not None}
