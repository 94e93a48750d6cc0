"""What all plots on black have in common: their resolution, how panels look, and their pixels."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from seg3dcam.review.pictures.draw import Picture

DOTS_PER_INCH = 100

#: The colour of what is beside the point.
PLAIN = "#9aa0a6"

#: How a legend looks.
LEGEND = {"facecolor": "black", "edgecolor": PLAIN, "labelcolor": "white"}


def rendered(figure: Figure) -> Picture:
    """Return a figure's pixels, (height, width, 3) uint8 in OpenCV's colour order."""
    for text in figure.findobj(Text):
        # Names of classes and layers may hold dollar signs, and are no formulas.
        text.set_parse_math(False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture: Picture = cv2.cvtColor(np.asarray(canvas.buffer_rgba()), cv2.COLOR_RGBA2BGR)
    return picture


def style_panel(panel: Any) -> None:
    """Make a panel light on black, like the other pictures."""
    panel.set_facecolor("black")
    panel.tick_params(colors="white", labelsize=8)
    for part in (panel.xaxis.label, panel.yaxis.label):
        part.set_color("white")
        part.set_fontsize(8)
    for spine in panel.spines.values():
        spine.set_color(PLAIN)
