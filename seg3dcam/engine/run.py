"""From an input, targets and methods to maps: the order of the passes.

The prediction is made once. Methods of activations and gradients go through the windows together,
for all targets and layers; those that rescore, look at biases or at the input follow one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from seg3dcam.engine.curvature import corrected_pass
from seg3dcam.engine.full_gradients import full_gradient_map
from seg3dcam.engine.input_attributions import Comparator, compare_map
from seg3dcam.engine.maps import Maps, attribute
from seg3dcam.engine.passes import FirstPass, Progress, Seed, gradient_pass
from seg3dcam.engine.rescoring import rescore_maps
from seg3dcam.geometry import FeatureGrid
from seg3dcam.methods import FullGradient, Method, Perturbation
from seg3dcam.network.layers import LayerRef
from seg3dcam.network.outputs import OutputSelection
from seg3dcam.targets import fixed, region_of, score_and_seed

Target = Callable[[torch.Tensor], torch.Tensor]

#: The name under which a map on the input's own voxels is found.
OF_INPUT = LayerRef("input")


@dataclass(frozen=True)
class Asked:
    """A target, and what the prediction makes of it.

    Attributes:
        target: a function of the logits.
        settled: the same, with its region as it is at the prediction.
        score: (B,).
        seed: dS/dlogits.
        region_voxels: (B,) voxels that it looks at, None if it does not say.
    """

    target: Target
    settled: Target
    score: torch.Tensor
    seed: Seed
    region_voxels: torch.Tensor | None

    @classmethod
    def of(cls, target: Target, logits: torch.Tensor) -> Asked:
        """Evaluate a target at logits (B, K, *S)."""
        settled = fixed(target, logits)  # its region is looked for once
        score, seed = score_and_seed(settled, logits)
        region = region_of(settled, logits)
        voxels = None if region is None else region.reshape(len(score), -1).sum(1)
        return cls(target, settled, score, Seed.of(seed), voxels)


def looks_at_layers(method: Any) -> bool:
    """Tell whether a method explains layers; the others explain the input."""
    return isinstance(method, Method | Perturbation)


def needs_graph(method: Any) -> bool:
    """Tell whether a method takes gradients of the first pass."""
    return isinstance(method, Method) and method.order > 0


def needs_activations(method: Any, shared: bool) -> bool:
    """Tell whether a method looks at activations apart from gradients.

    Args:
        shared: whether several windows share their weights.
    """
    return isinstance(method, Perturbation) or (
        isinstance(method, Method) and (shared or not method.order)
    )


def needs_own_logits(method: Any) -> bool:
    """Tell whether a method, at a member of an ensemble, looks at that member's own logits."""
    return isinstance(method, Perturbation | FullGradient)


def needs_gradient_of(method: Any) -> Literal["layers", "input", "nothing"]:
    """Tell the gradients that a method's map is made of."""
    if needs_graph(method):
        return "layers"
    through_input = isinstance(method, FullGradient) or (
        isinstance(method, Comparator) and method.kind != "occlusion"
    )
    return "input" if through_input else "nothing"


def maps_of(
    first: FirstPass,
    asked: Sequence[Asked],
    methods: Sequence[Any],
    grids: dict[LayerRef, FeatureGrid],
    output: OutputSelection,
    progress: Progress,
) -> list[list[Maps]]:
    """Return the maps of every layer: for every target a list with those of every method."""
    table: dict[int, list[Maps]] = {}
    targets, seeds = [one.target for one in asked], [one.seed for one in asked]
    plain = [n for n, m in enumerate(methods) if isinstance(m, Method) and m.order < 2]
    curved = [n for n, m in enumerate(methods) if isinstance(m, Method) and m.order == 2]
    # First what needs the first pass's graph: the others run the network again.
    for numbers, passes in (
        (plain, partial(gradient_pass, keep_graph=bool(curved))),
        (curved, partial(corrected_pass, targets=targets)),
    ):
        chosen = [methods[number] for number in numbers]
        if chosen:
            found = attribute(first, seeds, chosen, grids, passes, progress)
            for column, number in enumerate(numbers):
                table[number] = [row[column] for row in found]
    first.graph = None
    for number, method in enumerate(methods):
        if number not in table:
            table[number] = [
                _by_itself(first, one, method, grids, output, progress) for one in asked
            ]
    return [[table[n][t] for n in range(len(methods))] for t in range(len(asked))]


def _by_itself(
    first: FirstPass,
    one: Asked,
    method: Any,
    grids: dict[LayerRef, FeatureGrid],
    output: OutputSelection,
    progress: Progress,
) -> Maps:
    if isinstance(method, Perturbation):
        if first.own is not None:  # what a member's channels do is seen in its own logits
            first = replace(first, logits=first.own)
        return rescore_maps(first, one.settled, method, grids, progress=progress)
    if isinstance(method, FullGradient):
        return {OF_INPUT: full_gradient_map(first, one.score, one.seed, method, output, progress)}
    if isinstance(method, Comparator):
        return {OF_INPUT: compare_map(first, one.target, one.seed, method, output, progress)}
    raise TypeError(f"no way to run a {type(method).__name__}")
