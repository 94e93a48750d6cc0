"""Draw a comparison of layers and methods: curves of context deletion, and a panel of all maps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from seg3dcam.evaluate.comparison import Candidate, Comparison
from seg3dcam.explaining.comparing import ScanComparison
from seg3dcam.files import printable, shortened
from seg3dcam.review.pictures import display
from seg3dcam.review.pictures.draw import Picture
from seg3dcam.review.pictures.frame import stack_rows
from seg3dcam.review.pictures.page import RESEARCH_ONLY, file_to_write, write_png
from seg3dcam.review.pictures.plots import DOTS_PER_INCH, LEGEND, rendered, style_panel
from seg3dcam.review.pictures.text import AMBER, MARGIN, WHITE, text_block, wrap_items

#: Size in inches of the curves, and of a map with its title; and the narrowest figure.
CURVES, CELL, NARROWEST = (7.0, 4.0), 1.7, 9.0

#: So many random maps are drawn at most.
MOST_RANDOM = 60

#: The order in which layers run.
RUN = ("early", "encoder", "bottleneck", "middle", "decoder", "late", "")

BEST = "#7CFC9A"


def save_comparison(path: str | os.PathLike[str], found: ScanComparison) -> Path:
    """Save the curves of the best candidates, and the maps of all at one slice, as one PNG.

    Args:
        path: the file, ending in .png. Its folder is created if it is missing.
        found: from `compare_scans`.

    Raises:
        ConfigError: the path does not end in .png.
        OutputError: the file cannot be written.
    """
    return write_png(file_to_write(path, ".png", "comparison's"), draw_comparison(found))


def draw_comparison(found: ScanComparison) -> Picture:
    """Draw title, curves and maps, (height, width, 3) uint8 in OpenCV's colour order."""
    body = rendered(plot_comparison(found))
    width = body.shape[1]
    words = printable(f"{found.class_name}: {found.comparison.words}")
    title = text_block(wrap_items([words], width - 2 * MARGIN), width, WHITE)
    note = (
        "maps of the first scan at the axial slice with most of the mask; only evidence for the "
        "class, each map on its own scale; the line is the mask"
    )
    last = [*wrap_items([note, RESEARCH_ONLY], width - 2 * MARGIN), ""]
    return stack_rows([title, body, text_block(last, width, AMBER)])


def plot_comparison(found: ScanComparison) -> Figure:
    """Plot the curves, and below them a row of maps for each layer."""
    layers, methods = _layers(found.comparison), _methods(found.comparison)
    width = max(NARROWEST, CELL * len(methods) + 1.5)
    height = CELL * len(layers)
    figure = Figure((width, CURVES[1] + height), DOTS_PER_INCH, facecolor="black")
    top, below = cast(Any, figure.subfigures(2, 1, height_ratios=[CURVES[1], height]))
    _plot_curves(top, found.comparison)
    _plot_maps(below, found, layers, methods)
    return figure


def _layers(comparison: Comparison) -> list[tuple[str, str]]:
    """Return the layers and their roles, in the order in which they run.

    Suggested levels come coarse to fine, and encoders run from fine to coarse.
    """
    given = dict.fromkeys((c.layer, c.role) for c in _as_given(comparison))
    ordered: list[tuple[str, str]] = []
    for role in RUN:
        of_role = [one for one in given if one[1] == role]
        ordered += of_role[::-1] if role in ("early", "encoder") else of_role
    return ordered


def _methods(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(c.method for c in _as_given(comparison)))


def _as_given(comparison: Comparison) -> list[Candidate]:
    """Return the candidates in the order in which they were named."""
    place = {key: number for number, key in enumerate(comparison.order)}
    return sorted(comparison.candidates, key=lambda one: place[one.layer, one.method])


# ------------------------------------------------------------------------------------- curves


def _plot_curves(figure: SubFigure, comparison: Comparison) -> None:
    """Plot the best candidates on the first input that counts, the mask alone and random maps."""
    panel = figure.subplots(1, 1)
    figure.subplots_adjust(left=0.08, right=0.55, bottom=0.15, top=0.95)
    figure.set_facecolor("black")
    style_panel(panel)
    for number, (fractions, dice) in enumerate(comparison.random_points[:MOST_RANDOM]):
        label = "random maps, where measured" if number == 0 else None
        panel.plot(fractions, dice, color="#555555", linewidth=0.6, label=label)
    if comparison.mask_curve is not None:
        area = comparison.controls["mask alone"]
        panel.plot(
            *comparison.mask_curve, color="white", linestyle="--", label=f"mask alone {area:.2f}"
        )
    whole = [one for one in comparison.candidates if one.curves]
    for number, one in enumerate(whole):
        colour = BEST if one.won else f"C{number}"
        label = f"{_short(one.layer, 28)}, {one.method} {one.worth:.2f}"
        panel.plot(*one.curves[0], color=colour, linewidth=2 if one.won else 1, label=label)
    panel.set_xlim(0, 1)
    panel.set_ylim(0, 1.02)
    panel.set_xlabel("fraction of the blocks around the mask that are deleted")
    panel.set_ylabel("Dice of the class with its prediction")
    handles = panel.get_legend_handles_labels()[0]
    if handles:
        panel.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), fontsize=8, **LEGEND)


# --------------------------------------------------------------------------------------- maps


def _plot_maps(
    figure: SubFigure, found: ScanComparison, layers: list[tuple[str, str]], methods: list[str]
) -> None:
    panels = figure.subplots(len(layers), len(methods), squeeze=False)
    figure.set_facecolor("black")
    figure.subplots_adjust(left=0.13, right=0.99, bottom=0.02, top=0.95, wspace=0.05, hspace=0.3)
    view = display.plan_view(found.image.shape, found.affine, "axial")
    image, mask = (display.cut(view, volume, 0) for volume in (found.image, found.mask))
    high, wide = display.spacing_mm(view)
    of_key = {(one.layer, one.method): one for one in found.comparison.candidates}
    for row, (layer, role) in zip(panels, layers, strict=True):
        row[0].set_ylabel(f"{_short(layer, 20)}\n{role}", color="white", fontsize=7)
        for panel, method in zip(row, methods, strict=True):
            one = of_key.get((layer, method))
            style_panel(panel)
            panel.set_xticks([])
            panel.set_yticks([])
            panel.imshow(image, cmap="gray", aspect=high / wide, interpolation="nearest")
            if mask.any() and not mask.all():
                panel.contour(mask, [0.5], colors="cyan", linewidths=0.7)
            if one is not None:
                _plot_map(panel, one, view, high / wide)


def _plot_map(panel: Any, one: Candidate, view: display.View, aspect: float) -> None:
    """Draw what speaks for the class over the scan, and write what it is worth."""
    if one.kept is not None:
        heat = np.clip(display.cut(view, one.kept, 0).astype(np.float64), 0, None)
        if heat.max() > 0:
            heat = heat / heat.max()
        drawn: NDArray[Any] = np.ma.masked_less(heat, 0.05)
        panel.imshow(
            drawn, cmap="inferno", vmin=0, vmax=1, alpha=0.6, aspect=aspect, interpolation="nearest"
        )
    words = one.status if one.area is None else f"{one.area:.2f}"
    colour = BEST if one.won else "white"
    panel.set_title(f"{one.method} {words}", fontsize=7, color=colour, pad=2)
    if one.won:
        for spine in panel.spines.values():
            spine.set(color=BEST, linewidth=2.5)


def _short(name: str, most: int) -> str:
    return shortened(printable(name), most)
