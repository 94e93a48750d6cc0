"""Passes over a volume, window by window: predict it, take gradients, look at activations again.

For logits stitched from windows, L(v) = sum_w share_w(v) l_w(v), and any score S(L), the gradient
of S with respect to the activations of window w is that window's own backward pass, started with
`share_w * dS/dL`. So the whole volume is explained exactly, one batch of windows at a time, and a
window where `dS/dL` vanishes needs no backward pass at all. Several scores share the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from seg3dcam.engine.memory import AtOnce
from seg3dcam.errors import ModelError
from seg3dcam.network.capture import Capture
from seg3dcam.network.layers import LayerRef
from seg3dcam.windows import Windows, stitched

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
        activations: with one window, those of the whole batch.
        shapes: layer -> spatial shape of its activations in one window.
        kept: (item, window) -> activations, as far as they fit the plan's memory limit.
        footprint: bytes that one input takes in a forward pass, once measured.
        own: of a member of an ensemble, its own logits; `logits` are then the ensemble's.
        devices: layer -> where its activations were before they were kept.
        at_once: how many windows go through the network at once.
    """

    capture: Capture
    windows: Windows
    x: torch.Tensor
    logits: torch.Tensor
    shapes: dict[LayerRef, tuple[int, ...]]
    graph: torch.Tensor | None = None
    activations: Activations = field(default_factory=dict)
    kept: dict[tuple[int, int], Activations] = field(default_factory=dict)
    footprint: int = 0
    own: torch.Tensor | None = None
    devices: dict[LayerRef, torch.device] = field(default_factory=dict)
    at_once: AtOnce = field(default_factory=lambda: AtOnce(1))

    @property
    def items(self) -> list[list[int]]:
        """The items that are worked on together: all in one window, else one by one."""
        batch = list(range(len(self.x)))
        return [batch] if len(self.windows) == 1 else [[item] for item in batch]

    @cached_property
    def padded(self) -> torch.Tensor:
        return self.windows.pad(self.x)

    @cached_property
    def total_importance(self) -> torch.Tensor:
        return self.windows.total_importance(self.x)

    def cut(self, items: Sequence[int], which: Sequence[int]) -> torch.Tensor:
        """Return windows of the input as the network takes them: (items x windows, C, *roi)."""
        # A copy, as whatever is cut: a network may work in place on its input.
        return self.capture.to_model(self.windows.cut(self.padded[list(items)], which))


