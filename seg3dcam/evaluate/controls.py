"""Maps that know nothing of the network: what a map has to be better than.

- the predicted mask itself: a map that is no better says nothing beyond the mask;
- the absolute value of the input: a map that is no better is an edge or contrast detector;
- nearness to the mask: a map that is no better is a blurred mask;
- random maps of the layer's own resolution: coarse maps are smooth, and smooth maps do better by
  chance than single voxels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from scipy import ndimage

from seg3dcam.checks import check_whole_number
from seg3dcam.geometry import FeatureGrid, interpolate


def mask_alone(mask: torch.Tensor) -> torch.Tensor:
    """Return the mask (*S) as a map: 1 inside, 0 outside."""
    return mask.double()


def input_alone(x: torch.Tensor) -> torch.Tensor:
    """Return the absolute values of an input (1, C, *S), summed over channels, as a map (*S)."""
    return x[0].double().abs().sum(0)


def nearness(mask: torch.Tensor, spacing: Sequence[float] | None = None) -> torch.Tensor:
    """Return a map (*S) that falls with the distance to a mask, from 1 inside of it to 0.

    Args:
        spacing: mm from voxel to voxel along every axis, None for 1.

    >>> nearness(torch.tensor([True, False, False])).tolist()
    [1.0, 0.5, 0.0]
    """
    distance = torch.from_numpy(
        ndimage.distance_transform_edt(~mask.cpu().numpy(), sampling=spacing)
    )
    return 1 - distance / distance.max().clamp(min=1e-300)


def random_maps(
    grid: FeatureGrid, shape: Sequence[int], *, draws: int = 10, seed: int = 0
) -> Iterator[torch.Tensor]:
    """Yield random maps (*shape): uniform noise on a layer's grid, interpolated as its maps are.

    Args:
        grid: the layer's, in voxels of the input.
        shape: of the input.

    >>> grid = FeatureGrid((2,), (2.0,), (0.5,))
    >>> [len(values.unique()) for values in random_maps(grid, (4,), draws=2)]
    [4, 4]
    """
    check_whole_number("draws", draws)
    generator = torch.Generator("cpu").manual_seed(seed)
    for _ in range(draws):
        noise = torch.rand(grid.shape, generator=generator, dtype=torch.float64, device="cpu")
        yield interpolate(noise, grid, FeatureGrid.of_voxels(shape))


def rank_p_value(value: float, of_random: Sequence[float], *, low_is_good: bool = True) -> float:
    """Return the chance that a random map is at least as good: (1 + as good) / (1 + draws).

    So ten draws cannot give less than 1/11.

    >>> rank_p_value(0.2, [0.5, 0.6, 0.55])
    0.25
    """
    sign = 1 if low_is_good else -1
    as_good = sum(sign * other <= sign * value for other in of_random)
    return (1 + as_good) / (1 + len(of_random))
