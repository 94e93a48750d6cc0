"""Plan what all pictures of a layer share: planes turned for display, values and words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from seg3dcam.errors import ConfigError, InputError, nearest
from seg3dcam.geometry import size_text
from seg3dcam.review.look import colours
from seg3dcam.review.pictures import display, text

if TYPE_CHECKING:
    from seg3dcam.cams.feature_maps import FeatureMaps

FeatureScale = Literal["channel", "layer"]

#: A channel that varies by less than this fraction of its values is constant, up to rounding.
ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class Sheet:
    """What all pictures of one layer share; made by `prepare`.

    Attributes:
        features: the channels, the layer and its grid.
        planes: (C, rows, columns), turned for display.
        pixel: height and width of a voxel, in mm if the place in the patient is known, otherwise in
            input voxels.
        view: how the planes were turned; None if their place in the patient is not known.
        lows, highs: (C,), smallest and largest value of each channel; NaN if the channel holds NaN
            or infinity.
        scale: (low, high) for all channels; None if each channel has its own scale.
        colours: (256, 3), blue, green and red of each level.
        chosen: the channels that are drawn, in this order.
    """

    features: FeatureMaps
    planes: NDArray[Any]
    pixel: tuple[float, float]
    view: display.View | None
    lows: NDArray[np.float64]
    highs: NDArray[np.float64]
    scale: tuple[float, float] | None
    colours: NDArray[np.uint8]
    chosen: list[int]


def prepare(
    features: FeatureMaps,
    *,
    colormap: str = "viridis",
    scale: FeatureScale = "channel",
    channels: Sequence[int] | None = None,
    top: int | None = None,
) -> Sheet:
    """Check the channels and plan their pictures; arguments are those of `save_features`."""
    values = np.asarray(features.values)
    if values.ndim != 3 or values.size == 0 or values.dtype.kind not in "biuf":
        raise InputError(
            f"feature maps must be real numbers (C, h, w), not {values.dtype} {values.shape}"
        )
    if scale not in ("channel", "layer"):
        raise ConfigError(f"scale {scale!r}: {nearest(str(scale), ('channel', 'layer'))}")
    check_count(top, "top")
    lows, highs = (
        np.where(np.isfinite(values).all((1, 2)), extreme, np.nan).astype(np.float64)
        for extreme in (values.min((1, 2)), values.max((1, 2)))
    )
    known = np.isfinite(lows)
    view = _view_of(features)
    return Sheet(
        features=features,
        planes=values if view is None else _turned(values, view),
        pixel=features.pixel_size if view is None else display.spacing_mm(view),
        view=view,
        lows=lows,
        highs=highs,
        scale=(
            (float(lows[known].min()), float(highs[known].max()))
            if scale == "layer" and known.any()
            else None
        ),
        colours=colours(colormap)[:, ::-1],
        chosen=_chosen_channels(features, channels)[:top],
    )


def _view_of(features: FeatureMaps) -> display.View | None:
    """Return how the slice is turned for display; None if its place is not known."""
    if features.affine is None or features.axis is None or features.index is None:
        return None
    views = (
        display.plan_view(features.grid.shape, features.affine, name) for name in display.PLANES
    )
    return next(view for view in views if view.slice_axis == features.axis)


def _turned(planes: NDArray[Any], view: display.View) -> NDArray[Any]:
    """Turn planes (C, h, w) like `display.cut` turns the slices of a volume."""
    if view.row_axis > view.column_axis:
        planes = planes.swapaxes(1, 2)
    if view.flip_rows:
        planes = planes[:, ::-1]
    return planes[:, :, ::-1] if view.flip_columns else planes


def _chosen_channels(features: FeatureMaps, channels: Sequence[int] | None) -> list[int]:
    """Return the channels to draw, each once: the given ones, or all, the best first."""
    if channels is None:
        return [int(channel) for channel in features.order]
    count = len(features.values)
    for channel in channels:
        if channel not in range(count):
            raise InputError(
                f"channel {channel!r} of layer '{features.layer}': legal are 0 to {count - 1}"
            )
    if not len(channels):
        raise InputError(f"no channel given: name some of 0 to {count - 1}, or None for all")
    return [int(channel) for channel in dict.fromkeys(channels)]


def check_count(number: int | None, name: str) -> None:
    """Raise ConfigError for a number below 1; None is legal."""
    if number is not None and number < 1:
        raise ConfigError(f"{name} must be 1 or more, or None, not {number!r}")


# ---------------------------------------------------------------- words


def file_name(features: FeatureMaps, channel: int) -> str:
    """Return the name of a channel's picture; if weights rank the channels, with its rank."""
    digits = max(3, len(str(len(features.values) - 1)))
    name = f"channel_{channel:0{digits}d}"
    if features.weights is None:
        return name
    rank = int(np.flatnonzero(features.order == channel)[0])
    return f"rank_{rank:0{digits}d}_{name}"


def varies(low: float, high: float) -> bool:
    """Tell whether values from `low` to `high` differ by more than rounding."""
    return bool(high - low > ROUNDING * max(abs(low), abs(high)))


def label_of(sheet: Sheet, channel: int) -> list[str]:
    """Return the lines above a channel's tile: number, weight and range of values."""
    low, high = sheet.lows[channel], sheet.highs[channel]
    if not np.isfinite(low):
        extent = "NaN or infinite"
    elif not varies(low, high):
        extent = f"{low:.3g}, constant"
    else:
        extent = f"{low:.3g} … {high:.3g}"
    weights = sheet.features.weights
    weight = [] if weights is None else [f"weight {weights[channel]:+.3g}"]
    return [f"channel {channel}", *weight, extent]


def facts_of(sheet: Sheet) -> list[str]:
    """Return facts about the slice: its place, its edges, and what order and colours mean."""
    features, view = sheet.features, sheet.view
    grid = features.grid
    facts = [
        f"grid {size_text(grid.shape, 6)}",
        f"stride {size_text(grid.stride, 6)} input voxels"
        + ("" if grid.measured else " (assumed)"),
    ]
    if features.axis is not None and features.index is not None:
        where = float(grid.positions(features.axis)[features.index])
        facts.append(
            f"slice {features.index} of 0–{grid.shape[features.axis] - 1} along axis "
            f"{features.axis} (input voxel {where:g})"
        )
        if view is None:
            rows, columns = (axis for axis in range(3) if axis != features.axis)
            facts.append(f"axis {rows} runs down, axis {columns} to the right")
    if view is not None and features.index is not None:
        edges = display.edge_letters(view)
        facts.append(f"{view.axis}, {display.position_text(view, features.index)}")
        facts.append(f"left {edges.left}, right {edges.right}, top {edges.top}")
    if features.weights is not None:
        facts.append(text.clean_text(f"ranked by Grad-CAM weight for {features.target}"))
    own = "each channel on its own scale, constant channels are black"
    return [*facts, "one scale for all channels" if sheet.scale else own]
