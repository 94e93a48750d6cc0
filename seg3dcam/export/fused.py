"""Blend scan and CAM into one volume of colours, for viewers that cannot overlay two volumes.

    write_fused("fused.nii.gz", explanation)

The values of both are lost, so it is meant for viewing and not for measuring.
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
    """Write the scan with the CAM over it in colours, as RGB24 in a `.nii` or `.nii.gz`.

    The scan is grey, in the look's window. The CAM has the look's colours and opacity, see
    `Look.alpha`. The grid is that of the scan, of which the first channel is shown. A CAM without
    heat (`Explanation.notice`) leaves the scan grey.

    Args:
        path: the file, ending in .nii or .nii.gz.
        explanation: what `explain` returns.
        look: window, threshold, opacity and colours.
        layer: name of a layer; None averages all layers.

    Raises:
        OutputError: the path has another suffix, or the file cannot be written.
        InputError: there is no such layer.
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
    """Draw heat over grey values.

    Args:
        level: (*S), grey values in 0..255.
        cam: (*S) in [0, 1], or in [-1, 1] for a signed look.
        look: gives threshold and opacity.
        table: (256, 3), the colours of the heat.

    Returns:
        (*S, 3) red, green and blue.

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
