"""Scan and CAM blended into one picture volume, for viewers that cannot lay one over the other.

    write_fused("fused.nii.gz", explanation)

The values of both are lost in it: it is for looking at, and nothing can be measured in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from seg3dcam.explaining.explanation import Explanation
from seg3dcam.files import as_path
from seg3dcam.files.writers.nifti import RGB, placed_header, write_slabs
from seg3dcam.files.writers.volumes import slabs
from seg3dcam.review.look import Look, choose_window, colours

__all__ = ["write_fused"]


def write_fused(
    path: str | os.PathLike[str],
    explanation: Explanation,
    look: Look = Look(),  # noqa: B008 (frozen)
    layer: str | None = None,
) -> Path:
    """Write scan and CAM as they look, in colour: an RGB24 `.nii` or `.nii.gz` on the scan's grid.

    Grey by the look's window; over it the CAM in the look's colours, see `Look.alpha`. Of a scan
    with several channels the first is shown. A CAM without heat (`Explanation.notice`) leaves the
    scan grey.

    Args:
        path: ends in .nii or .nii.gz.
        explanation: what `explain` returns.
        look: window, threshold, opacity and colours.
        layer: one layer's name; None averages all.

    Raises:
        OutputError: another suffix, a place that cannot be written.
        InputError: no such layer.
    """
    path, scan = as_path(path), explanation.scan
    header = placed_header(path, scan.shape, RGB, explanation.affine, scan.header)
    grey, cam = scan.data[0], explanation.volume(layer, scale=look.scale)
    low, high, _ = choose_window(grey.numpy(), look.window)
    table = colours(look.colormap).astype(np.float32)

    def pieces() -> Iterator[memoryview]:
        for scan_slab, cam_slab in zip(slabs(grey), slabs(cam), strict=True):
            level = np.clip((scan_slab - low) / (high - low), 0, 1) * 255
            rgb = blended(level, cam_slab, look, table)
            yield np.ascontiguousarray(rgb.transpose(2, 1, 0, 3)).data

    return write_slabs(path, header, pieces())


def blended(
    level: npt.NDArray[np.floating],
    cam: npt.NDArray[np.floating],
    look: Look,
    table: npt.NDArray[np.floating],
) -> npt.NDArray[np.uint8]:
    """Lay heat over grey.

    Args:
        level: grey in 0..255, (*S).
        cam: (*S) in [0, 1], of a signed look in [-1, 1].
        look: gives the heat's opacity.
        table: (256, 3), the heat's colours.

    Returns:
        (*S, 3), red, green and blue.

    >>> look = Look(threshold=0.2, opacity=0.5, colormap="gray")
    >>> table = colours("gray").astype(float)
    >>> blended(np.array([100.0, 100.0]), np.array([0.1, 1.0]), look, table)[:, 0].tolist()
    [100, 178]
    """
    picture = np.repeat(level.round().astype(np.uint8)[..., None], 3, -1)
    warm = look.strength(cam) >= look.threshold
    alpha = look.alpha(cam[warm])[:, None]
    heat = table[(look.level(cam[warm]) * 255).round().astype(np.uint8)]
    picture[warm] = (level[warm][:, None] * (1 - alpha) + heat * alpha).round()
    return picture
