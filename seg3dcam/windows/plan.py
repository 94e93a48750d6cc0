"""Where the windows of a volume lie, and how much each of them counts at a voxel.

The windows and their importance are those of MONAI, so that the prediction is the same as that of
`monai.inferers.sliding_window_inference`, or those of nnU-Net's own predictor. At a voxel, the
*share* of a window is its importance divided by the sum over all windows there. So the shares sum
to 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812 (its usual name)

from seg3dcam.checks import (
    PaddingMode,
    WindowConvention,
    WindowMode,
    check_number,
    check_whole_number,
    check_word,
    is_number,
    is_whole,
)
from seg3dcam.errors import ConfigError, MissingExtraError


@dataclass(frozen=True)
class WindowPlan:
    """How a volume is cut into windows, as in MONAI's sliding window inference.

    Attributes:
        roi_size: voxels of a window, one number or one for each axis (-1: the whole axis).
        overlap: fraction of a window that it shares with the next, 0 <= overlap < 1.
        mode: "gaussian" counts a window's centre more than its rim, "constant" does not.
        sw_batch_size: windows that go through the network at once.
        sigma_scale: the gaussian's standard deviation as a fraction of the window.
        padding_mode, cval: how a volume smaller than a window is filled up.
        cache_gb: how many GB of activations may be kept between the first and the second pass;
            what does not fit is computed again.
        convention: "monai" puts windows at fixed steps and moves the last one back inside;
            "nnunet" spreads them evenly and has a gaussian of its own (extra `nnunet`).

    >>> WindowPlan(96, overlap=0.5).mode
    'gaussian'
    """

    roi_size: int | Sequence[int]
    overlap: float | Sequence[float] = 0.25
    mode: WindowMode = "gaussian"
    sw_batch_size: int = 1
    sigma_scale: float = 0.125
    padding_mode: PaddingMode = "constant"
    cval: float = 0.0
    cache_gb: float = 2.0
    convention: WindowConvention = "monai"

    def __post_init__(self) -> None:
        sizes = _as_tuple(self.roi_size)
        if not all(is_whole(n) and (n > 0 or n == -1) for n in sizes):
            raise ConfigError(
                f"roi_size {self.roi_size!r}: whole numbers of voxels from 1 up, -1: a whole axis"
            )
        check_word("window mode", self.mode, WindowMode)
        check_word("window convention", self.convention, WindowConvention)
        if not all(is_number(part) and 0 <= part < 1 for part in _as_tuple(self.overlap)):
            raise ConfigError(f"overlap {self.overlap!r}: a fraction, 0 <= overlap < 1")
        check_word("padding_mode", self.padding_mode, PaddingMode)
        check_whole_number("sw_batch_size", self.sw_batch_size)
        check_number("sigma_scale", self.sigma_scale, above=0)
        check_number("cval", self.cval)
        check_number("cache_gb", self.cache_gb, least=0, of="GB")


@dataclass(frozen=True)
class Windows:
    """The windows of one volume.

    Attributes:
        shape: voxels of the volume.
        roi: voxels of a window.
        before: voxels of padding in front of the volume, where it is smaller than a window.
        starts: first voxel of each window, in the padded volume.
        plan: the plan that they follow.
    """

    shape: tuple[int, ...]
    roi: tuple[int, ...]
    before: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]
    plan: WindowPlan

    def __len__(self) -> int:
        return len(self.starts)

    def one_by_one(self) -> Windows:
        """Return the same windows, each going through the network by itself."""
        return replace(self, plan=replace(self.plan, sw_batch_size=1))

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """Voxels of the padded volume."""
        return tuple(map(max, self.shape, self.roi))

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., *shape) filled up to the padded shape as the plan says."""
        return self._pad(x, self.plan.padding_mode, self.plan.cval)

    def crop(self, padded: torch.Tensor) -> torch.Tensor:
        """Return the volume (..., *shape) inside the padded one."""
        if self.padded_shape == self.shape:
            return padded
        return padded[box_of(self.before, self.shape)]

    def pad_with_zeros(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., *shape) filled up to the padded shape with zeros."""
        return self._pad(x, "constant", 0.0)

    def _pad(self, x: torch.Tensor, mode: str, value: float) -> torch.Tensor:
        if self.padded_shape == self.shape:
            return x
        sizes: list[int] = []
        for padded, size, before in zip(self.padded_shape, self.shape, self.before, strict=True):
            sizes = [before, padded - size - before, *sizes]  # torch wants the last axis first
        try:
            return F.pad(x, sizes, mode=mode, value=value if mode == "constant" else None)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConfigError(
                f"padding_mode {mode!r} cannot fill {self.shape} voxels up to a window of "
                f"{self.roi}: take 'constant' or 'replicate', or a smaller roi_size"
            ) from error

    def cut(self, padded: torch.Tensor, which: Sequence[int]) -> torch.Tensor:
        """Return windows of a padded volume (B, C, *padded_shape) as a batch (n * B, C, *roi)."""
        return torch.cat([padded[box_of(self.starts[window], self.roi)] for window in which])

    @cached_property
    def importance(self) -> torch.Tensor:
        """How much a window counts at each of its voxels: (*roi) float32, positive."""
        mode, sigma_scale = self.plan.mode, self.plan.sigma_scale
        if self.plan.convention == "nnunet" and mode == "gaussian":
            # Rounded to half precision, as nnU-Net's predictor weighs.
            return (
                _nnunet()
                .compute_gaussian(
                    self.roi, sigma_scale, value_scaling_factor=10, device=torch.device("cpu")
                )
                .float()
            )
        from monai.data.utils import compute_importance_map

        return compute_importance_map(self.roi, mode, sigma_scale)

    def total_importance(self, like: torch.Tensor) -> torch.Tensor:
        """Return the sum of importance over all windows at each voxel of the padded volume."""
        total = torch.zeros(self.padded_shape, dtype=like.dtype, device=like.device)
        for window in range(len(self)):
            total[box_of(self.starts[window], self.roi)] += self.importance.to(total)
        return total

    def weigh_by_share(
        self, values: torch.Tensor, window: int, total_importance: torch.Tensor
    ) -> None:
        """Multiply the values (..., *roi) of a window by its share at each voxel, in place."""
        values *= self.importance.to(values)
        values /= self.cut(total_importance, [window])

    def groups(self, whole_axes: Sequence[int]) -> list[list[int]]:
        """Group the windows that differ only in where they lie along `whole_axes`."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for window, start in enumerate(self.starts):
            key = tuple(s for axis, s in enumerate(start) if axis not in whole_axes)
            groups.setdefault(key, []).append(window)
        return list(groups.values())

    def lengths(self, axes: Sequence[int]) -> float:
        """Return the product of the padded volume's sizes along `axes`, in windows' lengths."""
        return float(np.prod([self.padded_shape[axis] / self.roi[axis] for axis in axes]))

    def batches(self, which: Iterable[int]) -> Iterator[list[int]]:
        """Yield `which` windows in batches of sw_batch_size."""
        which = list(which)
        size = self.plan.sw_batch_size
        for start in range(0, len(which), size):
            yield which[start : start + size]


