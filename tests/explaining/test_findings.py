"""The numbers beside a picture, against slow counts over every voxel."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_phantom import (
    against_mm,
    make_phantom,
    make_signed_phantom,
    marker_mm,
    positions,
    silent,
)
from scipy import ndimage

from seg3dcam.explaining.findings import find_peaks, find_signed_peaks, findings
from seg3dcam.geometry import peak_voxel


@pytest.fixture(scope="module")
def phantom():
    return make_phantom()


@pytest.fixture(scope="module")
def found(phantom):
    return findings(phantom)


def test_shares_of_the_cam(phantom, found):
    cam = phantom.volume().double().numpy()
    mask, truth = phantom.mask.numpy(), phantom.truth.numpy()
    assert found["cam_inside_prediction"] == pytest.approx(cam[mask].sum() / cam.sum())
    assert found["cam_inside_truth"] == pytest.approx(cam[truth].sum() / cam.sum())
    assert found["cam_outside"] == pytest.approx(cam[~(mask | truth)].sum() / cam.sum())


def test_volumes_and_dice(phantom, found):
    ml = abs(np.linalg.det(phantom.affine[:3, :3])) / 1000
    mask, truth = phantom.mask.numpy(), phantom.truth.numpy()
    assert found["predicted_ml"] == pytest.approx(mask.sum() * ml)
    assert found["truth_ml"] == pytest.approx(truth.sum() * ml)
    assert found["dice"] == pytest.approx(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))


def test_the_peak_is_at_the_marker(phantom, found):
    wanted = marker_mm(phantom.affine, phantom.scan.shape)
    half_a_voxel = np.linalg.norm(phantom.scan.spacing) / 2
    assert np.linalg.norm(np.array(found["peak_mm"]) - wanted) <= half_a_voxel
    assert phantom.volume()[found["peak_voxel"]] == 1
    assert found["peak_voxel"] == phantom.peak()[0]


def test_distance_from_peak_to_a_mask_is_that_to_its_nearest_voxel(phantom):
    place = positions(phantom.scan.shape, phantom.affine)
    away = np.linalg.norm(place - marker_mm(phantom.affine, phantom.scan.shape), axis=-1)
    shell = torch.tensor((away > 30) & (away < 40) & (place[..., 2] < place[..., 2].mean()))
    peak = np.array(phantom.peak()[1])
    wanted = np.linalg.norm(place[shell.numpy()] - peak, axis=-1).min()
    assert findings(replace(phantom, truth=shell))["peak_to_truth_mm"] == pytest.approx(wanted)
    assert findings(phantom)["peak_to_prediction_mm"] == 0


@pytest.mark.parametrize("status", ["zero", "nonfinite", "degenerate"])
def test_no_peak_where_there_is_no_heat(phantom, status):
    found = findings(silent(phantom, status))
    assert found["peak_mm"] is None
    assert found["peaks"] == []
    assert found["cam_inside_prediction"] is None
    assert found["warnings"][0].startswith("no CAM: ")
    json.dumps(found)


def test_a_lesion_smaller_than_a_cell_is_said(phantom, found):
    assert found["warnings"] == []
    coarse = replace(phantom, native_spacing={"model.1": (25.6, 25.6, 20.0)})
    (warning,) = [w for w in findings(coarse)["warnings"] if "predicted" in w]
    assert "smaller than one voxel of the layer's own grid (13 ml)" in warning


def test_a_map_of_mostly_evidence_against_is_said(phantom):
    """Where both signs are alike nothing is said."""
    few, half = make_signed_phantom(height=0.1), make_signed_phantom(height=1.0)
    raw = few.maps["model.1"].double().numpy()
    found = findings(few)
    assert found["evidence_against"] == pytest.approx(-raw[raw < 0].sum() / np.abs(raw).sum())
    assert found["evidence_against"] > 0.95
    (warning,) = found["warnings"]
    assert warning.startswith("mostly evidence against the target: at most 0.0974 for it, in sum ")
    assert warning.endswith("; the signed view shows both")
    assert findings(half)["warnings"] == []
    assert findings(phantom)["warnings"] == []  # weak background against, a strong peak for


def test_layers_count_together_and_each_by_itself(phantom):
    against, plain = make_signed_phantom(height=0.1), phantom.maps["model.1"].clamp(min=0)
    two = replace(
        against,
        maps={"a": against.maps["model.1"], "b": plain},
        status={"a": "ok", "b": "ok"},
        native_spacing=dict.fromkeys("ab", (6.4, 6.4, 10.0)),
    )
    assert "mostly evidence against" in findings(two, "a")["warnings"][0]
    assert findings(two)["warnings"] == findings(two, "b")["warnings"] == []
    left_out = replace(two, status={"a": "ok", "b": "zero"})
    assert "mostly evidence against" in findings(left_out)["warnings"][1]


def test_a_cam_outside_of_what_is_explained_is_said(phantom):
    place = positions(phantom.scan.shape, phantom.affine)
    away = np.linalg.norm(place - against_mm(phantom), axis=-1)
    elsewhere = torch.tensor(away < 11)
    prediction = torch.stack([~elsewhere, elsewhere])
    moved = replace(phantom, prediction=prediction, truth=None)
    (warning,) = findings(moved)["warnings"]
    assert warning.startswith("the CAM lies outside of the predicted region (5.")
    # The explained voxels count, and not the class's mask, where they are others.
    assert findings(replace(moved, region=phantom.mask))["warnings"] == []
    (warning,) = findings(replace(phantom, region=elsewhere))["warnings"]
    assert warning.startswith("the CAM lies outside of the explained region")
    # A score over the whole volume explains no mask.
    assert findings(replace(moved, over_mask=False))["warnings"] == []
    # What a layer cannot resolve, it cannot hit.
    coarse = findings(replace(moved, native_spacing={"model.1": (25.6, 25.6, 20.0)}))["warnings"]
    assert not any("outside" in word for word in coarse)


def test_an_empty_mask_is_said(phantom):
    empty = replace(phantom, truth=torch.zeros_like(phantom.truth))
    assert "the true region is empty" in findings(empty)["warnings"]
    assert findings(empty)["peak_to_truth_mm"] is None


def test_a_layer_that_failed_is_said():
    two = make_phantom(layers=("a", "b"))
    partly = replace(two, status={"a": "ok", "b": "zero"})
    assert "without the layers b, whose map is not usable" in findings(partly)["warnings"]
    assert findings(partly, "b")["warnings"][0].startswith("no CAM")
    assert findings(partly, "a")["warnings"] == []


def test_no_masks_no_numbers_of_them(phantom):
    bare = findings(replace(phantom, class_index=None, truth=None))
    assert {bare[key] for key in bare if "pred" in key or "truth" in key or key == "dice"} == {None}
    assert bare["cam_outside"] is None
    assert bare["peak_mm"] is not None


# ------------------------------------------------------------------------------------------ peaks


def bumps(spacing, places, heights, width_mm=6.0, shape=(60, 50, 30)):
    """Return a volume of Gaussian bumps at voxels, and its affine."""
    affine = np.diag([*spacing, 1.0])
    place = positions(shape, affine)
    volume = np.zeros(shape)
    for voxel, height in zip(places, heights, strict=True):
        away = np.linalg.norm(place - np.array(voxel) * spacing, axis=-1)
        volume = np.maximum(volume, height * np.exp(-((away / width_mm) ** 2)))
    return volume, affine


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.8, 0.8, 5.0), (3, 1, 2)])
def test_peaks_are_the_bumps_highest_first(spacing):
    places = [(10, 10, 5), (50, 40, 25), (10, 40, 20), (40, 12, 8)]
    volume, affine = bumps(np.array(spacing, float), places, [0.5, 1.0, 0.15, 0.7])
    found = find_peaks(volume, affine)
    assert [peak.voxel for peak in found] == [places[1], places[3], places[0]]  # 0.15 is too low
    assert [peak.value for peak in found] == pytest.approx([1.0, 0.7, 0.5])
    assert np.allclose([p.mm for p in found], [np.array(p.voxel) * spacing for p in found])


def test_of_equal_peaks_the_first_is_the_one_that_every_format_names():
    """Also where another one's block comes first."""
    volume = np.zeros((20, 50, 20))
    volume[5, 10, 5] = volume[4, 40, 5] = 1
    found = [peak.voxel for peak in find_peaks(volume, np.eye(4))]
    assert found == [peak_voxel(volume), (5, 10, 5)] == [(4, 40, 5), (5, 10, 5)]


