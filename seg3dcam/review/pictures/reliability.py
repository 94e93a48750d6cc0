"""Draw how true a network's probabilities are, before and after they were given a temperature."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from seg3dcam.explaining.calibration import Calibration
from seg3dcam.explaining.reliability import Reliability
from seg3dcam.files import printable, shortened
from seg3dcam.review.pictures.draw import Picture
from seg3dcam.review.pictures.frame import stack_rows
from seg3dcam.review.pictures.page import RESEARCH_ONLY, file_to_write, write_png
from seg3dcam.review.pictures.plots import DOTS_PER_INCH, LEGEND, PLAIN, rendered, style_panel
from seg3dcam.review.pictures.text import AMBER, MARGIN, text_block, wrap_items

#: Size in inches of a row of panels, and how many panels it has.
SIZE, COLUMNS = (9.0, 3.2), 3

#: So many classes are drawn; the table has all.
MOST = 12


def save_reliability(path: str | os.PathLike[str], found: Calibration) -> Path:
    """Save how often each class is there by its probability, as one PNG.

    Args:
        path: the file, ending in .png. Its folder is created if it is missing.
        found: from `calibrate`.

    Raises:
        ConfigError: the path does not end in .png.
        OutputError: the file cannot be written.
    """
    names = list(found.before)
    shown = names[:MOST]
    rows = [_drawn(found, shown[first : first + COLUMNS]) for first in range(0, MOST, COLUMNS)]
    width = round(SIZE[0] * DOTS_PER_INCH)
    last = [RESEARCH_ONLY]
    if len(names) > MOST:
        last.insert(0, f"and {len(names) - MOST} more classes, which the record lists")
    words = text_block([*wrap_items(last, width - 2 * MARGIN), ""], width, AMBER)
    picture = stack_rows([*(row for row in rows if row is not None), words])
    return write_png(file_to_write(path, ".png", "reliability's"), picture)


def _drawn(found: Calibration, names: list[str]) -> Picture | None:
    """Return a row of panels, one for each class; None without any."""
    if not names:
        return None
    figure = Figure(SIZE, DOTS_PER_INCH, facecolor="black")
    panels = figure.subplots(1, COLUMNS, sharey=True)
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.17, top=0.9, wspace=0.14)
    for panel, name in zip(panels, names, strict=False):
        _plot(panel, found, name)
    panels[0].set_ylabel("part that is of the class")
    for panel in panels:
        style_panel(panel)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    return rendered(figure)


def _plot(panel: Any, found: Calibration, name: str) -> None:
    panel.plot([0, 1], [0, 1], "--", color=PLAIN, linewidth=1)
    cold = f"temperature 1, ECE {found.before[name].ece:.3f}"
    warm = f"temperature {found.temperature:.2f}, ECE {found.after[name].ece:.3f}"
    _curve(panel, found.before[name], color="white", label=cold)
    _curve(panel, found.after[name], color="#7CFC9A", label=warm)
    panel.set_title(shortened(printable(name), 40), color="white", fontsize=9)
    panel.set_xlabel("probability")
    panel.set_xlim(0, 1)
    panel.set_ylim(0, 1.02)
    panel.legend(fontsize=7, loc="upper left", **LEGEND)


def _curve(panel: Any, one: Reliability, **style: Any) -> None:
    there = one.count > 0
    panel.plot(one.probability[there], one.frequency[there], ".-", **style)
