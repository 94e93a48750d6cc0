"""Gradients at the layers, in every window where a score changes at all.

For logits stitched from windows, L(v) = sum_w share_w(v) l_w(v), and any score S(L), the gradient
of S with respect to the activations of window w is that window's own backward pass, started with
`share_w * dS/dL`. So the whole volume is explained exactly, one batch of windows at a time, and a
window where `dS/dL` vanishes needs no backward pass at all. Several scores share the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from seg3dcam.engine.passes import Activations, FirstPass
from seg3dcam.engine.seed import Seed
from seg3dcam.network.layers import LayerRef
from seg3dcam.progress import Progress


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
    backward = _BackwardPasses(first, items, seeds, touched, keep_graph, create_graph)
    every = sorted(touched)
    # Windows, and the targets whose gradients are still to come there; the next ones are last.
    waiting = [(every, list(range(len(seeds))))] if every else []
    done = 0
    while waiting:
        which, wanted = waiting.pop()
        if len(which) > first.at_once.count:
            which, later = which[: first.at_once.count], which[first.at_once.count :]
            waiting.append((later, [*wanted]))
        wanted = [n for n in wanted if any(n in touched[window] for window in which)]
        try:
            for found in backward.in_windows(which, wanted):
                yield found
                wanted = [n for n in wanted if n != found.target]
                del found  # so that its memory is free once the caller is done with it
        except torch.OutOfMemoryError as error:
            first.at_once.halve(len(which), error)
            first.capture.clear()
            waiting.append((which, wanted))
            continue
        done += len(which)
        progress("explaining", done, len(touched))


@dataclass(frozen=True)
class _BackwardPasses:
    """What the backward passes of all batches of windows share; see `gradient_pass`.

    Attributes:
        touched: window -> the targets that have a seed in it.
    """

    first: FirstPass
    items: Sequence[int]
    seeds: Sequence[Seed]
    touched: Mapping[int, Sequence[int]]
    keep_graph: bool
    create_graph: bool

    def in_windows(self, which: list[int], targets: Sequence[int]) -> Iterator[Gradients]:
        """Yield the gradients of some targets in one batch of windows."""
        if not targets:  # all of them came before memory ran out
            return
        capture = self.first.capture
        if self.first.graph is not None:
            logits, keep = self.first.graph, self.keep_graph
        else:
            logits, keep = capture.forward(self.first.cut(self.items, which)), False
        for target in targets:
            last = target == targets[-1]
            upstream = upstream_of(self.first, self.seeds[target], self.items, which).to(logits)
            upstream.requires_grad_(self.create_graph)
            gradients = capture.gradients(
                logits,
                upstream,
                keep_graph=keep or not last or self.create_graph,
                create_graph=self.create_graph,
            )
            seeded = [window for window in which if target in self.touched[window]]
            yield Gradients(target, which, seeded, logits, upstream, capture.activations, gradients)


def seeded_windows(first: FirstPass, items: Sequence[int], seed: Seed) -> list[int]:
    """Return the windows where a seed is not zero everywhere."""
    every = range(len(first.windows))
    return [window for window in every if seed.touches(items, *first.place(window))]


def upstream_of(
    first: FirstPass, seed: Seed, items: Sequence[int], which: Sequence[int]
) -> torch.Tensor:
    """Return the part of a seed in each of some windows, weighted with the window's share."""
    windows = first.windows
    parts = [seed.cut(items, *first.place(window)) for window in which]
    if len(windows) > 1:
        for window, part in zip(which, parts, strict=True):
            windows.weigh_by_share(part, window, first.total_importance)
    return parts[0] if len(parts) == 1 else torch.cat(parts)
