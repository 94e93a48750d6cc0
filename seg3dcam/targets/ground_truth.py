"""Where a class really is: one class's mask out of a label map on the scan's grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from seg3dcam.errors import TargetError
from seg3dcam.geometry import SAME_GRID_VOXELS, same_grid
from seg3dcam.scan import Scan
from seg3dcam.targets.masks import check_labels


def check_on_grid(what: str, shape: Sequence[int], affine: np.ndarray, scan: Scan) -> None:
    """Refuse a mask that does not lie on the scan's grid.

    Raises:
        TargetError: what differs.
    """
    if tuple(shape) != tuple(scan.shape):
        raise TargetError(
            f"the {what} has {tuple(shape)} voxels, the scan {tuple(scan.shape)}: they must lie "
            f"on the same grid. Resample the {what} to the scan"
        )
    within_mm = min(scan.spacing) * SAME_GRID_VOXELS
    if not same_grid(affine, scan.affine, scan.shape, within_mm=within_mm):
        raise TargetError(
            f"the {what} has the scan's shape but lies elsewhere in the patient: its affine is\n"
            f"{affine}\nand the scan's\n{scan.affine}\nResample the {what} to the scan"
        )


def truth_mask(
    labels: torch.Tensor,
    label: int | None,
    *,
    class_index: int,
    class_names: Sequence[str],
    background: bool,
) -> torch.Tensor:
    """Return where a label map shows a class, bool.

    Args:
        labels: whole numbers, as `load_labels` reads them.
        label: the class's label; None: the class's index, where the network has a background
            class; 1, where it has one class alone.
        class_index: of the network's class.
        class_names: of the network.
        background: whether class 0 of the network is the background (softmax).

    Raises:
        TargetError: the label is not known for certain, with the labels that were found; or the
            map holds anything but whole numbers.

    >>> lesion = {"class_index": 1, "class_names": ["background", "lesion"], "background": True}
    >>> truth_mask(torch.tensor([0, 1, 1]), None, **lesion).tolist()
    [False, True, True]
    >>> truth_mask(torch.tensor([0, 255]), None, **lesion)
    Traceback (most recent call last):
        ...
    seg3dcam.errors.TargetError: the truth holds label 255, and the network has the classes 0 to 1.
    Say with label (--label) which is that of 'lesion'
    """
    check_labels(labels)
    runs = labels.flatten().unique_consecutive()  # few: all voxels take seconds to sort
    found = {int(value) for value in runs.unique().tolist()} - {0}
    name = class_names[class_index]
    if label is not None:
        wanted, legal = label, {label}
        among = f"none of them is {label}"
    elif background:
        wanted, legal = class_index, set(range(len(class_names)))
        among = f"the network has the classes 0 to {len(class_names) - 1}"
    else:
        wanted, legal = 1, {1} if len(class_names) == 1 else set()
        among = "the channels of a sigmoid output are no labels"
    # A class that is absent from this scan's truth is no error; labels of another scheme are.
    if found and not found <= legal and not (label is not None and label in found):
        listed = ", ".join(str(value) for value in sorted(found)[:12])
        raise TargetError(
            f"the truth holds label{'s' * (len(found) > 1)} {listed}, and {among}.\n"
            f"Say with label (--label) which is that of {name!r}"
        )
    return labels == wanted
