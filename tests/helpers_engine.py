"""Networks, windows and formulas that the tests of the engine share.

The references cut a network in two at the layer, send every window through both halves with MONAI's
sliding window inference, and let autograd differentiate the stitched logits: one giant graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import toy
from monai.data.utils import compute_importance_map
from monai.inferers import sliding_window_inference
from torch import nn

from seg3dcam import WindowPlan

EXACT = 1e-9  # float64, relative to the largest value of the map

Score = Callable[[torch.Tensor], torch.Tensor]

#: A method of every kind: of means, products, components, second derivatives, scores, biases, and
#: of the input.
QUICK = (
    "grad_cam",
    "hires_cam",
    "eigen_grad_cam",
    "shapley_cam",
    "score_cam",
    "full_grad",
    "gradient",
)


def each_method(keys: Iterable[str], quick: Sequence[str] = QUICK) -> pytest.MarkDecorator:
    """Parametrise a test over methods, of which all but the quick ones are slow."""
    return pytest.mark.parametrize("key", [slow_unless(key in quick, key) for key in keys])


def slow_unless(quick: bool, *values: object, name: str | None = None) -> Any:
    """Return the values of a parameter, which are slow unless told."""
    return pytest.param(*values, id=name, marks=[pytest.mark.slow] * (not quick))


# A random network may well find nothing that speaks for a class; its numbers count all the same.
signed_maps = pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")


#: Cases of every kind of network; where a test runs many methods on each case, the others are slow.
QUICK_CASES = ("plain 2D", "linear head", "in-place activation", "U-Net bottleneck")

each_case = pytest.mark.parametrize(
    "name", [slow_unless(name in QUICK_CASES, name) for name in toy.CASES]
)


# ----------------------------------------------------------------------------------------- networks


def two_levels(ndim: int = 3, *, smooth: bool = False) -> nn.Sequential:
    """Return a network with layer "1" on the input's grid and layer "3" on every second voxel."""
    activation = nn.Softplus if smooth else nn.ReLU
    layers = [
        toy.CONV[ndim](1, 4, 3, padding=1),
        activation(),
        toy.CONV[ndim](4, 5, 3, stride=2, padding=1),
        activation(),
        toy.UP[ndim](5, 3, 2, stride=2),
    ]
    return toy.seeded(nn.Sequential(*layers), seed=5)


STRIDES = {"1": 1, "3": 2}


def level(layer: str, x: torch.Tensor) -> toy.Case:
    """Return `two_levels`, which is shared, cut behind one of its layers."""
    return toy.cut(toy.shared(two_levels, x.ndim - 2), int(layer), x)


class Counting(nn.Module):
    """Counts how often the network inside is run, and on how many inputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        sizes: list[int] = []
        # What a function closes over stays; a count of the network's own would be put back.
        self._sizes = lambda: sizes

    @property
    def runs(self) -> int:
        return len(self._sizes())

    @property
    def inputs(self) -> int:
        return sum(self._sizes())

    def reset(self) -> None:
        self._sizes().clear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._sizes().append(len(x))
        return self.network(x)


def counting_levels() -> Counting:
    """Return `two_levels`, the runs of which are counted; its layers are in "network"."""
    return Counting(two_levels())


# ------------------------------------------------------------------------------------------- scores


def curved(logits: torch.Tensor) -> torch.Tensor:
    """Return a score that looks at all voxels and is not linear in the logits."""
    return (logits.softmax(1)[:, 1] * logits[:, 2].tanh()).flatten(1).sum(1)


def in_a_corner(logits: torch.Tensor) -> torch.Tensor:
    """Return a score that looks at the first three voxels along each axis."""
    corner = (slice(None), slice(None), *[slice(0, 3)] * (logits.ndim - 2))
    return curved(logits[corner])


SCORES = {"everywhere": curved, "in a corner": in_a_corner}


# ------------------------------------------------------------------------------------------ windows


@dataclass(frozen=True)
class Part:
    """A window of one item: where it starts in voxels, its activations and gradients (C, *s)."""

    item: int
    start: tuple[int, ...]
    a: torch.Tensor
    g: torch.Tensor


def predicted(network: Callable[..., torch.Tensor], x: torch.Tensor, plan: WindowPlan, **more):
    """Return the logits that MONAI stitches."""
    return sliding_window_inference(
        x,
        plan.roi_size,
        plan.sw_batch_size,
        network,
        overlap=plan.overlap,
        mode=plan.mode,
        sigma_scale=plan.sigma_scale,
        padding_mode=plan.padding_mode,
        cval=plan.cval,
        **more,
    )


def parts_of(case: toy.Case, plan: WindowPlan, score: Score) -> list[Part]:
    """Return all windows of all items, with the gradients of one graph through MONAI."""
    leaves: list[torch.Tensor] = []
    places: list[tuple[int, tuple[int, ...]]] = []

    def through_the_layer(batch: torch.Tensor, coordinates: list) -> torch.Tensor:
        leaves.append(case.front(batch.clone()).detach().clone().requires_grad_())
        places.extend((c[0].start, tuple(s.start for s in c[2:])) for c in coordinates)
        return case.back(leaves[-1].clone())

    logits = predicted(through_the_layer, case.x, plan, with_coord=True)
    gradients = torch.cat(torch.autograd.grad(score(logits).sum(), leaves))
    activations = torch.cat(leaves).detach()
    return [
        Part(item, start, a, g)
        for (item, start), a, g in zip(places, activations, gradients, strict=True)
    ]


def joined(parts: Sequence[Part], stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Put windows that do not overlap side by side: A and G, (B, C, *S)."""
    size = parts[0].a.shape[1:]
    shape = [max(part.start[axis] // stride for part in parts) + n for axis, n in enumerate(size)]
    batch = 1 + max(part.item for part in parts)
    pair = tuple(torch.full((batch, len(parts[0].a), *shape), np.nan).double() for _ in "ag")
    for part in parts:
        for total, values in zip(pair, (part.a, part.g), strict=True):
            place = (part.item, slice(None), *box_of(part.start, size, stride))
            assert total[place].isnan().all(), "windows overlap"
            total[place] = values
    assert not pair[0].isnan().any()
    return pair


def box_of(start: Sequence[int], size: Sequence[int], stride: int) -> tuple[slice, ...]:
    """Return where a window lies in the layer's grid of the volume."""
    assert all(s % stride == 0 for s in start)
    return tuple(slice(s // stride, s // stride + n) for s, n in zip(start, size, strict=True))


def importance_of(plan: WindowPlan, roi: Sequence[int], stride: int) -> torch.Tensor:
    """Return how much a window counts at the layer's voxels, the first of which is voxel 0."""
    importance = compute_importance_map(tuple(roi), plan.mode, plan.sigma_scale).double()
    return importance[tuple(slice(None, None, stride) for _ in roi)]
