"""Draw the map of a 2D network: over its input, with the input beside it, or alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from seg3dcam.errors import InputError
from seg3dcam.review.look import Look, choose_window
from seg3dcam.review.pictures import draw, frame
from seg3dcam.review.pictures.display import Size
from seg3dcam.review.pictures.draw import Picture
from seg3dcam.review.pictures.page import RESEARCH_ONLY, file_to_write, write_png
from seg3dcam.review.pictures.text import (
    AMBER,
    GAP,
    GREY,
    MARGIN,
    clean_text,
    text_block,
    wrap_items,
)

if TYPE_CHECKING:
    from seg3dcam.cams.result import CamResult

# Sides of a picture in pixels.
MAP_SHORT, MAP_LONG = 400, 1024

USUAL = Look()


def save_map(
    path: str | os.PathLike[str],
    result: CamResult,
    x: torch.Tensor | None = None,
    *,
    item: int | None = None,
    layer: str | None = None,
    look: Look = USUAL,
) -> Path:
    """Save the 2D map of one item as PNG: the input, and beside it the input under the map.

    Nothing is turned: rows run down and columns to the right, as in the array.

    Args:
        path: the file, ending in .png. Its folder is created if it is missing.
        result: what a CAM of a 2D network returned.
        x: the input (B, C, H, W), of which the mean over channels is drawn. Without it the map is
            drawn alone.
        item: number of the item in the batch; not needed for a batch of one.
        layer: name of a layer; None averages all layers.
        look: window, threshold, opacity and colours.

    Returns:
        The file.

    Raises:
        InputError: the map is not 2D, the input has another size, or an item must be chosen.
        ConfigError: the path does not end in .png.
        OutputError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> from seg3dcam import GradCAM, targets
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.ReLU())
        >>> _ = torch.nn.init.ones_(network[0].weight)
        >>> x = torch.rand(1, 1, 24, 32)
        >>> result = GradCAM(network, "0")(x, targets.ClassLogit(0, "volume"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_map(folder + "/cam.png", result, x).name
        'cam.png'
    """
    if len(result.shape) != 2:
        raise InputError(
            f"a map of {len(result.shape)} axes is no picture: save(...) writes a volume, "
            "`review_volumes` and `save_slices` draw its slices"
        )
    item = result.one_item(item)
    values = result.volume(layer, scale=look.scale)[item]
    names = list(result.layers) if layer is None else [layer]
    status = ", ".join(f"{name}: {result.layers[name].item_status[item]}" for name in names)
    words = [f"target: {result.target}", f"method: {result.method}", f"layer and status: {status}"]
    image = None if x is None else _image_of(x, item, result)
    return write_map(path, values, image, look, [clean_text(word) for word in words])


def write_map(
    path: str | os.PathLike[str],
    values: torch.Tensor,
    image: NDArray[np.float32] | None = None,
    look: Look | None = None,
    words: Sequence[str] = (),
) -> Path:
    """Write a map (H, W) as PNG with its colour bar and words; see `save_map`."""
    file = file_to_write(path, ".png", "2D map's")
    cam: NDArray[np.float32] = values.detach().float().cpu().numpy()
    largest = float(np.abs(cam).max())
    if look is None:
        look = Look(signed=bool(cam.min() < 0), threshold=0)
    if largest > 0:
        cam = (cam / largest).astype(np.float32)
    return write_png(file, _draw(cam, image, look, words))


def _draw(
    cam: NDArray[np.float32], image: NDArray[np.float32] | None, look: Look, words: Sequence[str]
) -> Picture:
    size = _size(cam.shape)
    palette = draw.make_palette(look)
    heat = draw.resize_smooth(cam, size)
    if image is None:
        pictures = [cv2.applyColorMap(palette.levels(heat), palette.pure)]
        notes = list(words)
    else:
        window = choose_window(image, look.window)
        grey = draw.draw_grey(image, window, size)
        overlay = draw.draw_heat(grey, heat, look.threshold, palette)
        pictures = [cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR), overlay]
        notes = [*words, f"window {window.text}", f"CAM shown from {look.from_text}"]
    if not cam.any():
        notes.append("no CAM: the map is zero or not usable")
    bar = frame.draw_colour_bar(palette, look.threshold)
    body = np.pad(frame.stack_columns([*pictures, bar], GAP), ((MARGIN, 0), (MARGIN, 0), (0, 0)))
    room = body.shape[1] - 2 * MARGIN
    lines = text_block(wrap_items(notes, room), body.shape[1], GREY) if notes else body[:0]
    last = text_block(wrap_items([RESEARCH_ONLY], room), body.shape[1], AMBER)
    return frame.stack_rows([body, lines, np.pad(last, ((0, GAP), (0, 0), (0, 0)))])


def _size(shape: tuple[int, ...]) -> Size:
    """Return a size that is large enough to look at, with at least one pixel per value."""
    height, width = shape
    zoom = min(max(1.0, MAP_SHORT / min(shape)), max(1.0, MAP_LONG / max(shape)))
    return Size(round(height * zoom), round(width * zoom), zoom)


def _image_of(x: torch.Tensor, item: int, result: CamResult) -> NDArray[np.float32]:
    """Return an item of the input as grey values (H, W), the mean of its channels."""
    shape = tuple(x.shape)
    if len(shape) != 4 or shape[0] != len(result.score) or shape[2:] != tuple(result.shape):
        raise InputError(
            f"the input {shape} is not the one that was explained: "
            f"({len(result.score)}, C, {', '.join(map(str, result.shape))})"
        )
    return x[item].detach().float().mean(0).cpu().numpy()
