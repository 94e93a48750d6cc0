"""How sure is the network of what it draws? Its own probabilities, summed up in one figure.

    soft_dice_confidence(probability, mask)

It is the Dice that the mask would have with the truth if the probabilities were true. A network may
be sure and wrong: where truths are known, `seg3dcam.cohort.calibration` tells what its figures are
worth.
"""

from __future__ import annotations

from functools import cached_property

import torch

#: Voxels around a lesion whose probabilities belong to it.
NEAR = 3

#: Slices that are summed over classes at once, so that many classes need little memory.
_SLAB = 8


class Probabilities:
    """The probabilities of classes, made one by one from logits.

    Args:
        logits: (K, *S).
        activation: "softmax" or "sigmoid".
        temperature: logits are divided by it, see `SegModel`.

    >>> Probabilities(torch.zeros(2, 1, 1, 2), "softmax").of(1).tolist()
    [[[0.5, 0.5]]]
    """

    def __init__(self, logits: torch.Tensor, activation: str, temperature: float = 1.0) -> None:
        self._logits, self._temperature = logits, temperature
        self._overlapping = activation == "sigmoid" or len(logits) == 1

    @cached_property
    def _total(self) -> torch.Tensor:
        """The logarithm of the sum over all classes, (*S), which every class is divided by."""
        slabs = [self._cooled(part).logsumexp(0) for part in self._logits.split(_SLAB, 1)]
        return torch.cat(slabs)

    def of(self, class_index: int) -> torch.Tensor:
        """Return the probability of a class, (*S) float32."""
        own = self._cooled(self._logits[class_index])
        return own.sigmoid() if self._overlapping else (own - self._total).exp()

    def _cooled(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float() / self._temperature


def soft_dice_confidence(probability: torch.Tensor, mask: torch.Tensor) -> float | None:
    """Return the soft Dice of a mask with the probabilities that it was made from, 0 to 1.

    2 * sum of p inside the mask / (sum of p + voxels of the mask)

    Args:
        probability: (*S), of the class.
        mask: (*S) bool, where the class is drawn.

    Returns:
        None for an empty mask.

    Source: Borges et al., "Soft Dice Confidence: A Near-Optimal Confidence Estimator for Selective
    Prediction in Semantic Segmentation", 2024.

    >>> mask = torch.tensor([True, True, False])
    >>> round(soft_dice_confidence(torch.tensor([1.0, 0.8, 0.2]), mask), 3)
    0.9
    """
    size = int(mask.sum())
    if not size:
        return None
    inside = float(probability[mask].sum(dtype=torch.float64))
    return 2 * inside / (float(probability.sum(dtype=torch.float64)) + size)


def lesion_confidence(
    probability: torch.Tensor, mask: torch.Tensor, lesion: torch.Tensor
) -> float | None:
    """Return the soft Dice of one lesion with the probabilities in it and a few voxels around it.

    Args:
        probability: (*S), of the class.
        mask: (*S) bool, where the class is drawn. Other lesions than this one are not this one's,
            however near they are.
        lesion: (*S) bool, a part of the mask.

    Returns:
        None for an empty lesion.

    >>> mask = torch.tensor([[[True, False, True]]])
    >>> lesion = torch.tensor([[[True, False, False]]])
    >>> round(lesion_confidence(torch.tensor([[[1.0, 0.5, 0.9]]]), mask, lesion), 3)
    0.8
    """
    voxels = lesion.nonzero()
    if not len(voxels):
        return None
    low, high = (voxels.amin(0) - NEAR).clamp(min=0).tolist(), (voxels.amax(0) + NEAR + 1).tolist()
    box = tuple(slice(*ends) for ends in zip(low, high, strict=True))
    own, drawn = lesion[box], mask[box]
    belongs = _grown(own, NEAR) & (own | ~drawn)
    return soft_dice_confidence(torch.where(belongs, probability[box], 0), own)


def _grown(mask: torch.Tensor, voxels: int) -> torch.Tensor:
    """Return a mask (*S) and all voxels at most so far from it along every axis."""
    grown = mask.float()[None, None]
    for _ in range(voxels):
        grown = torch.nn.functional.max_pool3d(grown, 3, stride=1, padding=1)
    return grown[0, 0].bool()
