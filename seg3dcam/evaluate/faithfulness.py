"""Does the prediction depend on what a map shows? Deletion, insertion and context deletion.

The volume is cut into blocks, and the blocks are replaced by a baseline, those of the highest mean
value of the map first. After each step the network predicts again. The score is the Dice of the
class with its own first prediction: a good map makes it fall early.

Deletion itself cannot tell a good map from the predicted mask, since deleting a structure deletes
its segmentation. Context deletion never touches the mask and a margin around it. It asks what else
the prediction depends on, and only this question has another answer than the mask.

All curves should be read beside those of controls (`seg3dcam.evaluate.controls`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import trapezoid
from torch import nn

from seg3dcam.checks import Activation, check_whole_number
from seg3dcam.errors import EvaluationError, InputError
from seg3dcam.evaluate.areas import area_between
from seg3dcam.evaluate.baselines import Replacement, baseline_of
from seg3dcam.evaluate.rerun import Rerun
from seg3dcam.evaluate.segments import grid_blocks, grown, ordered, segments_outside
from seg3dcam.network.outputs import OutputSelection
from seg3dcam.targets import ClassLogOdds, fixed
from seg3dcam.targets.regions import Prediction
from seg3dcam.windows import WindowPlan


@dataclass(frozen=True)
class Curve:
    """How a prediction changes while parts of its input are deleted or inserted.

    Attributes:
        fractions: (steps + 1,), the fraction of the blocks deleted (inserted) at each step.
        dice: (steps + 1,), Dice of the class with its own first prediction.
        drop: (steps + 1,), by which fraction of its first absolute value the class's log-odds over
            the first predicted mask have dropped.
        blocks: how many blocks there are.
    """

    fractions: NDArray[np.float64]
    dice: NDArray[np.float64]
    drop: NDArray[np.float64]
    blocks: int

    @property
    def auc(self) -> float:
        """The area under Dice over the fractions, by the trapezoid rule, from 0 to 1."""
        return float(trapezoid(self.dice, self.fractions))


class Subject:
    """One class in a network's prediction of one input, and how it is measured in others.

    Args:
        rerun: of the network and the input.
        class_index: the class.
        activation: "softmax" for classes that exclude each other, "sigmoid" for others.

    Attributes:
        mask: (*S) bool, where the class is predicted.

    Raises:
        EmptyRegionError: the class is not predicted anywhere.
    """

    def __init__(self, rerun: Rerun, class_index: int, activation: Activation) -> None:
        target = ClassLogOdds(class_index, activation=activation)
        self._log_odds = fixed(target, rerun.logits)
        self._overlapping = activation == "sigmoid" or rerun.logits.shape[1] == 1
        self.rerun, self.class_index = rerun, class_index
        self.score = self.score_at(rerun.logits)
        self.mask = self.mask_at(rerun.logits)

    def mask_at(self, logits: torch.Tensor) -> torch.Tensor:
        """Return where the class is predicted, (*S) bool."""
        return Prediction(logits, self.class_index, self._overlapping).mask()[0]

    def score_at(self, logits: torch.Tensor) -> float:
        """Return the class's log-odds over the first predicted mask."""
        return float(self._log_odds(logits))

    def dice_at(self, logits: torch.Tensor) -> float:
        """Return the Dice of the class with its own first prediction."""
        now = self.mask_at(logits)
        both = int((now & self.mask).sum())
        return 2 * both / (int(now.sum()) + int(self.mask.sum()))


def deletion(
    values: torch.Tensor | NDArray[np.floating],
    x: torch.Tensor,
    network: nn.Module,
    class_index: int,
    block: int = 4,
    steps: int = 25,
    baseline: str | float = "mean",
    sliding_window: WindowPlan | None = None,
    activation: Activation = "softmax",
    seed: int = 0,
    *,
    segments: NDArray[np.integer] | None = None,
    output: OutputSelection = None,
) -> Curve:
    """Delete the blocks of an input from the highest value of a map to the lowest.

    A small area means that the prediction depends on what the map shows. The mask itself has a
    small area, too: see `context_deletion`. The arguments are those of `context_deletion`.

    Source: Petsiuk et al., RISE (BMVC 2018), with the Dice of a segmentation as the score.
    """
    subject = Subject(
        Rerun(network, x, sliding_window=sliding_window, output=output), class_index, activation
    )
    blocks = Blocks.of(subject, block, segments)
    return blocks.deleted(values, steps=steps, baseline=baseline, seed=seed)


