"""A picture of every problem: its volume, and three maps of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from seg3dcam.cams.catalogue import ALL_METHODS

from .problems import PROBLEMS, as_input
from .score import loaded
from .tables import AUTO, ECHO

#: How the problems are called in the picture.
TITLES = {
    "remote_cue": "remote cue",
    "context": "contextual class",
    "shortcut": "shortcut",
    "absence": "evidence by absence",
    "side_by_side": "side by side",
}


def draw(figures: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write one row for every problem: the volume, the best map, that of "auto", and an echo.

    Everything is the largest value along the last axis, since object and evidence lie in different
    slices. Cyan is the prediction, green the evidence.

    Args:
        figures: problem -> the figures of its run.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(figures), 4, figsize=(9.5, 1.75 * len(figures)), layout="constrained", squeeze=False
    )
    for row, (name, of) in zip(axes, figures.items(), strict=True):
        problem, seed = PROBLEMS[name], of["seeds"][0]
        network, scene = loaded(problem), problem.scene(seed)
        x = as_input(scene.image)
        with torch.no_grad():
            mask = (network(x).argmax(1)[0] == problem.class_index).numpy().max(2)
        best = of["details"][0]
        pairs = [None, (best["method"], best["layer"]), AUTO, ECHO]
        for axis, pair in zip(row, pairs, strict=True):
            if pair is None:
                shown, title = np.abs(scene.image).max(2), TITLES[name]
                axis.imshow(shown.T, cmap="gray", vmin=0, vmax=1.8)
            else:
                values = _map(network, x, problem.class_index, pair).clip(0).max(2)
                title = " at ".join(pair) + (", auto" if pair == AUTO else "")
                axis.imshow(values.T, cmap="inferno", vmin=0, vmax=values.max() or 1)
            axis.contour(mask.T, [0.5], colors="cyan", linewidths=1)
            axis.contour(scene.evidence.max(2).T, [0.5], colors="lime", linewidths=1)
            axis.set_title(title, fontsize=8)
            axis.set_axis_off()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _map(network: torch.nn.Module, x: torch.Tensor, class_index: int, pair: Any) -> np.ndarray:
    method, layer = pair
    cam = ALL_METHODS[method]
    made = cam(network) if layer == "input" else cam(network, layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (values,) = made(x, class_index).maps.values()
    return values[0].numpy()
