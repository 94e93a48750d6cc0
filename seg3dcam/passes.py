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
from seg3dcam.geometry import FeatureGrid
from seg3dcam.layers import LayerRef
from seg3dcam.methods import PooledGradient
from seg3dcam.methods.pooled import weighted_sum
from seg3dcam.windows import Blend, Windows

#: Called with (step, windows done, windows in all).
Progress = Callable[[str, int, int], None]

Activations = dict[LayerRef, torch.Tensor]


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


@dataclass(frozen=True)
class Attribution:
    """A layer's blended map, the grid that it lies on, and how much evidence went into it.

    Attributes:
        values: (B, *grid.shape), raw and signed.
        grid: in voxels of the input.
        window_grid: the layer's grid within one window.
        magnitude: (B,) mean over the layer's voxels of sum over channels of |gradient x value|.
    """

    values: torch.Tensor
    grid: FeatureGrid
    window_grid: FeatureGrid
    magnitude: torch.Tensor


def predict(
    capture: Capture, x: torch.Tensor, windows: Windows, *, keep: bool, progress: Progress
) -> FirstPass:
    """Run the first pass: the logits of the whole volume.

    Args:
        keep: whether the second pass will need the activations of every window.
    """
    if len(windows) == 1:
        graph = capture.forward(capture.to_model(windows.pad(x)))
        logits = windows.crop(graph.detach()).to(x.device)
        return FirstPass(capture, windows, x, logits, capture.shapes, graph)

    kept: dict[tuple[int, int], Activations] = {}
    room = int(windows.plan.cache_gb * 1e9) if keep else 0
    done = 0

    def predictor(batch: torch.Tensor) -> torch.Tensor:
        nonlocal done, room
        logits = capture.observe(batch, copy=room > 0)
        if tuple(logits.shape[2:]) != windows.roi:
            raise ModelError(
                f"the network gave logits of shape {tuple(logits.shape)} for a window of "
                f"{windows.roi} voxels: windows can be stitched only at full resolution"
            )
        if room > 0:
            for offset, activations in enumerate(_split(capture.activations, len(batch))):
                room -= sum(a.numel() * a.element_size() for a in activations.values())
                if room > 0:
                    kept[divmod(done + offset, len(windows))] = _to(activations, x.device)
        done += len(batch)
        progress("predicting", done, len(windows) * len(x))
        return logits.to(x.dtype)

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
) -> dict[LayerRef, Attribution]:
    """Run the second pass: the raw map of every layer over the whole volume.

    Args:
        seed: dS/dlogits, (B, K, *S).
        grids: layer -> its grid in one window.
        last: whether the first pass may be let go of.
    """
    if first.graph is not None:  # one window: all items of the batch at once
        gradients = _of_the_graph(first, first.graph, seed, last)
        return _attribute(first, 0, gradients, method, grids, len(first.x), progress)
    items = [
        _attribute(
            first,
            item,
            _of_windows(first, item, seed[item : item + 1], progress),
            method,
            grids,
            1,
            progress,
        )
        for item in range(len(first.x))
    ]
    return {
        layer: Attribution(
            torch.cat([item[layer].values for item in items]),
            items[0][layer].grid,
            grids[layer],
            torch.cat([item[layer].magnitude for item in items]),
        )
        for layer in grids
    }


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
) -> dict[LayerRef, Attribution]:
    windows = first.windows
    like = first.x.new_zeros(batch, dtype=torch.promote_types(first.x.dtype, torch.float32))
    blends = {layer: Blend(windows, grid, like) for layer, grid in grids.items()}
    magnitudes = {layer: torch.zeros_like(like) for layer in grids}
    whole_axes = method.whole_axes(first.x.ndim - 2)
    groups = windows.groups(whole_axes)
    weights: dict[LayerRef, list[list[torch.Tensor]]] = {
        layer: [[] for _ in groups] for layer in grids
    }
    group_of = {window: g for g, group in enumerate(groups) for window in group}

    for which, activations, gradient in gradients:
        for layer, blend in blends.items():
            A, G = _wide(activations[layer]), _wide(gradient[layer])  # noqa: N806
            for window, a, g in zip(which, A.split(batch), G.split(batch), strict=True):
                magnitudes[layer] += (a * g).abs().flatten(1).sum(1).to(like)
                if len(groups[group_of[window]]) == 1:
                    blend.add_alone(window, method(a, g))
                else:
                    weights[layer][group_of[window]].append(method.weights(g))

    for g, group in enumerate(groups):
        joined = {
            layer: method.join(
                found[g], windows.lengths(whole_axes), missing=len(found[g]) < len(group)
            )
            for layer, found in weights.items()
            if found[g]
        }
        if joined:
            _blend_group(first, item, group, joined, blends, progress)

    voxels = windows.lengths(range(len(windows.roi)))
    return {
        layer: Attribution(
            blend.total,
            blend.grid,
            grids[layer],
            magnitudes[layer] / (voxels * float(torch.Size(grids[layer].shape).numel())),
        )
        for layer, blend in blends.items()
    }


def _blend_group(
    first: FirstPass,
    item: int,
    group: Sequence[int],
    weights: dict[LayerRef, torch.Tensor],
    blends: dict[LayerRef, Blend],
    progress: Progress,
) -> None:
    """Weight the activations of every window of a group, and blend."""
    adders = {layer: blends[layer].group() for layer in weights}
    for done, (window, activations) in enumerate(_activations(first, item, group), 1):
        for layer, adder in adders.items():
            adder.add(
                window, weighted_sum(_wide(activations[layer]).to(weights[layer]), weights[layer])
            )
        progress("mapping", done, len(group))
    for adder in adders.values():
        adder.finish()


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


def _split(activations: Activations, count: int) -> Iterator[Activations]:
    """Split a batch of windows into its windows."""
    for window in range(count):
        yield {layer: a[window : window + 1] for layer, a in activations.items()}


def _to(activations: Activations, device: torch.device) -> Activations:
    return {layer: a.to(device, copy=True) for layer, a in activations.items()}


def _wide(values: torch.Tensor) -> torch.Tensor:
    """Return at least float32: half precision is for networks, not for sums."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