def plan_windows(plan: WindowPlan | None, shape: Sequence[int]) -> Windows:
    """Lay out the windows of a volume: MONAI's places in MONAI's order, or nnU-Net's.

    Args:
        plan: None for one window, the volume itself.
        shape: voxels of the volume.

    >>> plan_windows(WindowPlan(4, overlap=0.5), (7,)).starts
    ((0,), (2,), (3,))
    """
    plan = plan or WindowPlan(-1)
    shape = tuple(int(n) for n in shape)
    sizes = _for_each_axis(plan.roi_size, len(shape), "roi_size")
    roi = tuple(length if size == -1 else size for size, length in zip(sizes, shape, strict=True))
    overlap = _for_each_axis(plan.overlap, len(shape), "overlap")
    padded = tuple(map(max, shape, roi))
    starts = _STARTS[plan.convention](padded, roi, overlap)
    before = tuple((p - s) // 2 for p, s in zip(padded, shape, strict=True))
    return Windows(shape, roi, before, starts, plan)


def _monai_starts(
    padded: Sequence[int], roi: Sequence[int], overlap: Sequence[float]
) -> tuple[tuple[int, ...], ...]:
    if tuple(padded) == tuple(roi):  # one window, for which MONAI need not be imported
        return ((0,) * len(roi),)
    from monai.data.utils import dense_patch_slices

    interval = [
        size if size == length else max(1, int(size * (1 - part)))
        for size, length, part in zip(roi, padded, overlap, strict=True)
    ]
    places = dense_patch_slices(padded, roi, interval, return_slice=True)
    return tuple(tuple(int(axis.start) for axis in place) for place in places)


def _nnunet_starts(
    padded: Sequence[int], roi: Sequence[int], overlap: Sequence[float]
) -> tuple[tuple[int, ...], ...]:
    steps_of = _nnunet().compute_steps_for_sliding_window
    lines = [
        # A 2D network takes every slice once, whatever the overlap.
        range(length) if size == 1 else steps_of((length,), (size,), round(1 - part, 9))[0]
        for length, size, part in zip(padded, roi, overlap, strict=True)
    ]
    return tuple(itertools.product(*lines))


#: Convention -> (padded shape, roi, overlap) -> first voxel of each window.
_STARTS = {"monai": _monai_starts, "nnunet": _nnunet_starts}


def _nnunet() -> Any:
    try:
        from nnunetv2.inference import sliding_window_prediction
    except ImportError as error:
        raise MissingExtraError(
            "windows by nnU-Net's convention are its own: pip install 'seg3dcam[nnunet]'"
        ) from error
    return sliding_window_prediction


def box_of(start: Sequence[int], size: Sequence[int]) -> Any:
    """Return the index of a box in the last axes of a tensor."""
    return (..., *(slice(s, s + n) for s, n in zip(start, size, strict=True)))


def _for_each_axis(value: int | float | Sequence, ndim: int, what: str) -> tuple:
    values = _as_tuple(value)
    if len(values) == 1:
        return values * ndim
    if len(values) != ndim:
        raise ConfigError(f"{what} {values} has {len(values)} numbers; the volume has {ndim} axes")
    return values


def _as_tuple(value: int | float | Sequence) -> tuple:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
