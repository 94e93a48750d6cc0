"""How sure is the network of a class when it sees only what a map shows? Average drop and increase.

The input is kept where the map is high and fades into a baseline where it is low. If the class
stays as probable as it was, the map holds what suffices for it.

A large map keeps much and so drops little: a map that is high everywhere drops nothing. And within
the predicted mask the mask itself keeps what is segmented. So these figures should be read beside
those of controls (`seg3dcam.evaluate.controls`), and they say less than `context_deletion` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from seg3dcam.checks import Activation
from seg3dcam.errors import ConfigError, EvaluationError
from seg3dcam.evaluate.arrays import refuse_constant
from seg3dcam.evaluate.baselines import baseline_of
from seg3dcam.evaluate.blocks import Subject, checked_map
from seg3dcam.evaluate.rerun import Rerun
from seg3dcam.network.outputs import OutputSelection
from seg3dcam.windows import WindowPlan


@dataclass(frozen=True)
class Confidence:
    """How probable a class is in an input, and in what a map keeps of the input.

    Attributes:
        before: mean probability of the class over its first predicted mask.
        after: the same mean, over the same voxels, of what the map keeps.
    """

    before: float
    after: float

    @property
    def drop(self) -> float:
        """The part of the probability that is lost, from 0 to 1; 0 where it has increased."""
        return max(0.0, self.before - self.after) / self.before

    @property
    def increase(self) -> bool:
        """Whether the class has become more probable."""
        return self.after > self.before


@dataclass(frozen=True)
class AverageDrop:
    """Average drop and rate of increase over some items.

    Attributes:
        drop: mean of the drops, in percent: less is better.
        increase: in how many percent of the items the class has become more probable.
        items: how many there are.
    """

    drop: float
    increase: float
    items: int


def kept_confidence(
    values: torch.Tensor | NDArray[np.floating],
    x: torch.Tensor,
    network: nn.Module,
    class_index: int,
    baseline: str | float = "mean",
    sliding_window: WindowPlan | None = None,
    activation: Activation = "softmax",
    seed: int = 0,
    *,
    output: OutputSelection = None,
) -> Confidence:
    """Keep of an input what a map shows, and compare the probabilities of a class.

    The map is cut at 0 and divided by its maximum. Then the network sees m x + (1 - m) b, where m
    is the map and b the baseline. The paper's own baseline is 0. For a scan, whose 0 may be water
    or the mean, it is a choice like any other.

    The score is a probability, because a ratio of log-odds, which may be negative, means nothing.

    Args:
        values: the map on the grid of `x`, (*S).
        baseline: "mean" of each channel, "blur", "noise" or a number, as for `deletion`.
        x, network, class_index, sliding_window, activation, seed, output: as for `deletion`.

    Raises:
        EmptyRegionError: the class is not predicted anywhere.
        EvaluationError: undefined: the map is constant or has no positive value, or the baseline is
            equal to the input wherever something would fade.
        ConfigError: there is no such baseline, or it is "neighbours", which needs a border between
            what is deleted and what is not.

    Source: Chattopadhay et al., Grad-CAM++ (WACV 2018), section 4.1, with the mean probability over
    a mask as the confidence.

    Example:
        >>> from seg3dcam.evaluate import kept_confidence
        >>> network = nn.Conv3d(1, 1, 1)
        >>> _ = nn.init.constant_(network.weight, 4.0), nn.init.constant_(network.bias, -2.0)
        >>> x = torch.zeros(1, 1, 8, 8, 8)
        >>> x[..., 2:4] = 1
        >>> found = kept_confidence(x[0, 0], x, network, 0, baseline=0.5, activation="sigmoid")
        >>> found.drop, found.increase
        (0.0, False)
    """
    if baseline == "neighbours":
        raise ConfigError(
            "baseline 'neighbours' fills from what is not deleted, but here all fades by degrees: "
            "give 'mean', 'blur', 'noise' or a number"
        )
    rerun = Rerun(network, x, sliding_window=sliding_window, output=output)
    subject = Subject(rerun, class_index, activation)
    kept = torch.from_numpy(_weights(checked_map(values, tuple(subject.mask.shape)))).to(rerun.x)
    other = baseline_of(baseline, rerun.x, seed)(kept < 1)
    blended = kept * rerun.x + (1 - kept) * other
    if torch.equal(torch.where(kept < 1, other, rerun.x), rerun.x):
        raise EvaluationError(
            f"undefined: the baseline {baseline!r} is equal to the input wherever the map is below "
            "its maximum, so nothing would fade; give another baseline"
        )
    before = subject.probability_at(rerun.logits)
    return Confidence(before, subject.probability_at(rerun.start().change(blended)))


def average_drop(items: Iterable[Confidence]) -> AverageDrop:
    """Return average drop and rate of increase over items, each with a map of its own.

    Raises:
        EvaluationError: there is none.

    >>> average_drop([Confidence(0.5, 0.25), Confidence(0.5, 0.75)])
    AverageDrop(drop=25.0, increase=50.0, items=2)
    """
    found = list(items)
    if not found:
        raise EvaluationError("undefined: an average over no item")
    drops, increases = zip(*((one.drop, one.increase) for one in found), strict=True)
    return AverageDrop(100 * float(np.mean(drops)), 100 * float(np.mean(increases)), len(found))


def _weights(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how much of each voxel a map keeps, from 0 to 1."""
    refuse_constant(array)
    if array.max() <= 0:
        raise EvaluationError("undefined: the map has no positive value, so it would keep nothing")
    return np.clip(array, 0, None) / array.max()
