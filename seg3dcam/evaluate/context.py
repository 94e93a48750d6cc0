"""Does a map point at something outside of the mask that the prediction depends on?

Context deletion by the map is held against context deletion by maps that know nothing of the
network: the mask alone, the input, nearness to the mask, and random maps of the layer's own
resolution. What passes is better than all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from seg3dcam.checks import Activation, check_whole_number
from seg3dcam.errors import ConfigError
from seg3dcam.evaluate.controls import (
    input_alone,
    mask_alone,
    nearness,
    random_maps,
    rank_p_value,
)
from seg3dcam.evaluate.faithfulness import Blocks, Curve, Subject
from seg3dcam.evaluate.rerun import Rerun
from seg3dcam.evaluate.segments import grown
from seg3dcam.geometry import FeatureGrid
from seg3dcam.network.outputs import OutputSelection
from seg3dcam.progress import Progress
from seg3dcam.windows import WindowPlan

#: The names of the controls.
MASK_ALONE, INPUT_ALONE, NEARNESS = "mask alone", "input alone", "nearness to the mask"

#: The largest p-value, and the least distance of areas, with which a map is better than controls.
SIGNIFICANT, BETTER = 0.05, 0.05

#: If the class keeps this Dice with everything around it deleted, it needs nothing of that.
NEEDS_NOTHING = 0.95


@dataclass(frozen=True)
class ContextEvidence:
    """Context deletion by a map, beside what knows nothing of the network.

    Attributes:
        curve: of the map, with the first baseline.
        baselines: baseline -> area of the map.
        controls: "mask alone", "input alone", "nearness to the mask" -> their areas.
        random: areas of random maps of the layer's resolution.
        p_value: the chance that a random map is at least as good.
        left: Dice of the class if everything around it is deleted.
        cost: in predictions of the whole volume.
    """

    curve: Curve
    baselines: Mapping[str, float]
    controls: Mapping[str, float]
    random: tuple[float, ...]
    p_value: float
    left: float
    cost: float

    @property
    def needs_context(self) -> bool:
        """Whether the prediction depends on anything around the mask."""
        return self.left < NEEDS_NOTHING

    @property
    def passed(self) -> bool:
        """Whether the map points at something that the prediction depends on, around the mask.

        It is better than random maps, than the mask and than nearness to it. If the input alone is
        as good, the map is not wrong: evidence may well be the brightest thing there is.
        """
        of_mask = min(area for name, area in self.controls.items() if name != INPUT_ALONE)
        worst = max(self.baselines.values())
        return self.needs_context and self.p_value <= SIGNIFICANT and worst < of_mask - BETTER

    @property
    def words(self) -> str:
        """The verdict in one line."""
        if not self.needs_context:
            return (
                "the prediction needs nothing outside of the mask (with all of it deleted the Dice "
                f"is {self.left:.2f}), so no map can point at it"
            )
        low, high = min(self.random), max(self.random)
        figures = (
            f"context deletion {self.curve.auc:.2f}, mask alone {self.controls[MASK_ALONE]:.2f}, "
            f"random {low:.2f}-{high:.2f}, p = {self.p_value:.2g}"
        )
        if self.p_value > SIGNIFICANT:
            return f"not better than random outside the mask: do not use ({figures})"
        if not self.passed:
            others = {name: area for name, area in self.controls.items() if name != INPUT_ALONE}
            named, best = min(others.items(), key=lambda control: control[1])
            return f"echo: says nothing beyond the {named}, which gets {best:.2f} ({figures})"
        words = f"points outside the mask at something the prediction depends on ({figures})"
        of_input = self.controls[INPUT_ALONE]
        as_good = of_input <= self.curve.auc + BETTER
        return words + f"; the values of the input alone get {of_input:.2f}" * as_good


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
    baselines: Sequence[str | float] = ("mean", "blur"),
    draws: int = 20,
    sliding_window: WindowPlan | None = None,
    activation: Activation = "softmax",
    output: OutputSelection = None,
    spacing: Sequence[float] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    region: torch.Tensor | None = None,
    rerun: Rerun | None = None,
) -> ContextEvidence:
    """Hold context deletion by a map against that by maps which know nothing of the network.

    Areas of controls, of random maps and of the other baselines are known to 0.02, if their curves
    fall; those of random maps only as far as is needed to rank the map among them.

    Args:
        values, x, network, class_index, margin, block, steps, sliding_window, activation, output,
            seed: as for `context_deletion`.
        grid: of the map's layer, in voxels of the input; random maps have its resolution. None
            gives every voxel a value of its own.
        baselines: the first one is used for everything, the others for the map alone.
        draws: random maps; with 20 the p-value can be as low as 1/21.
        spacing: mm from voxel to voxel along every axis, for the distance to the mask.
        region: (*S) bool, one connected part of the class's mask, such as a lesion: what does its
            prediction depend on? None for the whole mask.
        rerun: of this network and input, made before, so that several maps share its prediction.

    Raises:
        EmptyRegionError, EvaluationError: as `context_deletion`.
    """
    check_whole_number("draws", draws, least=10)
    if not baselines:
        raise ConfigError("no baseline given: name at least one, such as 'mean'")
    if rerun is None:
        rerun = Rerun(network, x, sliding_window=sliding_window, output=output, progress=progress)
        before = 0.0
    else:
        before = rerun.cost
    subject = Subject(rerun, class_index, activation, region)
    kept = grown(subject.mask.cpu().numpy(), margin)
    blocks = Blocks.of(subject, block, kept=kept)
    first, *others = baselines
    curve = blocks.deleted(values, steps=steps, baseline=first, seed=seed)
    left = float(curve.dice[-1])

    def area(other_values: torch.Tensor, rival: float | None = None) -> float:
        return blocks.area(
            other_values, steps=steps, baseline=first, seed=seed, last=left, other=rival
        )

    known = {str(first): curve.auc} | {
        str(name): blocks.area(values, steps=steps, baseline=name, seed=seed) for name in others
    }
    controls = {
        MASK_ALONE: area(mask_alone(subject.mask)),
        INPUT_ALONE: area(input_alone(x)),
        NEARNESS: area(nearness(subject.mask, spacing)),
    }
    grid = grid or FeatureGrid.of_voxels(tuple(subject.mask.shape))
    drawn = random_maps(grid, tuple(subject.mask.shape), draws=draws, seed=seed)
    random = tuple(area(one, curve.auc) for one in drawn)
    return ContextEvidence(
        curve,
        known,
        controls,
        random,
        rank_p_value(curve.auc, random),
        left,
        rerun.cost - before,
    )
