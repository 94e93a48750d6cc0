"""The numbers of an explanation: where the CAM is, how much lies where, and its resolution.

Everything is measured on the scan's grid and given in voxels, mm (RAS) and millilitres.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from seg3dcam.engine.scales import Scale
from seg3dcam.explaining.explanation import Explanation
from seg3dcam.explaining.pattern import body_mask
from seg3dcam.geometry import peak_voxel, plateau_middle, spacing_of, to_world, voxel_ml

__all__ = ["Peak", "find_peaks", "find_signed_peaks", "findings"]


#: A CAM of which less than this part lies inside the explained region is said to lie outside.
BARELY_INSIDE = 0.01


class Peak(NamedTuple):
    """A local extremum of a CAM: its value, its voxel, and its place in RAS mm."""

    value: float
    voxel: tuple[int, int, int]
    mm: tuple[float, float, float]


def find_peaks(
    volume: NDArray[np.floating] | torch.Tensor,
    affine: NDArray[np.float64],
    *,
    count: int = 5,
    apart_mm: float = 10.0,
    above: float = 0.2,
) -> list[Peak]:
    """Find the highest local maxima, highest first.

    Args:
        volume: (X, Y, Z) in [0, 1].
        affine: (4, 4) voxel -> RAS mm.
        count: at most so many.
        apart_mm: a maximum nearer than this to a higher one is left out.
        above: maxima below this value are left out.

    >>> volume = np.zeros((9, 9, 9))
    >>> volume[1, 1, 1], volume[7, 7, 7] = 1, 0.5
    >>> [peak.voxel for peak in find_peaks(volume, np.diag([3, 3, 3, 1]))]
    [(1, 1, 1), (7, 7, 7)]
    """
    heat = np.asarray(volume)
    found: list[Peak] = []
    # Blocks of a quarter of the distance or more: few of them, however large the volume is.
    block = [max(1, math.ceil(apart_mm / 4 / step)) for step in spacing_of(affine)]
    starts = _highest_blocks(heat, block, above)
    # The first one is the peak that every other format names, also where several are equal.
    voxel = peak_voxel(heat) if len(starts) else None
    while voxel is not None and len(found) < count:
        mm = to_world(affine, voxel)
        if all(math.dist(mm, higher.mm) >= apart_mm for higher in found):
            found.append(Peak(float(heat[voxel]), voxel, mm))  # type: ignore[arg-type]
            # Blocks near this peak are dropped at once: a wide plateau has very many.
            away = (starts + (np.array(block) - 1) / 2 - voxel) @ affine[:3, :3].T
            starts = starts[np.linalg.norm(away, axis=1) >= apart_mm]
        voxel = None
        if len(starts):
            voxel = plateau_middle(heat, _highest_voxel(heat, starts[0], block))
            starts = starts[1:]
    return found


def find_signed_peaks(
    volume: NDArray[np.floating] | torch.Tensor, affine: NDArray[np.float64], *, count: int = 5
) -> list[Peak]:
    """Find the strongest peaks for and against a target, strongest first.

    Args:
        volume: (X, Y, Z) in [-1, 1].
        affine, count: as for `find_peaks`, which finds those of each sign.

    >>> volume = np.zeros((9, 9, 9))
    >>> volume[1, 1, 1], volume[7, 7, 7] = 0.5, -1
    >>> [(peak.value, peak.voxel) for peak in find_signed_peaks(volume, np.diag([3, 3, 3, 1]))]
    [(-1.0, (7, 7, 7)), (0.5, (1, 1, 1))]
    """
    against = [peak._replace(value=-peak.value) for peak in find_peaks(-volume, affine)]
    both = [*find_peaks(volume, affine), *against]
    return sorted(both, key=lambda peak: -abs(peak.value))[:count]


def findings(
    explanation: Explanation, layer: str | None = None, scale: Scale = "max"
) -> dict[str, Any]:
    """Return the figures of an explanation, ready for JSON; None for what cannot be measured.

    - `predicted_voxels`, `predicted_ml`, `truth_voxels`, `truth_ml`, `dice`: the sizes of the
      class's masks and their overlap. Where the explanation has a region of its own, such as one
      lesion, they are those of the region and of the connected parts of the truth that touch it; a
      region that is no whole lesion has no Dice.
    - `peak_voxel`, `peak_mm`, `peaks`: where the CAM is highest.
    - `peak_to_prediction_mm`, `peak_to_truth_mm`: from the peak to the centre of the nearest voxel
      of the mask; 0 inside the mask.
    - `cam_inside_prediction`, `cam_inside_truth`, `cam_outside`: which part of the sum of the CAM
      lies inside each mask, and outside of both.
    - `cam_outside_body`: which part of it lies outside of the body, see `body_mask`.
    - `evidence_against`: which part of the absolute sum of the raw maps speaks against the target;
      the CAM shows the rest.
    - `confidence`: of the network in the class or lesion, by its own probabilities.
    - `resolution_mm`, `cell_ml`: the size of a voxel of the layer's own grid; of several layers,
      that of the finest one.
    - `warnings`: in words, what a reader must know.

    Args:
        explanation: what `explain` returns.
        layer: one layer's name; None averages all.
        scale: the scale of the view that the warnings are about. The figures do not depend on it.
    """
    volume = explanation.volume(layer)
    affine, prediction, truth = explanation.affine, explanation.measured, _truth_of(explanation)
    evidence = explanation.evidence(layer)
    names = list(explanation.maps) if layer is None else [layer]
    resolution = min((explanation.native_spacing[name] for name in names), key=math.prod)
    peaks = find_peaks(volume, affine, above=0.2) if not explanation.notice(layer) else []
    ml = voxel_ml(affine)
    cell_ml = math.prod(resolution) / 1000
    predicted, true = _count(prediction), _count(truth)
    found: dict[str, Any] = {
        "predicted_voxels": predicted,
        "predicted_ml": None if predicted is None else predicted * ml,
        "truth_voxels": true,
        "truth_ml": None if true is None else true * ml,
        "dice": _dice(prediction, truth) if _is_whole(explanation) else None,
        "peak_voxel": peaks[0].voxel if peaks else None,
        "peak_mm": peaks[0].mm if peaks else None,
        "peaks": [peak._asdict() for peak in peaks],
        "peak_to_prediction_mm": _distance(peaks, prediction, affine),
        "peak_to_truth_mm": _distance(peaks, truth, affine),
        **_shares(volume, prediction, truth),
        "cam_outside_body": _outside_body(explanation, volume),
        "evidence_against": None if evidence is None else evidence.against,
        "confidence": explanation.confidence,
        "resolution_mm": resolution,
        "cell_ml": cell_ml,
    }
    return {**found, "warnings": _warnings(explanation, found, layer, scale, volume)}


def _highest_blocks(
    heat: NDArray[np.floating], block: Sequence[int], above: float
) -> NDArray[np.intp]:
    """Return the first voxels (N, 3) of the blocks with a local maximum, highest block first.

    No neighbouring block holds a higher value, so the highest voxel of such a block is a local
    maximum of the volume.
    """
    top: Any = heat
    for axis, (size, step) in enumerate(zip(heat.shape, block, strict=True)):
        top = np.maximum.reduceat(top, np.arange(0, size, step), axis=axis)
    high = (top >= max(above, np.finfo(np.float32).tiny)) & (top == ndimage.maximum_filter(top, 3))
    blocks = np.argwhere(high)
    return (blocks * block)[np.argsort(-top[high], kind="stable")]


def _highest_voxel(
    heat: NDArray[np.floating], start: NDArray[np.intp], block: Sequence[int]
) -> tuple[int, ...]:
    part = heat[tuple(slice(s, s + step) for s, step in zip(start, block, strict=True))]
    inner = np.unravel_index(int(part.argmax()), part.shape)
    return tuple(int(s) + int(i) for s, i in zip(start, inner, strict=True))


def _is_whole(explanation: Explanation) -> bool:
    """Tell whether a whole mask or a whole lesion is measured, so that a Dice makes sense."""
    return explanation.region is None or explanation.of_component


def _truth_of(explanation: Explanation) -> torch.Tensor | None:
    """Return the truth to compare with: for a region, the connected parts that touch it."""
    truth, region = explanation.truth, explanation.region
    if truth is None or region is None:
        return truth
    parts, _ = ndimage.label(truth.numpy())
    touched = np.unique(parts[region.numpy()])
    return torch.from_numpy(np.isin(parts, touched[touched > 0]))


def _count(mask: torch.Tensor | None) -> int | None:
    # By numpy, since torch first makes 8 bytes of every voxel.
    return None if mask is None else int(np.count_nonzero(mask))


def _dice(prediction: torch.Tensor | None, truth: torch.Tensor | None) -> float | None:
    if prediction is None or truth is None:
        return None
    total = np.count_nonzero(prediction) + np.count_nonzero(truth)
    return 2 * np.count_nonzero(prediction & truth) / total if total else None


def _shares(
    volume: torch.Tensor, prediction: torch.Tensor | None, truth: torch.Tensor | None
) -> dict[str, float | None]:
    """Return which parts of the CAM's sum lie inside the masks, and outside of both."""
    heat = volume.numpy()
    masks = [mask.numpy() for mask in (prediction, truth) if mask is not None]
    total = float(heat.sum(dtype=np.float64))
    covered = _part(heat, total, np.logical_or.reduce(masks) if masks else None)
    return {
        "cam_inside_prediction": _part(heat, total, prediction),
        "cam_inside_truth": _part(heat, total, truth),
        "cam_outside": None if covered is None else 1 - covered,
    }


