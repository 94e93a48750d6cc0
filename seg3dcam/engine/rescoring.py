"""Maps by rescoring: what becomes of the score when the network sees less.

Score-CAM multiplies the input with each channel's map, Ablation-CAM sets each channel to zero; the
network runs once per channel, through all windows that the target's region lies in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from seg3dcam import targets as score
from seg3dcam.engine.layer_map import LayerMap, joined
from seg3dcam.engine.maps import Maps
from seg3dcam.engine.memory import AtOnce
from seg3dcam.engine.passes import FirstPass, Progress, activation_pass, scored_alone, stitch, wide
from seg3dcam.geometry import FeatureGrid, cropped, interpolate
from seg3dcam.methods.base import for_each_item, weighted_sum
from seg3dcam.methods.perturbation import Perturbation
from seg3dcam.network.layers import LayerRef
from seg3dcam.network.module_class import takes_hooks
from seg3dcam.network.outputs import tensors_in
from seg3dcam.windows import Blend

Target = Callable[[torch.Tensor], torch.Tensor]


def rescore_maps(
    first: FirstPass,
    target: Target,
    method: Perturbation,
    grids: dict[LayerRef, FeatureGrid],
    progress: Progress,
) -> Maps:
    """Return the map of every layer.

    Args:
        grids: layer -> its grid in one window.
    """
    at_once = _at_once(first, method.memory_gb)
    summed = _is_sum(target)
    target = score.fixed(target, first.logits)
    regions = score.region_of(target, first.logits)
    return {
        layer: joined(
            [
                _map(first, item, target, regions, summed, method, layer, grid, at_once, progress)
                for item in range(len(first.x))
            ]
        )
        for layer, grid in grids.items()
    }


def _map(
    first: FirstPass,
    item: int,
    target: Target,
    regions: torch.Tensor | None,
    summed: bool,
    method: Perturbation,
    layer: LayerRef,
    grid: FeatureGrid,
    at_once: AtOnce,
    progress: Progress,
) -> LayerMap:
    region = None if regions is None else regions[item : item + 1]
    target = scored_alone(target, first.logits, item)
    seen = _Seen(first, item, layer, grid, _windows_of(first, region))
    perturbed = {"masking": seen.through_channels, "ablation": seen.without_channels}[method.by]
    # The softmax of Score-CAM over a sum of a thousand voxels would be one for one channel.
    voxels = float(region.sum()) if method.by == "masking" and region is not None and summed else 1

    scores: list[torch.Tensor] = []
    channels = list(range(seen.channels))
    for rescored in at_once.each(len(channels), lambda part: perturbed(channels[part])):
        scores += [target(one[None]).detach() / voxels for one in rescored]
        progress("rescoring", len(scores), len(channels))
    score_of_all = target(first.logits[item : item + 1]).detach()
    weights = method.weights(torch.stack(scores, dim=1), score_of_all)

    def weighted(a: torch.Tensor) -> torch.Tensor:
        return torch.cat([weighted_sum(a, weights), weighted_sum(a.abs(), weights.abs())])

    values, grid_of_map = cropped(*seen.blended(weighted, 2), first.windows.shape)
    ceiling = values[1].amax().reshape(1)
    return LayerMap(values[:1], grid_of_map, grid, ceiling, seen.precision)


class _Seen:
    """One item of the first pass, and what its logits become when channels are used or lost."""

    def __init__(
        self,
        first: FirstPass,
        item: int,
        layer: LayerRef,
        grid: FeatureGrid,
        which: Sequence[int],
    ) -> None:
        self._first, self._item, self._layer, self._grid = first, item, layer, grid
        self._which = which
        example = next(self._activations())[1]
        self.channels, self.precision = example.shape[1], example.dtype

    def through_channels(self, channels: list[int]) -> torch.Tensor:
        """Return the logits (n, K, *S) of the input multiplied by each channel's scaled map."""
        windows = self._first.windows
        maps, grid = self.blended(lambda a: a[0, channels], len(channels))
        maps = _zero_to_one(interpolate(maps, grid, FeatureGrid.of_voxels(windows.shape)))
        image = self._first.x[self._item : self._item + 1] * maps[:, None]
        padded = windows.pad(image)

        def predicted(window: int) -> torch.Tensor:
            batch = self._first.capture.to_model(windows.cut(padded, [window]))
            return self._first.capture.observe(batch, copy=False)

        return self._stitched(predicted, len(channels))

    def without_channels(self, channels: list[int]) -> torch.Tensor:
        """Return the logits (n, K, *S) when each channel is set to zero, in every window."""
        scale = torch.ones(len(channels), self.channels, device="cpu")
        scale[range(len(channels)), channels] = 0

        def predicted(window: int) -> torch.Tensor:
            x = self._first.cut([self._item], [window])
            batch = x.expand(len(channels), *x.shape[1:]).contiguous()
            return self._first.capture.scaled(batch, self._layer, scale.to(batch))

        return self._stitched(predicted, len(channels))

    def blended(
        self, pick: Callable[[torch.Tensor], torch.Tensor], count: int
    ) -> tuple[torch.Tensor, FeatureGrid]:
        """Return what is picked from activations (1, C, *s), as (count, *s) of the volume."""
        blend = Blend(self._first.windows, self._grid, self._first.x.new_zeros(count))
        group = blend.group()
        for window, a in self._activations():
            group.add(window, pick(wide(a)))
        group.finish()
        return blend.total, blend.grid

    def _activations(self) -> Iterator[tuple[int, torch.Tensor]]:
        first, one = self._first, slice(self._item, self._item + 1)
        every = range(len(first.windows))
        for window, activations in activation_pass(first, [self._item], every):
            a = activations[self._layer]
            yield window, a if len(every) > 1 else a[one]

    def _stitched(self, predicted: Callable[[int], torch.Tensor], count: int) -> torch.Tensor:
        logits = self._first.logits
        total = logits.new_zeros(count, *logits.shape[1:])
        for window in self._which:
            stitch(self._first, total, range(count), [window], predicted(window))
        return total


