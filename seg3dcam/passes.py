"""The two passes over a volume: predict, then attribute the score to each window's activations.

For logits stitched from windows, L(v) = sum_w share_w(v) l_w(v), and any score S(L), the gradient
of S with respect to the activations of window w is that window's own backward pass, started with
`share_w * dS/dL`. So the whole volume is explained exactly, one batch of windows at a time, and a
window where `dS/dL` vanishes needs no backward pass at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from monai.inferers import sliding_window_inference

from seg3dcam.capture import Capture
from seg3dcam.errors import ModelError
from seg3dcam.geometry import FeatureGrid, cropped
from seg3dcam.layers import LayerRef
from seg3dcam.methods import PooledGradient
from seg3dcam.methods.pooled import weighted_sum
from seg3dcam.result import LayerMap, joined
from seg3dcam.windows import Blend, Windows

#: Called with (step, windows done, windows in all).
Progress = Callable[[str, int, int], None]

Activations = dict[LayerRef, torch.Tensor]


def silent(step: str, done: int, total: int) -> None:
    """Report no progress."""


@dataclass
class FirstPass:
    """What the first pass leaves behind.

    Attributes:
        x: the input (B, C, *S).
        logits: (B, K, *S), detached, on the device of `x`.
        graph: with one window, the padded logits with their graph; else None.
        shapes: layer -> spatial shape of its activations in one window.
        kept: (item, window) -> activations, as far as they fit the plan's memory limit.
    """

    capture: Capture
    windows: Windows
    x: torch.Tensor
    logits: torch.Tensor
    shapes: dict[LayerRef, tuple[int, ...]]
    graph: torch.Tensor | None = None
    kept: dict[tuple[int, int], Activations] = field(default_factory=dict)

    @cached_property
    def padded(self) -> torch.Tensor:
        return self.windows.pad(self.x)

    @cached_property
    def total_importance(self) -> torch.Tensor:
        return self.windows.total_importance(self.x)


def predict(
    capture: Capture, x: torch.Tensor, windows: Windows, *, keep: bool, progress: Progress
) -> FirstPass:
    """Run the first pass: the logits of the whole volume.

    Args:
        keep: whether the second pass will need the activations of every window.
    """
    if len(windows) == 1:
        # Cloned: a network may work in place on its input, and that is the caller's.
        progress("predicting", 0, 1)
        graph = capture.forward(capture.to_model(windows.pad(x).clone()))
        if windows.padded_shape != windows.shape:
            check_resolution(graph, windows.roi)
        logits = windows.crop(graph.detach()).to(x)
        return FirstPass(capture, windows, x, logits, capture.shapes, graph)

    kept: dict[tuple[int, int], Activations] = {}
    room = int(windows.plan.cache_gb * 1e9) if keep else 0
    done = 0

    def predictor(batch: torch.Tensor) -> torch.Tensor:
        nonlocal done, room
        logits = capture.observe(capture.to_model(batch.clone()), copy=room > 0)
        check_resolution(logits, windows.roi)
        if room > 0:
            for offset, activations in enumerate(_split(capture.activations, len(batch))):
                room -= sum(a.numel() * a.element_size() for a in activations.values())
                if room > 0:
                    kept[divmod(done + offset, len(windows))] = _to(activations, x.device)
        done += len(batch)
        progress("predicting", done, len(windows) * len(x))
        return logits.to(batch)

    plan = windows.plan
    logits = sliding_window_inference(
        x,
        windows.roi,
        plan.sw_batch_size,
        predictor,
        overlap=plan.overlap,
        mode=plan.mode,
        sigma_scale=plan.sigma_scale,
        padding_mode=plan.padding_mode,
        cval=plan.cval,
        sw_device=capture.device,
        device=x.device,
    )
    return FirstPass(capture, windows, x, logits, capture.shapes, kept=kept)


def attribute(
    first: FirstPass,
    seed: torch.Tensor,
    method: PooledGradient,
    grids: dict[LayerRef, FeatureGrid],
    *,
    last: bool,
    progress: Progress,
) -> dict[LayerRef, LayerMap]:
    """Run the second pass: the raw map of every layer over the whole volume.

    Args:
        seed: dS/dlogits, (B, K, *S).
        grids: layer -> its grid in one window.
        last: whether the first pass may be let go of.
    """
    if first.graph is not None:  # one window: all items of the batch at once
        gradients = _of_the_graph(first, first.graph, seed, last)
        return _attribute(first, 0, gradients, method, grids, len(first.x), progress)
    items = []
    for item in range(len(first.x)):
        gradients = _of_windows(first, item, seed[item : item + 1], progress)
        items.append(_attribute(first, item, gradients, method, grids, 1, progress))
    return {layer: joined([item[layer] for item in items]) for layer in grids}


#: (windows, activations and gradients of these windows as a batch)
_Gradients = Iterator[tuple[list[int], Activations, Activations]]


def _attribute(
    first: FirstPass,
    item: int,
    gradients: _Gradients,
    method: PooledGradient,
    grids: dict[LayerRef, FeatureGrid],
    batch: int,
    progress: Progress,
) -> dict[LayerRef, LayerMap]:
    windows = first.windows
    groups = windows.groups(method.whole_axes(first.x.ndim - 2))
    group_of = {window: number for number, group in enumerate(groups) for window in group}
    like = first.x.new_zeros(batch)
    makers = {layer: _MapMaker(windows, grid, method, like) for layer, grid in grids.items()}

    for which, activations, gradient in gradients:
        for layer, maker in makers.items():
            pairs = zip(activations[layer].split(batch), gradient[layer].split(batch), strict=True)
            for window, (a, g) in zip(which, pairs, strict=True):
                if len(groups[group_of[window]]) == 1:
                    maker.map_alone(window, _wide(a), _wide(g))
                else:
                    maker.collect(group_of[window], _wide(g))

    for number, group in enumerate(groups):
        waiting = [maker for maker in makers.values() if maker.start_group(number, len(group))]
        if not waiting:
            continue
        for done, (window, activations) in enumerate(_activations(first, item, group), 1):
            for layer, maker in makers.items():
                if maker in waiting:
                    maker.map_in_group(window, _wide(activations[layer]))
            progress("mapping", done, len(group))
        for maker in waiting:
            maker.finish_group()
    precision = {layer: a.dtype for layer, a in first.capture.activations.items()}
    return {layer: maker.result(precision[layer]) for layer, maker in makers.items()}


class _MapMaker:
    """Makes one layer's map, window by window, and the map that it would be if nothing cancelled.

    That ceiling, the method applied to absolute values, tells a small map from rounding noise.
    """

    def __init__(
        self, windows: Windows, grid: FeatureGrid, method: PooledGradient, like: torch.Tensor
    ) -> None:
        self._windows, self._grid, self._method = windows, grid, method
        self._blend = Blend(windows, grid, like)
        self._ceiling = torch.zeros_like(like)
        self._collected: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def map_alone(self, window: int, a: torch.Tensor, g: torch.Tensor) -> None:
        """Map a window that is pooled with no other."""
        self._blend.add_alone(window, self._method(a, g))
        self._raise_ceiling(self._method(a.abs(), g.abs()))

    def collect(self, group: int, g: torch.Tensor) -> None:
        """Keep the weights of a window until its group is complete."""
        weights = (self._method.weights(g), self._method.weights(g.abs()))
        self._collected.setdefault(group, []).append(weights)

    def start_group(self, group: int, size: int) -> bool:
        """Join the weights of a group of windows; False if none of them has a gradient."""
        collected = self._collected.pop(group, None)
        if collected is None:
            return False
        lengths = self._windows.lengths(self._method.whole_axes(len(self._grid.shape)))
        signed, absolute = zip(*collected, strict=True)
        missing = len(collected) < size
        self._weights = self._method.join(signed, lengths, missing=missing)
        self._absolute = self._method.join(absolute, lengths, missing=missing)
        self._group = self._blend.group()
        return True

    def map_in_group(self, window: int, a: torch.Tensor) -> None:
        """Map a window with its group's weights."""
        a = a.to(self._weights)
        self._group.add(window, weighted_sum(a, self._weights))
        self._raise_ceiling(weighted_sum(a.abs(), self._absolute))

    def finish_group(self) -> None:
        """Blend the group's maps by their shares."""
        self._group.finish()

    def result(self, precision: torch.dtype) -> LayerMap:
        """Return the map, without the voxels that lie in padding alone."""
        values, grid = cropped(self._blend.total, self._blend.grid, self._windows.shape)
        return LayerMap(values, grid, self._grid, self._ceiling, precision)

    def _raise_ceiling(self, absolute: torch.Tensor) -> None:
        highest = absolute.flatten(1).amax(1).to(self._ceiling)
        self._ceiling = torch.maximum(self._ceiling, highest)


