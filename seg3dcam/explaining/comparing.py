"""Scans in, a comparison of layers and methods out: which of them may be trusted for a model?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seg3dcam.errors import TargetError
from seg3dcam.evaluate.comparing import compare
from seg3dcam.evaluate.comparison import Comparison
from seg3dcam.explaining.placement import Placement, place_scan
from seg3dcam.geometry import anatomical_axis
from seg3dcam.models.seg_model import SegModel
from seg3dcam.progress import Progress, silent
from seg3dcam.scan import Scan, load_scan


@dataclass(frozen=True, eq=False)
class ScanComparison:
    """A comparison on whole scans, with the slice through the structure of the first.

    Attributes:
        comparison: the candidates, ranked. The `kept` of each is its map at that slice, (X, Y, Z)
            of the network's grid with one voxel along the axis of the slices.
        scans: the scans, in the order of the comparison's inputs.
        model: the network.
        image: the scan at that slice, as the network sees it, shaped like the maps.
        mask: the predicted mask there.
        affine: (4, 4) voxel -> RAS mm of the network's grid.
    """

    comparison: Comparison
    scans: tuple[Scan, ...]
    model: SegModel
    image: NDArray[np.float32]
    mask: NDArray[np.bool_]
    affine: NDArray[np.float64]

    @property
    def class_name(self) -> str:
        """The class that is compared on."""
        return self.model.class_name(self.comparison.class_index)


def compare_scans(
    scans: Sequence[Scan | str | Path | Sequence[str | Path]],
    model: SegModel,
    target: str | int | None = None,
    *,
    layers: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> ScanComparison:
    """Rank layers and methods for a model by one scan or several.

    Args:
        scans: each is what `load_scan` takes.
        model: what `load_model` returns.
        target: a class name or index; None for the only class besides the background.
        layers, methods: see `seg3dcam.evaluate.compare`.
        progress: called with (step, done, total).
        settings: more arguments of `seg3dcam.evaluate.compare`.

    Raises:
        TargetError: no such class, or none was named where there are several.
        EmptyRegionError, EvaluationError, LayerError, ConfigError: see `seg3dcam.evaluate.compare`.
        ScanError, ModelError: see `explain`.
    """
    class_index = only_class(model) if target is None else model.class_index(target)
    report = progress or silent
    loaded = tuple(load_scan(scan) for scan in scans)
    placements = [place_scan(scan, model, report) for scan in loaded]
    found = compare(
        model.module,
        [placement.network_input for placement in placements],
        class_index,
        layers=layers,
        methods=methods,
        sliding_window=model.window,
        activation=model.activation,
        output=model.output,
        keep=partial(_slice, placements[0]),
        progress=progress,
        **settings,
    )
    first = placements[0]
    image = first.network_input.as_tensor()[0].float().mean(0)
    return ScanComparison(
        found,
        loaded,
        model,
        _slice(first, image, found.mask),
        _slice(first, found.mask, found.mask),
        first.affine,
    )


def only_class(model: SegModel) -> int:
    """Return the only class besides the background; TargetError where there are several."""
    background = model.activation == "softmax" and len(model.class_names) > 1
    classes = range(int(background), len(model.class_names))
    if len(classes) != 1:
        listed = ", ".join(f"{index} {model.class_names[index]}" for index in classes)
        raise TargetError(f"a comparison is about one class: name one with target, of {listed}")
    return classes[0]


def _slice(placement: Placement, values: torch.Tensor, mask: torch.Tensor) -> NDArray[Any]:
    """Return the axial slice of a volume (*S) with the most of the mask, one voxel thick."""
    axis = anatomical_axis(placement.affine, "axial")
    others = tuple(other for other in range(mask.ndim) if other != axis)
    index = int(mask.sum(others).argmax())
    found: NDArray[Any] = values.narrow(axis, index, 1).cpu().numpy()
    return found
