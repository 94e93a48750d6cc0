"""How sure is the network of what it draws? Its own probabilities, summed up in one figure.

    soft_dice_confidence(probability, mask)

It is the Dice that the mask would have with the truth if the probabilities were true. A network may
be sure and wrong: where truths are known, `seg3dcam.cohort.calibration` tells what its figures are
worth.
"""

from __future__ import annotations

import torch

#: Slices whose probabilities are computed at once, so that many classes need little memory.
_SLAB = 8


def class_probability(logits: torch.Tensor, class_index: int, activation: str) -> torch.Tensor:
    """Return the probability of a class, (*S) float32, from logits (K, *S).

    Args:
        activation: "softmax" or "sigmoid".

    >>> logits = torch.zeros(2, 1, 1, 2)
    >>> class_probability(logits, 1, "softmax").tolist()
    [[[0.5, 0.5]]]
    """
    if activation == "sigmoid" or len(logits) == 1:
        return logits[class_index].float().sigmoid()
    slabs = [
        slab[class_index] for part in logits.split(_SLAB, 1) for slab in [part.float().softmax(0)]
    ]
    return torch.cat(slabs)


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