def _of_the_graph(
    first: FirstPass, graph: torch.Tensor, seed: torch.Tensor, last: bool
) -> _Gradients:
    if last:
        first.graph = None
    upstream = first.windows.pad_with_zeros(seed).to(graph)
    gradients = first.capture.gradients(graph, upstream, keep_graph=not last)
    yield [0], first.capture.activations, gradients


def _of_windows(first: FirstPass, item: int, seed: torch.Tensor, progress: Progress) -> _Gradients:
    """Yield the gradients of every window where the seed is not zero everywhere."""
    windows, capture = first.windows, first.capture
    seed = windows.pad_with_zeros(seed).div_(first.total_importance)  # ours alone: in place
    image = first.padded[item : item + 1]
    seeded = [window for window in range(len(windows)) if windows.cut(seed, [window]).any()]
    done = 0
    for which in windows.batches(seeded):
        logits = capture.forward(capture.to_model(windows.cut(image, which)))
        upstream = windows.cut(seed, which) * windows.importance.to(seed)
        gradients = capture.gradients(logits, upstream.to(logits))
        yield which, capture.activations, gradients
        done += len(which)
        progress("explaining", done, len(seeded))


def _activations(
    first: FirstPass, item: int, which: Sequence[int]
) -> Iterator[tuple[int, Activations]]:
    """Yield the activations of windows, kept from the first pass or computed again."""
    again = [window for window in which if (item, window) not in first.kept]
    for window in which:
        if (item, window) in first.kept:
            yield window, first.kept[item, window]
    image = first.padded[item : item + 1]
    for batch in first.windows.batches(again):
        x = first.capture.to_model(first.windows.cut(image, batch))
        found = first.capture.observe_layers(x)
        yield from zip(batch, _split(found, len(batch)), strict=True)


def check_resolution(logits: torch.Tensor, shape: Sequence[int]) -> None:
    """Raise ModelError unless logits have the input's spatial shape."""
    if tuple(logits.shape[2:]) != tuple(shape):
        raise ModelError(
            f"the network gave logits of shape {tuple(logits.shape)} for a window of "
            f"{tuple(shape)} voxels: whole scans can be explained only at full resolution"
        )


def _split(activations: Activations, count: int) -> Iterator[Activations]:
    """Split a batch of windows into its windows."""
    for window in range(count):
        yield {layer: a[window : window + 1] for layer, a in activations.items()}


def _to(activations: Activations, device: torch.device) -> Activations:
    return {layer: a.to(device, copy=True) for layer, a in activations.items()}


def _wide(values: torch.Tensor) -> torch.Tensor:
    """Return at least float32: half precision is for networks, not for sums."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
