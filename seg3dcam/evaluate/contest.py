"""One input on which many maps are held against each other: one prediction, one set of blocks.

To compare fifty maps by whole curves of context deletion takes more than a thousand predictions.
So a curve is measured point by point, where that says most, and no further than is needed to see
that another map is better. Maps that delete the same blocks share their predictions.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from seg3dcam.cams.base import BaseCAM
from seg3dcam.cams.calls import each_by
from seg3dcam.cams.catalogue import ALL_METHODS
from seg3dcam.checks import Activation
from seg3dcam.engine.layer_map import LayerMap
from seg3dcam.errors import EvaluationError, Seg3dcamWarning
from seg3dcam.evaluate.areas import PartialCurve
from seg3dcam.evaluate.blocks import Blocks, Subject
from seg3dcam.evaluate.controls import mask_alone, nearness, random_maps
from seg3dcam.evaluate.rerun import Rerun
from seg3dcam.evaluate.sanity import Check, randomisation
from seg3dcam.evaluate.segments import grown
from seg3dcam.geometry import FeatureGrid, interpolate, spacing_of
from seg3dcam.network.checked_input import as_input
from seg3dcam.network.outputs import OutputSelection
from seg3dcam.progress import Progress
from seg3dcam.targets import ClassLogOdds
from seg3dcam.windows import WindowPlan

#: An area is known well enough with this error; and with the second one, if the map is worse than
#: the best so far by more than the error and this distance.
KNOWN, ROUGHLY, WORSE = 0.02, 0.1, 0.05

#: The order in which a map deletes the blocks.
Order = NDArray[np.int32]


@dataclass(frozen=True)
class Measuring:
    """How a network predicts, and how its maps are measured; see `compare`."""

    network: nn.Module
    class_index: int
    sliding_window: WindowPlan | None
    activation: Activation
    output: OutputSelection
    margin: int
    block: int
    steps: int
    baseline: str | float
    seed: int
    progress: Progress

    def cam(self, method: str, layers: Sequence[str]) -> BaseCAM:
        """Return a method for some layers of the network."""
        return ALL_METHODS[method](
            self.network,
            list(layers),
            sliding_window=self.sliding_window,
            output=self.output,
            activation=self.activation,
            progress=self.progress,
        )


class Case:
    """One input, on which any number of maps is held against the same controls.

    Args:
        x: the input, (1, C, *S); the affine of a MetaTensor gives the spacing.
        spacing: mm from voxel to voxel along every axis, None for what the input says, or 1.
        kept_gb: how much memory the logits of windows may take.

    Attributes:
        mask: (*S) bool, where the class is predicted.
        left: Dice of the class if everything around it is deleted.

    Raises:
        EmptyRegionError, EvaluationError: see `context_deletion`.
    """

    def __init__(
        self,
        how: Measuring,
        x: torch.Tensor,
        *,
        spacing: Sequence[float] | None = None,
        kept_gb: float = 4.0,
    ) -> None:
        self.how, self.x = how, x
        _, affine = as_input(x)
        if spacing is None and affine is not None and affine.ndim == 2:
            spacing = spacing_of(affine)
        self._spacing = spacing
        self._rerun = Rerun(
            how.network,
            x,
            sliding_window=how.sliding_window,
            output=how.output,
            kept_gb=kept_gb,
        )
        self._subject = Subject(self._rerun, how.class_index, how.activation)
        self.mask = self._subject.mask
        kept = grown(self.mask.cpu().numpy(), how.margin)
        self._blocks = Blocks.of(self._subject, how.block, kept=kept)
        self._fractions = self._blocks.fractions(how.steps)
        self._known: dict[tuple[str | float, bytes], float] = {}
        self.left = self._dice_without(self._blocks.free, how.baseline)

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels of the input, (*S)."""
        return tuple(self.mask.shape)

    @property
    def cost(self) -> float:
        """What was predicted so far, in predictions of the whole volume, without the maps."""
        return self._rerun.cost

    @property
    def controls(self) -> tuple[Order, Order]:
        """The orders of the mask alone and of nearness to the mask."""
        near = nearness(self.mask, self._spacing)
        return self.order(mask_alone(self.mask)), self.order(near)

    def maps(
        self, layers: Sequence[str], methods: Sequence[str], *, tells: bool = True
    ) -> Iterator[tuple[str, str, LayerMap]]:
        """Yield layer, method and map; all share their passes.

        Args:
            tells: warn of what is wrong with the layers.
        """
        cams = [self.how.cam(method, layers) for method in methods]
        with _warnings_left_out("layer '" if tells else ""):
            (results,) = each_by(cams, self.x, [ClassLogOdds(self.how.class_index)])
        for method, result in zip(methods, results, strict=True):
            for layer, found in result.layers.items():
                yield layer, method, found

    def on_voxels(self, found: LayerMap) -> torch.Tensor:
        """Return a map on the input's voxels, (*S)."""
        return interpolate(found.values[:1], found.grid, FeatureGrid.of_voxels(self.shape))[0]

    def order(self, values: torch.Tensor) -> Order:
        """Return the order in which a map (*S) deletes the blocks."""
        return self._blocks.ordered(values, seed=self.how.seed).astype(np.int32)

    def random_orders(self, grid: FeatureGrid, draws: int, seed: int) -> Iterator[Order]:
        """Yield the orders of random maps of a layer's resolution."""
        return map(self.order, random_maps(grid, self.shape, draws=draws, seed=seed))

    def curve(self, order: Order, baseline: str | float | None = None) -> PartialCurve:
        """Return the curve of context deletion in an order, of which only the ends are known.

        Args:
            baseline: None for the first one.
        """
        given = self.how.baseline if baseline is None else baseline
        counts = self._blocks.counts(self.how.steps)

        def height(step: int) -> float:
            return self._dice_without(order[: counts[step]], given)

        return PartialCurve(height, self._fractions, 1.0, height(-1))

    def survives(self, method: str, layer: str) -> Check | str:
        """Return whether a map gets lost when all weights are random; or why that is unknown."""
        cam = self.how.cam(method, [layer])
        try:
            with _warnings_left_out(""):
                return randomisation(cam, self.x, self.how.class_index, seed=self.how.seed)
        except EvaluationError as error:
            return str(error)

    def _dice_without(self, blocks: NDArray[Any], baseline: str | float) -> float:
        """Return the Dice of the class when some blocks are deleted."""
        key = baseline, hashlib.sha256(np.sort(blocks).astype(np.int32).tobytes()).digest()
        if key not in self._known:
            segments, x = self._blocks.segments, self._rerun.x
            gone = np.zeros(int(segments.max()) + 1, dtype=bool)
            gone[blocks] = True
            deleted = torch.from_numpy(gone[segments]).to(x.device)
            replacement = self._blocks.replacement(baseline, self.how.seed)
            changed = torch.where(deleted, replacement(deleted), x)
            self._known[key] = self._subject.dice_at(self._rerun.start().change(changed))
        return self._known[key]


def measured(
    curves: Sequence[PartialCurve],
    *,
    best: float | None = None,
    rival: float | None = None,
) -> tuple[float, float]:
    """Return the mean area of the curves of one map on several inputs, and its largest error.

    Args:
        best: the area of the best map so far: worse maps need not be known well.
        rival: what has to be known is on which side of this area the map's lies, and nothing else.
    """
    while True:
        area = float(np.mean([curve.area for curve in curves]))
        left = float(np.mean([curve.error() for curve in curves]))
        if rival is not None:
            enough = left == 0 or abs(area - rival) > left
        else:
            worse = best is not None and left <= ROUGHLY and area - left > best + WORSE
            enough = left <= KNOWN or worse
        if enough:
            return area, left
        max(curves, key=PartialCurve.error).refine()


def settled(curves: Sequence[PartialCurve]) -> float:
    """Return the mean area of the curves of one map, with no error left if curves fall."""
    for curve in curves:
        while curve.error() > 0:
            curve.refine()
    return float(np.mean([curve.area for curve in curves]))


@contextmanager
def _warnings_left_out(beginning: str) -> Iterator[None]:
    """Leave out warnings that begin so: what is wrong with a map stands in the comparison."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", re.escape(beginning), Seg3dcamWarning)
        yield
