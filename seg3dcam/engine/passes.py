"""Passes over a volume, window by window: predict it, and look at its activations again.

`FirstPass` holds the results of the prediction, on which all other passes build. The backward
passes are in `gradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from seg3dcam.engine.memory import BatchLimit
from seg3dcam.engine.seed import index_of
from seg3dcam.errors import ModelError
from seg3dcam.network.capture import Capture
from seg3dcam.network.layers import LayerRef
from seg3dcam.network.module_class import takes_hooks
from seg3dcam.network.outputs import tensors_in
from seg3dcam.progress import Progress
from seg3dcam.windows import Windows, stitched

Activations = dict[LayerRef, torch.Tensor]


class ActivationCache:
    """Activations of windows that later passes need again, kept as long as there is room.

    They lie on the scan's device, which is the CPU for a scan that is larger than the GPU.

    Args:
        room: the memory in bytes that all of them together may take.
        device: where they are kept.
    """

    def __init__(self, room: int, device: torch.device) -> None:
        self._room, self._device = room, device
        self._kept: dict[tuple[int, int], Activations] = {}
        self._homes: dict[LayerRef, torch.device] = {}

    @property
    def has_room(self) -> bool:
        return self._room > 0

    def offer(self, item: int, window: int, activations: Activations) -> None:
        """Keep a copy of the activations of an item's window, if there is room for it."""
        self._room -= sum(a.numel() * a.element_size() for a in activations.values())
        if self.has_room:
            copies = {la: a.to(self._device, copy=True) for la, a in activations.items()}
            self._homes.update({layer: a.device for layer, a in activations.items()})
            self._kept[item, window] = copies

    def keep(self, item: int, window: int, activations: Activations) -> None:
        """Keep the activations themselves, whatever they take."""
        self._homes.update({layer: a.device for layer, a in activations.items()})
        self._kept[item, window] = activations

    def __contains__(self, place: tuple[int, int]) -> bool:
        return place in self._kept

    def __getitem__(self, place: tuple[int, int]) -> Activations:
        """Return the activations of (item, window), each on the device of its layer."""
        return {layer: a.to(self._homes[layer]) for layer, a in self._kept[place].items()}


@dataclass
class FirstPass:
    """The results of the first pass, on which all others build.

    Attributes:
        x: the input (B, C, *S).
        logits: (B, K, *S), detached, on the device of `x`.
        shapes: layer -> spatial shape of its activations in one window.
        graph: with one window, the padded logits with their graph; else None.
        activations: with one window, those of the whole batch.
        cache: of several windows, the activations that were kept.
        own: of a member of an ensemble, its own logits; `logits` are then the ensemble's.
        at_once: how many windows go through the network at once.
    """

    capture: Capture
    windows: Windows
    x: torch.Tensor
    logits: torch.Tensor
    shapes: dict[LayerRef, tuple[int, ...]]
    graph: torch.Tensor | None = None
    activations: Activations = field(default_factory=dict)
    cache: ActivationCache | None = None
    own: torch.Tensor | None = None
    at_once: BatchLimit = field(default_factory=lambda: BatchLimit(1))

    @classmethod
    def of_first_window(
        cls, capture: Capture, windows: Windows, x: torch.Tensor, at_once: BatchLimit
    ) -> FirstPass:
        """Run the first item's first window as far as the layers, and nothing else.

        Its activations are kept. There are no logits.
        """
        first = cls(capture, windows, x, x.new_empty(0), {}, at_once=at_once)
        cache = ActivationCache(0, x.device)
        cache.keep(0, 0, capture.observe_layers(first.cut([0], [0])))
        return replace(first, shapes=capture.shapes, cache=cache)

    @property
    def items(self) -> list[list[int]]:
        """The items that are worked on together: all of them in one window, else one by one."""
        batch = list(range(len(self.x)))
        return [batch] if len(self.windows) == 1 else [[item] for item in batch]

    @cached_property
    def padded(self) -> torch.Tensor:
        return self.windows.pad(self.x)

    @cached_property
    def total_importance(self) -> torch.Tensor:
        return self.windows.total_importance(self.x)

    @cached_property
    def footprint(self) -> int:
        """Memory in bytes of one forward pass if all outputs are kept."""
        taken = 0

        def count(module: torch.nn.Module, args: object, output: object) -> None:
            nonlocal taken
            taken += sum(t.numel() * t.element_size() for _, t in tensors_in(output))

        x = self.cut([0], [0])
        hooks = [
            module.register_forward_hook(count)
            for module in self.capture.model.modules()
            if not any(module.children()) and takes_hooks(module)
        ]
        try:
            self.capture.observe(x, copy=False)
        finally:
            for hook in hooks:
                hook.remove()
        stitched_logits = self.logits[:1].numel() * self.logits.element_size()
        return taken + 2 * x.numel() * x.element_size() + 2 * stitched_logits

    def cut(self, items: Sequence[int], which: Sequence[int]) -> torch.Tensor:
        """Return windows of the input as the network takes them: (items x windows, C, *roi)."""
        # `cut` copies, because a network may change its input in place.
        return self.capture.to_model(self.windows.cut(self.padded[list(items)], which))

    def place(self, window: int) -> tuple[Sequence[int], Sequence[int]]:
        """Return where a window's logits lie in those of the volume: start and size."""
        windows = self.windows
        if len(windows) == 1 and windows.padded_shape == windows.shape:
            # The logits may have any resolution; those of a classifier have no spatial axes.
            size = self.logits.shape[2:]
            return (0,) * len(size), size
        starts = zip(windows.starts[window], windows.before, strict=True)
        return [start - before for start, before in starts], windows.roi

    def release_graph(self) -> None:
        """Free the memory of the graph, when no further gradient needs it."""
        self.graph = None