@dataclass(frozen=True)
class Seed:
    """dS/dlogits of one target, kept as the smallest box of channels and voxels that is not zero.

    Attributes:
        start: first index of the box in (B, K, *S).
        values: the box.
        shape: (B, K, *S).
    """

    start: tuple[int, ...]
    values: torch.Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, dense: torch.Tensor) -> Seed:
        """Return the seed with the values of a (B, K, *S) tensor.

        >>> seed = Seed.of(torch.tensor([[[0.0, 2.0, 0.0]]]))
        >>> seed.start, seed.values.tolist()
        ((0, 0, 1), [[[2.0]]])
        """
        start, box = [0], dense  # of all items
        for axis in range(1, dense.ndim):
            first, end = _used(box, axis)
            start.append(first)
            box = box.narrow(axis, first, end - first)
        whole = box.shape == dense.shape
        return cls(tuple(start), box if whole else box.clone(), tuple(dense.shape))

    def touches(self, items: Sequence[int], start: Sequence[int], size: Sequence[int]) -> bool:
        """Tell whether anything in a box in space is not zero; for the arguments see `cut`."""
        low, high = self._overlap(items, start, size)
        if any(a >= b for a, b in zip(low, high, strict=True)):
            return False
        inner = self.values[_between(low, high, self.start)]
        return inner.shape == self.values.shape or bool((inner != 0).any())

    def cut(self, items: Sequence[int], start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        """Return a box in space, (len(items), K, *size).

        Args:
            items: consecutive ones.
            start: of the box in voxels of the volume; it may reach beyond the volume.
        """
        low, high = self._overlap(items, start, size)
        first = [items[0], 0, *start]
        if self.values.shape == (len(items), self.shape[1], *size) and first == [*self.start]:
            return self.values.clone()
        result = self.values.new_zeros(len(items), self.shape[1], *size)
        if all(a < b for a, b in zip(low, high, strict=True)):
            result[_between(low, high, first)] = self.values[_between(low, high, self.start)]
        return result

    def _overlap(
        self, items: Sequence[int], start: Sequence[int], size: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Return where a box in space and this one overlap: first and past-the-last index."""
        first = [items[0], 0, *start]
        lengths = [len(items), self.shape[1], *size]
        low = list(map(max, first, self.start))
        ends = [f + n for f, n in zip(first, lengths, strict=True)]
        own = [s + n for s, n in zip(self.start, self.values.shape, strict=True)]
        return low, list(map(min, ends, own))


def _used(values: torch.Tensor, axis: int) -> tuple[int, int]:
    """Return first and past-the-last index along an axis of what is not zero; NaN is not."""
    size = values.shape[axis]
    if not size:
        return 0, 0
    if all((values.select(axis, rim) != 0).any() for rim in (0, size - 1)):
        return 0, size  # most often, and seen at a glance
    used = (values != 0).transpose(0, axis).flatten(1).any(1).nonzero().flatten().tolist()
    return (used[0], used[-1] + 1) if used else (0, 0)


def predict(
    capture: Capture,
    x: torch.Tensor,
    windows: Windows,
    *,
    graph: bool,
    keep: bool,
    progress: Progress,
) -> FirstPass:
    """Run the first pass: the logits of the whole volume.

    Args:
        graph: whether gradients will be asked for.
        keep: whether later passes will need the activations of every window.
    """
    if len(windows) == 1:
        progress("predicting", 0, 1)
        # Cloned: a network may work in place on its input, and that is the caller's.
        padded = capture.to_model(windows.pad(x).clone())
        output = capture.forward(padded) if graph else capture.observe(padded, copy=keep)
        if windows.padded_shape != windows.shape:
            check_resolution(output, windows.roi)
        logits = windows.crop(output.detach()).to(x)
        first = FirstPass(capture, windows, x, logits, capture.shapes)
        first.graph, first.activations = output if graph else None, capture.activations
        return first

    kept: dict[tuple[int, int], Activations] = {}
    devices: dict[LayerRef, torch.device] = {}
    room = int(windows.plan.cache_gb * 1e9) if keep else 0
    done = 0

    def predicted(batch: torch.Tensor) -> torch.Tensor:
        nonlocal done, room
        logits = capture.observe(capture.to_model(batch.clone()), copy=room > 0)
        check_resolution(logits, windows.roi)
        if room > 0:
            devices.update({layer: a.device for layer, a in capture.activations.items()})
            for offset, activations in enumerate(_split(capture.activations, len(batch))):
                room -= sum(a.numel() * a.element_size() for a in activations.values())
                if room > 0:
                    kept[divmod(done + offset, len(windows))] = _to(activations, x.device)
        done += len(batch)
        progress("predicting", done, len(windows) * len(x))
        return logits.to(batch)

    plan = windows.plan
    at_once = AtOnce(plan.sw_batch_size)

    def predictor(batch: torch.Tensor) -> torch.Tensor:
        parts = list(at_once.each(len(batch), lambda part: predicted(batch[part])))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    if plan.convention != "monai":
        logits = stitched(windows, x, predictor)
        first = FirstPass(capture, windows, x, logits, capture.shapes, kept=kept)
        return replace(first, devices=devices, at_once=at_once)
    from monai.inferers import sliding_window_inference

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
    first = FirstPass(capture, windows, x, logits, capture.shapes, kept=kept)
    return replace(first, devices=devices, at_once=at_once)


def predict_member(
    capture: Capture,
    x: torch.Tensor,
    windows: Windows,
    logits: torch.Tensor,
    *,
    graph: bool,
    keep: bool,
    own: bool,
    progress: Progress,
) -> FirstPass:
    """Run the first pass of a network whose ensemble has been predicted.

    Through windows it predicts again only where it must.

    Args:
        logits: the ensemble's, (B, K, *S).
        graph, keep: as for `predict`.
        own: whether its own logits are wanted too.
    """
    if len(windows) == 1 or keep or own:
        first = predict(capture, x, windows, graph=graph, keep=keep, progress=progress)
        return replace(first, logits=logits, own=first.logits)
    at_once = AtOnce(windows.plan.sw_batch_size)
    first = FirstPass(capture, windows, x, logits, {}, at_once=at_once)
    capture.observe_layers(first.cut([0], [0]))
    return replace(first, shapes=capture.shapes)


@dataclass(frozen=True)
class Gradients:
    """Gradients of one target in some windows.

    Attributes:
        target: its number.
        batch: the windows that went through the network together.
        seeded: those of them that have a seed.
        logits: (n, K, *roi) with their graph, n = windows x items.
        upstream: dS/d(logits), (n, K, *roi).
        activations, gradients: layer -> (n, C, *s).
    """

    target: int
    batch: list[int]
    seeded: list[int]
    logits: torch.Tensor
    upstream: torch.Tensor
    activations: Activations
    gradients: Activations

    def each(self, layer: LayerRef) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield (window, activations, gradients) of a layer."""
        if layer not in self.gradients:  # the score does not depend on it
            return
        count = len(self.batch)
        parts = (self.activations[layer].chunk(count), self.gradients[layer].chunk(count))
        for window, a, g in zip(self.batch, *parts, strict=True):
            if window in self.seeded:
                yield window, a, g


def gradient_pass(
    first: FirstPass,
    items: Sequence[int],
    seeds: Sequence[Seed],
    progress: Progress,
    *,
    keep_graph: bool = False,
    create_graph: bool = False,
) -> Iterator[Gradients]:
    """Yield the gradients of every target in every window that has a seed of it.

    All targets share one forward pass per window.

    Args:
        seeds: one for each target.
        keep_graph: whether the first pass's graph (one window) will be needed again.
        create_graph: make gradients that can be differentiated again.
    """
    touched: dict[int, list[int]] = {}
    for number, seed in enumerate(seeds):
        for window in seeded_windows(first, items, seed):
            touched.setdefault(window, []).append(number)
    every = sorted(touched)
    # Windows, and the targets that are still wanted in them; the next ones are last.
    waiting = [(every, list(range(len(seeds))))] if every else []
    done = 0
    while waiting:
        which, wanted = waiting.pop()
        if len(which) > first.at_once.count:
            which, later = which[: first.at_once.count], which[first.at_once.count :]
            waiting.append((later, [*wanted]))
        wanted = [n for n in wanted if any(n in touched[window] for window in which)]
        try:
            for found in _gradients_of(
                first, items, seeds, touched, which, wanted, keep_graph, create_graph
            ):
                yield found
                wanted = [n for n in wanted if n != found.target]
                del found  # whoever took it may be done with it
        except torch.OutOfMemoryError as error:
            first.at_once.halve(len(which), error)
            first.capture.clear()
            waiting.append((which, wanted))
            continue
        done += len(which)
        progress("explaining", done, len(touched))


def _gradients_of(
    first: FirstPass,
    items: Sequence[int],
    seeds: Sequence[Seed],
    touched: Mapping[int, Sequence[int]],
    which: list[int],
    targets: Sequence[int],
    keep_graph: bool,
    create_graph: bool,
) -> Iterator[Gradients]:
    """Yield the gradients of some targets in one batch of windows."""
    if not targets:  # all were found before memory ran out
        return
    capture = first.capture
    if first.graph is not None:
        logits, keep = first.graph, keep_graph
    else:
        logits, keep = capture.forward(first.cut(items, which)), False
    for target in targets:
        last = target == targets[-1]
        upstream = upstream_of(first, seeds[target], items, which).to(logits)
        upstream.requires_grad_(create_graph)
        gradients = capture.gradients(
            logits,
            upstream,
            keep_graph=keep or not last or create_graph,
            create_graph=create_graph,
        )
        seeded = [window for window in which if target in touched[window]]
        yield Gradients(target, which, seeded, logits, upstream, capture.activations, gradients)


def seeded_windows(first: FirstPass, items: Sequence[int], seed: Seed) -> list[int]:
    """Return the windows where a seed is not zero everywhere."""
    every = range(len(first.windows))
    return [window for window in every if seed.touches(items, *_place(first, window))]


def scored_alone(
    target: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor, item: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a target as a function of one item's logits (1, K, *S) -> (1,).

    The others keep theirs: a target may hold a mask for every item.

    Args:
        target: one that is fixed.
        logits: (B, K, *S) of all items.
    """

    def score(own: torch.Tensor) -> torch.Tensor:
        together = torch.cat([logits[:item], own, logits[item + 1 :]])
        return target(together)[item : item + 1]

    return target if len(logits) == 1 else score


def stitch(
    first: FirstPass,
    total: torch.Tensor,
    items: Sequence[int],
    which: Sequence[int],
    values: torch.Tensor,
) -> None:
    """Add windows' values (n, K, *roi), weighted with their shares, to those of the volume.

    Args:
        total: (B, K, *S), changed in place.
    """
    windows = first.windows
    for window, part in zip(which, values.detach().to(total).chunk(len(which)), strict=True):
        start, size = _place(first, window)
        if len(windows) > 1:
            part = part * windows.importance.to(part)
            part /= windows.cut(first.total_importance, [window])
        low = [max(0, s) for s in start]
        high = [min(s + n, end) for s, n, end in zip(start, size, total.shape[2:], strict=True)]
        inside = total[slice(items[0], items[-1] + 1)]
        outer: Any = (..., *map(slice, low, high))
        inside[outer] += part[(..., *_between(low, high, start))]


def activation_pass(
    first: FirstPass, items: Sequence[int], which: Sequence[int]
) -> Iterator[tuple[int, Activations]]:
    """Yield the activations of windows, kept from the first pass or computed again.

    They are on the layer's device, as gradients are.
    """
    if first.activations:
        yield from ((window, first.activations) for window in which)
        return
    (item,) = items
    again = [window for window in which if (item, window) not in first.kept]
    recomputed = _computed_again(first, items, again)
    for window in which:
        kept = first.kept.get((item, window))
        if kept is None:
            yield next(recomputed)
        else:
            home = first.capture.device
            yield window, {k: a.to(first.devices.get(k, home)) for k, a in kept.items()}


def check_resolution(logits: torch.Tensor, shape: Sequence[int]) -> None:
    """Raise ModelError unless logits have the input's spatial shape."""
    if tuple(logits.shape[2:]) != tuple(shape):
        raise ModelError(
            f"the network gave logits of shape {tuple(logits.shape)} for a window of "
            f"{tuple(shape)} voxels: whole scans can be explained only at full resolution"
        )


def wide(values: torch.Tensor) -> torch.Tensor:
    """Return at least float32: half precision is for networks, not for sums."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _computed_again(
    first: FirstPass, items: Sequence[int], which: Sequence[int]
) -> Iterator[tuple[int, Activations]]:
    def observed(part: slice) -> tuple[Sequence[int], Activations]:
        return which[part], first.capture.observe_layers(first.cut(items, which[part]))

    for batch, found in first.at_once.each(len(which), observed):
        yield from zip(batch, _split(found, len(batch)), strict=True)


def _between(low: Sequence[int], high: Sequence[int], start: Sequence[int]) -> Any:
    """Return the index of low ... high - 1 in a tensor whose first voxel is `start`."""
    return tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))


def _place(first: FirstPass, window: int) -> tuple[Sequence[int], Sequence[int]]:
    """Return where a window's logits lie in those of the volume: start and size."""
    windows = first.windows
    if len(windows) == 1 and windows.padded_shape == windows.shape:
        size = first.logits.shape[2:]  # of any resolution; a classifier's have no place at all
        return (0,) * len(size), size
    starts = zip(windows.starts[window], windows.before, strict=True)
    return [start - before for start, before in starts], windows.roi


def upstream_of(
    first: FirstPass, seed: Seed, items: Sequence[int], which: Sequence[int]
) -> torch.Tensor:
    """Return a batch of windows' parts of a seed, each weighted with the window's share."""
    windows = first.windows
    parts = [seed.cut(items, *_place(first, window)) for window in which]
    if len(windows) > 1:
        for window, part in zip(which, parts, strict=True):
            part *= windows.importance.to(part)
            part /= windows.cut(first.total_importance, [window])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _split(activations: Activations, count: int) -> Iterator[Activations]:
    """Split a batch of windows into its windows."""
    for window in range(count):
        yield {layer: a[window : window + 1] for layer, a in activations.items()}


def _to(activations: Activations, device: torch.device) -> Activations:
    return {layer: a.to(device, copy=True) for layer, a in activations.items()}
