"""Formulas that change something and score again: those of Score-CAM and Ablation-CAM.

They see neither the network nor its hooks. They are given a function `rescore`, which takes a list
of n channels and returns the scores (B, n) that the network gives when each is used in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from seg3dcam.checks import check_number
from seg3dcam.methods.base import Formula, weighted_sum

#: Channels -> scores (B, n).
Rescore = Callable[[list[int]], torch.Tensor]


@dataclass(frozen=True)
class Perturbation(Formula):
    """Base of the formulas that rescore.

    Attributes:
        by: what is done for a channel: "masking" multiplies the input with the channel's own map,
            "ablation" sets the channel to zero.
        memory_gb: memory that a batch of changed inputs may take, with all that the network makes
            of it.
    """

    route = "rescoring"
    own_logits = True
    by: ClassVar[Literal["masking", "ablation"]]
    memory_gb: float = 2.0

    def __post_init__(self) -> None:
        check_number("memory_gb", self.memory_gb, above=0, of="GB")

    def needs_activations(self, weights_are_shared: bool) -> bool:
        return True

    def weights(self, scores: torch.Tensor, score: torch.Tensor | None) -> torch.Tensor:
        """Return channel weights (B, C).

        Args:
            scores: (B, C), one for each channel.
            score: (B,) of the untouched network.
        """
        raise NotImplementedError

    def __call__(
        self,
        activations: torch.Tensor,
        rescore: Rescore,
        score: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the raw map (B, *S) of activations (B, C, *S)."""
        scores = rescore(list(range(activations.shape[1])))
        return weighted_sum(activations, self.weights(scores, score))


class MaskedInputs(Perturbation):
    """sum_k softmax_k(s_k) A_k, s_k being the score of the input seen through channel k.

    >>> A = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> MaskedInputs()(A, rescore=lambda channels: torch.zeros(1, len(channels))).tolist()
    [[0.5, 0.5]]
    """

    by = "masking"

    def needs_activations(self, weights_are_shared: bool) -> bool:
        return True

    def weights(self, scores: torch.Tensor, score: torch.Tensor | None) -> torch.Tensor:
        # To a softmax, minus infinity would be a channel that counts for nothing.
        return scores.masked_fill(scores.isinf(), float("nan")).softmax(1)


class AblatedChannels(Perturbation):
    """sum_k (S - S_k) / |S| A_k, S_k being the score without channel k.

    >>> A = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> without = torch.tensor([[-4.0, -2.0]])
    >>> AblatedChannels()(A, lambda channels: without[:, channels], torch.tensor([-2.0])).tolist()
    [[1.0, 0.0]]
    """

    by = "ablation"

    def needs_activations(self, weights_are_shared: bool) -> bool:
        return True

    def weights(self, scores: torch.Tensor, score: torch.Tensor | None) -> torch.Tensor:
        if score is None:
            raise TypeError("ablation_cam needs the score (B,) of the untouched network")
        change, size = score[:, None] - scores, score.abs()[:, None]
        return torch.where(size > 0, change / size, change)  # a score of 0 has no scale
