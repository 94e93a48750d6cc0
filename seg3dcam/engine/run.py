"""From a prediction, targets and formulas to maps: which formula goes which way, in what order.

The prediction is made once. Formulas of activations and gradients go through the windows together,
for all targets and layers. Those that rescore, or that explain the input, follow one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from seg3dcam.engine.curvature import corrected_pass
from seg3dcam.engine.full_gradients import full_gradient_map
from seg3dcam.engine.gradients import gradient_pass
from seg3dcam.engine.input_attributions import input_map
from seg3dcam.engine.maps import Attribution, Maps
from seg3dcam.engine.passes import FirstPass
from seg3dcam.engine.rescoring import rescore_maps
from seg3dcam.engine.seed import Seed
from seg3dcam.geometry import FeatureGrid
from seg3dcam.methods.base import Formula, Route
from seg3dcam.methods.full_grad import FullGradient
from seg3dcam.methods.input_attributions import InputFormula
from seg3dcam.methods.perturbation import Perturbation
from seg3dcam.network.layers import LayerRef
from seg3dcam.network.outputs import OutputSelection
from seg3dcam.progress import Progress
from seg3dcam.targets import fixed, region_of, score_and_seed

Target = Callable[[torch.Tensor], torch.Tensor]

#: The name under which a map on the input's own voxels is found.
OF_INPUT = LayerRef("input")


@dataclass(frozen=True)
class TargetScore:
    """A target, and its score and gradient at the prediction.

    Attributes:
        target: a function of the logits.
        at_prediction: the same target, with its region as it is at the prediction.
        score: (B,).
        seed: dS/dlogits.
        region_voxels: (B,) voxels that it looks at, None if it does not say.
    """

    target: Target
    at_prediction: Target
    score: torch.Tensor
    seed: Seed
    region_voxels: torch.Tensor | None

    @classmethod
    def of(cls, target: Target, logits: torch.Tensor) -> TargetScore:
        """Evaluate a target at logits (B, K, *S)."""
        at_prediction = fixed(target, logits)  # its region is looked for once
        score, seed = score_and_seed(at_prediction, logits)
        region = region_of(at_prediction, logits)
        voxels = None if region is None else region.reshape(len(score), -1).sum(1)
        return cls(target, at_prediction, score, Seed.of(seed), voxels)


@dataclass(frozen=True)
class Run:
    """What all maps of one network are made of.

    Attributes:
        first: what the prediction left behind.
        grids: layer -> its grid in one window.
        output: which of the network's outputs are the logits.
        progress: called after every batch of windows.
    """

    first: FirstPass
    grids: dict[LayerRef, FeatureGrid]
    output: OutputSelection
    progress: Progress


def maps_of(
    run: Run, targets: Sequence[TargetScore], formulas: Sequence[Formula]
) -> list[list[Maps]]:
    """Return the maps of every layer: for every target a list with those of every formula."""
    columns: dict[int, list[Maps]] = {}
    on_route = {
        route: [number for number, formula in enumerate(formulas) if formula.route == route]
        for route in ("gradients", "curvature")
    }
    # These two come first, since they need the graph of the first pass. The other methods run the
    # network again, which overwrites the graph.
    passes = {
        "gradients": partial(gradient_pass, keep_graph=bool(on_route["curvature"])),
        "curvature": partial(corrected_pass, targets=[one.target for one in targets]),
    }
    for route, numbers in on_route.items():
        if numbers:
            seeds = [one.seed for one in targets]
            chosen: list[Any] = [formulas[number] for number in numbers]
            found = Attribution(
                run.first, seeds, chosen, run.grids, passes[route], run.progress
            ).maps()
            for column, number in enumerate(numbers):
                columns[number] = [row[column] for row in found]
    run.first.release_graph()
    for number, formula in enumerate(formulas):
        if number not in columns:
            columns[number] = [RUNNERS[formula.route](run, one, formula) for one in targets]
    return [[columns[n][t] for n in range(len(formulas))] for t in range(len(targets))]


def _rescored(run: Run, one: TargetScore, formula: Perturbation) -> Maps:
    first = run.first
    if first.own is not None:  # the channels of an ensemble's member act on its own logits
        first = replace(first, logits=first.own)
    return rescore_maps(first, one.at_prediction, formula, run.grids, run.progress)


def _full_gradients(run: Run, one: TargetScore, formula: FullGradient) -> Maps:
    map_ = full_gradient_map(run.first, one.score, one.seed, formula, run.output, run.progress)
    return {OF_INPUT: map_}


def _input_attribution(run: Run, one: TargetScore, formula: InputFormula) -> Maps:
    return {OF_INPUT: input_map(run.first, one.target, one.seed, formula, run.output, run.progress)}


#: Route -> how the maps of one target are made, for the formulas that run one by one.
RUNNERS: Mapping[Route, Callable[[Run, TargetScore, Any], Maps]] = {
    "rescoring": _rescored,
    "full_gradients": _full_gradients,
    "input": _input_attribution,
}
