"""Plan what all pictures of a case share: volumes, look, words, and how slices are cut.

review = review_explanation(explanation, Look(window="lung"))
review = review_volumes(scan, cam, affine, prediction=mask, slices="all")
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seg3dcam.engine.scales import NO_HEAT
from seg3dcam.errors import InputError
from seg3dcam.explaining.explanation import Explanation
from seg3dcam.geometry import Axis, peak_voxel, size_text, voxel_ml
from seg3dcam.review.look import GreyWindow, Look, choose_window
from seg3dcam.review.pictures import display, draw, frame
from seg3dcam.review.pictures.text import clean_text

SliceSetting = str | int | Sequence[int]

USUAL = Look()


class Profile(NamedTuple):
    """Numbers about every slice along one axis, each (N,).

    Attributes:
        largest: the highest value of the CAM; None if there is no CAM to draw.
        total: the sum of the CAM, or for a signed look of its absolute values; None without a CAM.
        volumes: name of a mask -> its volume in ml.
        lowest: the lowest value of the CAM for a signed look; otherwise None.
    """

    largest: NDArray[Any] | None
    total: NDArray[np.float64] | None
    volumes: dict[str, NDArray[np.float64]]
    lowest: NDArray[Any] | None = None


@dataclass(frozen=True, eq=False)
class Review:
    """Everything that all pictures of a case share.

    `review_explanation` makes one from an explanation, `review_volumes` from arrays.

    Attributes:
        scan: (X, Y, Z).
        cam: (X, Y, Z) in [0, 1], or in [-1, 1] for a signed look; None if there is no heat.
        masks: boolean (X, Y, Z), under the names "truth", "prediction" and "explained region", as
            far as they are known.
        affine: (4, 4), voxel index -> RAS mm.
        look: the settings.
        window: the grey window that the settings give for this scan.
        notice: the reason why there is no heat; "" if there is some.
        peak: the voxel where the CAM is strongest; None without a CAM.
        view: how the slices are cut and turned.
        profile: numbers about every slice.
        indices: the slices to show.
        title: the words of the header.
        caption: the words of the footer.
    """

    scan: NDArray[Any]
    cam: NDArray[Any] | None
    masks: dict[str, NDArray[np.bool_]]
    affine: NDArray[np.float64]
    look: Look
    window: GreyWindow
    notice: str
    peak: tuple[int, ...] | None
    view: display.View
    profile: Profile
    indices: list[int]
    title: str
    caption: list[str]

    @property
    def peak_slice(self) -> int | None:
        """The slice with the peak; None without a CAM."""
        return None if self.peak is None else self.peak[self.view.slice_axis]

    def range_in(self, index: int) -> str:
        """Return the range of the CAM in a slice as a text: "max 0.40", or "-0.83 to 0.40"."""
        if self.profile.largest is None:
            return ""
        largest = f"{self.profile.largest[index]:.2f}"
        if self.profile.lowest is None:
            return f"max {largest}"
        return f"{self.profile.lowest[index]:.2f} to {largest}"

    @cached_property
    def palette(self) -> draw.Palette:
        """The colours of the heat."""
        return draw.make_palette(self.look)

    @cached_property
    def colour_bar(self) -> draw.Picture:
        """A picture of the colours and their values; black if there is no heat."""
        bar = frame.draw_colour_bar(self.palette, self.look.threshold)
        return bar if self.cam is not None else np.zeros_like(bar)

    def along(self, axis: Axis, slices: SliceSetting = "relevant") -> Review:
        """Return the same case cut along another axis, or with other slices.

        No volume is copied.

        Raises:
            ConfigError: the axis, or the word for the slices, is unknown.
            InputError: an index lies outside of the scan.

        >>> cam = np.zeros((6, 7, 8))
        >>> cam[1, 2, 3] = 1
        >>> review = review_volumes(cam, cam, np.eye(4))
        >>> review.indices, review.along("coronal").indices
        ([3], [2])
        """
        view = display.plan_view(self.scan.shape, self.affine, axis)
        profile = self.profile
        if view.slice_axis != self.view.slice_axis:
            profile = _profile(view, self.cam, self.masks, self.look)
        shown = _chosen(slices, view, profile, self.look, self.peak)
        return replace(self, view=view, profile=profile, indices=shown)


def review_volumes(
    scan: ArrayLike,
    cam: ArrayLike,
    affine: ArrayLike,
    *,
    look: Look = USUAL,
    prediction: ArrayLike | None = None,
    region: ArrayLike | None = None,
    truth: ArrayLike | None = None,
    axis: Axis = "axial",
    slices: SliceSetting = "relevant",
    title: str = "",
    caption: Mapping[str, object] | None = None,
    notice: str = "",
) -> Review:
    """Check the volumes of a case, and plan its pictures; no volume is copied.

    Args:
        scan: (X, Y, Z), real numbers.
        cam: (X, Y, Z) in [0, 1], or in [-1, 1] for a signed look, scaled once for the whole volume.
            If it is zero everywhere or holds NaN, no heat is drawn, and the pictures say so.
        affine: (4, 4), voxel index -> RAS mm.
        look: window, threshold, opacity, colours, and whether evidence against is shown.
        prediction: (X, Y, Z) mask, drawn as a dashed cyan outline.
        region: (X, Y, Z) mask that is explained instead of a prediction, and is drawn like one.
        truth: (X, Y, Z) mask, drawn as a solid green outline.
        axis: "axial", "coronal" or "sagittal". An oblique scan is cut along its own axes.
        slices: voxel indices along the array axis of the scan that is nearest to the anatomical
            axis, as in NIfTI viewers and in the names of the files; or "all"; or "relevant", which
            stands for at most 20 slices where the CAM reaches the threshold, or where there is
            prediction or region. The slice of the peak is one of them.
        title: the first line of the pictures.
        caption: more words for the footer, such as {"class": "tumour", "layer": "encoder.4"}.
        notice: the reason why the CAM must not be drawn, if there is one. It is written instead.

    Raises:
        InputError: shapes differ, an index lies outside of the scan, or the CAM has another scale.
        ConfigError: the axis is unknown.

    Example:
        >>> scan, cam = np.ones((24, 24, 12)), np.zeros((24, 24, 12))
        >>> cam[5:10, 5:10, 6] = 1
        >>> review = review_volumes(scan, cam, np.diag([1, 1, 3, 1]))
        >>> review.indices, review.peak, review.notice
        ([6], (7, 7, 6), '')
        >>> review_volumes(scan, 0 * cam, np.eye(4)).notice
        'no CAM: the map is zero'
    """
    image = _check_volume(scan, "scan")
    heat = _check_volume(cam, "cam", image.shape)
    given = {"truth": truth, "prediction": prediction, "explained region": region}
    masks = {
        name: _check_mask(mask, name, image.shape)
        for name, mask in given.items()
        if mask is not None
    }
    view = display.plan_view(image.shape, affine, axis)
    notice = clean_text(notice) or _missing_heat(heat, look)
    shown = None if notice else heat
    profile = _profile(view, shown, masks, look)
    peak = None
    if shown is not None:
        peak = peak_voxel(look.strength(shown))
        notice = _faint_heat(look.strength(shown[peak]), look.threshold)
    return Review(
        scan=image,
        cam=shown,
        masks=masks,
        affine=view.affine,
        look=look,
        window=choose_window(image, look.window),
        notice=notice,
        peak=peak,
        view=view,
        profile=profile,
        indices=_chosen(slices, view, profile, look, peak),
        title=clean_text(title),
        caption=[
            f"{clean_text(key)}: {clean_text(value)}" for key, value in (caption or {}).items()
        ],
    )


def review_explanation(
    explanation: Explanation,
    look: Look = USUAL,
    *,
    layer: str | None = None,
    axis: Axis = "axial",
    slices: SliceSetting = "relevant",
    case: str = "",
) -> Review:
    """Plan the pictures of an explanation: scan, CAM, prediction, truth, and words.

    If the scan has several channels, the first one is shown, and the footer says so.

    Args:
        explanation: what `explain` returns.
        look: window, threshold, opacity and colours.
        layer: name of a layer; None averages all layers.
        axis, slices: see `review_volumes`.
        case: the scan's name in the title. No name is taken from files or headers.

    Raises:
        InputError: as in `review_volumes`, or there is no such layer.
        ConfigError: as in `review_volumes`.
    """
    mask, truth = explanation.measured, explanation.truth
    measured = None if mask is None else mask.numpy()
    is_predicted = explanation.measured_as == "prediction"
    words = (case, explanation.label or explanation.class_name)
    return review_volumes(
        explanation.scan.data[0].numpy(),
        explanation.volume(layer, scale=look.scale).numpy(),
        explanation.affine,
        look=look,
        prediction=measured if is_predicted else None,
        region=None if is_predicted else measured,
        truth=None if truth is None else truth.numpy(),
        axis=axis,
        slices=slices,
        title=" · ".join(word for word in words if word),
        caption=_caption(explanation, layer, look),
        notice=explanation.notice(layer, look.scale),
    )


# ---------------------------------------------------------------- words


def _caption(explanation: Explanation, layer: str | None, look: Look) -> dict[str, str]:
    """Return the facts in the footer, name -> words."""
    names = list(explanation.maps) if layer is None else [layer]
    finest = min((explanation.native_spacing[name] for name in names), key=math.prod)
    silent = explanation.left_out(layer, look.scale)
    words = {
        "class": explanation.class_name,
        "layer": explanation.layer_name(layer),
        "method": explanation.method,
        "target": explanation.target,
        "score": f"{explanation.score:.6g}",
        "CAM resolution": f"{size_text(finest, 3)} mm",
    }
    if len(explanation.scan.data) > 1:
        words["scan"] = f"channel 1 of {len(explanation.scan.data)}"
    if silent and len(silent) < len(names):
        words["without the layers, whose map is not usable"] = ", ".join(silent)
    if caution := explanation.caution(layer):
        words["caution"] = caution
    if said := explanation.verdict(layer):
        words["verdict"] = said.words
    return words


def _missing_heat(heat: NDArray[Any], look: Look) -> str:
    """Return why there is no heat, "" if there is some; refuse a CAM on another scale."""
    low, high = float(heat.min()), float(heat.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        return NO_HEAT["nonfinite"]
    least, most = look.ends
    if low < least - 1e-3 or high > most + 1e-3:
        example = "cam / abs(cam).max()" if look.signed else "cam.clip(0) / cam.max()"
        raise InputError(
            f"cam must be in {least:g}..{most:g}, but goes from {low:.4g} to {high:.4g}: scale it "
            f"once for the whole volume, for example {example}"
        )
    return "" if high > 0 or (look.signed and low < 0) else "no CAM: the map is zero"


def _faint_heat(high: float, threshold: float) -> str:
    """Return a notice if all heat lies below the threshold; otherwise ""."""
    if high >= threshold:
        return ""
    return f"no CAM at the threshold {threshold:.2f}: the map's maximum is {high:.2g}"


# ---------------------------------------------------------------- figures


def _profile(
    view: display.View,
    cam: NDArray[Any] | None,
    masks: Mapping[str, NDArray[np.bool_]],
    look: Look,
) -> Profile:
    """Compute the numbers about every slice along the axis of a view."""
    others = (view.row_axis, view.column_axis)
    ml = voxel_ml(view.affine)
    volumes = {name: np.count_nonzero(mask, axis=others) * ml for name, mask in masks.items()}
    if cam is None:
        return Profile(None, None, volumes)
    largest, total = display.slice_profile(view, cam)
    if not look.signed:
        return Profile(largest, total, volumes)
    _, total = display.slice_profile(view, look.strength(cam))
    return Profile(largest, total, volumes, lowest=cam.min(axis=others))


def _chosen(
    slices: SliceSetting,
    view: display.View,
    profile: Profile,
    look: Look,
    peak: Sequence[int] | None,
) -> list[int]:
    """Return the indices of the slices that the setting `slices` chooses."""
    relevant = np.zeros(view.slice_count, bool)
    least = max(look.threshold, float(np.finfo(np.float32).tiny))
    if profile.largest is not None:
        relevant |= profile.largest >= least
    if profile.lowest is not None:
        relevant |= profile.lowest <= -least
    for name in profile.volumes.keys() - {"truth"}:
        relevant |= profile.volumes[name] > 0
    return display.choose_slices(slices, relevant, None if peak is None else peak[view.slice_axis])


# ---------------------------------------------------------------- checks


def _check_volume(
    volume: ArrayLike, name: str, shape: tuple[int, ...] | None = None
) -> NDArray[Any]:
    array = np.asarray(volume)
    if shape is not None and array.shape != shape:
        raise InputError(
            f"{name} and scan must have one shape: {name} is {array.shape}, scan is {shape}"
        )
    if array.ndim != 3 or array.size == 0:
        raise InputError(f"{name} must be (X, Y, Z) with at least one voxel, not {array.shape}")
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name} must hold real numbers, not {array.dtype}")
    return array


def _check_mask(mask: ArrayLike, name: str, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    array = _check_volume(mask, name, shape)
    if array.dtype == bool:
        return array
    inside = array == 1
    if not (inside | (array == 0)).all():
        raise InputError(
            f"{name} must be a mask of 0 and 1; of a label map take one class: {name} == label"
        )
    return inside
