"""The gradient of a score with respect to the logits, from which backward passes start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Seed:
    """dS/dlogits of one target, kept as the smallest box of channels and voxels that is not zero.

    Attributes:
        start: first index of the box in (B, K, *S).
        values: the box.
        shape: (B, K, *S).
    """

    start: tuple[int, ...]
    values: torch.Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, dense: torch.Tensor) -> Seed:
        """Return the seed with the values of a (B, K, *S) tensor.

        >>> seed = Seed.of(torch.tensor([[[0.0, 2.0, 0.0]]]))
        >>> seed.start, seed.values.tolist()
        ((0, 0, 1), [[[2.0]]])
        """
        start, box = [0], dense  # of all items
        for axis in range(1, dense.ndim):
            first, end = _used(box, axis)
            start.append(first)
            box = box.narrow(axis, first, end - first)
        whole = box.shape == dense.shape
        return cls(tuple(start), box if whole else box.clone(), tuple(dense.shape))

    def touches(self, items: Sequence[int], start: Sequence[int], size: Sequence[int]) -> bool:
        """Tell whether anything in a box in space is not zero; for the arguments see `cut`."""
        low, high = self._overlap(items, start, size)
        if any(a >= b for a, b in zip(low, high, strict=True)):
            return False
        inner = self.values[index_of(low, high, self.start)]
        return inner.shape == self.values.shape or bool((inner != 0).any())

    def cut(self, items: Sequence[int], start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        """Return a box in space, (len(items), K, *size).

        Args:
            items: consecutive ones.
            start: of the box in voxels of the volume; it may reach beyond the volume.
        """
        low, high = self._overlap(items, start, size)
        first = [items[0], 0, *start]
        if self.values.shape == (len(items), self.shape[1], *size) and first == [*self.start]:
            return self.values.clone()
        result = self.values.new_zeros(len(items), self.shape[1], *size)
        if all(a < b for a, b in zip(low, high, strict=True)):
            result[index_of(low, high, first)] = self.values[index_of(low, high, self.start)]
        return result

    def _overlap(
        self, items: Sequence[int], start: Sequence[int], size: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Return where a box in space and this one overlap: first and past-the-last index."""
        first = [items[0], 0, *start]
        lengths = [len(items), self.shape[1], *size]
        low = list(map(max, first, self.start))
        ends = [f + n for f, n in zip(first, lengths, strict=True)]
        own = [s + n for s, n in zip(self.start, self.values.shape, strict=True)]
        return low, list(map(min, ends, own))


def _used(values: torch.Tensor, axis: int) -> tuple[int, int]:
    """Return the first and past-the-last index along an axis of values that are not zero.

    NaN counts as not zero.
    """
    size = values.shape[axis]
    if not size:
        return 0, 0
    if all((values.select(axis, rim) != 0).any() for rim in (0, size - 1)):
        return 0, size  # the usual case, and quickly seen
    used = (values != 0).transpose(0, axis).flatten(1).any(1).nonzero().flatten().tolist()
    return (used[0], used[-1] + 1) if used else (0, 0)


def index_of(low: Sequence[int], high: Sequence[int], start: Sequence[int]) -> Any:
    """Return the index of low ... high - 1 in a tensor whose first voxel is `start`."""
    return tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