def test_a_shoulder_is_no_peak():
    """On a slope every block has a maximum; none but the top is a local one."""
    slope = np.linspace(0.3, 1, 60)[:, None, None] * np.ones((1, 20, 20))
    slope[-1, 10, 10] = 1.01
    found = find_peaks(slope / 1.01, np.eye(4))
    assert {peak.voxel[0] for peak in found} == {59}


def test_no_more_than_asked_and_not_nearer_than_asked():
    places = [(10, 10, 5), (16, 10, 5), (40, 40, 20), (50, 10, 20), (10, 40, 10)]
    volume, affine = bumps(np.ones(3), places, [1.0, 0.9, 0.8, 0.7, 0.6], width_mm=2.0)
    apart = find_peaks(volume, affine, apart_mm=10)
    assert [p.voxel for p in apart] == [places[0], *places[2:]]
    assert [p.voxel for p in find_peaks(volume, affine, apart_mm=4, count=2)] == places[:2]


def test_signed_peaks_are_the_strongest_of_both_signs():
    places = [(10, 10, 5), (50, 40, 25), (10, 40, 20), (40, 12, 8)]
    above, affine = bumps(np.ones(3), places[:2], [0.5, 0.9])
    below, _ = bumps(np.ones(3), places[2:], [1.0, 0.3])
    found = find_signed_peaks(above - below, affine)
    assert [peak.voxel for peak in found] == [places[2], places[1], places[0], places[3]]
    assert [peak.value for peak in found] == pytest.approx([-1.0, 0.9, 0.5, -0.3])
    assert find_signed_peaks(above - below, affine, count=1) == found[:1]


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.8, 0.8, 5.0), (3, 1, 2)])
def test_peaks_of_noise_are_local_maxima_far_from_each_other(spacing):
    noise = ndimage.gaussian_filter(np.random.default_rng(7).random((60, 50, 30)), 1.5)
    volume = (noise - noise.min()) / np.ptp(noise)
    found = find_peaks(volume, np.diag([*spacing, 1.0]), count=200, above=0.1)
    assert len(found) > 20
    assert found[0].value == 1
    around = ndimage.maximum_filter(volume, 3)
    assert all(volume[peak.voxel] == around[peak.voxel] for peak in found)
    apart = [math.dist(a.mm, b.mm) for a, b in itertools.combinations(found, 2)]
    assert min(apart) >= 10
