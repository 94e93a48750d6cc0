"""Does a map point at something outside of the mask that the prediction depends on?

Context deletion by the map is held against context deletion by maps that know nothing of the
network: the mask alone, the input, nearness to the mask, and random maps of the layer's own
resolution. What passes is better than all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from seg3dcam.checks import Activation, check_number, check_whole_number
from seg3dcam.errors import ConfigError
from seg3dcam.evaluate.arrays import map_array, refuse_constant
from seg3dcam.evaluate.baselines import OF_VERDICTS
from seg3dcam.evaluate.blocks import Blocks, Curve, Subject
from seg3dcam.evaluate.controls import input_alone, mask_alone, nearness, random_maps
from seg3dcam.evaluate.rerun import Rerun
from seg3dcam.evaluate.segments import grown
from seg3dcam.evaluate.trial import BETTER, NEEDS_NOTHING, Rivals, Trial, significant
from seg3dcam.geometry import FeatureGrid
from seg3dcam.network.outputs import OutputSelection
from seg3dcam.progress import Progress
from seg3dcam.windows import WindowPlan

#: The names of the controls.
MASK_ALONE, INPUT_ALONE, NEARNESS = "mask alone", "input alone", "nearness to the mask"

#: An area that may be wrong by more than this is written with its error.
_ROUGH = 0.05


@dataclass(frozen=True)
class ContextEvidence:
    """Context deletion by a map, beside what knows nothing of the network.

    Attributes:
        curve: of the map, with the first baseline, through the steps that were taken.
        baselines: baseline -> area of the map.
        controls: "mask alone", "input alone", "nearness to the mask" -> their areas.
        random: areas of random maps of the layer's resolution.
        p_value: the chance that a random map is at least as good. Random maps that are not known
            to be worse count as good.
        left: Dice of the class if everything around it is deleted.
        cost: in predictions of the whole volume.
        errors: how far areas may be from those of all steps: by the names of the baselines and
            controls, and "random" for the least certain of the random maps.
        rise: by how much a curve rises where it should fall, at most; the errors hold if no curve
            rises by more between the steps that were taken.
        certain: whether more steps could not change the verdict.
    """

    curve: Curve
    baselines: Mapping[str, float]
    controls: Mapping[str, float]
    random: tuple[float, ...]
    p_value: float
    left: float
    cost: float
    errors: Mapping[str, float] = field(default_factory=dict)
    rise: float = 0.0
    certain: bool = True

    @property
    def needs_context(self) -> bool:
        """Whether the prediction depends on anything around the mask."""
        return self.left < NEEDS_NOTHING

    @property
    def better_than_random(self) -> bool:
        """Whether hardly any random map is as good: p is 0.05, or the least that is possible."""
        return self.p_value <= significant(len(self.random))

    @property
    def passed(self) -> bool:
        """Whether the map points at something that the prediction depends on, around the mask.

        It is better than random maps, than the mask and than nearness to it. If the input alone is
        as good, the map is not wrong: evidence may well be the brightest thing there is.
        """
        of_mask = min(area for name, area in self.controls.items() if name != INPUT_ALONE)
        worst = max(self.baselines.values())
        return self.needs_context and self.better_than_random and worst < of_mask - BETTER

    @property
    def words(self) -> str:
        """The verdict in one line."""
        if not self.needs_context:
            return self._of_no_need()
        figures = (
            f"context deletion {self.curve.auc:.2f}, mask alone {self._area_of(MASK_ALONE)}, "
            f"random {self._areas_of_random()}, p = {self.p_value:.2g}"
        )
        if not self.better_than_random:
            shown = "not better" if self.certain else "not shown to be better"
            words = f"{shown} than random outside the mask: do not use ({figures})"
        elif not self.passed:
            others = {name: area for name, area in self.controls.items() if name != INPUT_ALONE}
            named = min(others, key=lambda name: others[name])
            worst = max(self.baselines, key=lambda name: self.baselines[name])
            words = f"echo: says nothing beyond the mask; the {named} gets {self._area_of(named)}"
            if worst != next(iter(self.baselines)):
                words += f", the map {self.baselines[worst]:.2f} with baseline {worst}"
            words += f" ({figures})"
        else:
            words = f"points outside the mask at something the prediction depends on ({figures})"
            if self.controls[INPUT_ALONE] <= self.curve.auc + BETTER:
                words += f"; the values of the input alone get {self._area_of(INPUT_ALONE)}"
        return words + self._doubt()

    def _of_no_need(self) -> str:
        if self.rise > BETTER:
            return (
                f"undefined: with everything around the mask deleted the Dice is {self.left:.2f}, "
                f"and on the way there it was {self.rise:.2f} less; what is deleted in part "
                "disturbs the network"
            )
        return (
            "the prediction needs nothing outside of the mask (with all of it deleted the Dice "
            f"is {self.left:.2f}), so no map can point at it"
        )

    def _doubt(self) -> str:
        rises = f"; curves rise by up to {self.rise:.2f} where they should fall" * (
            self.rise > BETTER
        )
        if self.certain:
            return rises
        return rises + "; not certain, since areas are known too roughly"

    def _area_of(self, control: str) -> str:
        return _area(self.controls[control], self.errors.get(control, 0.0))

    def _areas_of_random(self) -> str:
        low, high, error = min(self.random), max(self.random), self.errors.get("random", 0.0)
        return f"{low:.2f}-{high:.2f}" + (f" ± {error:.2f}" if error > _ROUGH else "")


def _area(area: float, error: float) -> str:
    """Write an area, and how far it may be off where that is much.

    >>> _area(0.5, 0.01), _area(0.5, 0.2)
    ('0.50', '0.50 ± 0.20')
    """
    return f"{area:.2f} ± {error:.2f}" if error > _ROUGH else f"{area:.2f}"


def context_evidence(
    values: torch.Tensor | NDArray[np.floating],
    x: torch.Tensor,
    network: nn.Module,
    class_index: int,
    *,
    grid: FeatureGrid | None = None,
    margin: int = 2,
    block: int = 4,
    steps: int = 25,
    baselines: Sequence[str | float] = OF_VERDICTS,
    draws: int = 20,
    sliding_window: WindowPlan | None = None,
    activation: Activation = "softmax",
    output: OutputSelection = None,
    spacing: Sequence[float] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    budget: float | None = None,
    region: torch.Tensor | None = None,
    rerun: Rerun | None = None,
) -> ContextEvidence:
    """Hold context deletion by a map against that by maps which know nothing of the network.

    Curves of deletion fall, so a few of their steps bound the area under all of them. First the
    steps are taken that decide the verdict, then those that make the figures sharper: to 0.01 the
    map's area and to 0.02 those of the controls and of the other baselines. If the budget is spent
    before, `errors` says how far the areas may be off, and `certain` whether that matters.

    Args:
        values, x, network, class_index, margin, block, steps, sliding_window, activation, output,
            seed: as for `context_deletion`, which takes all steps.
        grid: of the map's layer, in voxels of the input; random maps have its resolution. None
            gives every voxel a value of its own.
        baselines: the first one is used for everything, the others for the map alone.
        draws: random maps; with 20 the p-value can be as low as 1/21. With fewer than 19, a map
            that is better than all of them counts as better than random.
        spacing: mm from voxel to voxel along every axis, for the distance to the mask.
        budget: in predictions of the whole volume; None for 20 and twice the draws.
        region: (*S) bool, one connected part of the class's mask, such as a lesion: what does its
            prediction depend on? None for the whole mask.
        rerun: of this network and input, made before, so that several maps share its prediction.

    Raises:
        EmptyRegionError, EvaluationError: as `context_deletion`; or the map is constant.
    """
    check_whole_number("draws", draws, least=10)
    budget = 20 + 2 * draws if budget is None else budget
    check_number("budget", budget, above=0)
    if not baselines or isinstance(baselines, str):
        raise ConfigError(f"baselines {baselines!r}: a list of at least one, such as ['mean']")
    refuse_constant(map_array(values))
    before = 0.0 if rerun is None else rerun.cost
    if rerun is None:
        rerun = Rerun(network, x, sliding_window=sliding_window, output=output, progress=progress)
    subject = Subject(rerun, class_index, activation, region)
    mask, shape = subject.mask, tuple(subject.mask.shape)
    rivals = Rivals(
        Blocks.of(subject, block, kept=grown(mask.cpu().numpy(), margin)),
        baseline=baselines[0],
        steps=steps,
        seed=seed,
        controls={
            MASK_ALONE: mask_alone(mask),
            INPUT_ALONE: input_alone(rerun.x),
            NEARNESS: nearness(mask, spacing),
        },
        strict=(MASK_ALONE, NEARNESS),
        random=random_maps(grid or FeatureGrid.of_voxels(shape), shape, draws=draws, seed=seed),
    )
    found = evidence_against(rivals, values, baselines[1:], before + budget)
    return replace(found, cost=found.cost - before)


def evidence_against(
    rivals: Rivals,
    values: torch.Tensor | NDArray[np.floating],
    others: Sequence[str | float],
    budget: float,
) -> ContextEvidence:
    """Hold a map against rivals that may have been there for other maps; see `context_evidence`.

    Args:
        others: baselines besides that of the rivals.
        budget: in predictions of the whole volume, all of them so far included.
    """
    trial = Trial(rivals, values, others)
    trial.run(budget)
    named = trial.baselines | rivals.controls
    return ContextEvidence(
        trial.whole_curve(),
        {name: curve.area for name, curve in trial.baselines.items()},
        {name: curve.area for name, curve in rivals.controls.items()},
        tuple(curve.area for curve in rivals.random),
        trial.p_values()[1],
        rivals.left,
        rivals.cost,
        {name: trial.error(curve) for name, curve in named.items()}
        | {"random": max(trial.error(curve) for curve in rivals.random)},
        trial.rise,
        trial.certain,
    )
