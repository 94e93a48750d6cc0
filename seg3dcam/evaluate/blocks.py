"""The blocks of an input, deleted or inserted in the order of a map, and what is measured then."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.integrate import trapezoid

from seg3dcam.checks import Activation, check_whole_number
from seg3dcam.errors import EvaluationError, InputError
from seg3dcam.evaluate.areas import area_between
from seg3dcam.evaluate.arrays import map_array
from seg3dcam.evaluate.baselines import Replacement, baseline_of
from seg3dcam.evaluate.rerun import Changes, Rerun
from seg3dcam.evaluate.segments import grid_blocks, ordered, segments_outside
from seg3dcam.targets import ClassLogOdds, ClassProbability, fixed
from seg3dcam.targets.regions import Prediction, Region


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
        region: (*S) bool, one connected part of the class's mask, such as a lesion, that is
            measured alone; None for the whole mask. What is predicted nearer to another part
            belongs to that one.

    Attributes:
        mask: (*S) bool, where the class is predicted, or the region.

    Raises:
        EmptyRegionError: the class is not predicted anywhere.
        InputError: the region is no part of the predicted mask.
    """

    def __init__(
        self,
        rerun: Rerun,
        class_index: int,
        activation: Activation,
        region: torch.Tensor | None = None,
    ) -> None:
        over: Region = "predicted" if region is None else region[None]
        of_class = ClassLogOdds(class_index, over, activation=activation)
        probability = ClassProbability(class_index, over, activation=activation)
        self._log_odds = fixed(of_class, rerun.logits)
        self._probability = fixed(probability, rerun.logits)
        self._overlapping = activation == "sigmoid" or rerun.logits.shape[1] == 1
        self.rerun, self.class_index = rerun, class_index
        self.score = self.score_at(rerun.logits)
        self._zone: torch.Tensor | None = None
        self.mask = self.mask_at(rerun.logits)
        if region is not None:
            self._zone = _zone_of(region, self.mask)
            self.mask = self.mask & self._zone

    def mask_at(self, logits: torch.Tensor) -> torch.Tensor:
        """Return where the class is predicted, (*S) bool; of a region, the voxels near to it."""
        mask = Prediction(logits, self.class_index, self._overlapping).mask()[0]
        return mask if self._zone is None else mask & self._zone

    def score_at(self, logits: torch.Tensor) -> float:
        """Return the class's log-odds over the first predicted mask."""
        return float(self._log_odds(logits))

    def probability_at(self, logits: torch.Tensor) -> float:
        """Return the class's mean probability over the first predicted mask, in float64."""
        return float(self._probability(logits.double())) / int(self.mask.sum())

    def dice_at(self, logits: torch.Tensor) -> float:
        """Return the Dice of the class with its own first prediction."""
        now = self.mask_at(logits)
        both = int((now & self.mask).sum())
        return 2 * both / (int(now.sum()) + int(self.mask.sum()))


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
    _replacements: dict[tuple[str, int], Replacement] = field(
        default_factory=dict, repr=False, compare=False
    )

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
        return self._curve(Deletion(self, values, steps, baseline, seed))

    def inserted(
        self,
        values: torch.Tensor | NDArray[np.floating],
        *,
        steps: int,
        baseline: str | float,
        seed: int,
    ) -> Curve:
        """Return the curve of insertion by a map (*S)."""
        return self._curve(Deletion(self, values, steps, baseline, seed, inserts=True))

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
        deletion = Deletion(self, values, steps, baseline, seed)
        end = deletion.dice(steps) if last is None else last
        return area_between(deletion.dice, deletion.fractions, 1.0, end, other=other)[0]

    def ordered(
        self, values: torch.Tensor | NDArray[np.floating], *, seed: int
    ) -> NDArray[np.int64]:
        """Return the blocks in the order in which a map (*S) deletes them."""
        array = checked_map(values, self.segments.shape)
        return ordered(array, self.segments, self.free, seed)

    def counts(self, steps: int) -> NDArray[np.int64]:
        """Return how many blocks are deleted at each of `steps` + 1 steps."""
        check_whole_number("steps", steps)
        return np.round(np.arange(steps + 1) * len(self.free) / steps).astype(np.int64)

    def fractions(self, steps: int) -> NDArray[np.float64]:
        """Return which fraction of the blocks is deleted at each of `steps` + 1 steps."""
        return self.counts(steps) / len(self.free)

    def replacement(self, baseline: str | float, seed: int) -> Replacement:
        """Return what stands in the place of deleted blocks; it is made once for all maps.

        Raises:
            EvaluationError: it is equal to the input wherever that may be deleted.
        """
        key = (str(baseline), seed)
        if key not in self._replacements:
            x = self.subject.rerun.x
            found = baseline_of(baseline, x, seed)
            chosen = np.zeros(int(self.segments.max()) + 1, dtype=bool)
            chosen[self.free] = True
            free = torch.from_numpy(chosen[self.segments]).to(x.device)
            if torch.equal(torch.where(free, found(free), x), x):
                raise EvaluationError(
                    f"undefined: the baseline {baseline!r} is equal to the input wherever it may "
                    "be replaced, so nothing would be deleted; give another baseline"
                )
            self._replacements[key] = found
        return self._replacements[key]

    def _curve(self, deletion: Deletion) -> Curve:
        steps = range(len(deletion.fractions))
        return deletion.curve({step: deletion.dice(step) for step in steps})