def suited(capture: Capture, x: torch.Tensor, windows: Windows) -> tuple[torch.Tensor, Windows]:
    """Return the input in the network's precision, and windows that suit the network.

    Every pass of a network that draws random numbers starts from the same random state. But the
    numbers drawn for a batch differ from those drawn for single items, so its windows are run one
    at a time.
    """
    # float64 stays float64
    x = x.to(torch.promote_types(x.dtype, capture.dtype))
    if len(windows) > 1:
        capture.find_out_whether_it_draws(
            lambda: capture.to_model(windows.cut(windows.pad(x[:1]), [0]).clone())
        )
        windows = windows.one_by_one() if capture.known.draws else windows
    return x, windows


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
        return _predict_in_one(capture, x, windows, graph, keep, progress)
    cache = ActivationCache(int(windows.plan.cache_gb * 1e9) if keep else 0, x.device)
    at_once = BatchLimit(windows.plan.sw_batch_size)
    done = 0

    def predicted(batch: torch.Tensor) -> torch.Tensor:
        nonlocal done
        logits = capture.observe(capture.to_model(batch.clone()), copy=cache.has_room)
        check_resolution(logits, windows.roi)
        if cache.has_room:
            for number, activations in enumerate(_split(capture.activations, len(batch)), done):
                cache.offer(*divmod(number, len(windows)), activations)
        done += len(batch)
        progress("predicting", done, len(windows) * len(x))
        return logits.to(batch)

    def predictor(batch: torch.Tensor) -> torch.Tensor:
        parts = list(at_once.each(len(batch), lambda part: predicted(batch[part])))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    logits = _stitched_logits(capture, x, windows, predictor)
    return FirstPass(capture, windows, x, logits, capture.shapes, cache=cache, at_once=at_once)


def _predict_in_one(
    capture: Capture, x: torch.Tensor, windows: Windows, graph: bool, keep: bool, progress: Progress
) -> FirstPass:
    """Run the first pass of one window, which is the whole volume."""
    progress("predicting", 0, 1)
    # A copy: a network may change its input in place, and this one belongs to the caller.
    padded = capture.to_model(windows.pad(x).clone())
    output = capture.forward(padded) if graph else capture.observe(padded, copy=keep)
    if windows.padded_shape != windows.shape:
        check_resolution(output, windows.roi)
    logits = windows.crop(output.detach()).to(x)
    return FirstPass(
        capture,
        windows,
        x,
        logits,
        capture.shapes,
        graph=output if graph else None,
        activations=capture.activations,
    )


def _stitched_logits(
    capture: Capture,
    x: torch.Tensor,
    windows: Windows,
    predictor: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return the logits (B, K, *S) as nnU-Net or MONAI stitch them."""
    plan = windows.plan
    if plan.convention != "monai":
        return stitched(windows, x, predictor)
    from monai.inferers import sliding_window_inference

    return sliding_window_inference(
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
    at_once = BatchLimit(windows.plan.sw_batch_size)
    first = FirstPass(capture, windows, x, logits, {}, at_once=at_once)
    capture.observe_layers(first.cut([0], [0]))
    return replace(first, shapes=capture.shapes)


def scored_alone(
    target: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor, item: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a target as a function of one item's logits (1, K, *S) -> (1,).

    The other items keep their logits, since a target may hold a mask for every item.

    Args:
        target: one that is fixed.
        logits: (B, K, *S) of all items.
    """

    def score(own: torch.Tensor) -> torch.Tensor:
        batch = torch.cat([logits[:item], own, logits[item + 1 :]])
        return target(batch)[item : item + 1]

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
        start, size = first.place(window)
        if len(windows) > 1:
            part = part.clone()
            windows.weigh_by_share(part, window, first.total_importance)
        low = [max(0, s) for s in start]
        high = [min(s + n, end) for s, n, end in zip(start, size, total.shape[2:], strict=True)]
        inside = total[slice(items[0], items[-1] + 1)]
        outer: Any = (..., *map(slice, low, high))
        inside[outer] += part[(..., *index_of(low, high, start))]


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
    kept = [window for window in which if first.cache is not None and (item, window) in first.cache]
    computed = _computed_again(first, items, [window for window in which if window not in kept])
    for window in which:
        if first.cache is not None and window in kept:
            yield window, first.cache[item, window]
        else:
            yield next(computed)


def check_resolution(logits: torch.Tensor, shape: Sequence[int]) -> None:
    """Raise ModelError unless logits have the input's spatial shape."""
    if tuple(logits.shape[2:]) != tuple(shape):
        raise ModelError(
            f"the network gave logits of shape {tuple(logits.shape)} for a window of "
            f"{tuple(shape)} voxels: whole scans can be explained only at full resolution"
        )


def wide(values: torch.Tensor) -> torch.Tensor:
    """Return the values in float32 at least: half precision is for networks, not for sums."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _computed_again(
    first: FirstPass, items: Sequence[int], which: Sequence[int]
) -> Iterator[tuple[int, Activations]]:
    def observed(part: slice) -> tuple[Sequence[int], Activations]:
        return which[part], first.capture.observe_layers(first.cut(items, which[part]))

    for batch, found in first.at_once.each(len(which), observed):
        yield from zip(batch, _split(found, len(batch)), strict=True)


def _split(activations: Activations, count: int) -> Iterator[Activations]:
    """Split a batch of windows into its windows."""
    for window in range(count):
        yield {layer: a[window : window + 1] for layer, a in activations.items()}
