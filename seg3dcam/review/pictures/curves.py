"""Draw the curves of an evaluation: Dice while parts of the input are deleted or inserted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from seg3dcam.explaining.evaluating import MapEvaluation
from seg3dcam.files import printable, shortened
from seg3dcam.review.pictures.draw import Picture
from seg3dcam.review.pictures.frame import stack_rows
from seg3dcam.review.pictures.page import RESEARCH_ONLY, file_to_write, write_png
from seg3dcam.review.pictures.plots import DOTS_PER_INCH, LEGEND, rendered, style_panel
from seg3dcam.review.pictures.text import AMBER, MARGIN, WHITE, text_block, wrap_items

#: Size in inches of the curves of one map.
SIZE = (9.0, 3.2)

#: So many maps are drawn; the table has all.
MOST = 12

#: Panel -> what is said below it, and the curve of the mask alone.
_PANELS = {
    "context deletion": "of the blocks around the mask deleted",
    "deletion": "of all blocks deleted",
    "insertion": "of all blocks inserted",
}


def save_curves(path: str | os.PathLike[str], found: Sequence[MapEvaluation]) -> Path:
    """Save the curves of every map as one PNG, a row for each.

    Args:
        path: the file, ending in .png. Its folder is created if it is missing.
        found: from `evaluate_scan`.

    Raises:
        ConfigError: the path does not end in .png.
        OutputError: the file cannot be written.
    """
    width = round(SIZE[0] * DOTS_PER_INCH)
    rows = []
    for one in found[:MOST]:
        name = shortened(printable(one.layer), 40)
        words = [f"{printable(one.class_name)}, {one.method}, {name}: {one.verdict.words}"]
        rows.append(text_block(wrap_items(words, width - 2 * MARGIN), width, WHITE))
        rows.append(_drawn(one))
    last = [RESEARCH_ONLY]
    if len(found) > MOST:
        last.insert(0, f"and {len(found) - MOST} more maps, which the table lists")
    rows.append(text_block([*wrap_items(last, width - 2 * MARGIN), ""], width, AMBER))
    return write_png(file_to_write(path, ".png", "curves'"), stack_rows(rows))


def _drawn(one: MapEvaluation) -> Picture:
    figure = Figure(SIZE, DOTS_PER_INCH, facecolor="black")
    panels = figure.subplots(1, len(_PANELS), sharey=True)
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.17, top=0.9, wspace=0.14)
    for panel, (name, below) in zip(panels, _PANELS.items(), strict=True):
        _plot(panel, one, name)
        panel.set_xlabel(f"fraction {below}")
    panels[0].set_ylabel("Dice with its prediction")
    for panel in panels:
        style_panel(panel)
    return rendered(figure)


def _plot(panel: Any, one: MapEvaluation, name: str) -> None:
    """Plot the curve of a map, and that of the mask alone where it is known."""
    lines = {"this map": (name, "-"), "mask alone": (f"{name} by the mask alone", "--")}
    for label, (curve_name, line) in lines.items():
        if (curve := one.curves.get(curve_name)) is not None:
            colour = "#7CFC9A" if line == "-" else "white"
            label = f"{label} {curve.auc:.2f}"
            panel.plot(curve.fractions, curve.dice, line, color=colour, label=label)
    panel.set_title(name, color="white", fontsize=9)
    panel.set_xlim(0, 1)
    panel.set_ylim(0, 1.02)
    handles = panel.get_legend_handles_labels()[0]
    if handles:
        panel.legend(fontsize=8, **LEGEND)
    else:
        panel.text(0.5, 0.5, "undefined", color="white", ha="center", transform=panel.transAxes)
