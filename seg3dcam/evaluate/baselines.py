"""What stands in the place of a part of the input that is deleted.

No replacement is neutral: a constant makes edges, a blur leaves the large shapes, noise is a
texture that the network may know. So a result should be looked at with at least two of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from seg3dcam.checks import check_number, is_number
from seg3dcam.errors import ConfigError, nearest

#: Where the input is deleted, (*S) bool -> what stands there, (1, C, *S).
Replacement = Callable[[torch.Tensor], torch.Tensor]

#: Standard deviation of the blur in voxels: structures of a few voxels are gone.
BLUR = 8.0

#: Width in voxels of the neighbourhood from which a deleted voxel is filled, before it is widened.
NEIGHBOURHOOD = 9


def baseline_of(baseline: str | float, x: torch.Tensor, seed: int) -> Replacement:
    """Return a baseline for an input by its name, or the one that is a number everywhere.

    Args:
        x: (1, C, *S).
        seed: of the noise.

    Raises:
        ConfigError: there is none of this name.
    """
    check_baseline(baseline)
    if is_number(baseline):
        return _always(torch.full_like(x, float(baseline)))
    return BASELINES[str(baseline)](x, seed)


def check_baseline(baseline: str | float) -> None:
    """Raise ConfigError unless there is a baseline of this name, or it is a number."""
    if is_number(baseline):
        check_number("baseline", baseline)
        if abs(float(baseline)) > torch.finfo(torch.float32).max:
            raise ConfigError(f"baseline {baseline!r}: too large for a voxel's value")
    elif not isinstance(baseline, str) or baseline not in BASELINES:
        legal = nearest(str(baseline), BASELINES)
        raise ConfigError(f"baseline {baseline!r}: a number, or {legal}")


def mean(x: torch.Tensor, seed: int) -> Replacement:
    """Return each channel's mean over the volume."""
    return _always(_as_volume(x.double().flatten(2).mean(2), x))


def noise(x: torch.Tensor, seed: int) -> Replacement:
    """Return normal noise with the mean and standard deviation of each channel."""
    flat = x.double().flatten(2)
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu")
    centre, spread = _as_volume(flat.mean(2), x), _as_volume(flat.std(2, correction=0), x)
    return _always(centre + drawn.to(x) * spread)


def blur(x: torch.Tensor, seed: int) -> Replacement:
    """Return the input blurred by a Gaussian of `BLUR` voxels."""
    blurred = [
        ndimage.gaussian_filter(channel.cpu().double().numpy(), BLUR, mode="nearest")
        for channel in x[0]
    ]
    return _always(torch.from_numpy(np.stack(blurred))[None].to(x))


def neighbours(x: torch.Tensor, seed: int) -> Replacement:
    """Return, for each voxel, the mean of the voxels around it that are not deleted.

    The neighbourhood is a cube, doubled in size where nothing of it is left. Where everything is
    deleted, it is the mean of all.
    """

    def filled(deleted: torch.Tensor) -> torch.Tensor:
        if deleted.all():
            return mean(x, seed)(deleted)
        return torch.from_numpy(_filled(x[0].cpu().double().numpy(), deleted.cpu().numpy()))[
            None
        ].to(x)

    return filled


#: What stands in the place of what is deleted where a verdict or a recommendation is found; both
#: have to hold with each.
OF_VERDICTS = ("mean", "blur")

BASELINES: dict[str, Callable[[torch.Tensor, int], Replacement]] = {
    "mean": mean,
    "blur": blur,
    "noise": noise,
    "neighbours": neighbours,
}


def _filled(channels: NDArray[np.float64], missing: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return (C, *S) with the missing voxels, (*S) bool, filled from those around them."""
    filled, counted = channels.copy(), (~missing).astype(np.float64)
    width = NEIGHBOURHOOD
    while missing.any():
        weight = ndimage.uniform_filter(counted, width, mode="constant")
        # One voxel weighs 1 / width^n; much less is the rounding of a running sum.
        reached = missing & (weight > 0.5 / width**counted.ndim)
        for own, given in zip(filled, channels, strict=True):
            sums = ndimage.uniform_filter(given * counted, width, mode="constant")
            own[reached] = sums[reached] / weight[reached]
        missing = missing & ~reached
        width = 2 * width + 1
    return filled


def _always(replacement: torch.Tensor) -> Replacement:
    """Return a replacement that does not depend on what is deleted."""
    return lambda deleted: replacement


def _as_volume(of_channels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return (1, C) as a volume shaped like `x`."""
    return of_channels.to(x)[(..., *[None] * (x.ndim - 2))].expand_as(x)
