"""How a scan and its CAM are shown in every format: grey window, threshold, colours.

Look(window="lung", threshold=0.3, colormap="viridis")
Look(signed=True)  # evidence against the target too, in colours of its own
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import cv2
import matplotlib
import numpy as np
from numpy.typing import NDArray

from seg3dcam.errors import ConfigError, nearest

__all__ = ["WINDOWS", "GreyWindow", "Look", "choose_window", "colours"]

#: CT windows in Hounsfield units: name -> (width, level).
WINDOWS: dict[str, tuple[float, float]] = {
    "brain": (80, 40),
    "lung": (1500, -600),
    "soft tissue": (400, 40),
    "abdomen": (350, 40),
    "bone": (2000, 500),
}

#: The default window goes between these percentiles of the voxels of the volume that are not 0.
AUTO_PERCENTILES = (0.5, 99.5)
#: A scan whose lower percentile is at most this is a CT.
CT_AIR = -800.0
#: If there are more voxels than this, only some of them are used, without a visible difference.
AUTO_SAMPLE = 8_000_000

#: Heat has its full opacity where the CAM has at least this value, and less below.
FULL_OPACITY = 0.5

#: The default colours, of the usual look and of a signed one.
USUAL_COLOURS, SIGNED_COLOURS = "inferno", "blue_orange"

#: Diverging colours from -1 to 1, in even steps. They are dark in the middle and become brighter
#: with the strength, as inferno does. The usual diverging colours are darkest at their ends, so
#: that on a dark scan the strongest values would be the least visible. Both sides are equally
#: bright, and people with any kind of colour vision can tell blue from orange.
BLUE_ORANGE = (
    (120, 195, 255),
    (62, 147, 250),
    (22, 101, 206),
    (6, 52, 118),
    (0, 0, 0),
    (102, 38, 0),
    (184, 78, 0),
    (240, 125, 10),
    (255, 185, 80),
)


class GreyWindow(NamedTuple):
    """The scan values that are drawn black (`low`) and white (`high`), and a text about them."""

    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Look:
    """How a scan and its CAM are shown.

    Attributes:
        window: (width, level), or a CT window: "brain", "lung", "soft tissue", "abdomen", "bone".
            None stands for soft tissue in a CT, and otherwise for the 0.5 to 99.5 percentiles of
            the voxels that are not 0.
        threshold: CAM values below it are fully transparent.
        opacity: opacity of the heat where the CAM is 0.5 or more; it is less below.
        colormap: a name of matplotlib or OpenCV, or "blue_orange". "" stands for "inferno", and for
            "blue_orange" in a signed look.
        signed: whether the evidence against the target is shown as well, from -1 to 1 on one scale
            (see `Explanation.volume`). Threshold and opacity then apply to absolute values.

    Raises:
        ConfigError: a setting is illegal.

    >>> Look(colormap="infernal")
    Traceback (most recent call last):
        ...
    seg3dcam.errors.ConfigError: unknown colormap 'infernal'; did you mean 'inferno'?
    """

    window: str | Sequence[float] | None = None
    threshold: float = 0.2
    opacity: float = 0.5
    colormap: str = ""
    signed: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that no writer could draw, and choose colours if none are given."""
        if not self.colormap:
            chosen = SIGNED_COLOURS if self.signed else USUAL_COLOURS
            object.__setattr__(self, "colormap", chosen)
        if self.window is not None:
            width_level(self.window)
        for name in ("threshold", "opacity"):
            if not 0 <= getattr(self, name) <= 1:  # also refuses NaN
                raise ConfigError(f"{name} must be in 0..1, not {getattr(self, name)!r}")
        colours(self.colormap)

    @property
    def scale(self) -> Literal["max", "signed"]:
        """The argument `scale` for `Explanation.volume`."""
        return "signed" if self.signed else "max"

    @property
    def ends(self) -> tuple[float, float]:
        """The CAM values drawn in the first and in the last colour."""
        return (-1.0, 1.0) if self.signed else (0.0, 1.0)

    @property
    def from_text(self) -> str:
        """The threshold in words.

        >>> Look().from_text, Look(signed=True).from_text
        ('0.20', '±0.20')
        """
        return f"±{self.threshold:.2f}" if self.signed else f"{self.threshold:.2f}"

    def strength(self, cam: Any) -> Any:
        """Return the strength of CAM values, to which threshold and peaks refer."""
        return abs(cam) if self.signed else cam

    def level(self, cam: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return where CAM values lie among the colours, from 0 for the first to 1 for the last.

        >>> Look(signed=True).level(np.array([-1.0, 0.0, 0.5])).tolist()
        [0.0, 0.5, 0.75]
        """
        low, high = self.ends
        return (cam - low) / (high - low)

    def alpha(self, cam: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return the heat's opacity at CAM values: opacity * min(1, strength / 0.5).

        It is 0 below the threshold.

        >>> Look(threshold=0.2, opacity=0.5).alpha(np.array([0.1, 0.25, 0.9])).tolist()
        [0.0, 0.25, 0.5]
        """
        cam = self.strength(cam)
        return np.where(cam < self.threshold, 0, self.opacity * np.minimum(1, cam / FULL_OPACITY))


# ---------------------------------------------------------------- colours


def colours(colormap: str) -> NDArray[np.uint8]:
    """Return red, green and blue of a colormap at 0, 1/255, ..., 1: (256, 3).

    Args:
        colormap: "blue_orange", a name of matplotlib, or a name of OpenCV in small letters, such as
            "parula". If both libraries have it, that of matplotlib is taken.

    Raises:
        ConfigError: there is no such colormap.

    >>> colours("gray")[[0, 255]].tolist()
    [[0, 0, 0], [255, 255, 255]]
    """
    if colormap == SIGNED_COLOURS:
        return _between(BLUE_ORANGE)
    if colormap in matplotlib.colormaps:
        rgb = matplotlib.colormaps[colormap](np.linspace(0, 1, 256))[:, :3]
        return (rgb * 255).round().astype(np.uint8)
    of_opencv = _opencv_colormaps()
    if colormap in of_opencv:
        levels = np.arange(256, dtype=np.uint8)[:, None]
        return cv2.applyColorMap(levels, of_opencv[colormap])[:, 0, ::-1].copy()
    names = {name for name in matplotlib.colormaps if not name.endswith("_r")} | set(of_opencv)
    names.add(SIGNED_COLOURS)
    raise ConfigError(f"unknown colormap {colormap!r}; {nearest(str(colormap), sorted(names))}")


def _between(knots: Sequence[Sequence[int]]) -> NDArray[np.uint8]:
    """Return 256 colours, interpolated linearly between evenly spaced ones."""
    at = np.linspace(0, len(knots) - 1, 256)
    columns = [np.interp(at, np.arange(len(knots)), column) for column in zip(*knots, strict=True)]
    return np.stack(columns, axis=1).round().astype(np.uint8)


def _opencv_colormaps() -> dict[str, int]:
    """Return name in small letters -> OpenCV's number of the colormap."""
    prefix = "COLORMAP_"
    return {
        name.removeprefix(prefix).lower(): getattr(cv2, name)
        for name in dir(cv2)
        if name.startswith(prefix)
    }


# ---------------------------------------------------------------- grey window


def choose_window(scan: NDArray[Any], window: str | Sequence[float] | None) -> GreyWindow:
    """Return the grey window for a preset's name, for (width, level), or for None.

    None stands for soft tissue if the scan holds air in Hounsfield units, as only a CT does. For
    other scans it stands for the 0.5 and 99.5 percentiles of the voxels that are finite and not 0.
    In both cases the whole volume counts, so all slices get the same window.

    Raises:
        ConfigError: the preset is unknown, or the width is not above 0.

    >>> choose_window(np.zeros((2, 2, 2)), "brain")
    GreyWindow(low=0.0, high=80.0, text='W 80 L 40 (brain)')
    """
    if window is None:
        low, high, source = _auto_range(scan)
        return GreyWindow(low, high, f"{_in_words(low, high)} ({source})")
    width, level = width_level(window)
    low, high = level - width / 2, level + width / 2
    suffix = f" ({_preset(window)})" if isinstance(window, str) else ""
    return GreyWindow(low, high, _in_words(low, high) + suffix)


def width_level(window: str | Sequence[float]) -> tuple[float, float]:
    """Return (width, level) for the name of a preset or a pair of numbers; otherwise ConfigError.

    >>> width_level("soft_tissue")
    (400, 40)
    """
    if isinstance(window, str):
        preset = _preset(window)
        if preset not in WINDOWS:
            raise ConfigError(
                f"unknown window {window!r}; {nearest(preset, WINDOWS)}; or (width, level), or "
                "None for 0.5–99.5 percentiles"
            )
        return WINDOWS[preset]
    try:
        width, level = (float(number) for number in window)
    except (TypeError, ValueError):
        raise ConfigError(f"window must be (width, level), not {window!r}") from None
    if not (math.isfinite(width) and math.isfinite(level) and width > 0):
        raise ConfigError(f"window must be a finite (width, level), width > 0, not {window!r}")
    return width, level


def _preset(name: str) -> str:
    return name.lower().replace("_", " ").replace("-", " ")


def _auto_range(scan: NDArray[Any]) -> tuple[float, float, str]:
    """Return the values that are drawn black and white, and a text about them."""
    values = scan.ravel(order="K")  # no copy in any memory order
    step = max(1, math.ceil(values.size / AUTO_SAMPLE)) | 1  # odd: out of step with rows
    values = values[::step].astype(np.float32, copy=False)
    values = values[np.isfinite(values) & (values != 0)]
    if values.size == 0:
        return 0.0, 1.0, "no value but 0"
    low, high = (float(number) for number in np.percentile(values, AUTO_PERCENTILES))
    if low < high and low <= CT_AIR:
        width, level = WINDOWS["soft tissue"]
        return level - width / 2, level + width / 2, "soft tissue, since there is air as in a CT"
    if low < high:
        return low, high, "0.5–99.5 % of the volume"
    # Nearly all values are the same, so the few others may be what matters.
    low, high = float(values.min()), float(values.max())
    if low < high:
        return low, high, "all values of the volume"
    half = max(0.5, abs(low) / 100)  # mid grey
    return low - half, high + half, f"constant: no value but {low:.4g}"


def _in_words(low: float, high: float) -> str:
    return f"W {high - low:.4g} L {(high + low) / 2:.4g}"
