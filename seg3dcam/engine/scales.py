"""The scales at which maps are shown, and the words for a map that shows no heat."""

from __future__ import annotations

from typing import Literal, get_args

from seg3dcam.errors import InputError

#: Whether a layer's map can be shown, or why not; see `LayerMap.item_status`.
Status = Literal["ok", "zero", "nonfinite", "degenerate", "incomplete"]

#: How a map is scaled for a view; see `CamResult.volume`.
Scale = Literal["max", "minmax", "raw", "signed"]

#: The words for a map without a positive value, of which the usual view shows nothing.
ALL_AGAINST = "all evidence speaks against the target"

#: Status -> why no heat is shown, in the words of pictures, pages and files. With the numbers of a
#: map, `LayerMap.reason` says the same.
NO_HEAT = {
    "zero": "no CAM: no voxel speaks for the target, or contributions cancel to rounding noise",
    "nonfinite": "no CAM: the map holds NaN or infinite values",
    "degenerate": "no CAM: the map is the same everywhere, or undefined for these activations",
    "incomplete": "no CAM: a branch of the network has no gradient, so a map would miss part of "
    "the evidence",
}


def display_range(scale: Scale) -> tuple[float, float] | None:
    """Return the values of the first and the last colour in viewers; None for raw maps."""
    return {"raw": None, "signed": (-1.0, 1.0)}.get(scale, (0.0, 1.0))


def check_scale(scale: str) -> None:
    """Raise InputError unless there is such a scale."""
    if scale not in get_args(Scale):
        *others, last = map(repr, get_args(Scale))
        raise InputError(f"scale {scale!r}: legal are {', '.join(others)} and {last}")
