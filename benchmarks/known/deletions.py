"""Training volumes of which parts are deleted, as the measurement of context deletion does it.

A network that never saw a deleted region may answer anything there, and often draws the class that
is left when nothing speaks against it. Then deletion says nothing about what was planted. So half
of the volumes of such a problem are trained on with blocks deleted: the class stays if other blocks
are, and goes with its evidence.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy import ndimage

from .volumes import SHAPE, Mask, Scene, nothing

#: Voxels of a block, and those around the object that are never deleted.
BLOCK, MARGIN = 4, 2

#: Width of the blur, in voxels.
BLUR = 4


def with_deletions(random: np.random.Generator, scene: Scene, power: float) -> Scene:
    """Return a scene with blocks deleted by its mean or by a blur, the evidence in half of them.

    The blocks of the evidence are deleted together. Without it the object is of the class that it
    has in the changed volume. What is deleted is background, another object too.

    Args:
        power: the larger it is, the more often few of the blocks without evidence are deleted.
    """
    objects = scene.objects.get("first", scene.labels > 0)
    kept = ndimage.binary_dilation(objects, np.ones((2 * MARGIN + 1,) * 3))
    evidence = _blocks_of(scene.evidence)
    goes = bool(random.random() < 0.5)
    blocks = random.random([size // BLOCK for size in SHAPE])
    # Now and then all of them are deleted.
    drawn = blocks < 1.25 * random.uniform(0, 1) ** power
    deleted = (_whole(np.where(evidence, goes, drawn))) & ~kept
    blurred = random.random() < 0.5
    flat = ndimage.gaussian_filter(scene.image, BLUR) if blurred else scene.image.mean()
    labels, reach = scene.labels, scene.reach
    if goes and (labels == 1).any():
        labels, reach = scene.changed_labels, nothing() if reach.any() else ~nothing()
    return replace(
        scene,
        image=np.where(deleted, flat, scene.image),
        labels=np.where(deleted, 0, labels),
        reach=reach,
    )


def _blocks_of(mask: Mask) -> Mask:
    """Return the blocks that a mask (*S) meets, one value for each block."""
    sizes = [n for size in SHAPE for n in (size // BLOCK, BLOCK)]
    return mask.reshape(sizes).any((1, 3, 5))


def _whole(blocks: Mask) -> Mask:
    """Return the voxels (*S) of blocks."""
    return np.kron(blocks, np.ones((BLOCK,) * 3, dtype=bool)).astype(bool)
