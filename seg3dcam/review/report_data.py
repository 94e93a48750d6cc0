"""What a page needs of scan, maps and masks, made small enough for a mail.

Everything is put into display order, (Z, Y, X): x towards the patient's left, y towards the back,
z upwards. A page cuts all three planes out of that without knowing how the file was stored.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import nibabel
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.nn.functional import avg_pool3d, max_pool3d

from seg3dcam.geometry import FeatureGrid, interpolate, spacing_of
from seg3dcam.look import WINDOWS, Window
from seg3dcam.review.display import plan_view

#: Parts of the 256 grey codes: for the chosen window, for the whole range, and for all CT windows.
SHARES = {"window": 0.5, "range": 0.1, "presets": 0.4}
#: A scan that reaches down to this value is a CT: in MR and PET there is nothing so far below 0.
CT_AIR = -800.0

#: A map may be drawn this far from its value; a finer grid is taken where it is further off.
MAP_ERROR = 0.02
#: Grids that are tried for a map: voxels of the page to one of the layer, along each axis.
MAP_PARTS = (1, 2, 4)
#: Blocks that are averaged to make a map small are at most this large.
MAX_BLOCK_MM = 20.0
#: The code of 0 in a map. What is below is never drawn, but it says where the map crosses 0.
ZERO_CODE = 55
#: Planes along each axis where the error is measured, besides the one through the peak.
ERROR_PLANES = 4


# ---------------------------------------------------------------- display order


@dataclass(frozen=True, eq=False)
class Frame:
    """How arrays of a scan are turned into display order.

    Attributes:
        axes: the array's own axes for slices, rows and columns.
        flips: which of them run the other way.
        shape: (X, Y, Z) of the array.
        affine: (4, 4), display index (x, y, z) -> RAS mm.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    shape: tuple[int, ...]
    affine: NDArray[np.float64]

    def arrange(self, volume: NDArray[Any]) -> NDArray[Any]:
        """Return a view of (X, Y, Z) as (slices, rows, columns)."""
        steps = tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)
        return volume.transpose(self.axes)[steps]

    def by_axis(self, values: Sequence[Any]) -> list[Any]:
        """Order one value for each of the array's axes as columns, rows, slices (x, y, z)."""
        return [values[axis] for axis in reversed(self.axes)]

    @property
    def spacing(self) -> tuple[float, ...]:
        """The array's own spacing in mm."""
        of_axis = dict(zip(self.axes, reversed(spacing_of(self.affine)), strict=True))
        return tuple(of_axis[axis] for axis in range(3))

    @property
    def flipped(self) -> list[bool]:
        """Which of the array's own axes run the other way."""
        return [flip for _, flip in sorted(zip(self.axes, self.flips, strict=True))]

    def place(self, voxel: Sequence[int]) -> list[int]:
        """Return the display index (x, y, z) of one of the array's voxels."""
        shown = [
            self.shape[axis] - 1 - voxel[axis] if flip else voxel[axis]
            for axis, flip in zip(self.axes, self.flips, strict=True)
        ]
        return [int(index) for index in reversed(shown)]


def plan_frame(shape: Sequence[int], affine: NDArray[np.float64]) -> Frame:
    """Plan the display order of a grid; it agrees with `plan_view` of all three planes.

    >>> frame = plan_frame((2, 3, 4), np.eye(4))  # x to the right and y to the front: flipped
    >>> frame.place((0, 0, 0)), frame.arrange(np.zeros((2, 3, 4))).shape
    ([1, 2, 0], (4, 3, 2))
    """
    view = plan_view(shape, affine, "axial")
    axes = (view.slice_axis, view.row_axis, view.column_axis)
    downwards = nibabel.aff2axcodes(view.affine)[view.slice_axis] == "I"
    flips = (downwards, view.flip_rows, view.flip_columns)
    to_own = np.zeros((4, 4))
    to_own[3, 3] = 1
    for shown, (axis, flip) in enumerate(zip(reversed(axes), reversed(flips), strict=True)):
        to_own[axis, shown] = -1 if flip else 1
        to_own[axis, 3] = view.shape[axis] - 1 if flip else 0
    return Frame(axes, flips, view.shape, view.affine @ to_own)


# ---------------------------------------------------------------- grey values


