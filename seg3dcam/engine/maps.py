"""Maps from gradients and activations: the steps of every method, over all windows of a volume.

`Attribution` explains several targets by several methods at several layers with one forward pass
per window, and one backward pass per window and target that has a seed there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from seg3dcam.engine.gradients import Gradients
from seg3dcam.engine.layer_map import LayerMap, joined
from seg3dcam.engine.passes import FirstPass, activation_pass, wide
from seg3dcam.engine.seed import Seed
from seg3dcam.geometry import FeatureGrid, cropped
from seg3dcam.methods.base import StepwiseFormula, Sums
from seg3dcam.network.layers import LayerRef
from seg3dcam.progress import Progress
from seg3dcam.windows import Blend, GroupBlend

#: Layer -> its map.
Maps = dict[LayerRef, LayerMap]


@dataclass(frozen=True)
class Attribution:
    """Several targets, methods and layers, and the passes that their maps are made of.

    Attributes:
        first: the results of the prediction.
        seeds: dS/dlogits of every target.
        methods: the formulas.
        grids: layer -> its grid in one window.
        passes: `gradient_pass`, or a function that yields other gradients in the same way.
        progress: called after every batch of windows.
    """

    first: FirstPass
    seeds: Sequence[Seed]
    methods: Sequence[StepwiseFormula]
    grids: dict[LayerRef, FeatureGrid]
    passes: Callable[..., Iterator[Gradients]]
    progress: Progress

    def maps(self) -> list[list[Maps]]:
        """Return the maps of every layer: for every target a list with those of every method."""
        of_items = [self._maps_of_items(items) for items in self.first.items]
        return [
            [
                {
                    layer: joined([of[target][method][layer] for of in of_items])
                    for layer in self.grids
                }
                for method in range(len(self.methods))
            ]
            for target in range(len(self.seeds))
        ]

    def _maps_of_items(self, items: Sequence[int]) -> list[list[Maps]]:
        """Lead the makers of all maps of some items through their steps."""
        first, progress = self.first, self.progress
        tasks = [
            _Task(target, number, layer, MapMaker(first, len(items), method, grid))
            for number, method in enumerate(self.methods)
            for target in ([None] if method.agnostic else range(len(self.seeds)))
            for layer, grid in self.grids.items()
        ]
        _over_activations(first, items, [task for task in tasks if task.maker.surveys], progress)
        _over_gradients(self._gradients(items), tasks)
        for task in tasks:
            task.maker.conclude()
        again = [task for task in tasks if task.maker.waits_for_gradients]
        _over_gradients(self._gradients(items), again)
        _over_activations(first, items, [task for task in tasks if task.maker.waits], progress)

        found = {(task.target, task.method, task.layer): task.maker.result() for task in tasks}
        return [
            [
                {
                    layer: found[None if method.agnostic else target, number, layer]
                    for layer in self.grids
                }
                for number, method in enumerate(self.methods)
            ]
            for target in range(len(self.seeds))
        ]

    def _gradients(self, items: Sequence[int]) -> Iterator[Gradients]:
        return self.passes(self.first, items, self.seeds, self.progress)


@dataclass(frozen=True)
class _Task:
    """One map to be made; a map that is the same for every target is made once (target None)."""

    target: int | None
    method: int
    layer: LayerRef
    maker: MapMaker


def _over_gradients(gradients: Iterator[Gradients], tasks: Sequence[_Task]) -> None:
    if all(task.target is None for task in tasks):
        return
    for found in gradients:
        for task in tasks:
            if task.target == found.target:
                for window, a, g in found.each(task.layer):
                    task.maker.take(window, a, g)
        del found  # with its graph, before the next one is made


def _over_activations(
    first: FirstPass, items: Sequence[int], tasks: Sequence[_Task], progress: Progress
) -> None:
    which = sorted({window for task in tasks for window in task.maker.wanted})
    for done, (window, activations) in enumerate(activation_pass(first, items, which), 1):
        for task in tasks:
            if window in task.maker.wanted:
                task.maker.look(window, activations[task.layer])
        progress("mapping", done, len(which))


class MapMaker:
    """Makes the map of one target by one method at one layer, window by window.

    The steps, in this order: `look` at the activations of the windows `wanted`, if it `surveys`;
    `take` the gradients of every window that has some; `conclude`; and what it `waits` for: again
    the gradients, or the activations of the windows `wanted`.

    Beside the map it finds its ceiling, the largest value if no contributions cancelled each other.
    A map far below its ceiling is rounding noise.
    """

    def __init__(
        self,
        first: FirstPass,
        batch: int,
        method: StepwiseFormula,
        grid: FeatureGrid,
    ) -> None:
        like = first.x.new_zeros(batch)
        self._first, self._method, self._grid = first, method, grid
        self._ndim = len(grid.shape)
        self._blend = Blend(first.windows, grid, like)
        self._ceiling = torch.zeros_like(like)
        self._degenerate = torch.zeros_like(like, dtype=torch.bool)
        self._lowest = torch.zeros((), device="cpu")
        self._precision: torch.dtype = like.dtype
        whole = method.whole_axes(self._ndim)
        self._groups = first.windows.groups(whole)
        self._group_of = {w: number for number, group in enumerate(self._groups) for w in group}
        voxels = float(np.prod([grid.shape[axis] for axis in whole]))
        self._voxels = voxels * first.windows.lengths(whole)
        self._surveyed: dict[int, Sums] = {}
        self._weighed: dict[int, tuple[Sums, int]] = {}
        self._weights: dict[int, Any] = {}
        self._blends: dict[int, tuple[GroupBlend, int]] = {}
        self._concluded = False
        self._last: Any = None

    @property
    def surveys(self) -> bool:
        """Whether it needs the activations of all windows before anything else."""
        return self._method.surveys

    @property
    def waits_for_gradients(self) -> bool:
        """Whether it needs the gradients a second time."""
        return bool(self._weights) and self._method.maps_gradients(self._ndim)

    @property
    def waits(self) -> bool:
        """Whether it needs activations after the gradients, for the map itself."""
        return bool(self._weights) and not self._method.maps_gradients(self._ndim)

    @property
    def wanted(self) -> set[int]:
        """The windows whose activations it needs."""
        if not self._concluded:
            return set(self._group_of)
        return {window for group in self._weights for window in self._groups[group]}

    def look(self, window: int, a: torch.Tensor) -> None:
        """Survey the activations of a window, or map it once all weights are known."""
        a = self._wide(a)
        if self._concluded:
            self._map(window, a, None, self._weights[self._group_of[window]])
            return
        self._lowest = torch.minimum(self._lowest, a.amin().cpu())
        sums = self._method.survey(a, self._shares(window, a))
        group = self._group_of[window]
        known = self._surveyed.get(group)
        self._surveyed[group] = sums if known is None else self._method.join(known, sums)

    def take(self, window: int, a: torch.Tensor, g: torch.Tensor) -> None:
        """Weigh the gradients of a window; map it if that is all that its map needs."""
        a, g = self._wide(a), wide(g)
        group = self._group_of[window]
        if self._concluded:
            self._map(window, a, g, self._weights[group])
            return
        survey = self._surveyed.get(group, {})
        sums = self._method.weigh(a, g, survey)
        if len(self._groups[group]) == 1:
            weights = self._method.weights(survey, sums, self._voxels, missing=False)
            self._map(window, a, g, weights)
            return
        if group in self._weighed:
            known, count = self._weighed[group]
            self._weighed[group] = (self._method.join(known, sums), count + 1)
        else:
            self._weighed[group] = (sums, 1)

    def conclude(self) -> None:
        """Turn what was summed into the weights of each group of windows."""
        self._concluded = True
        if self._method.order:
            for group, (sums, count) in self._weighed.items():
                self._weights[group] = self._method.weights(
                    self._surveyed.get(group, {}),
                    sums,
                    self._voxels,
                    missing=count < len(self._groups[group]),
                )
        else:
            for group in range(len(self._groups)):
                self._weights[group] = self._method.weights(
                    self._surveyed.get(group, {}), {}, self._voxels, missing=False
                )
        self._surveyed, self._weighed = {}, {}

    def result(self) -> LayerMap:
        """Return the map, without the voxels that lie in padding alone."""
        values, grid = cropped(self._blend.total, self._blend.grid, self._first.windows.shape)
        if self._last is not None:
            values = self._method.finish(values, self._last)
        signed = self._method.nonnegative and bool(self._lowest < 0)
        return LayerMap(
            values,
            grid,
            self._grid,
            self._ceiling,
            self._precision,
            self._degenerate,
            (f"the method is meant for activations >= 0; here they go down to {self._lowest:.3g}",)
            if signed
            else (),
        )

    def _map(self, window: int, a: torch.Tensor, g: torch.Tensor | None, weights: Any) -> None:
        method = self._method
        values = method.map(a, g, weights)
        highest = method.ceiling(a, g, weights).flatten(1).amax(1)
        self._ceiling = torch.maximum(self._ceiling, highest.to(self._ceiling))
        if weights is not None and weights.degenerate is not None:
            self._degenerate |= weights.degenerate.to(self._degenerate)
        if method.finishes:
            self._last = weights
        group = self._group_of[window]
        if len(self._groups[group]) == 1 or method.maps_gradients(self._ndim):
            self._blend.add_alone(window, values)
            return
        blend, left = self._blends.pop(group, (None, len(self._groups[group])))
        blend = blend or self._blend.group()
        blend.add(window, values)
        if left > 1:
            self._blends[group] = (blend, left - 1)
        else:
            blend.finish()

    def _shares(self, window: int, a: torch.Tensor) -> torch.Tensor:
        """Return how much each voxel of a window counts in the volume, (*s)."""
        windows = self._first.windows
        if len(windows) == 1:
            return a.new_ones(a.shape[2:])
        return self._blend.shares(window, self._first.total_importance).to(a.device)

    def _wide(self, a: torch.Tensor) -> torch.Tensor:
        self._precision = a.dtype
        return wide(a)
