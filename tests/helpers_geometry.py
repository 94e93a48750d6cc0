"""Oblique affines, and fields that are linear in the patient's coordinates."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import torch


def rotation(*degrees: float) -> np.ndarray:
    """Return a 4x4 rotation about x, then y, then z."""
    matrix = np.eye(4)
    for axis, angle in enumerate(np.radians(degrees)):
        turn = np.eye(4)
        a, b = [i for i in range(3) if i != axis]
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def world_field(affine: np.ndarray, shape: tuple[int, ...], axis: int) -> torch.Tensor:
    """Return the RAS coordinate along `axis`, in mm, of every voxel."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return torch.as_tensor(nib.affines.apply_affine(affine, index)[..., axis])


OBLIQUE_LAS = rotation(12, -7, 20) @ np.diag([-0.8, 0.8, 2.5, 1.0])
OBLIQUE_LAS[:3, 3] = [71, -120, 33]