def insertion(
    values: torch.Tensor | NDArray[np.floating],
    x: torch.Tensor,
    network: nn.Module,
    class_index: int,
    block: int = 4,
    steps: int = 25,
    baseline: str | float = "mean",
    sliding_window: WindowPlan | None = None,
    activation: Activation = "softmax",
    seed: int = 0,
    *,
    segments: NDArray[np.integer] | None = None,
    output: OutputSelection = None,
) -> Curve:
    """Insert the blocks of an input into the baseline, from the highest value of a map downwards.

    A large area means that what the map shows suffices for the prediction. The arguments are those
    of `context_deletion`.

    Source: Petsiuk et al., RISE (BMVC 2018), with the Dice of a segmentation as the score.
    """
    subject = Subject(
        Rerun(network, x, sliding_window=sliding_window, output=output), class_index, activation
    )
    blocks = Blocks.of(subject, block, segments)
    return blocks.inserted(values, steps=steps, baseline=baseline, seed=seed)


def context_deletion(
    values: torch.Tensor | NDArray[np.floating],
    x: torch.Tensor,
    network: nn.Module,
    class_index: int,
    margin: int = 2,
    block: int = 4,
    steps: int = 25,
    baseline: str | float = "mean",
    sliding_window: WindowPlan | None = None,
    activation: Activation = "softmax",
    seed: int = 0,
    *,
    segments: NDArray[np.integer] | None = None,
    output: OutputSelection = None,
) -> Curve:
    """Delete what lies around the predicted mask, from the highest value of a map to the lowest.

    A small area means that the map points at something outside of the mask that the prediction
    depends on. The mask itself, as a map, is constant there and so deletes at random.

    Args:
        values: the map on the grid of `x`, (*S).
        x: the input, (1, C, *S).
        network: any network that a CAM takes, also an `Ensemble`.
        class_index: the class.
        margin: the mask grown by so many voxels along every axis (by a cube) is never touched,
            and neither is a block that meets it.
        block: size of the blocks in voxels along every axis.
        steps: in how many steps all the other blocks are deleted, about equally many at each.
        baseline: what stands in the place of a deleted block: "mean" of each channel, "blur",
            "noise" of each channel's mean and deviation, "neighbours" that are not deleted, or a
            number.
        sliding_window: the windows, None for one window, the volume itself.
        activation: "softmax" for classes that exclude each other, "sigmoid" for others.
        seed: of the order of blocks that have the same value, and of noise.
        segments: the number of each voxel's segment, (*S), in place of blocks, such as
            `supervoxels(x)`.
        output: which of the network's outputs are the logits, see `BaseCAM`.

    Raises:
        EmptyRegionError: the class is not predicted anywhere.
        EvaluationError: the curve is undefined: the mask leaves fewer than 20 blocks, or the
            baseline is equal to the input there.
        InputError, ConfigError: a map of another shape, or an illegal setting.

    Example:
        >>> from seg3dcam.evaluate import context_deletion
        >>> network = nn.Conv3d(1, 2, 5, padding=2)
        >>> _ = nn.init.zeros_(network.weight), nn.init.constant_(network.bias, -0.5)
        >>> network.weight.data[1, 0, 0, 2, 2] = 1.0  # looks 2 voxels to the left
        >>> x = torch.zeros(1, 1, 24, 24, 24)
        >>> x[..., 8:12, 8:12, 8:12] = 1
        >>> curve = context_deletion(x[0, 0], x, network, 1, margin=0, block=2, baseline=0)
        >>> curve.dice[:2].round(3)
        array([1.   , 0.667])
    """
    check_whole_number("margin", margin, least=0)
    subject = Subject(
        Rerun(network, x, sliding_window=sliding_window, output=output), class_index, activation
    )
    kept = grown(subject.mask.cpu().numpy(), margin)
    blocks = Blocks.of(subject, block, segments, kept=kept)
    return blocks.deleted(values, steps=steps, baseline=baseline, seed=seed)


