"""Cut a volume into blocks or supervoxels, and order them by a map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from seg3dcam.errors import EvaluationError, MissingExtraError

#: Fewer segments than this make a curve of a few large steps, whose area says little.
FEWEST = 20

#: Means that differ by less than this fraction of the largest one differ by rounding alone.
_ROUNDING = 1e-9


def grid_blocks(shape: Sequence[int], block: int | Sequence[int]) -> NDArray[np.int64]:
    """Return the number of each voxel's block, (*S): blocks of `block` voxels along every axis.

    The blocks begin at the first voxel; the last ones may be smaller.

    >>> grid_blocks((3, 4), 2)
    array([[0, 0, 1, 1],
           [0, 0, 1, 1],
           [2, 2, 3, 3]])
    """
    sizes = list(block) if isinstance(block, Sequence) else [block] * len(shape)
    number = np.zeros((1,) * len(shape), dtype=np.int64)
    for axis, (length, size) in enumerate(zip(shape, sizes, strict=True)):
        index = np.arange(length) // size
        lines = index.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        number = number * (index[-1] + 1) + lines
    return number


def supervoxels(
    x: torch.Tensor, count: int = 500, *, spacing: Sequence[float] | None = None
) -> NDArray[np.int64]:
    """Return the number of each voxel's SLIC supervoxel, (*S).

    Args:
        x: (1, C, *S); each channel is scaled to a range of 1 first.
        count: about so many supervoxels.
        spacing: mm from voxel to voxel along every axis, so that supervoxels are as wide as long.

    Raises:
        MissingExtraError: scikit-image is not installed.

    Source: Achanta et al., SLIC superpixels (TPAMI 2012); scikit-image.
    """
    try:
        from skimage.segmentation import slic
    except ImportError as error:
        raise MissingExtraError(
            "supervoxels need scikit-image: pip install 'seg3dcam[evaluate]'"
        ) from error
    image = np.moveaxis(x[0].cpu().double().numpy(), 0, -1)
    low, high = image.min(), image.max()
    image = (image - low) / (high - low) if high > low else image * 0
    found = slic(
        image, n_segments=count, compactness=0.1, spacing=spacing, channel_axis=-1, start_label=0
    )
    return np.unique(found, return_inverse=True)[1].reshape(found.shape)


def grown(mask: NDArray[np.bool_], margin: int) -> NDArray[np.bool_]:
    """Return a mask grown by `margin` voxels along every axis, corners included (a cube).

    >>> grown(np.array([0, 0, 0, 1, 0, 0, 0], bool), 2).astype(int)
    array([0, 1, 1, 1, 1, 1, 0])
    """
    return ndimage.maximum_filter(mask, 2 * margin + 1, mode="constant", cval=0)


def segments_outside(
    segments: NDArray[np.int64], mask: NDArray[np.bool_] | None
) -> NDArray[np.int64]:
    """Return the numbers of the segments of which no voxel lies in a mask (None: all segments).

    Raises:
        EvaluationError: there are fewer than `FEWEST`.
    """
    count = int(segments.max()) + 1
    met = np.zeros(count, dtype=bool)
    if mask is not None:
        met[segments[mask]] = True
    free = np.flatnonzero(~met)
    if len(free) < FEWEST:
        where = "" if mask is None else " outside of the grown mask"
        raise EvaluationError(
            f"undefined: there are {len(free)} blocks{where}, of {count} in all, and a curve needs "
            f"{FEWEST} or more; give smaller blocks" + (", or a smaller margin" if where else "")
        )
    return free


def ordered(
    values: NDArray[np.floating], segments: NDArray[np.int64], which: NDArray[np.int64], seed: int
) -> NDArray[np.int64]:
    """Return segments by their mean value, the highest first; the seed decides between equals.

    So a constant map orders them at random.

    >>> line = np.arange(4)
    >>> ordered(np.array([1.0, 5, 0, 9]), line, line, seed=0)
    array([3, 1, 0, 2])
    """
    flat = segments.reshape(-1)
    sums = np.bincount(flat, np.asarray(values, dtype=np.float64).reshape(-1))
    means = (sums / np.bincount(flat))[which]
    if largest := np.abs(means).max():
        means = np.round(means / (largest * _ROUNDING))
    drawn = np.random.default_rng(seed).permutation(len(which))
    return which[drawn[np.argsort(-means[drawn], kind="stable")]]
