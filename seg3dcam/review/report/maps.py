"""Pack a map in 8 bits, on the coarsest grid from which a page can draw it well enough."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.nn.functional import avg_pool3d, max_pool3d

from seg3dcam.explaining.provenance import LayerRecord
from seg3dcam.geometry import FeatureGrid, interpolate
from seg3dcam.review.report.display_order import DisplayOrder

#: A drawn map may differ from the true one by this much; otherwise a finer grid is tried.
MAP_ERROR = 0.02
#: Grids that are tried: stored voxels per voxel of the layer, along each axis.
MAP_PARTS = (1, 2, 4)
#: The largest blocks of voxels that are averaged to make a map small.
MAX_BLOCK_MM = 20.0
#: The code of 0 in a map. Values below 0 are never drawn, but they tell where the map crosses 0.
ZERO_CODE = 55
#: The code of 0 in a signed map, whose values below 0 are drawn, too.
SIGNED_ZERO_CODE = 127
#: The error is measured in so many planes along each axis, and in the plane through the peak.
ERROR_PLANES = 4


class PackedMap(NamedTuple):
    """A map in 8 bits on a grid that may be coarser than the scan's.

    A page interpolates the map first and then cuts it at zero, as `Explanation.volume` does. So
    values below zero must be kept. `data` unpacks to the codes (Z, Y, X), as differences along x.
    If `zero` is the code of 0, a code c above it stands for
    `ends[1] * (c - zero) / (255 - zero)`, and one below it for `ends[0] * (zero - c) / zero`.

    `shape`, `start` and `step` are (x, y, z): voxel k lies at the display index start + step * k
    of the scan. Beyond the outermost voxels their values are used. `error` is the largest error of
    the drawn map that was measured.
    """

    data: bytes
    ends: list[float]
    shape: list[int]
    start: list[float]
    step: list[float]
    error: float


class Lattice(NamedTuple):
    """Where the voxels of a layer lie along each axis of the scan: at offset + stride * k."""

    stride: tuple[float, ...]
    offset: tuple[float, ...]


def pack_map(
    values: torch.Tensor,
    order: DisplayOrder,
    lattice: Lattice | None,
    cells: Sequence[float],
    limit: float,
    signed: bool = False,
) -> PackedMap:
    """Pack a map (X, Y, Z) whose largest value is 1 on the coarsest grid that is good enough.

    Args:
        lattice: where the voxels of the layer lie in the scan. The map was interpolated between
            them, so they hold all of it. None if they are not known, or not parallel to the scan's
            axes.
        cells: scan voxels per voxel of the layer's own grid, along each axis.
        limit: the most bytes. If no grid needs so few, blocks of voxels are averaged.
        signed: whether values below 0 are drawn, too. The largest absolute value is then 1.
    """
    ways = _ways_to_read(values, lattice, cells, signed)
    candidates = (_packed(*read, values, order, signed) for read in ways)
    best: PackedMap | None = None
    for packed in candidates:
        if len(packed.data) <= limit and (best is None or packed.error < best.error):
            best = packed
        if len(packed.data) > limit or packed.error <= MAP_ERROR:
            break
    return best or _packed_blocks(values, order, limit, signed)


def zero_code(signed: bool) -> int:
    """Return the code of 0 in the maps of a page."""
    return SIGNED_ZERO_CODE if signed else ZERO_CODE


def lattice_of(
    layer: LayerRecord | None, prepared_affine: ArrayLike | None, affine: NDArray[np.float64]
) -> Lattice | None:
    """Return where the voxels of a layer lie along the axes of the scan.

    Return None if that is not known, or if the axes of layer and scan are not parallel, for example
    because the scan was rotated for the network.

    Args:
        layer: the layer's grid in the network's input.
        prepared_affine: (4, 4) voxel -> RAS mm of the network's input.
        affine: (4, 4) voxel -> RAS mm of the scan.
    """
    if layer is None or not layer.shape or prepared_affine is None:
        return None
    window = FeatureGrid(tuple(layer.shape), tuple(layer.stride), tuple(layer.offset))
    matrix = np.linalg.inv(affine) @ window.affine(np.asarray(prepared_affine))
    steps = np.abs(matrix[:3, :3])
    stride = steps.max(1)
    one_to_one = len(set(steps.argmax(1).tolist())) == 3
    if not one_to_one or (steps.sum(1) - stride).max() > 1e-6 * stride.min():
        return None
    return Lattice(tuple(stride.tolist()), tuple(matrix[:3, 3].tolist()))


def _ways_to_read(
    values: torch.Tensor, lattice: Lattice | None, cells: Sequence[float], signed: bool
) -> Iterator[tuple[torch.Tensor, FeatureGrid]]:
    """Yield a map on coarse grids first, and at last on the scan's own grid."""
    own = FeatureGrid.of_voxels(values.shape)
    for parts in MAP_PARTS:
        if lattice is None:
            grid = _even_grid(values.shape, [cell / parts for cell in cells])
            yield interpolate(values, own, grid), grid
        else:
            # Where sliding windows put grids of the layer side by side, halves or quarters may fit.
            stride = tuple(step / parts for step in lattice.stride)
            grid = _nodes_or_voxels(Lattice(stride, lattice.offset), values.shape)
            yield _at_nodes(values, grid), grid
    # Nothing is interpolated here, so values below zero, which are not drawn, are not needed.
    yield values if signed else values.clamp(min=0), own