@dataclass(frozen=True)
class Blocks:
    """The blocks of an input that may be deleted, for any number of maps.

    Attributes:
        subject: whose prediction is measured.
        segments: the number of each voxel's block, (*S).
        free: the numbers of the blocks that may be deleted.
    """

    subject: Subject
    segments: NDArray[np.int64]
    free: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        subject: Subject,
        block: int,
        segments: NDArray[np.integer] | None = None,
        *,
        kept: NDArray[np.bool_] | None = None,
    ) -> Blocks:
        """Cut the input into blocks, or take given segments.

        Args:
            kept: (*S) bool, a block that meets it may not be deleted.
        """
        check_whole_number("block", block)
        shape = tuple(subject.mask.shape)
        found = grid_blocks(shape, block) if segments is None else np.asarray(segments)
        if found.shape != shape or found.dtype.kind not in "iu" or found.min() < 0:
            raise InputError(
                f"segments are whole numbers from 0 for each voxel of the input, {shape}; got "
                f"{found.dtype} of shape {found.shape}"
            )
        number = np.unique(found, return_inverse=True)[1].reshape(shape)
        return cls(subject, number, segments_outside(number, kept))

    def deleted(
        self,
        values: torch.Tensor | NDArray[np.floating],
        *,
        steps: int,
        baseline: str | float,
        seed: int,
    ) -> Curve:
        """Return the curve of deletion by a map (*S)."""
        return self._curve(values, steps, baseline, seed, inserts=False)

    def inserted(
        self,
        values: torch.Tensor | NDArray[np.floating],
        *,
        steps: int,
        baseline: str | float,
        seed: int,
    ) -> Curve:
        """Return the curve of insertion by a map (*S)."""
        return self._curve(values, steps, baseline, seed, inserts=True)

    def area(
        self,
        values: torch.Tensor | NDArray[np.floating],
        *,
        steps: int,
        baseline: str | float,
        seed: int,
        last: float | None = None,
        other: float | None = None,
    ) -> float:
        """Return the area of deletion by a map (*S), known to 0.02 from few steps.

        Args:
            last: Dice with everything deleted, if it is known.
            other: see `area_between`.
        """
        deleted_at = self._deletion(values, steps, baseline, seed)
        end = self.subject.dice_at(deleted_at(steps)) if last is None else last

        def height(step: int) -> float:
            return self.subject.dice_at(deleted_at(step))

        return area_between(height, self.fractions(steps), 1.0, end, other=other)[0]

    def ordered(
        self, values: torch.Tensor | NDArray[np.floating], *, seed: int
    ) -> NDArray[np.int64]:
        """Return the blocks in the order in which a map (*S) deletes them."""
        return ordered(self._checked(values), self.segments, self.free, seed)

    def fractions(self, steps: int) -> NDArray[np.float64]:
        """Return which fraction of the blocks is deleted at each of `steps` + 1 steps."""
        return self._counts(steps) / len(self.free)

    def replacement(self, baseline: str | float, seed: int) -> Replacement:
        """Return what stands in the place of deleted blocks.

        Raises:
            EvaluationError: it is equal to the input wherever a block may be deleted.
        """
        x = self.subject.rerun.x
        replacement = baseline_of(baseline, x, seed)
        free = torch.from_numpy(np.isin(self.segments, self.free)).to(x.device)
        if torch.equal(torch.where(free, replacement(free), x), x):
            raise EvaluationError(
                f"undefined: the baseline {baseline!r} is equal to the input wherever it may be "
                "replaced, so nothing would be deleted; give another baseline"
            )
        return replacement

    def _counts(self, steps: int) -> NDArray[np.int64]:
        """Return how many blocks are deleted at each step."""
        check_whole_number("steps", steps)
        return np.round(np.arange(steps + 1) * len(self.free) / steps).astype(np.int64)

    def _deletion(
        self,
        values: torch.Tensor | NDArray[np.floating],
        steps: int,
        baseline: str | float,
        seed: int,
        *,
        inserts: bool = False,
    ) -> Callable[[int], torch.Tensor]:
        """Return a function of the step that gives the logits (1, K, *S)."""
        counts, x = self._counts(steps), self.subject.rerun.x
        order, replacement = self.ordered(values, seed=seed), self.replacement(baseline, seed)
        rank = np.full(int(self.segments.max()) + 1, len(order))
        rank[order] = np.arange(len(order))
        place = torch.from_numpy(rank[self.segments]).to(x.device)
        free = place < len(order)
        changes = self.subject.rerun.start()

        def logits_at(step: int) -> torch.Tensor:
            count = int(counts[step])
            deleted = (place >= count) & free if inserts else place < count
            return changes.change(torch.where(deleted, replacement(deleted), x))

        return logits_at

    def _curve(
        self,
        values: torch.Tensor | NDArray[np.floating],
        steps: int,
        baseline: str | float,
        seed: int,
        *,
        inserts: bool,
    ) -> Curve:
        subject = self.subject
        logits_at = self._deletion(values, steps, baseline, seed, inserts=inserts)
        dice, drop = [], []
        for step in range(steps + 1):
            logits = logits_at(step)
            dice.append(subject.dice_at(logits))
            drop.append(_relative_drop(subject.score_at(logits), subject.score))
        return Curve(self.fractions(steps), np.array(dice), np.array(drop), len(self.free))

    def _checked(self, values: torch.Tensor | NDArray[np.floating]) -> NDArray[np.float64]:
        """Return a map as an array; InputError if it is no map on the grid of the input."""
        array = torch.as_tensor(values).detach().cpu().double().numpy()
        if array.shape != self.segments.shape:
            raise InputError(
                f"the map has shape {array.shape}; it must lie on the grid of the input, "
                f"{self.segments.shape}: give result.maps[layer][0], or resample it"
            )
        if not np.isfinite(array).all():
            raise InputError(
                f"the map has {int((~np.isfinite(array)).sum())} values that are NaN or infinite"
            )
        return array


def _relative_drop(now: float, before: float) -> float:
    return (before - now) / abs(before) if before else 0.0
