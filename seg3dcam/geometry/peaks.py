"""The voxel where a volume is highest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def peak_voxel(volume: np.ndarray | torch.Tensor) -> tuple[int, ...]:
    """Return the voxel with the highest value, or the middle of neighbours that are equally high.

    >>> volume = np.zeros((5, 5, 2))
    >>> volume[1:4, 1:4, 1] = 1
    >>> peak_voxel(volume)
    (2, 2, 1)
    """
    values = np.asarray(volume)
    first = np.unravel_index(int(values.argmax()), values.shape)
    return plateau_middle(values, [int(i) for i in first])


def plateau_middle(values: np.ndarray, voxel: Sequence[int]) -> tuple[int, ...]:
    """Move from a voxel to the middle of its equally high neighbours, one axis after another."""
    place = list(voxel)
    for axis, at in enumerate(voxel):
        line = values[tuple(slice(None) if n == axis else i for n, i in enumerate(place))]
        others = np.flatnonzero(line != line[at])
        after = int(np.searchsorted(others, at))
        start = int(others[after - 1]) + 1 if after else 0
        stop = int(others[after]) if after < len(others) else len(line)
        place[axis] = (start + stop - 1) // 2
    return tuple(place)
