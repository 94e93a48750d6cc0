"""Feature maps of a scan: what the channels of a layer hold when the network sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seg3dcam.cams.feature_maps import FeatureMaps, feature_maps
from seg3dcam.explaining.explain import target_of_class
from seg3dcam.explaining.placement import place_scan
from seg3dcam.geometry import anatomical_axis
from seg3dcam.models.seg_model import SegModel
from seg3dcam.network.layers import LayerSpec
from seg3dcam.progress import Progress, silent
from seg3dcam.scan import Scan, load_scan
from seg3dcam.targets import placed


def features_of_scan(
    scan: Scan | str | Path | Sequence[str | Path] | torch.Tensor,
    model: SegModel,
    layer: LayerSpec = "auto",
    *,
    target: Any = None,
    index: int | None = None,
    axis: int | str = 0,
    progress: Progress | None = None,
) -> FeatureMaps:
    """Return what the channels of a layer hold when the network sees a scan.

    Args:
        scan: what `load_scan` takes.
        model: what `load_model` returns.
        target: a class name or index (its log-odds over the predicted mask), or a target, whose
            masks may be given as `Scan` on the scan's grid.
        axis: "axial", "coronal" or "sagittal": the axis of the array that the network sees along
            which the slices lie closest to this plane; or that axis's number.
        layer, index, progress: as for `feature_maps`.

    Raises:
        InputError: no such axis; and as `feature_maps`.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 1))
        >>> model = SegModel(network, class_names=("background", "liver"))
        >>> scan = load_scan(np.random.default_rng(0).random((6, 7, 8)), affine=np.eye(4))
        >>> features_of_scan(scan, model, "0", index=2).values.shape
        (2, 7, 8)
    """
    placement = place_scan(load_scan(scan), model, progress or silent)
    if isinstance(axis, str):
        axis = anatomical_axis(placement.affine, axis)  # type: ignore[arg-type]
    class_index = None
    if isinstance(target, str | int | np.integer):
        target = target_of_class(model, target)
        class_index = target.index
    if target is not None:
        target = placed(target, placement.mask_to_network)
    found = feature_maps(
        model.module,
        placement.network_input,
        layer,
        sliding_window=model.window,
        target=target,
        index=index,
        axis=axis,
        output=model.output,
        activation=model.activation,
        progress=progress,
    )
    if class_index is None or found.target is None:
        return found
    name = model.class_name(class_index)
    return replace(found, target=found.target.replace(f"class {class_index} ", f"{name} "))