def _is_sum(target: Target) -> bool:
    """Tell a score that is a sum over the voxels of its region from one that is not, as a Dice."""
    if isinstance(target, score.WeightedSum):
        return all(_is_sum(part) for _, part in target.parts)
    return isinstance(target, score.SumOverRegion)


def _windows_of(first: FirstPass, region: torch.Tensor | None) -> list[int]:
    """Return the windows that a region (1, *S) lies in; None is everywhere."""
    every = list(range(len(first.windows)))
    if region is None or len(every) == 1:
        return every
    padded = first.windows.pad_with_zeros(region[:, None].to(torch.uint8))
    return [window for window in every if first.windows.cut(padded, [window]).any()]


def _zero_to_one(maps: torch.Tensor) -> torch.Tensor:
    """Scale each map (n, *S) to [0, 1]; a constant one becomes zeros."""
    flat = maps.flatten(1)
    low, high = (for_each_item(value, maps.ndim) for value in (flat.amin(1), flat.amax(1)))
    return (maps - low) / torch.where(high > low, high - low, 1)


def _at_once(first: FirstPass, memory_gb: float) -> AtOnce:
    """Return how many perturbed inputs fit in memory."""
    if first.capture.known.draws:  # those of a batch are others than those of its items
        return AtOnce(1, "changed inputs", "memory_gb")
    if not first.footprint:
        first.footprint = _footprint(first)
    return AtOnce(
        max(1, int(min(memory_gb * 1e9 / first.footprint, 1e9))), "changed inputs", "memory_gb"
    )


def _footprint(first: FirstPass) -> int:
    """Return what one input takes, in bytes, as if no layer's output were let go of."""
    taken = 0

    def count(module: torch.nn.Module, args: object, output: object) -> None:
        nonlocal taken
        taken += sum(t.numel() * t.element_size() for _, t in tensors_in(output))

    x = first.cut([0], [0])
    hooks = [
        module.register_forward_hook(count)
        for module in first.capture.model.modules()
        if not any(module.children()) and takes_hooks(module)
    ]
    try:
        first.capture.observe(x, copy=False)
    finally:
        for hook in hooks:
            hook.remove()
    stitched = first.logits[:1].numel() * first.logits.element_size()
    return taken + 2 * x.numel() * x.element_size() + 2 * stitched