def _packed_blocks(
    values: torch.Tensor, order: DisplayOrder, limit: float, signed: bool
) -> PackedMap:
    """Average blocks of voxels, which are larger if `limit` is smaller."""
    side = min(order.spacing)
    while True:
        side *= 1.5
        block = [
            min(size, max(1, round(side / mm)))
            for mm, size in zip(order.spacing, values.shape, strict=True)
        ]
        means = avg_pool3d(values[None], block, ceil_mode=True)[0]
        offset = tuple((by - 1) / 2 for by in block)
        grid = FeatureGrid(tuple(means.shape), tuple(map(float, block)), offset)
        packed = _packed(means, grid, values, order, signed)
        if len(packed.data) <= limit or side > MAX_BLOCK_MM:
            return packed


def _nodes_or_voxels(lattice: Lattice, shape: Sequence[int]) -> FeatureGrid:
    """Return the grid of nodes or voxels from which a map can be drawn.

    Use the layer's nodes where two scan voxels lie between them; otherwise use the voxels.
    """
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
    """Return the values of a map at the nodes of its layer.

    Between two nodes the map is linear along each axis. So two voxels there give the exact value at
    either node, but two voxels on different sides of a node do not.
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
    """Return a grid from the first to the last voxel with steps of at most `factors` voxels."""
    sizes, steps = [], []
    for n, by in zip(shape, factors, strict=True):
        sizes.append(math.ceil((n - 1) / max(1, by)) + 1)
        steps.append((n - 1) / (sizes[-1] - 1) if n > 1 else 1.0)
    return FeatureGrid(tuple(sizes), tuple(steps), (0.0,) * len(sizes))


def _packed(
    coarse: torch.Tensor, grid: FeatureGrid, values: torch.Tensor, order: DisplayOrder, signed: bool
) -> PackedMap:
    if not signed:
        # Values below zero without a neighbour above are never seen. As zeros they need no room.
        seen = max_pool3d(coarse[None], 3, stride=1, padding=1)[0] > 0
        coarse = torch.where(seen, coarse, 0)
    zero = zero_code(signed)
    ends = [min(-1e-6, float(coarse.min())), max(1e-6 if signed else 1.0, float(coarse.max()))]
    above, below = (255 - zero) / ends[1], zero / -ends[0]
    codes = (torch.where(coarse < 0, coarse * below, coarse * above) + zero).round_().byte()
    arranged = order.arrange(codes.numpy())
    data = zlib.compress(np.diff(arranged, axis=2, prepend=np.uint8(0)).tobytes(), 3)
    levels = codes.float() - zero
    drawn = torch.where(levels < 0, levels / below, levels / above)
    first = [
        size - 1 - offset - step * (count - 1) if flip else offset
        for size, offset, step, count, flip in zip(
            values.shape, grid.offset, grid.stride, grid.shape, order.flipped, strict=True
        )
    ]
    return PackedMap(
        data,
        ends,
        order.by_axis(grid.shape),
        order.by_axis(first),
        order.by_axis(grid.stride),
        _largest_error(values, drawn, grid, signed),
    )


def _largest_error(
    values: torch.Tensor, coarse: torch.Tensor, grid: FeatureGrid, signed: bool
) -> float:
    """Return the largest error of what the page will draw, in the peak's planes and some others."""
    strongest = values.abs() if signed else values
    peak = np.unravel_index(int(strongest.argmax()), values.shape)
    largest = 0.0
    for axis, size in enumerate(values.shape):
        others = np.linspace(0, size - 1, min(size, ERROR_PLANES)).astype(int)
        for index in {int(peak[axis]), *others.tolist()}:
            wanted = values.narrow(axis, index, 1).movedim(axis, 0)
            # The plane's own axis comes first, so that little is left for the other axes.
            drawn = interpolate(
                coarse.movedim(axis, 0),
                _axis_first(grid, axis),
                FeatureGrid(tuple(wanted.shape), (1.0, 1.0, 1.0), (float(index), 0.0, 0.0)),
            )
            gap = drawn - wanted if signed else drawn.clamp_(min=0) - wanted.clamp(min=0)
            largest = max(largest, float(gap.abs().max()))
    return largest


def _axis_first(grid: FeatureGrid, axis: int) -> FeatureGrid:
    axes = [axis, *(other for other in range(3) if other != axis)]
    return FeatureGrid(
        tuple(grid.shape[n] for n in axes),
        tuple(grid.stride[n] for n in axes),
        tuple(grid.offset[n] for n in axes),
    )