class Deletion:
    """The blocks of an input deleted, or inserted, in the order of a map, up to any step.

    Args:
        blocks: of the input.
        values: the map, (*S).
        steps, baseline, seed: see `context_deletion`.
        inserts: whether blocks are inserted into the baseline instead.

    Attributes:
        fractions: (steps + 1,), the fraction of the blocks deleted at each step.
        drops: step -> by which fraction the score has dropped, where `dice` has been asked for.
    """

    def __init__(
        self,
        blocks: Blocks,
        values: torch.Tensor | NDArray[np.floating],
        steps: int,
        baseline: str | float,
        seed: int,
        *,
        inserts: bool = False,
    ) -> None:
        check_whole_number("seed", seed, least=0)
        self._blocks, self._inserts = blocks, inserts
        self._replacement = blocks.replacement(baseline, seed)
        self._counts, self.fractions = blocks.counts(steps), blocks.fractions(steps)
        # Only the order is held, not the map: there may be many maps.
        self._order = blocks.ordered(values, seed=seed)
        self._changes: Changes | None = None
        self.drops = {0: 0.0}

    def dice(self, step: int) -> float:
        """Return the Dice of the class with its own first prediction at a step."""
        subject = self._blocks.subject
        logits = self._logits(step)
        self.drops[step] = _relative_drop(subject.score_at(logits), subject.score)
        return subject.dice_at(logits)

    def rest(self) -> None:
        """Forget the windows of the last step, which take memory."""
        self._changes = None

    def curve(self, heights: dict[int, float]) -> Curve:
        """Return the curve through the Dice of some steps, whose drops are known."""
        steps = sorted(heights)
        dice = np.array([heights[step] for step in steps])
        drops = np.array([self.drops[step] for step in steps])
        return Curve(self.fractions[steps], dice, drops, len(self._order))

    def _logits(self, step: int) -> torch.Tensor:
        blocks, x = self._blocks, self._blocks.subject.rerun.x
        count = int(self._counts[step])
        chosen = np.zeros(int(blocks.segments.max()) + 1, dtype=bool)
        chosen[self._order[count:] if self._inserts else self._order[:count]] = True
        deleted = torch.from_numpy(chosen[blocks.segments]).to(x.device)
        if self._changes is None:
            self._changes = blocks.subject.rerun.start()
        return self._changes.change(torch.where(deleted, self._replacement(deleted), x))


def checked_map(
    values: torch.Tensor | NDArray[np.floating], shape: tuple[int, ...]
) -> NDArray[np.float64]:
    """Return a map as an array; InputError if it is no map on the grid (*S) of the input."""
    array = map_array(values)
    if array.shape != shape:
        raise InputError(
            f"the map has shape {array.shape}; it must lie on the grid of the input, {shape}: give "
            "result.maps[layer][0], or resample it"
        )
    return array


def _relative_drop(now: float, before: float) -> float:
    return (before - now) / abs(before) if before else 0.0


def _zone_of(region: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the voxels that are nearer to a region than to the rest of a mask, (*S) bool."""
    inside, predicted = region.cpu().numpy() != 0, mask.cpu().numpy()
    if inside.shape != predicted.shape or not inside.any() or (inside & ~predicted).any():
        raise InputError(
            f"the region {tuple(inside.shape)} must be a part of the class's predicted mask "
            f"{tuple(predicted.shape)}, such as one connected component"
        )
    others = predicted & ~inside
    if not others.any():
        return torch.ones_like(mask)
    to_own, to_others = (ndimage.distance_transform_edt(~part) for part in (inside, others))
    return torch.from_numpy(to_own < to_others).to(mask.device)
