"""What a page needs of scan, maps and masks, made small enough for a mail.

All arrays are put into display order, see `seg3dcam.review.report.display_order`.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from seg3dcam.review.look import CT_AIR, WINDOWS, GreyWindow, Look
from seg3dcam.review.report.display_order import DisplayOrder

#: Parts of the 256 grey codes: for the chosen window, for the whole range, and for all CT windows.
SHARES = {"window": 0.5, "range": 0.1, "presets": 0.4}


# ---------------------------------------------------------------- grey values


class Greys(NamedTuple):
    """A scan in 8 bits: `codes` (Z, Y, X), and the scan's value that each code stands for."""

    codes: NDArray[np.uint8]
    values: NDArray[np.float64]


def is_ct(lowest: float, window: Any = None) -> bool:
    """Tell whether a scan is in Hounsfield units: by its window's name, or by the air in it."""
    return isinstance(window, str) or lowest <= CT_AIR


def grey_codes(
    volume: NDArray[np.floating], order: DisplayOrder, window: GreyWindow, ct: bool
) -> Greys:
    """Turn a scan into 8-bit codes that lie densely where a reader looks.

    Most codes lie in the chosen window, some in each CT window, few in the rest of the range, so
    that other windows can be chosen in the page. The value of a code is off by at most half a step
    to the next code.
    """
    lowest, highest = float(volume.min()), float(volume.max())
    knots, parts = _code_curve(min(lowest, window.low), max(highest, window.high), window, ct)
    arranged = order.arrange(volume)
    codes = np.empty(arranged.shape, np.uint8)

    def encode(index: int) -> None:
        codes[index] = np.rint(255 * np.interp(arranged[index], knots, parts))

    _each(encode, len(codes))
    return Greys(codes, np.interp(np.arange(256) / 255, parts, knots))


