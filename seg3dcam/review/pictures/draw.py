"""Draw slices with OpenCV: grey values, heat, and outlines.

Pictures are (height, width, 3) uint8, in OpenCV's order blue, green, red.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import DTypeLike, NDArray

from seg3dcam.review.look import GreyWindow, Look, colours
from seg3dcam.review.pictures.display import Size

Picture = NDArray[np.uint8]
Colour = tuple[int, int, int]


class Line(NamedTuple):
    """How an outline is drawn: its colour, and the lengths of dashes and gaps in pixels.

    A gap of 0 makes it solid.
    """

    colour: Colour
    dash: int
    gap: int


# Lines differ in colour and in style, so that they can be distinguished in a grey printout.
_EXPLAINED = Line(colour=(255, 255, 0), dash=7, gap=5)
LINES = {
    "prediction": _EXPLAINED,
    "explained region": _EXPLAINED,
    "truth": Line(colour=(60, 220, 60), dash=1, gap=0),
}


class Palette(NamedTuple):
    """Colours of the heat at the levels 0..255, from the first to the last value of a look.

    Attributes:
        pure: (256, 1, 3), the colormap.
        heat: (256, 1, 3), the colormap times the opacity.
        keep: (256,), how much of the grey shows through; 255 is all of it.
        zero: the level at which nothing is drawn.
        look: the settings.
    """

    pure: Picture
    heat: Picture
    keep: Picture
    zero: int
    look: Look

    def levels(self, cam: NDArray[np.float32]) -> Picture:
        """Return the levels, in 0..255, of CAM values."""
        low, high = self.look.ends
        step = 255 / (high - low)
        return cv2.convertScaleAbs(cam, alpha=step, beta=-low * step)


def make_palette(look: Look) -> Palette:
    """Make the colours of the heat; `draw_heat` applies the threshold, as it has exact values.

    >>> make_palette(Look(colormap="gray", opacity=0.5)).keep[[0, 64, 255]].tolist()
    [255, 191, 128]
    """
    values = np.linspace(*look.ends, 256)
    strength = look.strength(values)
    alpha = replace(look, threshold=0.0).alpha(values)
    # In a signed look, zero lies between two levels.
    alpha[np.isclose(strength, strength.min())] = 0
    bgr = colours(look.colormap)[:, None, ::-1]
    return Palette(
        pure=np.ascontiguousarray(bgr),
        heat=(bgr * alpha[:, None, None]).round().astype(np.uint8),
        keep=((1 - alpha) * 255).round().astype(np.uint8),
        zero=int(strength.argmin()),
        look=look,
    )


def turned_copy(plane: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """Return a contiguous copy of a slice of a volume.

    Reading it in the order of memory and then turning it takes half the time of both at once.
    """
    return np.ascontiguousarray(plane.astype(dtype, order="K"))


def resize_smooth(plane: NDArray[Any], size: Size) -> NDArray[np.float32]:
    """Resize linearly; if both sides shrink, average instead."""
    plane = turned_copy(plane, np.float32)
    shrink = plane.shape[0] >= size.height and plane.shape[1] >= size.width
    how = cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
    return cv2.resize(plane, (size.width, size.height), interpolation=how)


def resize_mask(plane: NDArray[np.bool_], size: Size) -> Picture:
    """Resize a mask, and return it as 0 and 1; if it shrinks, no voxel is lost."""
    mask = turned_copy(plane, bool).view(np.uint8)
    if mask.shape[0] >= size.height and mask.shape[1] >= size.width:
        covered = cv2.resize(mask * 255, (size.width, size.height), interpolation=cv2.INTER_AREA)
        return (covered > 0).astype(np.uint8)
    # INTER_NEAREST_EXACT puts voxel centres at the same places as INTER_LINEAR.
    return cv2.resize(mask, (size.width, size.height), interpolation=cv2.INTER_NEAREST_EXACT)


def draw_grey(plane: NDArray[Any], window: GreyWindow, size: Size) -> Picture:
    """Draw a slice of the scan in its grey window, (height, width) uint8; NaN becomes black."""
    values = turned_copy(plane, np.float32)
    if not np.isfinite(values).all():
        values = np.nan_to_num(values, nan=window.low, posinf=window.high, neginf=window.low)
    values = resize_smooth(values, size)
    scaled = (values - np.float32(window.low)) * np.float32(255 / (window.high - window.low))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def draw_heat(
    grey: Picture, cam: NDArray[np.float32], threshold: float, palette: Palette
) -> Picture:
    """Draw the heat over a grey picture, which is unchanged below the threshold.

    Args:
        grey: (height, width) uint8.
        cam: (height, width) float32 in [0, 1], or in [-1, 1] for a signed look, on the scale of the
            whole volume.
        threshold: weaker values are fully transparent.
        palette: from `make_palette`.
    """
    level = palette.levels(cam)
    # Values at the threshold may have been rounded down.
    hidden = palette.look.strength(cam) < threshold - 1e-6
    level[hidden] = palette.zero
    kept = cv2.multiply(grey, cv2.LUT(level, palette.keep), scale=1 / 255)
    return cv2.add(cv2.cvtColor(kept, cv2.COLOR_GRAY2BGR), cv2.applyColorMap(level, palette.heat))


def draw_outlines(picture: Picture, masks: Mapping[str, Picture]) -> None:
    """Draw the outlines of masks onto a picture, just outside of the regions, with a dark rim.

    Args:
        picture: (height, width, 3).
        masks: name in `LINES` -> (height, width) uint8, 1 inside. Later ones are drawn on top.
    """
    lines = {name: _outline(mask, LINES[name]) for name, mask in masks.items() if mask.any()}
    if not lines:
        return
    # All rims are drawn first, so that none covers the line of another mask.
    rim = cv2.dilate(np.maximum.reduce(list(lines.values())), np.ones((3, 3), np.uint8))
    picture[rim > 0] //= 3
    for name, line in lines.items():
        picture[line > 0] = LINES[name].colour


def _outline(mask: Picture, line: Line) -> Picture:
    """Return the pixels of a mask's outline, with the gaps of its line."""
    outside = cv2.dilate(mask, np.ones((3, 3), np.uint8))
    found, _ = cv2.findContours(outside, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    drawn = np.zeros(mask.shape, np.uint8)
    for points in found:
        x, y = points[:, 0].T
        kept = np.arange(len(x)) % (line.dash + line.gap) < line.dash
        drawn[y[kept], x[kept]] = 1
    return cv2.dilate(drawn, np.ones((2, 2), np.uint8))