class Greys(NamedTuple):
    """A scan in 8 bits: `codes` (Z, Y, X), and the scan's value that each code stands for."""

    codes: NDArray[np.uint8]
    values: NDArray[np.float64]


def is_ct(lowest: float, window: Any = None) -> bool:
    """Tell whether a scan is in Hounsfield units: by its window's name, or by the air in it."""
    return isinstance(window, str) or lowest <= CT_AIR


def grey_codes(volume: NDArray[np.floating], frame: Frame, window: Window, ct: bool) -> Greys:
    """Turn a scan into 8-bit codes that lie densely where a reader looks.

    Most codes lie in the chosen window, some in each CT window, few in the rest of the range, so
    that other windows can be chosen in the page. The value of a code is off by at most half a step
    to the next code.
    """
    lowest, highest = float(volume.min()), float(volume.max())
    knots, parts = _code_curve(min(lowest, window.low), max(highest, window.high), window, ct)
    arranged = frame.arrange(volume)
    codes = np.empty(arranged.shape, np.uint8)

    def encode(index: int) -> None:
        codes[index] = np.rint(255 * np.interp(arranged[index], knots, parts))

    _each(encode, len(codes))
    return Greys(codes, np.interp(np.arange(256) / 255, parts, knots))


def _code_curve(
    lowest: float, highest: float, window: Window, ct: bool
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
    below = sum(
        share * (knots - low).clip(0, high - low) / (high - low) for low, high, share in spans
    )
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
    sample = codes[:: max(1, len(codes) // SAMPLE_SLICES)]
    for encoding in ENCODINGS:
        foreseen = sum(map(len, _encode(sample, encoding))) * len(codes) / len(sample)
        if foreseen > limit and encoding is not ENCODINGS[-1]:
            continue
        pictures = _encode(codes, encoding)
        if sum(map(len, pictures)) <= limit:
            break
    width, height = _shrunk(codes[0], encoding.shrink)
    step = codes.shape[2] / width, codes.shape[1] / height, 1.0
    return Slices(encoding, pictures, (width, height, len(codes)), step)


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


# ---------------------------------------------------------------- maps


class PackedMap(NamedTuple):
    """A map in 8 bits on a grid that may be coarser than the scan's.

    The map is interpolated first and then cut at zero, as `Explanation.volume` was; that is why
    values below zero are kept. `data` unpacks to differences along x of the codes, (Z, Y, X).
    Code c is the value `ends[1] * (c - ZERO_CODE) / (255 - ZERO_CODE)`, and below zero
    `ends[0] * (ZERO_CODE - c) / ZERO_CODE`.

    `shape`, `start` and `step` are (x, y, z): voxel k lies at the scan's display index
    start + step * k; beyond the outermost voxels their value is held. `error` is how far the page
    is off where it was measured.
    """

    data: bytes
    ends: list[float]
    shape: list[int]
    start: list[float]
    step: list[float]
    error: float


class Lattice(NamedTuple):
    """Where a layer's voxels lie along each of the scan's axes: at offset + stride * k."""

    stride: tuple[float, ...]
    offset: tuple[float, ...]


def pack_map(
    values: torch.Tensor,
    frame: Frame,
    lattice: Lattice | None,
    cells: Sequence[float],
    limit: float,
) -> PackedMap:
    """Pack a map, (X, Y, Z), whose largest value is 1, on the coarsest grid that is good enough.

    Args:
        lattice: the layer's voxels in the scan, between which the map was interpolated, so that
            nothing is lost on them. None: not known, or not parallel to the scan's axes.
        cells: scan voxels to one voxel of the layer's own grid, for each axis.
        limit: bytes. Where no grid needs less, blocks of voxels are averaged.
    """
    candidates = (_packed(*read, values, frame) for read in _ways_to_read(values, lattice, cells))
    best: PackedMap | None = None
    for packed in candidates:
        if len(packed.data) <= limit and (best is None or packed.error < best.error):
            best = packed
        if len(packed.data) > limit or packed.error <= MAP_ERROR:
            break
    return best or _packed_blocks(values, frame, limit)


def lattice_of(
    layer: Mapping[str, Any], prepared_affine: ArrayLike, affine: NDArray[np.float64]
) -> Lattice | None:
    """Return where a layer's voxels lie in the scan, from what `explain` keeps as provenance.

    None where its axes are not those of the scan, which may have been turned for the network.
    """
    window = FeatureGrid(tuple(layer["shape"]), tuple(layer["stride"]), tuple(layer["offset"]))
    matrix = np.linalg.inv(affine) @ window.affine(np.asarray(prepared_affine))
    steps = np.abs(matrix[:3, :3])
    stride = steps.max(1)
    one_to_one = len(set(steps.argmax(1).tolist())) == 3
    if not one_to_one or (steps.sum(1) - stride).max() > 1e-6 * stride.min():
        return None
    return Lattice(tuple(stride.tolist()), tuple(matrix[:3, 3].tolist()))


def _ways_to_read(
    values: torch.Tensor, lattice: Lattice | None, cells: Sequence[float]
) -> Iterator[tuple[torch.Tensor, FeatureGrid]]:
    """Yield a map on coarse grids first, on the scan's own at last."""
    own = FeatureGrid.of_voxels(values.shape)
    for parts in MAP_PARTS:
        if lattice is None:
            grid = _even_grid(values.shape, [cell / parts for cell in cells])
            yield interpolate(values, own, grid), grid
        else:
            # Sliding windows may have put layer grids side by side: then halves or quarters fit.
            stride = tuple(step / parts for step in lattice.stride)
            grid = _nodes_or_voxels(Lattice(stride, lattice.offset), values.shape)
            yield _at_nodes(values, grid), grid
    yield values.clamp(min=0), own  # each voxel alone: what is below zero tells nothing


def _packed_blocks(values: torch.Tensor, frame: Frame, limit: float) -> PackedMap:
    """Average blocks of voxels, the larger the smaller `limit` is."""
    side = min(frame.spacing)
    while True:
        side *= 1.5
        block = [
            min(size, max(1, round(side / mm)))
            for mm, size in zip(frame.spacing, values.shape, strict=True)
        ]
        means = avg_pool3d(values[None], block, ceil_mode=True)[0]
        offset = tuple((by - 1) / 2 for by in block)
        grid = FeatureGrid(tuple(means.shape), tuple(map(float, block)), offset)
        packed = _packed(means, grid, values, frame)
        if len(packed.data) <= limit or side > MAX_BLOCK_MM:
            return packed


def _nodes_or_voxels(lattice: Lattice, shape: Sequence[int]) -> FeatureGrid:
    """Take the nodes that two of the scan's voxels tell of; where they are dense, its voxels."""
    lines = []
    for size, stride, offset in zip(shape, *lattice, strict=True):
        first = math.ceil((1 - offset) / stride) - 1
        last = math.floor((size - 2 - offset) / stride) + 1
        if stride >= 2 and last > first:
            lines.append((last - first + 1, stride, offset + stride * first))
        else:
            lines.append((size, 1.0, 0.0))
    sizes, strides, offsets = zip(*lines, strict=True)
    return FeatureGrid(sizes, strides, offsets)


def _at_nodes(values: torch.Tensor, grid: FeatureGrid) -> torch.Tensor:
    """Read a map at the nodes of its layer.

    Between two nodes it is straight along each axis, so two voxels there tell the value of either
    node exactly; voxels on both sides of a node do not.
    """
    for axis, size in enumerate(values.shape):
        if grid.stride[axis] == 1:
            continue
        at = grid.positions(axis)
        above = at.ceil()
        low = torch.where(above + 1 > size - 1, at.floor() - 1, above).clamp(0, size - 2).long()
        weight = (at - low).to(values.dtype).view(-1, *[1] * (values.ndim - axis - 1))
        values = values.index_select(axis, low).lerp_(values.index_select(axis, low + 1), weight)
    return values


def _even_grid(shape: Sequence[int], factors: Sequence[float]) -> FeatureGrid:
    """Return a grid from the first to the last voxel with at most `factors` voxels a step."""
    sizes, steps = [], []
    for n, by in zip(shape, factors, strict=True):
        sizes.append(math.ceil((n - 1) / max(1, by)) + 1)
        steps.append((n - 1) / (sizes[-1] - 1) if n > 1 else 1.0)
    return FeatureGrid(tuple(sizes), tuple(steps), (0.0,) * len(sizes))


def _packed(
    coarse: torch.Tensor, grid: FeatureGrid, values: torch.Tensor, frame: Frame
) -> PackedMap:
    # What is below zero, and has no neighbour above, is never seen: zeros need no room.
    seen = max_pool3d(coarse[None], 3, stride=1, padding=1)[0] > 0
    coarse = torch.where(seen, coarse, 0)
    ends = [min(-1e-6, float(coarse.min())), max(1.0, float(coarse.max()))]
    above, below = (255 - ZERO_CODE) / ends[1], ZERO_CODE / -ends[0]
    codes = (torch.where(coarse < 0, coarse * below, coarse * above) + ZERO_CODE).round_().byte()
    arranged = frame.arrange(codes.numpy())
    data = zlib.compress(np.diff(arranged, axis=2, prepend=np.uint8(0)).tobytes(), 3)
    levels = codes.float() - ZERO_CODE
    drawn = torch.where(levels < 0, levels / below, levels / above)
    first = [
        size - 1 - offset - step * (count - 1) if flip else offset
        for size, offset, step, count, flip in zip(
            values.shape, grid.offset, grid.stride, grid.shape, frame.flipped, strict=True
        )
    ]
    return PackedMap(
        data,
        ends,
        frame.by_axis(grid.shape),
        frame.by_axis(first),
        frame.by_axis(grid.stride),
        _largest_error(values, drawn, grid),
    )


def _largest_error(values: torch.Tensor, coarse: torch.Tensor, grid: FeatureGrid) -> float:
    """Compare planes through the peak, and some others, with what the page will draw."""
    peak = np.unravel_index(int(values.argmax()), values.shape)
    largest = 0.0
    for axis, size in enumerate(values.shape):
        others = np.linspace(0, size - 1, min(size, ERROR_PLANES)).astype(int)
        for index in {int(peak[axis]), *others.tolist()}:
            wanted = values.narrow(axis, index, 1).movedim(axis, 0)
            # The plane's own axis first: what is left is small.
            drawn = interpolate(
                coarse.movedim(axis, 0),
                _axis_first(grid, axis),
                FeatureGrid(tuple(wanted.shape), (1.0, 1.0, 1.0), (float(index), 0.0, 0.0)),
            )
            gap = drawn.clamp_(min=0) - wanted.clamp(min=0)
            largest = max(largest, float(gap.abs().max()))
    return largest


def _axis_first(grid: FeatureGrid, axis: int) -> FeatureGrid:
    order = [axis, *(other for other in range(3) if other != axis)]
    return FeatureGrid(
        *(tuple(of[n] for n in order) for of in (grid.shape, grid.stride, grid.offset))
    )


# ---------------------------------------------------------------- masks and profiles


def pack_mask(mask: torch.Tensor, frame: Frame) -> bytes:
    """Pack a mask, (X, Y, Z) bool: one bit a voxel, the first in the lowest bit."""
    bits = np.packbits(frame.arrange(mask.numpy()), axis=None, bitorder="little")
    return zlib.compress(bits.tobytes(), 6)


def map_profile(volume: torch.Tensor, frame: Frame) -> list[dict[str, list[float]]]:
    """Return the largest value and the sum of every slice, across x, y and z."""
    # Two axes are left after the first step, so a large volume is read only twice.
    largest = [volume.amax(2), volume.amax(0)]
    total = [volume.sum(2), volume.sum(0)]
    return _ordered(
        frame,
        [
            {"max": one.numpy(), "sum": two.numpy()}
            for one, two in (
                (largest[0].amax(1), total[0].sum(1)),
                (largest[0].amax(0), total[0].sum(0)),
                (largest[1].amax(0), total[1].sum(0)),
            )
        ],
    )


def mask_profile(mask: torch.Tensor, frame: Frame) -> list[dict[str, list[float]]]:
    """Return the voxels in every slice, across x, y and z."""
    inside = mask.numpy()
    first = np.count_nonzero(inside, axis=2)
    last = np.count_nonzero(inside, axis=(0, 1))
    return _ordered(frame, [{"voxels": first.sum(1)}, {"voxels": first.sum(0)}, {"voxels": last}])


def _ordered(
    frame: Frame, profiles: Sequence[dict[str, NDArray[Any]]]
) -> list[dict[str, list[float]]]:
    """Put profiles along the array's own axes into display order, with 4 digits."""
    turned = [
        {
            name: [float(f"{value:.4g}") for value in (line[::-1] if flip else line)]
            for name, line in profile.items()
        }
        for flip, profile in zip(frame.flipped, profiles, strict=True)
    ]
    return frame.by_axis(turned)
