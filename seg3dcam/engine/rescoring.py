"""Maps by rescoring: how the score changes if a part of the input or of a layer is missing.

Score-CAM multiplies the input with each channel's map, Ablation-CAM sets each channel to zero. The
network runs once per channel, through all windows that the target's region lies in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from seg3dcam.engine.layer_map import LayerMap, joined
from seg3dcam.engine.maps import Maps
from seg3dcam.engine.memory import BatchLimit
from seg3dcam.engine.passes import FirstPass, activation_pass, scored_alone, stitch, wide
from seg3dcam.geometry import FeatureGrid, cropped, interpolate
from seg3dcam.methods.base import for_each_item, weighted_sum
from seg3dcam.methods.perturbation import Perturbation
from seg3dcam.network.layers import LayerRef
from seg3dcam.progress import Progress
from seg3dcam.targets import fixed, region_of
from seg3dcam.targets.base import as_own_target
from seg3dcam.windows import Blend

Target = Callable[[torch.Tensor], torch.Tensor]


def rescore_maps(
    first: FirstPass,
    target: Target,
    formula: Perturbation,
    grids: dict[LayerRef, FeatureGrid],
    progress: Progress,
) -> Maps:
    """Return the map of every layer.

    Args:
        grids: layer -> its grid in one window.
    """
    at_once = _at_once(first, formula.memory_gb)
    summed = as_own_target(target).is_sum
    target = fixed(target, first.logits)
    regions = region_of(target, first.logits)
    items = [
        _Item(
            first,
            item,
            scored_alone(target, first.logits, item),
            None if regions is None else regions[item : item + 1],
            summed,
        )
        for item in range(len(first.x))
    ]
    return {
        layer: joined(
            [_map(_ItemAtLayer(item, layer, grid), formula, at_once, progress) for item in items]
        )
        for layer, grid in grids.items()
    }


@dataclass(frozen=True)
class _Item:
    """One item of the batch, and the score of its logits.

    Attributes:
        number: which item of the first pass.
        target: a function of this item's logits (1, K, *S) -> (1,).
        region: (1, *S), the voxels that the target looks at; None is everywhere.
        summed: whether the target is a sum over the voxels of its region.
    """

    first: FirstPass
    number: int
    target: Target
    region: torch.Tensor | None
    summed: bool

    @property
    def image(self) -> torch.Tensor:
        """The input (1, C, *S)."""
        return self.first.x[self.number : self.number + 1]

    @property
    def logits(self) -> torch.Tensor:
        """The logits (1, K, *S) of the untouched network."""
        return self.first.logits[self.number : self.number + 1]

    @cached_property
    def windows(self) -> list[int]:
        """The windows that the region lies in."""
        windows = self.first.windows
        every = list(range(len(windows)))
        if self.region is None or len(every) == 1:
            return every
        padded = windows.pad_with_zeros(self.region[:, None].to(torch.uint8))
        return [window for window in every if windows.cut(padded, [window]).any()]


class _ItemAtLayer:
    """One item at one layer: the network's logits with only one channel, or without one."""

    def __init__(self, item: _Item, layer: LayerRef, grid: FeatureGrid) -> None:
        self.item, self.layer, self.grid = item, layer, grid
        self._first = item.first
        example = next(self._activations())[1]
        self.channels, self.precision = example.shape[1], example.dtype

    def through_channels(self, channels: list[int]) -> torch.Tensor:
        """Return the logits (n, K, *S) of the input multiplied by each channel's scaled map."""
        windows = self._first.windows
        maps, grid = self.blended(lambda a: a[0, channels], len(channels))
        maps = _zero_to_one(interpolate(maps, grid, FeatureGrid.of_voxels(windows.shape)))
        padded = windows.pad(self.item.image * maps[:, None])

        def predicted(window: int) -> torch.Tensor:
            batch = self._first.capture.to_model(windows.cut(padded, [window]))
            return self._first.capture.observe(batch, copy=False)

        return self._stitched(predicted, len(channels))

    def without_channels(self, channels: list[int]) -> torch.Tensor:
        """Return the logits (n, K, *S) when each channel is set to zero, in every window."""
        scale = torch.ones(len(channels), self.channels, device="cpu")
        scale[range(len(channels)), channels] = 0

        def predicted(window: int) -> torch.Tensor:
            x = self._first.cut([self.item.number], [window])
            batch = x.expand(len(channels), *x.shape[1:]).contiguous()
            return self._first.capture.scaled(batch, self.layer, scale.to(batch))

        return self._stitched(predicted, len(channels))

    def blended(
        self, pick: Callable[[torch.Tensor], torch.Tensor], count: int
    ) -> tuple[torch.Tensor, FeatureGrid]:
        """Blend what `pick` takes from the activations (1, C, *s) of each window.

        Returns:
            (count, *s) on the grid of the volume, and that grid.
        """
        blend = Blend(self._first.windows, self.grid, self._first.x.new_zeros(count))
        group = blend.group()
        for window, a in self._activations():
            group.add(window, pick(wide(a)))
        group.finish()
        return blend.total, blend.grid

    def _activations(self) -> Iterator[tuple[int, torch.Tensor]]:
        number = self.item.number
        every = range(len(self._first.windows))
        for window, activations in activation_pass(self._first, [number], every):
            a = activations[self.layer]
            yield window, a if len(every) > 1 else a[number : number + 1]

    def _stitched(self, predicted: Callable[[int], torch.Tensor], count: int) -> torch.Tensor:
        logits = self._first.logits
        total = logits.new_zeros(count, *logits.shape[1:])
        for window in self.item.windows:
            stitch(self._first, total, range(count), [window], predicted(window))
        return total


