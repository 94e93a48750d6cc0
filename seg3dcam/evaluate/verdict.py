"""What may be said of a map: in one line of words, with the figures that the words come from.

A quick verdict costs little and comes with every explanation of a scan. It finds maps that cannot
be right or say nothing: empty ones, those of methods that do not look at the class, regions smaller
than a voxel of the layer, and maps that the predicted mask alone explains. What it finds nothing
against is untested, and the words say so. A full verdict tests it: by context deletion, held
against controls, and by random weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
import torch
from scipy import ndimage

from seg3dcam.engine.head_check import SAME
from seg3dcam.engine.layer_map import LayerMap
from seg3dcam.engine.scales import NO_HEAT
from seg3dcam.evaluate.context import (
    INPUT_ALONE,
    MASK_ALONE,
    NEARNESS,
    ContextEvidence,
)
from seg3dcam.evaluate.sanity import Check
from seg3dcam.geometry import FeatureGrid, interpolate
from seg3dcam.methods.base import Formula

#: What a verdict says, the worst first.
Finding = Literal[
    "unusable",  # there is no map, or it misses part of the evidence
    "class-agnostic",  # it is the same for every class
    "random",  # the full verdict: it is no better than a random map
    "echo",  # the full verdict: it says nothing beyond the mask
    "too coarse",  # the region is smaller than a voxel of the layer
    "perhaps echo",  # the mask explains most of the map, and deletion was not run
    "no context",  # the full verdict: the prediction depends on nothing outside of the mask
    "insensitive",  # it stays the same with random weights in the last layer, or in all
    "undefined",  # the full verdict could not be made
    "untested",  # nothing is known against the map, and deletion was not run
    "supported",  # the full verdict: the prediction depends on what it shows
]

#: If the mask explains this part of the map's variance, the map may be an echo of the mask.
ECHO = 0.7

#: Blurs of the mask that are tried as its echo, in voxels of the layer.
BLURS = (0.0, 1.0, 2.0)

#: At most about so many voxels of a map are compared with the mask.
MOST = 2_000_000

NOT_TESTED = "not tested by deletion"


@dataclass(frozen=True)
class Verdict:
    """What may be said of a map.

    Attributes:
        finding: in one word, see `Finding`.
        words: in one line.
        figures: name -> the value that the words come from; None where it is not known.
        full: whether context deletion and random weights were tried.

    >>> Verdict("untested", "not tested by deletion").is_against
    False
    """

    finding: Finding
    words: str
    figures: Mapping[str, float | Sequence[float] | None] = field(default_factory=dict)
    full: bool = False

    @property
    def is_against(self) -> bool:
        """Whether the map should not be used as evidence."""
        order = get_args(Finding)
        return order.index(self.finding) < order.index("perhaps echo")


def quick_verdict(map_: LayerMap, formula: Formula, region: torch.Tensor | None) -> Verdict:
    """Return what can be said of a map without running the network again.

    Args:
        map_: of one item.
        formula: the method that made it.
        region: the voxels that were explained, (*S) bool on the input's grid; None if not known.
    """
    explained = None if region is None or not region.any() else region
    figures = {
        "mask_explains": None if explained is None else explained_by_mask(map_, explained),
        "random_head": map_.head,
        "missing_gradient": map_.missing,
    }

    def says(finding: Finding, words: str) -> Verdict:
        return Verdict(finding, words, figures)

    if map_.status != "ok":
        return says("unusable", f"do not use: {NO_HEAT[map_.status].removeprefix('no CAM: ')}")
    if getattr(formula, "agnostic", False):
        return says(
            "class-agnostic",
            "class-agnostic: shows what stands out in the layer, the same for every class",
        )
    if explained is not None and int(explained.sum()) < math.prod(map_.window_grid.stride):
        return says(
            "too coarse", "too coarse: the explained region is smaller than one voxel of the layer"
        )
    share = figures["mask_explains"]
    alone = "" if share is None else f"the mask alone explains {100 * share:.0f} % of the map"
    doubts: dict[Finding, str] = {}
    if share is not None and share >= ECHO:
        doubts["perhaps echo"] = f"perhaps an echo: {alone}"
    if map_.head is not None and map_.head >= SAME:
        doubts["insensitive"] = (
            "insensitive: the map stays the same if the network's last layer is random"
        )
    if map_.unchecked:
        doubts["untested"] = "its gradient could not be checked"
    if not doubts:
        doubts["untested"] = ", ".join(words for words in ("no fault found", alone) if words)
    return says(next(iter(doubts)), "; ".join([*doubts.values(), NOT_TESTED]))


def full_verdict(quick: Verdict, evidence: ContextEvidence, randomised: Check | None) -> Verdict:
    """Return what can be said of a map after it was tested.

    Args:
        quick: the quick verdict.
        evidence: context deletion by the map, beside controls.
        randomised: the map of a network with random weights; None where there is none.
    """
    figures = {
        **quick.figures,
        "context_deletion": evidence.curve.auc,
        "mask_alone": evidence.controls[MASK_ALONE],
        "nearness": evidence.controls[NEARNESS],
        "input_alone": evidence.controls[INPUT_ALONE],
        "random": evidence.random,
        "p_value": evidence.p_value,
        "without_context": evidence.left,
        "random_weights": None if randomised is None else randomised.worst,
    }
    stays = "" if randomised is None or randomised.passed else randomised.why
    finding = _finding_of(quick, evidence, bool(stays))
    words = {
        "class-agnostic": f"{quick.words}; {stays}; {evidence.words}".replace("; ; ", "; "),
        "insensitive": f"insensitive: {stays}; {evidence.words}",
    }.get(finding, evidence.words)
    return Verdict(finding, words, figures, full=True)


def _finding_of(quick: Verdict, evidence: ContextEvidence, stays: bool) -> Finding:
    """Return a full verdict in one word; `stays`: the map survives random weights."""
    if quick.finding == "class-agnostic":
        return quick.finding
    if not evidence.needs_context:
        return "no context" if evidence.certain else "undefined"
    if not evidence.better_than_random:
        return "random"
    if not evidence.passed:
        return "echo"
    return "insensitive" if stays else "supported"


def undefined_verdict(quick: Verdict, reason: object) -> Verdict:
    """Return the verdict on a map that could not be tested, for a reason that is said."""
    if quick.is_against:
        return replace(quick, full=True)
    words = f"{quick.words.removesuffix(f'; {NOT_TESTED}')}; {NOT_TESTED}: {reason}"
    return Verdict("undefined", words, quick.figures, full=True)


def together(verdicts: Mapping[str, Verdict]) -> Verdict | None:
    """Return one verdict on the mean of several layers' maps; None where there is none.

    >>> one, other = Verdict("untested", "no fault found"), Verdict("unusable", "do not use")
    >>> together({"a": one, "b": other, "c": one}).words
    'of 3 layers: 1 unusable, 2 untested; see each layer'
    """
    if len(verdicts) <= 1:
        return next(iter(verdicts.values()), None)
    order = get_args(Finding)
    found = sorted((verdict.finding for verdict in verdicts.values()), key=order.index)
    counted = ", ".join(f"{found.count(finding)} {finding}" for finding in dict.fromkeys(found))
    return Verdict(
        found[0],
        f"of {len(found)} layers: {counted}; see each layer",
        full=all(verdict.full for verdict in verdicts.values()),
    )


def explained_by_mask(map_: LayerMap, mask: torch.Tensor) -> float:
    """Return which part of a drawn map's variance the mask alone explains (R squared).

    The map and the mask are compared on the grid of the map, so that a coarse layer is not praised
    for being coarse. The mask is tried sharp and blurred, since an echo may have a halo.

    Args:
        map_: of one item.
        mask: (*S) bool on the input's grid.

    >>> grid = FeatureGrid((8,), (2.0,), (0.5,))
    >>> mask = torch.arange(16) < 5
    >>> shares = torch.tensor([[1, 1, 0.5, 0, 0, 0, 0, 0]])
    >>> round(explained_by_mask(LayerMap(7 * shares, grid, grid, torch.ones(1)), mask), 6)
    1.0
    """
    values, grid = map_.values[0].cpu(), map_.grid
    share = _share_in_cells(mask.cpu(), grid)
    # Of a fine map of a large volume, a part of the voxels tells as much.
    step = math.ceil((values.numel() / MOST) ** (1 / values.ndim))
    thinned = (slice(None, None, step),) * values.ndim
    drawn, share = values[thinned].double().clamp(min=0), share[thinned].double()
    return max(_correlation(drawn, _blurred(share, blur / step)) ** 2 for blur in BLURS)


def _share_in_cells(mask: torch.Tensor, grid: FeatureGrid) -> torch.Tensor:
    """Return which part of each voxel of a layer lies in the mask, (*grid.shape)."""
    width = [max(1, round(stride)) for stride in grid.stride]
    (box,) = ndimage.find_objects(mask.numpy().astype(np.uint8))
    around = tuple(
        slice(max(0, part.start - n), part.stop + n) for part, n in zip(box, width, strict=True)
    )
    share = torch.zeros(mask.shape)
    share[around] = torch.from_numpy(
        ndimage.uniform_filter(mask[around].numpy().astype(np.float32), width, mode="nearest")
    )
    # An even width reaches one voxel further down than up, so its middle is half a voxel lower.
    middles = tuple(0.0 if n % 2 else -0.5 for n in width)
    return interpolate(share, FeatureGrid(tuple(mask.shape), (1.0,) * mask.ndim, middles), grid)


def _blurred(values: torch.Tensor, sigma: float) -> torch.Tensor:
    if not sigma:
        return values
    return torch.from_numpy(ndimage.gaussian_filter(values.numpy(), sigma, mode="nearest"))


def _correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return Pearson's correlation; 0 if either is constant."""
    a, b = one.flatten() - one.mean(), other.flatten() - other.mean()
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length > 0 else 0.0
