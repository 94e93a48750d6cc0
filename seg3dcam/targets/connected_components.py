"""The connected components of a mask, numbered by size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage

from seg3dcam.errors import TargetError


def components(mask: torch.Tensor, connectivity: int = 1) -> tuple[torch.Tensor, list[int]]:
    """Number the connected components of one mask by size.

    Args:
        mask: (*S) bool.
        connectivity: along how many axes at once neighbours may differ; 1 joins across faces.

    Returns:
        Ranks (*S), int32 and on the CPU: 0 in the largest component, -1 outside of all; and the
        components' sizes in voxels, largest first. Of two equal ones the first in memory leads.

    Raises:
        TargetError: there is no such connectivity in so many axes.

    >>> components(torch.tensor([1, 0, 1, 1, 0, 1]).bool())
    (tensor([ 1, -1,  0,  0, -1,  2], dtype=torch.int32), [2, 1, 1])
    """
    axes = max(mask.ndim, 1)  # a classifier's one place is labelled as a line of one voxel
    if not 1 <= connectivity <= axes:
        raise TargetError(f"connectivity {connectivity}: legal with {axes} axes are 1 to {axes}")
    inside = np.atleast_1d(mask.cpu().numpy())
    where = _extent(inside)  # a lesion is small: the rest of the volume is not searched
    found, count = ndimage.label(
        inside[where], structure=ndimage.generate_binary_structure(axes, connectivity)
    )
    sizes = np.bincount(found.ravel(), minlength=count + 1)[1:]
    order = np.argsort(-sizes, kind="stable")
    rank_of = np.full(count + 1, -1, dtype=np.int32)
    rank_of[order + 1] = np.arange(count, dtype=np.int32)
    ranks = np.full(inside.shape, -1, dtype=np.int32)
    ranks[where] = rank_of[found]
    return torch.from_numpy(ranks.reshape(mask.shape)), sizes[order].tolist()


def listed_sizes(sizes: Sequence[int]) -> str:
    """Say how many components there are, and how large.

    >>> listed_sizes([7, 2])
    '2 components of 7, 2 voxels'
    """
    shown = ", ".join(map(str, sizes[:10])) + (", ..." if len(sizes) > 10 else "")
    return f"{len(sizes)} component{'s' * (len(sizes) != 1)} of {shown} voxels"


def _extent(mask: np.ndarray) -> tuple[slice, ...]:
    """Return the smallest box around what is true in a mask."""
    where = []
    for axis in range(mask.ndim):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        filled = np.flatnonzero(mask.any(axis=others))
        where.append(slice(filled[0], filled[-1] + 1) if len(filled) else slice(0, 0))
    return tuple(where)
