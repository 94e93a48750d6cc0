"""Regions where the prediction and the ground truth agree, or where they differ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from seg3dcam.errors import TargetError
from seg3dcam.targets.arguments import check_whole
from seg3dcam.targets.masks import Mask, Move, OnItsGrid, check_labels, labels, placed_mask
from seg3dcam.targets.regions import Prediction, RegionKind


@dataclass(frozen=True, eq=False)
class TruthComparison(RegionKind):
    """The prediction compared with ground truth.

    Args:
        truth: whole numbers, where a voxel of the class holds the class's index; or a boolean
            mask of the class. (*S), (B, *S) or (B, 1, *S) on the network's grid, or a `Scan` on
            its own, which `explain` brings there.
        label: the number of the class in `truth`, where it is not the class's index. A sigmoid
            output has no background channel, so its indices are not labels, and `label` is needed;
            except for one channel and a truth of 0 and 1.

    Labels leak into a map over such a region (`uses_truth`): it cannot serve as evidence that the
    model looks in the right place.
    """

    truth: Mask
    label: int | None = None

    uses_truth = True
    follows_prediction = True
    title: ClassVar[str]

    def __post_init__(self) -> None:
        if not isinstance(self.truth, torch.Tensor | np.ndarray | OnItsGrid):
            raise TargetError(
                f"truth {self.truth!r}: legal are a label map or boolean mask as tensor or array, "
                "or a Scan"
            )
        if self.label is not None:
            check_whole("label", self.label)

    def compared(self, truth: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        """Return the region of two boolean masks."""
        raise NotImplementedError

    def masks(self, prediction: Prediction) -> torch.Tensor:
        predicted = prediction.mask()
        return self.compared(self._is_class(prediction).to(predicted.device), predicted)

    def _is_class(self, prediction: Prediction) -> torch.Tensor:
        """Return where the truth is the target's class, (B, *S) bool."""
        truth = labels(self.truth, prediction.grid)
        if truth.dtype == torch.bool:
            if self.label is not None:
                raise TargetError(
                    f"label {self.label} of a truth that is a boolean mask: a mask has no labels. "
                    "Leave label out, or give a label map"
                )
            return truth
        if self.label is None and prediction.index is None:
            return truth != 0  # any foreground
        return truth.eq(self._label(truth, prediction))

    def _label(self, truth: torch.Tensor, prediction: Prediction) -> int:
        if self.label is not None:
            return self.label
        if prediction.index is not None and not prediction.overlapping:
            return prediction.index
        if prediction.logits.shape[1] == 1 and ((truth == 0) | (truth == 1)).all():
            return 1
        raise TargetError(
            f"channel {prediction.index} of a sigmoid output need not be label {prediction.index} "
            f"of the truth, which holds {_listed_labels(truth)}. Name the label, as in label=1, or "
            "give a boolean mask of the class"
        )

    def placed(self, move: Move) -> TruthComparison:
        if isinstance(self.truth, OnItsGrid):  # here, since a coarser grid may miss a fraction
            check_labels(torch.as_tensor(self.truth.data, device="cpu"))
        return replace(self, truth=placed_mask(self.truth, move))

    def instead(self, prediction: Prediction, item: int) -> str:
        truth, predicted = self._is_class(prediction)[item].cpu(), prediction.mask()[item].cpu()
        what = "foreground" if prediction.index is None else f"class {prediction.index}"
        return (
            f"The truth has {what} in {int(truth.sum())} voxels and the network predicts it in "
            f"{int(predicted.sum())}, {int((truth & predicted).sum())} of them in common. The "
            f"truth holds {_listed_labels(labels(self.truth, prediction.grid)[item])}. "
            f"{prediction.described(item)}. If the file has another number for the class, give "
            "label="
        )

    def __str__(self) -> str:
        return self.title + ("" if self.label is None else f" (label {self.label} of the truth)")


def _listed_labels(truth: torch.Tensor) -> str:
    values, counts = (part.tolist() for part in truth.unique(return_counts=True))
    if truth.dtype == torch.bool:
        return "a boolean mask"
    shown = [f"label {int(v)} in {n} voxels" for v, n in zip(values, counts, strict=True)]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


class FalseNegatives(TruthComparison):
    """Where the truth is the class and the prediction is not: why was it missed?

    >>> from seg3dcam.targets import ClassLogit
    >>> logits = torch.tensor([[[-1.0, -1.0, 1.0, 1.0]]])
    >>> missed = FalseNegatives(torch.tensor([0, 1, 1, 0]))
    >>> ClassLogit(0, missed).regions(logits)
    tensor([[False,  True, False, False]])
    """

    title = "false negatives"

    def compared(self, truth: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        return truth & ~predicted


class FalsePositives(TruthComparison):
    """Where the prediction is the class and the truth is not: why was it invented?

    >>> from seg3dcam.targets import ClassLogit
    >>> logits = torch.tensor([[[-1.0, -1.0, 1.0, 1.0]]])
    >>> ClassLogit(0, FalsePositives(torch.tensor([0, 1, 1, 0]))).regions(logits)
    tensor([[False, False, False,  True]])
    """

    title = "false positives"

    def compared(self, truth: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        return predicted & ~truth


class TruePositives(TruthComparison):
    """Where both the truth and the prediction are the class.

    >>> from seg3dcam.targets import ClassLogit
    >>> logits = torch.tensor([[[-1.0, -1.0, 1.0, 1.0]]])
    >>> ClassLogit(0, TruePositives(torch.tensor([0, 1, 1, 0]))).regions(logits)
    tensor([[False, False,  True, False]])
    """

    title = "true positives"

    def compared(self, truth: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        return truth & predicted
