"""Plot the CAM and the volumes of the masks slice by slice, along the axis of the slices."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from seg3dcam.review.pictures import display
from seg3dcam.review.pictures.draw import LINES, Colour, Picture
from seg3dcam.review.pictures.frame import stack_rows
from seg3dcam.review.pictures.page import build_page, file_to_write, write_png
from seg3dcam.review.pictures.plots import DOTS_PER_INCH, rendered
from seg3dcam.review.pictures.text import AMBER, GREY, MARGIN, WHITE, text_block, wrap_items
from seg3dcam.review.plan import Review

INCHES = (11.0, 5.5)
FEW = 60  # each of up to so many slices gets a dot


def save_profile(path: str | os.PathLike[str], review: Review) -> Path:
    """Save the CAM's maximum and sum, and the volume of the masks, for every slice, as one PNG.

    Args:
        path: the file, ending in .png. Its folder is created if it is missing.
        review: from `review_explanation` or `review_volumes`. The curves follow its axis.

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
        ...     save_profile(folder + "/z.png", review_volumes(volume, volume, np.eye(4))).name
        'z.png'
    """
    file = file_to_write(path, ".png", "profile's")
    return write_png(file, draw_profile(review))


def draw_profile(review: Review) -> Picture:
    """Draw the curves with title and footer, (height, width, 3) uint8 in OpenCV's colour order."""
    curves = rendered(plot_profile(review))
    if review.notice:
        width = curves.shape[1]
        words = text_block(wrap_items([review.notice], width - 2 * MARGIN), width, AMBER)
        curves = stack_rows([words, curves])
    return build_page(review, curves)


def plot_profile(review: Review) -> Figure:
    """Plot the CAM, and below it the volumes, if there are masks."""
    figure = Figure(INCHES, DOTS_PER_INCH, facecolor="black", layout="constrained")
    panels = figure.subplots(2 if review.masks else 1, 1, sharex=True, squeeze=False)[:, 0].tolist()
    for panel in panels:
        _style(panel)
        if review.peak_slice is not None:
            panel.axvline(review.peak_slice, color=_hex(AMBER), linewidth=1, label="peak slice")
    _plot_cam(panels[0], review)
    if review.masks:
        _plot_volumes(panels[1], review)
    _label_slices(panels, review)
    return figure


def _plot_cam(panel: Any, review: Review) -> None:
    """Plot the largest value of each slice and, on a second scale, its share of the sum."""
    panel.set_ylim(0, 1.05)
    panel.set_ylabel("CAM max in slice")
    panel.axhline(review.look.threshold, color=_hex(GREY), linestyle=":", label="threshold")
    right = panel.twinx()
    _style(right)
    right.set_ylabel("share of the CAM's sum, %")
    largest, total = review.profile.largest, review.profile.total
    if largest is not None and total is not None:
        share = 100 * total / total.sum()
        dot = _dot(largest)
        panel.plot(largest, color="#ff9a4d", marker=dot, label="CAM max")
        if review.profile.lowest is not None:
            _plot_against(panel, review, review.profile.lowest)
        right.plot(share, color="#b48cff", linestyle="--", marker=dot, label="share of the sum")
        right.set_ylim(0, 1.05 * share.max())
    lines = [
        line
        for line in (*panel.get_lines(), *right.get_lines())
        if not str(line.get_label()).startswith("_")
    ]
    frame = {"facecolor": "black", "edgecolor": _hex(GREY), "labelcolor": _hex(WHITE)}
    right.legend(handles=lines, **frame)  # these axes are drawn last, so no line crosses the legend


def _plot_against(panel: Any, review: Review, lowest: np.ndarray) -> None:
    """Add the lowest values of a signed CAM, and a line at zero."""
    panel.set_ylim(-1.05, 1.05)
    panel.set_ylabel("against    CAM    for")
    panel.axhline(-review.look.threshold, color=_hex(GREY), linestyle=":")
    panel.axhline(0, color=_hex(GREY), linewidth=0.8)
    panel.plot(lowest, color="#52a6fa", marker=_dot(lowest), label="CAM min")


def _plot_volumes(panel: Any, review: Review) -> None:
    for name, ml in review.profile.volumes.items():
        line = LINES[name]
        style = "--" if line.gap else "-"
        panel.plot(ml, color=_hex(line.colour), linestyle=style, marker=_dot(ml), label=name)
    panel.set_ylim(bottom=0)
    panel.set_ylabel("ml per slice")  # the legend of the page explains the lines


def _label_slices(panels: Sequence[Any], review: Review) -> None:
    """Label the slices with their indices below, and with their positions in mm above."""
    view = review.view
    edges = (-0.5, view.slice_count - 0.5)
    panels[-1].set_xlim(*edges)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlabel(f"{view.axis} slice, voxel index {view.index_name}")
    top = panels[0].twiny()
    _style(top)
    top.set_xlim(*(display.position_mm(view, edge) for edge in edges))  # the positions may decrease
    top.set_xlabel(f"mm towards {display.PLANES[view.axis].across}")


def _style(panel: Any) -> None:
    """Make a panel light on black, like the other pictures."""
    panel.set_facecolor("black")
    panel.tick_params(colors=_hex(WHITE))
    for part in (panel.xaxis.label, panel.yaxis.label):
        part.set_color(_hex(WHITE))
    for spine in panel.spines.values():
        spine.set_color(_hex(GREY))


def _dot(values: np.ndarray) -> str:
    return "." if len(values) <= FEW else ""


def _hex(colour: Colour) -> str:
    blue, green, red = colour
    return f"#{red:02x}{green:02x}{blue:02x}"
