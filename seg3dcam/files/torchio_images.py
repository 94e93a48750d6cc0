"""Voxels and affines of TorchIO's images and subjects, read without importing TorchIO."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from seg3dcam.errors import ScanError


def is_torchio(source: Any) -> bool:
    """Tell whether something is an image or a subject of TorchIO, by the module of its class."""
    return any(cls.__module__.partition(".")[0] == "torchio" for cls in type(source).__mro__)


def images_of(source: Any) -> dict[str, tuple[torch.Tensor, np.ndarray]]:
    """Return name -> (voxels (C, X, Y, Z), affine to RAS mm) of the images that are no label maps.

    Raises:
        ScanError: there is no such image.
    """
    if hasattr(source, "data") and hasattr(source, "affine"):
        images = {"scan": source}
    else:
        images = dict(source.get_images_dict(intensity_only=False))
    chosen = {name: image for name, image in images.items() if not _is_label_map(image)}
    if not chosen:
        raise ScanError(
            f"no ScalarImage to be explained, only label maps: {', '.join(images) or 'none at all'}"
        )
    return {
        name: (torch.as_tensor(image.data), np.asarray(image.affine, dtype=np.float64))
        for name, image in chosen.items()
    }


def _is_label_map(image: Any) -> bool:
    return any(cls.__name__ == "LabelMap" for cls in type(image).__mro__)
