"""Pack what a page needs of scan and masks, small enough for an e-mail.

All arrays are put into display order (see `seg3dcam.review.report.display_order`).
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

#: Shares of the 256 grey codes for the chosen window, the whole range, and all CT windows.
SHARES = {"window": 0.5, "range": 0.1, "presets": 0.4}


# ---------------------------------------------------------------- grey values


class Greys(NamedTuple):
    """A scan in 8 bits: `codes` (Z, Y, X), and `values` (256,), the scan's value for each code."""

    codes: NDArray[np.uint8]
    values: NDArray[np.float64]


def is_ct(lowest: float, window: Any = None) -> bool:
    """Tell whether a scan is in Hounsfield units, by the name of its window or the air in it."""
    return isinstance(window, str) or lowest <= CT_AIR


def grey_codes(
    volume: NDArray[np.floating], order: DisplayOrder, window: GreyWindow, ct: bool
) -> Greys:
    """Turn a scan into 8-bit codes, which are densest where a reader looks.

    Most codes lie in the chosen window, some in each CT window, and a few in the rest of the range,
    so that another window can be chosen in the page. A value is at most half the distance between
    two codes away from the value of its code.
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
    """Return values, and for each of them the fraction of all codes that lie below it."""
    presets = WINDOWS.values() if ct else ()
    # A wider window gets more codes, but not in proportion to its width.
    roots = sum(math.sqrt(width) for width, _ in presets)
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
    """A way to store the slices: both sides shrunk by a factor, then PNG or WebP."""

    text: str
    shrink: float = 1
    webp: int | None = None


#: From the best to the smallest; the first one that fits is taken. For the same error in noisy
#: scans, WebP needs half as many bytes as JPEG. Every browser since 2020 can read it.
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
#: How many slices are encoded to estimate the size of all.
SAMPLE_SLICES = 12


class Slices(NamedTuple):
    """Encoded slices, the lowest first.

    `shape` is their shape (X, Y, Z), and `step` tells how many voxels of the scan make one of
    theirs along x, y and z.
    """

    encoding: Encoding
    pictures: list[bytes]
    shape: tuple[int, int, int]
    step: tuple[float, float, float]

    @property
    def mime(self) -> str:
        """The MIME type of the pictures."""
        return "image/png" if self.encoding.webp is None else "image/webp"


def pack_slices(codes: NDArray[np.uint8], limit: float) -> Slices:
    """Encode slices by the first of `ENCODINGS` that needs at most `limit` bytes, else the last.

    A voxel of shrunk slices is the mean of the area that it covers, so voxel k lies at
    `step * k + (step - 1) / 2` in voxels of the scan.
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
    """Estimate from some slices how many bytes all slices will need."""
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
    """Return width and height of a picture after shrinking."""
    height, width = picture.shape
    return max(1, round(width / by)), max(1, round(height / by))


def _each(task: Callable[[int], Any], count: int) -> list[Any]:
    """Do something for each slice in threads; numpy and OpenCV release Python's lock."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(task, range(count)))


# ---------------------------------------------------------------- masks and profiles


def pack_mask(mask: torch.Tensor, order: DisplayOrder) -> bytes:
    """Pack a boolean mask (X, Y, Z) with one bit per voxel, the first voxel in the lowest bit."""
    bits = np.packbits(order.arrange(mask.numpy()), axis=None, bitorder="little")
    return zlib.compress(bits.tobytes(), 6)


def map_profile(
    volume: torch.Tensor, order: DisplayOrder, look: Look
) -> list[dict[str, list[float]]]:
    """Return the largest value and the sum of every slice along x, y and z.

    For a signed look the sum is that of absolute values, and the lowest values are added.
    """
    strength = look.strength(volume)
    # After this step two axes are left, so a large volume is read only twice.
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
    """Return how many voxels of a mask lie in every slice along x, y and z."""
    inside = mask.numpy()
    first = np.count_nonzero(inside, axis=2)
    last = np.count_nonzero(inside, axis=(0, 1))
    return _ordered(order, [{"voxels": first.sum(1)}, {"voxels": first.sum(0)}, {"voxels": last}])


def _ordered(
    order: DisplayOrder, profiles: Sequence[dict[str, NDArray[Any]]]
) -> list[dict[str, list[float]]]:
    """Put profiles along the array's axes into display order, rounded to 4 digits."""
    turned = [
        {
            name: [float(f"{value:.4g}") for value in (line[::-1] if flip else line)]
            for name, line in profile.items()
        }
        for flip, profile in zip(order.flipped, profiles, strict=True)
    ]
    return order.by_axis(turned)