def _part(heat: NDArray[np.floating], total: float, mask: Any) -> float | None:
    """Return which part of the CAM's sum lies inside a mask, None without either."""
    if mask is None or total <= 0:
        return None
    return float(heat.sum(dtype=np.float64, where=np.asarray(mask))) / total


def _outside_body(explanation: Explanation, volume: torch.Tensor) -> float | None:
    """Return which part of the CAM lies outside of the body; None where no body is seen."""
    body = body_mask(explanation.scan.data[0].numpy())
    heat = volume.numpy()
    inside = _part(heat, float(heat.sum(dtype=np.float64)), body)
    return None if inside is None else 1 - inside


def _distance(
    peaks: Sequence[Peak], mask: torch.Tensor | None, affine: NDArray[np.float64]
) -> float | None:
    """Return the distance in mm from the highest peak to the nearest voxel of a mask."""
    if not peaks or mask is None or not mask.any():
        return None
    if mask[peaks[0].voxel]:
        return 0.0
    inside = mask.numpy()
    box = ndimage.find_objects(inside.view(np.uint8))[0]
    surface = inside[box] & ~ndimage.binary_erosion(inside[box])
    voxels = np.argwhere(surface) + [part.start for part in box]
    offsets = (voxels - np.array(peaks[0].voxel)) @ affine[:3, :3].T
    return float(np.sqrt((offsets**2).sum(1).min()))


