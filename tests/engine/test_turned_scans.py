"""A scan that is mirrored, or whose axes are permuted, and a network turned alike turn the map.

Sizes are odd and windows start on even voxels, so that strides of 2 look the same from both ends.
"""

from __future__ import annotations

import pytest
import toy
from helpers_crossed import crossed
from helpers_engine import EXACT, signed_maps
from torch import nn
from toy import deviation

from seg3dcam import WindowPlan
from seg3dcam.cams.attributions import ATTRIBUTIONS
from seg3dcam.cams.catalogue import CAMS
from seg3dcam.cams.result import CamResult

METHODS = CAMS | {key: ATTRIBUTIONS[key] for key in ("gradient", "gradient_x_input", "occlusion")}
LAYERS = ["encoder", "bottleneck"]  # of stride 1 and 2
#: The methods that most will use, and those whose axes are not alike.
USUAL = ("grad_cam", "hires_cam", "slice_grad_cam", "xres_cam", "full_grad")
SHAPES = {2: (5, 7), 3: (5, 3, 7)}
PLANS = {"one window": None, "windows": WindowPlan(3, overlap=0.33)}

STRAIGHT = toy.mirroring(())


def skip(ndim: int) -> nn.Module:
    return toy.seeded(toy.Skip(ndim), seed=1)


def turned(
    key: str, ndim: int, plan: WindowPlan | None, turn: toy.Turn, blocks: tuple
) -> CamResult:
    """Return the result for a turned input; kernels (K, C, *s) are turned like inputs."""
    settings = {"window": blocks} if key == "xres_cam" else {}
    if key == "occlusion":
        settings = {"block": 1}
    network = toy.shared(toy.turned, toy.shared(skip, ndim), turn)
    x = turn(toy.random_input(1, 1, *SHAPES[ndim], seed=7))
    return METHODS[key](network, LAYERS, sliding_window=plan, **settings)(x, target=1)


def assert_turned(found: CamResult, straight: CamResult, turn: toy.Turn) -> None:
    assert found.maps.keys() == straight.maps.keys()
    for name, map_ in straight.maps.items():
        assert deviation(found.maps[name], turn(map_[:, None])[:, 0]) < EXACT
        values = straight.layers[name].values
        assert deviation(found.layers[name].values, turn(values[:, None])[:, 0]) < EXACT
    assert found.status == straight.status


@pytest.mark.few(4)
@signed_maps
@pytest.mark.parametrize(
    ("key", "axes", "through"),
    crossed(
        METHODS,
        [(2,), (3,), (2, 3), (4,), (2, 4), (2, 3, 4)],
        PLANS,
        rows=6,
        also=[(key, (2, 3, 4), "windows") for key in USUAL],
        pairs=True,
    ),
)
def test_mirrored_scan_gives_the_mirrored_map(key, axes, through):
    plan = PLANS[through]
    ndim = 2 if max(axes) == 3 else 3
    blocks = (1, None, 1)[:ndim]
    flip = toy.mirroring(axes)
    straight = toy.shared(turned, key, ndim, plan, STRAIGHT, blocks)
    assert_turned(turned(key, ndim, plan, flip, blocks), straight, flip)


@pytest.mark.few(3)
@signed_maps
@pytest.mark.parametrize(
    ("key", "order", "through"),
    crossed(
        METHODS,
        [(1, 0), (0, 2, 1), (1, 2, 0), (2, 1, 0)],
        PLANS,
        rows=4,
        also=[(key, (0, 2, 1), "windows") for key in USUAL],
        pairs=True,
    ),
)
def test_permuted_axes_give_the_permuted_map(key, order, through):
    plan = PLANS[through]
    if key == "slice_grad_cam" and len(order) == 3 and order[0] != 0:
        pytest.skip("another axis counts the slices")
    ndim = len(order)
    blocks = (1, None, 2)[:ndim]
    permute = toy.permuting(order)
    straight = toy.shared(turned, key, ndim, plan, STRAIGHT, blocks)
    found = turned(key, ndim, plan, permute, tuple(blocks[axis] for axis in order))
    assert_turned(found, straight, permute)