def _code_curve(
    lowest: float, highest: float, window: GreyWindow, ct: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return values and the part of all codes that lies below each: linear in between."""
    presets = WINDOWS.values() if ct else ()
    roots = sum(math.sqrt(width) for width, _ in presets)  # wide ones need more codes, not in step
    spans = [
        (lowest, highest, SHARES["range"]),
        (window.low, window.high, SHARES["window"]),
        *(
            (level - width / 2, level + width / 2, SHARES["presets"] * math.sqrt(width) / roots)
            for width, level in presets
        ),
    ]
    knots = np.unique(
        np.clip([end for low, high, _ in spans for end in (low, high)], lowest, highest)
    )
    below = np.zeros(len(knots))
    for low, high, share in spans:
        below += share * (knots - low).clip(0, high - low) / (high - low)
    return knots, (below - below[0]) / (below[-1] - below[0])


# ---------------------------------------------------------------- slices as pictures


class Encoding(NamedTuple):
    """One way to store the slices: shrink both sides by a factor, then PNG or WebP."""

    text: str
    shrink: float = 1
    webp: int | None = None


#: From the best to the smallest; the first one that fits is taken. WebP needs half of JPEG's
#: bytes for the same error in noisy scans, and every browser since 2020 reads it.
ENCODINGS = (
    Encoding("every grey code kept"),
    *(
        Encoding(f"WebP quality {q}, for display only", webp=q)
        for q in (98, 95, 92, 90, 87, 84, 80)
    ),
    *(
        Encoding(f"shrunk by {by} in each slice, WebP quality {q}, for display only", by, q)
        for by, q in ((1.5, 90), (2, 90), (2, 80), (3, 80), (4, 75))
    ),
)
#: Slices that are encoded to foresee the size of all.
SAMPLE_SLICES = 12


class Slices(NamedTuple):
    """Encoded slices, lowest first; `shape` (X, Y, Z) and the scan's voxels to one of theirs."""

    encoding: Encoding
    pictures: list[bytes]
    shape: tuple[int, int, int]
    step: tuple[float, float, float]

    @property
    def mime(self) -> str:
        """What a browser is told to decode."""
        return "image/png" if self.encoding.webp is None else "image/webp"


def pack_slices(codes: NDArray[np.uint8], limit: float) -> Slices:
    """Encode slices by the first of `ENCODINGS` whose bytes stay within `limit`, else the last.

    A shrunk voxel is the mean of the area that it covers: voxel k lies at the scan's voxel
    `step * k + (step - 1) / 2`.
    """
    for encoding in ENCODINGS:
        if foreseen_bytes(codes, encoding) > limit and encoding is not ENCODINGS[-1]:
            continue
        pictures = _encode(codes, encoding)
        if sum(map(len, pictures)) <= limit:
            break
    width, height = _shrunk(codes[0], encoding.shrink)
    step = codes.shape[2] / width, codes.shape[1] / height, 1.0
    return Slices(encoding, pictures, (width, height, len(codes)), step)


def foreseen_bytes(codes: NDArray[np.uint8], encoding: Encoding) -> float:
    """Foresee from some slices what all will need."""
    sample = codes[:: max(1, len(codes) // SAMPLE_SLICES)]
    return sum(map(len, _encode(sample, encoding))) * len(codes) / len(sample)


def _encode(codes: NDArray[np.uint8], encoding: Encoding) -> list[bytes]:
    webp = encoding.webp
    suffix = ".png" if webp is None else ".webp"
    flags = [] if webp is None else [cv2.IMWRITE_WEBP_QUALITY, webp]
    size = _shrunk(codes[0], encoding.shrink)

    def encode(index: int) -> bytes:
        picture = codes[index]
        if size != picture.shape[::-1]:
            picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        return cv2.imencode(suffix, picture, flags)[1].tobytes()

    return _each(encode, len(codes))


def _shrunk(picture: NDArray[Any], by: float) -> tuple[int, int]:
    """Width and height after shrinking."""
    height, width = picture.shape
    return max(1, round(width / by)), max(1, round(height / by))


def _each(task: Callable[[int], Any], count: int) -> list[Any]:
    """Do something for each slice, on all cores: numpy and OpenCV let threads run."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(task, range(count)))


# ---------------------------------------------------------------- masks and profiles


def pack_mask(mask: torch.Tensor, order: DisplayOrder) -> bytes:
    """Pack a mask, (X, Y, Z) bool: one bit a voxel, the first in the lowest bit."""
    bits = np.packbits(order.arrange(mask.numpy()), axis=None, bitorder="little")
    return zlib.compress(bits.tobytes(), 6)


def map_profile(
    volume: torch.Tensor, order: DisplayOrder, look: Look
) -> list[dict[str, list[float]]]:
    """Return the largest value and the sum of every slice, across x, y and z.

    Of a signed look the lowest value too, and the sum of the values' sizes.
    """
    strength = look.strength(volume)
    # Two axes are left after the first step, so a large volume is read only twice.
    largest = [volume.amax(2), volume.amax(0)]
    total = [strength.sum(2), strength.sum(0)]
    profiles = [
        {"max": one.numpy(), "sum": two.numpy()}
        for one, two in (
            (largest[0].amax(1), total[0].sum(1)),
            (largest[0].amax(0), total[0].sum(0)),
            (largest[1].amax(0), total[1].sum(0)),
        )
    ]
    if look.signed:
        for axis, profile in enumerate(profiles):
            profile["min"] = volume.amin([other for other in range(3) if other != axis]).numpy()
    return _ordered(order, profiles)


def mask_profile(mask: torch.Tensor, order: DisplayOrder) -> list[dict[str, list[float]]]:
    """Return the voxels in every slice, across x, y and z."""
    inside = mask.numpy()
    first = np.count_nonzero(inside, axis=2)
    last = np.count_nonzero(inside, axis=(0, 1))
    return _ordered(order, [{"voxels": first.sum(1)}, {"voxels": first.sum(0)}, {"voxels": last}])


def _ordered(
    order: DisplayOrder, profiles: Sequence[dict[str, NDArray[Any]]]
) -> list[dict[str, list[float]]]:
    """Put profiles along the array's own axes into display order, with 4 digits."""
    turned = [
        {
            name: [float(f"{value:.4g}") for value in (line[::-1] if flip else line)]
            for name, line in profile.items()
        }
        for flip, profile in zip(order.flipped, profiles, strict=True)
    ]
    return order.by_axis(turned)