def _warnings(
    explanation: Explanation,
    found: dict[str, Any],
    layer: str | None,
    scale: Scale,
    volume: torch.Tensor,
) -> list[str]:
    """Say in words what makes the CAM hard to read."""
    words = []
    if notice := explanation.notice(layer, scale):
        words.append(notice)
    silent = explanation.left_out(scale=scale)
    if layer is None and silent and not notice:
        words.append(f"without the layers {', '.join(silent)}, whose map is not usable")
    if (caution := explanation.caution(layer)) and not notice:  # which says it already
        words.append(caution + "; the signed view shows both" * (scale != "signed"))
    for name, ml in (("predicted region", "predicted_ml"), ("true region", "truth_ml")):
        if found[ml] == 0 and ml == "truth_ml" and explanation.region is not None:
            continue  # no part of the truth touches this lesion, which its Dice of 0 says
        if found[ml] == 0:
            words.append(f"the {name} is empty")
        elif found[ml] is not None and found[ml] < found["cell_ml"]:
            words.append(
                f"the {name} ({found[ml]:.2g} ml) is smaller than one voxel of the layer's own "
                f"grid ({found['cell_ml']:.2g} ml): the CAM cannot resolve it"
            )
    if outside := _outside(explanation, found, volume):
        words.append(outside)
    return words


def _outside(explanation: Explanation, found: dict[str, Any], volume: torch.Tensor) -> str:
    """Say that the CAM lies outside of the explained region.

    Say nothing if the region is smaller than a voxel of the layer, which cannot resolve it.
    """
    region = explanation.explained
    size = (_count(region) or 0) * voxel_ml(explanation.affine)
    if not 0 < size >= found["cell_ml"]:
        return ""
    heat = volume.numpy()
    inside = _part(heat, float(heat.sum(dtype=np.float64)), region)
    if inside is None or inside >= BARELY_INSIDE:
        return ""
    what = "predicted" if explanation.region is None else "explained"
    return (
        f"the CAM lies outside of the {what} region ({size:.2g} ml): {100 * inside:.2g} % of it is "
        "inside"
    )
