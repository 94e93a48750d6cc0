"""Whether the gradient is right: the change that it predicts, and how the score really changes.

A branch without a gradient (quantised weights, `.detach()`, `no_grad`, argmax, rounding, a function
with a backward of its own) takes part in the prediction, but in no map that is made of gradients.
Such a branch shows when activations are changed a little: the score then changes by more, or less,
than the gradient promises. Small steps in random directions find that out, once for each layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch.nn import functional as F  # noqa: N812 (its usual name)

from seg3dcam.errors import LayerError, ModelError
from seg3dcam.network.capture import Capture, capturing
from seg3dcam.network.facts import key_of
from seg3dcam.network.layers import LayerRef
from seg3dcam.network.outputs import OutputSelection

#: Steps, as fractions of the activations' size. At small steps rounding disturbs the comparison, at
#: large ones curvature and the kinks of ReLU and pooling do; a missing branch disturbs all of them.
STEPS: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 1e-1)

#: Steps in half precision, in which smaller ones are lost in rounding.
STEPS_OF_HALF = (3e-2, 1e-1, 3e-1)

#: A gradient that misses more than this part of the change at every step misses a branch.
MISSED, MISSED_OF_HALF = 0.1, 0.4

#: If this many times more is missed at a step three times as large, the score jumps, as with an
#: argmax that changes its choice. What curvature misses grows with the square of the step at most,
#: which is about ten times.
JUMP = 15

#: Directions at each step: a few at first, at the steps numbered FIRST; more where doubt is left.
FEW, MANY = 3, 8
FIRST, FIRST_OF_HALF = (1, 3), (1, 2)

#: At most TOGETHER layers are nudged at once, or more if there would be more than GROUPS groups.
TOGETHER, GROUPS = 3, 8

#: Voxels along each axis of the part of the image that is used; the larger only if need be.
PARTS = (32, 64)

Steps = dict[LayerRef, torch.Tensor]


def gradient_gaps(
    capture: Capture, x: torch.Tensor, layers: Sequence[LayerRef], output: OutputSelection
) -> tuple[dict[LayerRef, float], str]:
    """Return which part of the score's changes the gradient at each layer misses; 0: none.

    Layers that could not be checked are left out, and tried again the next time. The reason is
    returned, too.

    Args:
        capture: of the network, whose last pass stays as it is.
        x: a window (1, C, *roi) of the image that is explained.
        layers: of this capture.
        output: which of the network's outputs are the logits.
    """
    known, keys = capture.known.gaps, {layer: key_of(layer) for layer in layers}
    gaps = {layer: known[key] for layer, key in keys.items() if key in known}
    new = [replace(layer, required=False) for layer in layers if layer not in gaps]
    reason = ""
    for part in (*(_middle(x, size) for size in PARTS), x) if new else ():
        try:
            with capturing(capture.member, new, output) as own:
                found = _gaps(own, part)
        except (ModelError, LayerError, torch.OutOfMemoryError) as error:
            reason = str(error).partition("\n")[0]
            continue  # some networks take one size only
        for layer, gap in found.items():
            if (key := keys[layer]) is not None:
                known[key] = gap
        return gaps | found, ""
    return gaps, reason


def _middle(x: torch.Tensor, part: int) -> torch.Tensor:
    """Return the middle of an image, smaller by multiples of most networks' strides."""
    for axis, size in enumerate(x.shape[2:], 2):
        kept = min(size, part + size % 32)
        x = x.narrow(axis, (size - kept) // 2, kept)
    return x.contiguous()


def _stirred(x: torch.Tensor) -> torch.Tensor:
    """Return an image with a little noise.

    Where it is empty, a layer without a bias gives exactly 0, the kink of a ReLU behind it, where
    no gradient is right for steps to both sides.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    spread = float(x.double().std(correction=0)) or 1.0
    noise = torch.randn(x.shape, generator=generator, device="cpu").to(x)
    return x + 0.1 * spread * noise


def _gaps(capture: Capture, x: torch.Tensor) -> dict[LayerRef, float]:
    x = _stirred(x)
    logits = capture.forward(x)
    weights = _weights(logits)
    gradients = capture.gradients(logits, weights)
    activations = {layer: capture.activations[layer] for layer in gradients}
    promise = _Promise(capture, x, logits.detach(), weights, gradients, activations)
    found: dict[LayerRef, float] = {}
    for group in _groups(list(gradients)):
        if promise.is_kept(group, FEW):
            found |= dict.fromkeys(group, 0.0)
            continue
        if not promise.is_repeated():
            raise ModelError(
                "the network answers the same image differently each time, as with what it "
                "remembers of earlier passes, or with random numbers of a generator that is "
                "neither a global one nor the network's own"
            )
        found |= {layer: promise.gap(layer, MANY) for layer in group}
    return found


def _weights(logits: torch.Tensor) -> torch.Tensor:
    """Return a random score's weights, smooth as those of a region are: dS/dlogits."""
    generator = torch.Generator("cpu").manual_seed(0)
    coarse = [max(1, n // 8) for n in logits.shape[2:]]
    drawn = torch.randn(
        logits.shape[0], logits.shape[1], *coarse, generator=generator, device="cpu"
    )
    smooth = F.interpolate(drawn, size=logits.shape[2:]) if coarse else drawn
    return smooth.to(logits)


def _groups(layers: list[LayerRef]) -> Iterator[list[LayerRef]]:
    size = max(TOGETHER, math.ceil(len(layers) / GROUPS))
    for start in range(0, len(layers), size):
        yield layers[start : start + size]


def _direction(activations: torch.Tensor, number: int) -> torch.Tensor:
    """Return a random direction of changes, whose mean square is about one.

    With an even number each voxel changes by itself, with an odd one whole channels grow or shrink:
    a branch that sees the image as a whole (its mean, a quantile) would not notice changes of
    single voxels. Voxels that are exactly 0 stay 0. Behind a ReLU such voxels are equal to their
    neighbours in a pooling, and no gradient is right for steps to both sides there.
    """
    generator = torch.Generator("cpu").manual_seed(number)
    if number % 2:
        shape = (*activations.shape[:2], *[1] * (activations.ndim - 2))
        size = activations.double().square().mean().sqrt()
        scale = (activations / size).to(activations) if size > 0 else torch.zeros_like(activations)
        return scale * torch.randn(shape, generator=generator, device="cpu").to(activations)
    drawn = torch.randn(activations.shape, generator=generator, device="cpu").to(activations)
    return drawn * (activations != 0)


class _Promise:
    """What the gradient promises of a score, and what the score does."""

    def __init__(
        self,
        capture: Capture,
        x: torch.Tensor,
        logits: torch.Tensor,
        weights: torch.Tensor,
        gradients: Mapping[LayerRef, torch.Tensor],
        activations: Mapping[LayerRef, torch.Tensor],
    ) -> None:
        self._capture, self._x, self._weights = capture, x, weights.double()
        self._gradients = gradients
        # At most as large as the activations, and each layer's step with as much effect.
        sizes = {la: a.double().square().mean().sqrt() for la, a in activations.items()}
        effects = {la: float(g.double().norm() * sizes[la]) for la, g in gradients.items()}
        self._sizes, self._effects, self._activations = sizes, effects, activations
        half = any(torch.finfo(a.dtype).eps > 1e-5 for a in activations.values())
        self._steps, self._limit = (STEPS_OF_HALF, MISSED_OF_HALF) if half else (STEPS, MISSED)
        self._first = FIRST_OF_HALF if half else FIRST
        # What rounding alone may change of the score.
        precision = torch.finfo(logits.dtype).eps
        self._rounding = 8 * precision * float((self._weights * logits.double()).norm())

    def is_repeated(self) -> bool:
        """Tell whether the score is the same again, but for rounding."""
        return abs(self._score({}, 1) - self._score({}, 1)) <= 10 * self._rounding

    def is_kept(self, layers: Sequence[LayerRef], directions: int) -> bool:
        """Tell whether nothing is missed at a small step, and at a larger one no jump is seen."""
        missed = [self._missed(layers, self._steps[n], directions) for n in self._first]
        return all(part <= self._limit * times for part, times in zip(missed, (1, 3), strict=True))

    def gap(self, layer: LayerRef, directions: int) -> float:
        """Return the part that is missed at every step, or at a jump; 0 if none is."""
        missed = [self._missed([layer], step, directions) for step in self._steps]
        least = min(missed)
        if least > self._limit:
            return min(1.0, least)
        jumps = [
            large
            for small, large in itertools.pairwise(missed[:-1])
            if small <= self._limit and large > max(JUMP * small, 5 * self._limit)
        ]
        return min(1.0, *jumps) if jumps else 0.0

    def _missed(self, layers: Sequence[LayerRef], step: float, directions: int) -> float:
        """Return |change - promise| / |change| over several random directions, without rounding."""
        least = min(self._effects[layer] for layer in layers)
        off, whole = 0.0, 0.0
        for number in range(directions):
            nudge: Steps = {}
            for layer in layers:
                a = self._activations[layer]
                share = max(0.1, least / self._effects[layer]) if self._effects[layer] else 1.0
                size = step * share * float(self._sizes[layer])
                nudge[layer] = size * _direction(a, number)
            change = (self._score(nudge, 1) - self._score(nudge, -1)) / 2
            promised = sum(
                float((self._gradients[layer].double() * n.double()).sum())
                for layer, n in nudge.items()
            )
            off += (change - promised) ** 2
            whole += max(change**2, promised**2)
        off, whole = math.sqrt(off / directions), math.sqrt(whole / directions)
        return max(0.0, off - self._rounding) / whole if whole > self._rounding else 0.0

    def _score(self, nudge: Steps, sign: int) -> float:
        steps = {layer: sign * n for layer, n in nudge.items()}
        return float((self._weights * self._capture.nudged(self._x, steps).double()).sum())
