"""Where scan and network lie to each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

from seg3dcam.geometry import ras_affine, resample_labels
from seg3dcam.scan import Scan
from seg3dcam.targets.ground_truth import check_on_grid


def on_network_grid(mask: Any, scan: Scan, prepared: MetaTensor) -> torch.Tensor:
    """Bring a mask on the scan's grid to the one that the network saw."""
    data = torch.as_tensor(mask.data, device="cpu")
    affine = np.asarray(mask.affine, dtype=np.float64)
    if isinstance(mask, MetaTensor):
        data, affine = mask.as_tensor(), ras_affine(affine, mask.meta.get("space"))
    if data.ndim == len(scan.shape) + 1 and len(data) == 1:
        data = data[0]
    check_on_grid("mask", data.shape, affine, scan)
    to_affine = prepared.affine.numpy().astype(np.float64)
    return resample_labels(data, scan.affine, to_affine, prepared.shape[1:])
