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
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F  # noqa: N812 (its usual name)

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
from seg3dcam.files import printable
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
    "insensitive",  # it stays the same with other weights at the end of the network, or everywhere
    "undefined",  # the full verdict could not be made
    "untested",  # nothing is known against the map, and deletion was not run
    "supported",  # the full verdict: the prediction depends on what it shows
]

#: If the mask explains this part of the map's variance, the map may be an echo of the mask.
ECHO = 0.7

#: Blurs of the mask that are tried as its echo, in voxels of the layer.
BLURS = (0.0, 1.0, 2.0)

#: At most about so many values of a map are compared with the mask.
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


def quick_verdict(
    map_: LayerMap, formula: Formula, region: torch.Tensor | None, *, resolvable: bool = True
) -> Verdict:
    """Return what can be said of a map without running the network again.

    Args:
        map_: of one item.
        formula: the method that made it.
        region: the voxels that were explained, (*S) bool on the input's grid; None if not known.
        resolvable: whether the map is meant to show the region as a shape; not so of one voxel,
            or where the region is not what the score sums over.
    """
    explained = None if region is None or not region.any() else region
    figures = {
        "mask_explains": None if explained is None else explained_by_mask(map_, explained),
        "random_head": map_.head,
        "missing_gradient": map_.missing,
    }

    def says(finding: Finding, words: str) -> Verdict:
        return Verdict(finding, words, _finite(figures))

    if map_.status != "ok":
        return says("unusable", f"do not use: {NO_HEAT[map_.status].removeprefix('no CAM: ')}")
    if getattr(formula, "agnostic", False):
        return says(
            "class-agnostic",
            "class-agnostic: the method gives this map for every class",
        )
    cell = math.prod(map_.window_grid.stride)
    if resolvable and explained is not None and int(explained.sum()) < cell:
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
            "insensitive: the map stays the same if the network's last weights are random"
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
    figures |= {f"context_deletion, {name}": area for name, area in evidence.baselines.items()}
    figures |= {f"error, {name}": error for name, error in evidence.errors.items()}
    figures |= {"rise": evidence.rise, "certain": float(evidence.certain)}
    stays = "" if randomised is None or randomised.passed else randomised.why
    finding = _finding_of(quick, evidence, bool(stays))
    words = [quick.words] if finding == "class-agnostic" else []
    words += [f"insensitive: {stays}" if finding == "insensitive" else stays] if stays else []
    words.append(evidence.words)
    if finding != "class-agnostic" and (doubts := _doubts_of(quick)):
        words.append(doubts)
    if randomised is None:
        words.append("not tested by random weights")
    return Verdict(finding, "; ".join(words), _finite(figures), full=True)


def _doubts_of(quick: Verdict) -> str:
    """Return what the quick verdict found against a map, in its words; "" for nothing."""
    words = quick.words.removesuffix(NOT_TESTED).removesuffix("; ")
    return "" if words.startswith("no fault found") else words


def _finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures with None for those that are no number."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [one for one in value if math.isfinite(one)]
        return value if value is None or math.isfinite(value) else None

    return {name: cleaned(value) for name, value in figures.items()}


def _finding_of(quick: Verdict, evidence: ContextEvidence, stays: bool) -> Finding:
    """Return a full verdict in one word; `stays`: the map survives random weights."""
    if quick.finding == "class-agnostic":
        return quick.finding
    if evidence.needs_context and not evidence.better_than_random:
        return "random"  # not shown to be better is enough
    if not evidence.certain:
        return "undefined"
    if not evidence.needs_context:
        return quick.finding if quick.finding == "too coarse" else "no context"
    if not evidence.passed:
        return "echo"
    return "insensitive" if stays else "supported"


def undefined_verdict(quick: Verdict, reason: object) -> Verdict:
    """Return the verdict on a map that could not be tested, for a reason that is said."""
    words = quick.words.removesuffix(NOT_TESTED).removesuffix("; ")
    finding: Finding = quick.finding if quick.is_against else "undefined"
    said = f"{words}; {NOT_TESTED}: {printable(str(reason))}"
    return Verdict(finding, said, quick.figures, full=True)


def verdict_of(
    finding: str, words: str, figures: Mapping[str, Any], *, full: bool = False
) -> Verdict:
    """Return a verdict from what a file says; of an unknown kind, "undefined".

    >>> verdict_of("later words", "something new", {"a": 1.0, "b": "no number"})
    Verdict(finding='undefined', words='something new', figures={'a': 1.0}, full=False)
    """
    numbers = {
        name: value
        for name, value in figures.items()
        if value is None
        or isinstance(value, int | float)
        or (isinstance(value, list) and all(isinstance(one, int | float) for one in value))
    }
    known: Any = finding if finding in get_args(Finding) else "undefined"
    return Verdict(known, printable(words), _finite(numbers), full)


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
    # Of a fine map of a large volume, means over a few voxels tell as much.
    step = math.ceil((values.numel() / MOST) ** (1 / values.ndim))
    drawn, share = (_means(one, step).double() for one in (values.float().clamp(min=0), share))
    # A map that is high everywhere but in the mask is no echo of it.
    return max(max(0.0, _correlation(drawn, _blurred(share, blur / step))) ** 2 for blur in BLURS)


def _share_in_cells(mask: torch.Tensor, grid: FeatureGrid) -> torch.Tensor:
    """Return which part of each voxel of a layer lies in the mask, (*grid.shape)."""
    width = [max(1, round(stride)) for stride in grid.stride]
    mask = mask != 0
    (box,) = ndimage.find_objects(mask.numpy().astype(np.uint8))
    around = tuple(
        slice(max(0, part.start - n), part.stop + n) for part, n in zip(box, width, strict=True)
    )
    share = torch.zeros(mask.shape, device="cpu")
    share[around] = torch.from_numpy(
        ndimage.uniform_filter(mask[around].numpy().astype(np.float32), width, mode="nearest")
    )
    # An even width reaches one voxel further down than up, so its middle is half a voxel lower.
    middles = tuple(0.0 if n % 2 else -0.5 for n in width)
    return interpolate(share, FeatureGrid(tuple(mask.shape), (1.0,) * mask.ndim, middles), grid)


def _means(values: torch.Tensor, step: int) -> torch.Tensor:
    """Return the means over cubes of `step` voxels."""
    if step == 1:
        return values
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[values.ndim]
    pooled: torch.Tensor = pool(values[None, None], step, ceil_mode=True)[0, 0]
    return pooled


def _blurred(values: torch.Tensor, sigma: float) -> torch.Tensor:
    if not sigma:
        return values
    return torch.from_numpy(ndimage.gaussian_filter(values.numpy(), sigma, mode="nearest"))


def _correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return Pearson's correlation; 0 if either is constant."""
    a, b = one.flatten() - one.mean(), other.flatten() - other.mean()
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length > 0 else 0.0