#: Kind of change -> function that returns the logits for some channels.
PERTURBED = {
    "masking": _ItemAtLayer.through_channels,
    "ablation": _ItemAtLayer.without_channels,
}


def _map(
    here: _ItemAtLayer, formula: Perturbation, at_once: BatchLimit, progress: Progress
) -> LayerMap:
    """Return the map of one item at one layer."""
    item, perturbed = here.item, PERTURBED[formula.by]
    # Sums over a thousand voxels differ so much that a softmax would give one channel all the
    # weight. Means do not.
    voxels = 1.0
    if formula.by == "masking" and item.summed and item.region is not None:
        voxels = float(item.region.sum())

    scores: list[torch.Tensor] = []
    channels = list(range(here.channels))
    for logits in at_once.each(len(channels), lambda part: perturbed(here, channels[part])):
        scores += [item.target(one[None]).detach() / voxels for one in logits]
        progress("rescoring", len(scores), len(channels))
    weights = formula.weights(torch.stack(scores, dim=1), item.target(item.logits).detach())

    def weighted(a: torch.Tensor) -> torch.Tensor:
        return torch.cat([weighted_sum(a, weights), weighted_sum(a.abs(), weights.abs())])

    values, grid = cropped(*here.blended(weighted, 2), item.first.windows.shape)
    ceiling = values[1].amax().reshape(1)
    return LayerMap(values[:1], grid, here.grid, ceiling, here.precision)


def _zero_to_one(maps: torch.Tensor) -> torch.Tensor:
    """Scale each map (n, *S) to [0, 1]; a constant one becomes zeros."""
    flat = maps.flatten(1)
    low, high = (for_each_item(value, maps.ndim) for value in (flat.amin(1), flat.amax(1)))
    return (maps - low) / torch.where(high > low, high - low, 1)


def _at_once(first: FirstPass, memory_gb: float) -> BatchLimit:
    """Return how many changed inputs fit in memory."""
    if first.capture.known.draws:  # a batch draws other random numbers than its items do
        return BatchLimit(1, "changed inputs", "memory_gb")
    count = max(1, int(min(memory_gb * 1e9 / first.footprint, 1e9)))
    return BatchLimit(count, "changed inputs", "memory_gb")
