"""Geometry: interpolation and resampling are exact for linear fields, and nothing is shifted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import toy
from helpers_engine import slow_unless
from helpers_geometry import OBLIQUE_LAS, rotation, world_field
from hypothesis import given, settings
from hypothesis import strategies as st
from monai import transforms
from torch import nn
from torch.nn import functional as F  # noqa: N812

from seg3dcam import GradCAM, HiResCAM, WindowPlan, targets
from seg3dcam.errors import InputError
from seg3dcam.geometry import (
    FeatureGrid,
    checked_affine,
    interpolate,
    ras_affine,
    resample,
    resample_labels,
    resampling,
)


@given(
    size=st.integers(2, 6),
    stride=st.sampled_from([1.0, 2.0, 3.0, 8.0]),
    offset=st.floats(-2, 4),
    slope=st.floats(-3, 3),
)
@settings(deadline=None, max_examples=50)
def test_a_linear_field_is_interpolated_exactly_and_held_outside(size, stride, offset, slope):
    coarse = FeatureGrid((size,), (stride,), (offset,))
    fine = FeatureGrid.of_voxels((int(size * stride),))
    found = interpolate(slope * coarse.positions(0), coarse, fine)
    held = fine.positions(0).clamp(offset, offset + stride * (size - 1))
    torch.testing.assert_close(found, slope * held, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("stride", [2, 4])
def test_with_poolings_offset_it_is_what_torch_does(ndim: int, stride: int) -> None:
    values = torch.rand(2, 3, *[3, 4, 5][:ndim], dtype=torch.double)
    shape = values.shape[2:]
    grid = FeatureGrid(tuple(shape), (float(stride),) * ndim, ((stride - 1) / 2,) * ndim)
    found = interpolate(values, grid, FeatureGrid.of_voxels([n * stride for n in shape]))
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[ndim]
    expected = F.interpolate(values, scale_factor=stride, mode=mode, align_corners=False)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_world_field_survives_resampling_between_oblique_grids(axis: int) -> None:
    coarse_affine = rotation(-5, 9, 30) @ np.diag([3.0, -2.0, 2.5, 1.0])
    coarse_shape = (24, 34, 29)
    centre = coarse_affine[:3, :3] @ (np.array(coarse_shape) / 2)
    coarse_affine[:3, 3] = (OBLIQUE_LAS @ [20, 22, 7, 1])[:3] - centre
    field = world_field(coarse_affine, coarse_shape, axis)
    found = resample(field, coarse_affine, OBLIQUE_LAS, (40, 44, 14))
    expected = world_field(OBLIQUE_LAS, (40, 44, 14), axis)
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() < 1e-4  # mm


@pytest.mark.parametrize(
    ("voxels", "slabs"), [(1, [1] * 13), (60, [1] * 13), (120, [2] * 6 + [1]), (280, [5, 5, 3])]
)
def test_slabs_of_limited_size_give_what_one_piece_gives(
    monkeypatch: pytest.MonkeyPatch, voxels: int, slabs: list[int]
) -> None:
    volume, affine = torch.rand(9, 8, 7), rotation(3, -4, 5) @ np.diag([0.6, 0.7, 1.2, 1.0])
    whole = resample(volume, np.eye(4), affine, (13, 11, 5))
    assert whole[0].any()
    assert whole[-1].any()
    sizes = []

    class Watched(transforms.SpatialResample):
        def __call__(self, *args, **settings):
            sizes.append(settings["spatial_size"])
            return super().__call__(*args, **settings)

    monkeypatch.setattr(transforms, "SpatialResample", Watched)
    monkeypatch.setattr(resampling, "SLAB_VOXELS", voxels)
    sliced = resample(volume, np.eye(4), affine, (13, 11, 5))
    torch.testing.assert_close(sliced, whole)
    assert sizes == [(thickness, 11, 5) for thickness in slabs]


def test_on_its_own_grid_a_volume_comes_back_as_it_is_and_as_a_copy() -> None:
    volume = torch.rand(9, 8, 7)
    found = resample(volume, OBLIQUE_LAS, OBLIQUE_LAS.copy(), volume.shape)
    assert torch.equal(found, volume)
    found.zero_()
    assert volume.any()


def test_what_the_network_did_not_see_is_zero_in_the_result_alone() -> None:
    volume = torch.rand(4, 5, 6)
    given, seen = volume.clone(), np.eye(4)
    seen[0, 3] = 2
    found = resample(volume, np.eye(4), np.eye(4), (4, 5, 6), seen_affine=seen)
    assert not found[:2].any()
    assert torch.equal(found[2:], given[2:])
    assert torch.equal(volume, given)


def test_what_is_moved_carries_no_graph() -> None:
    values = torch.rand(4, 4, 4, requires_grad=True)
    for move in (resample, resample_labels):
        assert not move(values, np.eye(4), np.diag([2.0, 2, 2, 1]), (2, 2, 2)).requires_grad


def test_two_grids_are_the_same_whether_measured_or_assumed() -> None:
    measured = FeatureGrid((3,), (2.0,), (0.5,))
    assert measured == FeatureGrid((3,), (2.0,), (0.5,), measured=False)
    assert measured != FeatureGrid((3,), (2.0,), (0.0,))


def test_an_affine_is_in_ras_unless_it_says_lps() -> None:
    flipped = np.diag([-1.0, -1, 1, 1]) @ OBLIQUE_LAS
    for space in (None, "RAS", "ras"):
        assert np.array_equal(ras_affine(OBLIQUE_LAS, space), OBLIQUE_LAS)
    assert np.array_equal(ras_affine(OBLIQUE_LAS, "LPS"), flipped)
    both = ras_affine(np.stack([OBLIQUE_LAS] * 2), [None, "LPS"])
    assert np.array_equal(both, np.stack([OBLIQUE_LAS, flipped]))
    with pytest.raises(InputError, match=r"'MNI'\. Legal: 'RAS', 'LPS'"):
        ras_affine(OBLIQUE_LAS, "MNI")


def test_zero_outside_of_what_the_network_saw_and_held_at_its_rim() -> None:
    seen_affine = np.diag([2.0, 2.0, 2.0, 1.0])
    coarse = np.diag([8.0, 8.0, 8.0, 1.0])  # one voxel centre at the corner of what was seen
    found = resample(
        torch.full((1, 1, 1), 5.0),
        coarse,
        np.eye(4),
        (14, 14, 14),
        seen_affine=seen_affine,
        seen_shape=(4, 5, 6),
    )
    inside = torch.zeros(14, 14, 14, dtype=torch.bool)
    inside[:8, :10, :12] = True  # half a voxel beyond the last centre: 7, 9 and 11 mm
    assert (found[inside] == 5).all()
    assert (found[~inside] == 0).all()


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (np.full((4, 4), np.nan), "the map: the affine holds NaN or infinite"),
        (np.eye(3), r"the map: the affine has shape \(3, 3\)"),
        (np.diag([1.0, 0.0, 1.0, 1.0]), "the affine is singular"),
        (
            np.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
            "the affine is singular",
        ),
    ],
)
def test_an_affine_that_is_none_is_refused(affine: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resample(torch.ones(2, 2, 2), affine, np.eye(4), (2, 2, 2))


@pytest.mark.parametrize("move", [resample, resample_labels])
@pytest.mark.parametrize("which", [0, 1], ids=["from", "to"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_number_of_an_affine_that_is_not_finite_is_enough_to_refuse_it(move, which, value):
    for place in np.ndindex(4, 4):
        affines = [np.eye(4), np.eye(4)]
        affines[which][place] = value
        with pytest.raises(InputError, match="holds NaN or infinite values"):
            move(torch.ones(2, 2, 2), *affines, (2, 2, 2))


def strided(channels: int = 4) -> list[nn.Module]:
    return [nn.Conv3d(c, channels, 3, 2, 1) for c in (1, channels, channels)]


def pooled(channels: int = 4) -> list[nn.Module]:
    levels = [(nn.Conv3d(c, channels, 3, 1, 1), nn.MaxPool3d(2)) for c in (1, channels, channels)]
    return [module for level in levels for module in level]


def averaged(channels: int = 4) -> list[nn.Module]:
    levels = [(nn.Conv3d(c, channels, 3, 1, 1), nn.AvgPool3d(2)) for c in (1, channels, channels)]
    return [module for level in levels for module in level]


def encoder(levels: list[nn.Module]) -> nn.Module:
    """Return a network with a stride-8 encoder of positive, symmetric kernels; layer "encoder"."""
    torch.manual_seed(0)
    for module in levels:
        if isinstance(module, nn.Conv3d):
            hat = torch.tensor([0.5, 1.0, 0.5])
            kernel = hat[:, None, None] * hat[:, None] * hat
            scale = torch.rand(module.out_channels, module.in_channels, 1, 1, 1) + 0.1
            module.weight.data = scale * kernel
            module.bias.data.zero_()
    network = nn.Sequential()
    network.add_module("encoder", nn.Sequential(*levels))
    network.add_module("head", nn.Conv3d(4, 2, 1))
    network.head.weight.data = torch.tensor([[0.1] * 4, [1.0] * 4])[..., None, None, None]
    network.add_module("upsample", nn.Upsample(scale_factor=8))
    return network.double()


def blob(shape: tuple[int, ...], centre: tuple[float, ...], sigma: float = 2.5) -> torch.Tensor:
    axes = [torch.arange(n, dtype=torch.double) - c for n, c in zip(shape, centre, strict=True)]
    squares = [(a / sigma) ** 2 / -2 for a in axes]
    return torch.exp(squares[0][:, None, None] + squares[1][:, None] + squares[2])[None, None]


def centroid(volume: torch.Tensor) -> torch.Tensor:
    index = torch.stack(torch.meshgrid(*map(torch.arange, volume.shape), indexing="ij"), -1)
    return (index * volume[..., None]).sum((0, 1, 2)) / volume.sum()


# Feature voxel (3, 4, 3) of stride 8 lies at 8u for strided convolutions, at 8u + 3.5 for pooling.
UNDER = {
    "strided": (24.0, 32.0, 24.0),
    "max-pooled": (27.5, 35.5, 27.5),
    "averaged": (27.5, 35.5, 27.5),
}
LEVELS = {"strided": strided, "max-pooled": pooled, "averaged": averaged}


def encoder_of(kind: str) -> nn.Module:
    return encoder(LEVELS[kind]())


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("cam", [GradCAM, HiResCAM])
@pytest.mark.parametrize(
    "window",
    [
        slow_unless(False, None),
        slow_unless(False, WindowPlan(48, overlap=0.5)),
        WindowPlan(32, overlap=0.5),
    ],
)
def test_a_blob_under_a_stride_8_feature_voxel_is_found_within_half_a_voxel(kind, cam, window):
    network = toy.shared(encoder_of, kind)
    x = blob((56, 64, 56), UNDER[kind])
    result = cam(network, "encoder", sliding_window=window)(x, targets.ClassLogit(1, "volume"))
    volume = result.volume()[0]
    peak = np.unravel_index(int(volume.argmax()), volume.shape)
    assert np.abs(np.array(peak) - UNDER[kind]).max() <= 0.5
    near = volume * (volume > 0.3)
    assert (centroid(near) - torch.tensor(UNDER[kind])).abs().max() < 0.5


def test_a_last_row_that_is_rounded_is_made_exact() -> None:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    rounded = affine.copy()
    rounded[3] = [1e-9, -1e-12, 0, 1 - 1e-9]
    np.testing.assert_array_equal(checked_affine(rounded, "the map"), affine)
    rounded[3, 0] = 1e-3
    with pytest.raises(InputError, match=r"^the map: the affine's last row is \[0.001,"):
        checked_affine(rounded, "the map")
