"""Preparation: intensities by hand, and every voxel stays where it was in the patient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers_cases import OBLIQUE, SHAPE

from seg3dcam.errors import ScanError
from seg3dcam.models.preparation import build_preparation
from seg3dcam.models.specs import Prepare
from seg3dcam.scan import Scan


def prepared(data, affine=OBLIQUE, **spec):
    data = torch.as_tensor(np.asarray(data, dtype=np.float32))
    scan = Scan(data, np.asarray(affine, dtype=np.float64), "case")
    result = build_preparation(Prepare.model_validate(spec))(scan)
    assert result.dtype == torch.float32
    return result


def random_scan(channels=1):
    return np.random.default_rng(0).normal(size=(channels, *SHAPE))


def blob(centre):
    """Return one smooth bright spot."""
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    return np.exp(-((grid - np.asarray(centre)) ** 2).sum(-1) / 8)[None]


def centre_mm(image):
    """Return where the spot lies in the patient: its centre of gravity in mm."""
    weights = image[0].numpy().astype(np.float64)
    voxel = [(weights * index).sum() / weights.sum() for index in np.indices(weights.shape)]
    return image.affine.numpy()[:3] @ [*voxel, 1]


def test_nothing_asked_nothing_done():
    data = random_scan()
    result = prepared(data)
    assert torch.equal(result.as_tensor(), torch.as_tensor(data, dtype=torch.float32))
    assert np.array_equal(result.affine.numpy(), OBLIQUE)


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"intensity": {"range": [0, 1]}},
        {"intensity": {"percentiles": [5, 95]}},
        {"intensity": {"zscore": "all"}},
        {"intensity": {"zscore": "nonzero"}},
        {"orientation": "RAS", "intensity": {"zscore": "all"}},
        {"pad_divisible": 16, "crop_foreground": True},
    ],
    ids=str,
)
def test_the_scan_is_left_as_it_was(spec):
    """Pictures are drawn from it, in its own grey values."""
    data = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    before = data.clone()
    build_preparation(Prepare.model_validate(spec))(Scan(data, OBLIQUE, "case"))
    assert torch.equal(data, before)


@pytest.mark.parametrize(
    "spec",
    [
        {"orientation": "RAS"},
        {"orientation": "PIR"},
        {"spacing": [1.0, 1.0, 2.0]},
        {"pad_divisible": 16},
        {"crop_foreground": True},
        {"orientation": "LPS", "spacing": [1.5, 1.5, 1.5], "pad_divisible": 8},
    ],
    ids=str,
)
def test_a_spot_stays_where_it_is_in_the_patient(spec):
    centre = (9, 13, 8)
    where = OBLIQUE[:3] @ [*centre, 1]
    assert np.allclose(centre_mm(prepared(blob(centre), **spec)), where, atol=0.1)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL"])
def test_orientation(codes):
    affine = prepared(random_scan(), orientation=codes).affine.numpy()
    # Each letter: along this axis one walks mostly in its direction.
    world = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    for axis, letter in enumerate(codes):
        row, sign = world[letter]
        assert np.abs(affine[:3, axis]).argmax() == row
        assert np.sign(affine[row, axis]) == sign


def test_orientation_moves_voxels_and_changes_none():
    data = random_scan()
    result = prepared(data, np.diag([-1.0, -1, 1, 1]), orientation="RAS")
    assert np.array_equal(result.numpy()[0], data[0, ::-1, ::-1].astype(np.float32))


def test_spacing():
    """The scan's 30 x 36 x 54 mm in steps of 2, 1 and 3 mm."""
    result = prepared(random_scan(), np.diag([1.5, 1.5, 3.0, 1]), spacing=[2.0, 1.0, 3.0])
    steps = np.linalg.norm(result.affine.numpy()[:3, :3], axis=0)
    assert np.allclose(steps, [2, 1, 3])
    assert np.allclose(result.shape[1:], [15, 36, 18], atol=1)


# ---------------------------------------------------------------------------------- intensities

RAMP = np.linspace(-200, 300, np.prod(SHAPE)).reshape(1, *SHAPE)


@pytest.mark.parametrize(
    ("spec", "by_hand"),
    [
        ({"range": [-100, 100]}, lambda x: np.clip((x + 100) / 200, 0, 1)),
        ({"range": [0, 1000]}, lambda x: np.clip(x / 1000, 0, 1)),
        (
            {"percentiles": [10, 90]},
            lambda x: np.clip((x + 150) / 400, 0, 1),  # the ramp's own 10 and 90 %
        ),
        ({"zscore": "all"}, lambda x: (x - x.mean()) / x.std()),
    ],
    ids=["range", "range clipped on one side", "percentiles", "zscore"],
)
def test_intensity(spec, by_hand):
    result = prepared(RAMP, intensity=spec).numpy()
    assert np.allclose(result, by_hand(RAMP), atol=1e-3)


def test_zscore_of_nonzero_voxels_leaves_the_background():
    data = np.abs(random_scan()) + 1
    data[:, :10] = 0
    result = prepared(data, intensity={"zscore": "nonzero"}).numpy()
    inside = data[:, 10:].astype(np.float32)
    assert (result[:, :10] == 0).all()
    assert np.allclose(result[:, 10:], (inside - inside.mean()) / inside.std(), atol=1e-4)


@pytest.mark.parametrize("spec", [{"percentiles": [1, 99]}, {"zscore": "all"}], ids=str)
def test_each_channel_has_its_own_scale(spec):
    one = random_scan()
    both = prepared(np.concatenate([one, 50 * one + 7]), intensity=spec).numpy()
    assert np.allclose(both[0], both[1], atol=1e-4)


@pytest.mark.filterwarnings("ignore:Divide by zero")
def test_a_constant_channel_stays_finite():
    data = np.concatenate([random_scan(), np.full((1, *SHAPE), 5)])
    for spec in ({"percentiles": [1, 99]}, {"zscore": "all"}, {"zscore": "nonzero"}):
        assert torch.isfinite(prepared(data, intensity=spec)).all(), spec


# ---------------------------------------------------------------------------- cropping, padding


def test_crop_to_what_is_above_zero():
    data = np.zeros((1, *SHAPE))
    data[0, 3:9, 4:20, 5:6] = 1
    result = prepared(data, crop_foreground=True)
    assert result.shape == (1, 6, 16, 1)
    assert (result == 1).all()
    assert np.allclose(result.affine.numpy()[:3, 3], OBLIQUE[:3] @ [3, 4, 5, 1])


def test_crop_comes_after_the_intensities():
    data = np.full((1, *SHAPE), -1000.0)
    data[0, 3:9, 4:20, 5:8] = 50
    result = prepared(data, intensity={"range": [-100, 200]}, crop_foreground=True)
    assert result.shape == (1, 6, 16, 3)
    assert torch.allclose(result.as_tensor(), torch.tensor(0.5))


def test_nothing_left_to_crop_to():
    with pytest.raises(ScanError, match=r"case: nothing is left .* do the model's intensity"):
        prepared(np.full((1, *SHAPE), -5.0), crop_foreground=True)


def test_padding_comes_last():
    data = np.zeros((1, *SHAPE))
    data[0, 3:9, 4:20, 5:8] = 1
    result = prepared(data, crop_foreground=True, pad_divisible=8)
    assert result.shape == (1, 8, 16, 8)
    assert result.sum() == 6 * 16 * 3
