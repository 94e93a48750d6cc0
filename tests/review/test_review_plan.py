"""The review: what is checked, what is shared, what is taken from an explanation."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_crossed import crossed
from helpers_phantom import make_phantom, silent
from helpers_review import blob_case, review_of, written_words

import seg3dcam.review
from seg3dcam.engine.scales import NO_HEAT
from seg3dcam.errors import ConfigError, InputError
from seg3dcam.explaining.findings import findings
from seg3dcam.review import (
    review_explanation,
    save_cine,
    save_montage,
    save_planes,
    save_profile,
    save_slices,
)
from seg3dcam.review.look import Look
from seg3dcam.review.pictures import display, frame, slices, text

WRITERS = {
    "slices": lambda folder, review: save_slices(folder, review),
    "montage": lambda folder, review: save_montage(folder / "montage.png", review),
    "planes": lambda folder, review: save_planes(folder / "planes.png", review),
    "profile": lambda folder, review: save_profile(folder / "profile.png", review),
    "cine": lambda folder, review: save_cine(folder / "cine.webp", review),
}


# ---------------------------------------------------------------- along another axis


@pytest.mark.parametrize("axis", display.PLANES)
def test_along_gives_what_a_new_review_gives(axis):
    scan, cam, affine = blob_case()
    cam[6, 9, 8] = 1
    cam[cam == 1] = 0.9
    cam[6, 9, 8] = 1  # one voxel is the highest
    settings = {"prediction": cam > 0.5, "truth": cam > 0.8, "window": "brain", "title": "x"}
    turned = review_of(scan, cam, affine, **settings).along(axis, "all").along(axis)
    fresh = review_of(scan, cam, affine, axis=axis, **settings)
    assert turned.indices == fresh.indices
    assert turned.peak == fresh.peak == (6, 9, 8)
    assert turned.peak_slice == fresh.peak_slice == (6, 9, 8)[turned.view.slice_axis]
    assert turned.view.axis == axis
    for mine, other in zip(turned.profile[:2], fresh.profile[:2], strict=True):
        np.testing.assert_array_equal(mine, other)
    for name in ("truth", "prediction"):
        np.testing.assert_array_equal(turned.profile.volumes[name], fresh.profile.volumes[name])


def test_no_volume_is_copied():
    shape = (160, 150, 140)
    scan = np.random.default_rng(0).random(shape, dtype=np.float32)
    cam, mask = scan / scan.max(), scan > 0.5
    tracemalloc.start()
    review = review_of(scan, cam, np.eye(4), prediction=mask, truth=mask, window="brain")
    turned = review.along("coronal")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for plan in (review, turned):
        assert np.shares_memory(plan.scan, scan)
        assert np.shares_memory(plan.cam, cam)
        assert np.shares_memory(plan.masks["truth"], mask)
    assert most < scan.nbytes / 10


@pytest.mark.parametrize("axis", display.PLANES)
def test_of_several_equal_peaks_every_plane_and_figure_names_the_same(axis):
    phantom = make_phantom(spacing=(4.0, 4.0, 5.0))
    cam = torch.zeros(phantom.scan.shape)
    cam[14:21, 16:23, 22] = 1
    cam[4:11, 6:13, 2:5] = 1
    equal = replace(phantom, maps={"model.1": cam})
    peak = review_explanation(equal, axis=axis).peak
    assert peak == equal.peak()[0] == findings(equal)["peak_voxel"] == (7, 9, 3)


# ---------------------------------------------------------------- from an explanation


def test_volumes_and_words_are_those_of_the_explanation():
    explanation = make_phantom(layers=("model.1", "model.2"), classes=("back", "gland", "lesion"))
    review = review_explanation(explanation, Look(threshold=0.3), case="Case 7")
    np.testing.assert_array_equal(review.scan, explanation.scan.data[0])
    np.testing.assert_array_equal(review.cam, explanation.volume())
    np.testing.assert_array_equal(review.masks["prediction"], explanation.mask)
    np.testing.assert_array_equal(review.masks["truth"], explanation.truth)
    assert review.title == "Case 7 · lesion"
    assert review.caption == [
        "class: lesion",
        "layer: mean of 2 layers",
        "method: hires_cam",
        "target: log-odds of class lesion over the predicted mask",
        "score: 12.5",
        "CAM resolution: 6.4 x 6.4 x 10 mm",
    ]
    assert review.peak == explanation.peak()[0]
    one = review_explanation(explanation, layer="model.2")
    np.testing.assert_array_equal(one.cam, explanation.volume("model.2"))
    assert "layer: model.2" in one.caption
    assert one.title == "lesion"


def test_an_unusable_layer_among_others_is_named():
    explanation = make_phantom(layers=("model.1", "model.2"))
    explanation = replace(explanation, status={"model.1": "ok", "model.2": "zero"})
    review = review_explanation(explanation)
    assert review.notice == ""
    assert "without the layers, whose map is not usable: model.2" in review.caption


def test_nothing_of_the_file_is_shown():
    explanation = make_phantom(name="/data/Smith_John.nii.gz")
    review = review_explanation(explanation)
    assert "Smith" not in review.title + " ".join(review.caption)


@pytest.mark.parametrize(("status", "writer"), crossed(NO_HEAT, WRITERS))
def test_why_there_is_no_heat_is_written_in_every_picture(tmp_path, writer, status):
    review = review_explanation(silent(make_phantom(), status))
    assert review.cam is None
    assert review.peak is None
    with written_words() as lines:
        WRITERS[writer](tmp_path, review)
    # As words: tiles and frames are drawn by several threads.
    assert set(NO_HEAT[status].split()) <= set(" ".join(lines).split())
    assert "CAM shown from" not in " ".join(lines)
    assert not review.colour_bar.any()


def test_of_several_channels_it_is_said_which_is_shown():
    phantom = make_phantom()
    both = replace(phantom.scan, data=torch.cat([phantom.scan.data, 0 * phantom.scan.data]))
    assert "scan: channel 1 of 2" in review_explanation(replace(phantom, scan=both)).caption


@pytest.mark.parametrize("shape", [(30, 30, 30), (30, 30, 2), (2, 30, 30), (200, 200, 2)])
def test_the_notice_covers_no_letter(shape):
    review = review_of(np.ones(shape), np.zeros(shape), np.diag([1, 1, 2, 1.0]), slices=[0])
    shown = review_of(np.ones(shape), np.ones(shape), np.diag([1, 1, 2, 1.0]), slices=[0])
    for axis in display.PLANES:
        silent_one, shown_one = review.along(axis, [0]), shown.along(axis, [0])
        for side in (128, 400):
            size = display.picture_size(silent_one.view, side, long_side=1024)
            with_notice, without = (
                slices.draw_framed_pair(one, 0, size, (side, side))[1]
                for one in (silent_one, shown_one)
            )
            top, left = frame.corner_in_cell(size[:2], (side, side))
            outside = np.ones(without.shape[:2], bool)
            outside[top : top + size.height, left : left + size.width] = False
            letters = (without == text.WHITE).all(-1) & outside
            assert letters.sum() > 100
            np.testing.assert_array_equal(with_notice[letters], without[letters])
            amber = (with_notice == text.AMBER).all(-1).sum()
            assert amber > 30


ODD = {
    "no prediction, no truth": lambda e: replace(e, class_index=None, truth=None),
    "no truth": lambda e: replace(e, truth=None),
    "an empty prediction": lambda e: replace(e, prediction=torch.zeros_like(e.prediction)),
    "a constant scan": lambda e: replace(e, scan=replace(e.scan, data=e.scan.data * 0 + 7)),
    "letters of many scripts": lambda e: replace(e, label="Läsion µ 肿瘤 ورم", method="Grad\nCAM"),
    "a path as a name": lambda e: replace(e, class_names=["back", "../x"], label="../x"),
    "a very long name": lambda e: replace(e, label="lesion " * 60 + "x" * 400),
}


@pytest.mark.parametrize(("odd", "writer"), crossed(ODD, WRITERS))
def test_odd_explanations_are_drawn_without_a_warning(tmp_path, writer, odd):
    explanation = ODD[odd](make_phantom(spacing=(3.0, 3.0, 8.0)))
    WRITERS[writer](tmp_path / "out", review_explanation(explanation))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").iterdir())


@pytest.mark.few(2)
@pytest.mark.parametrize(("axis", "writer"), crossed(display.PLANES, WRITERS))
def test_scans_of_two_slices_are_drawn(tmp_path, writer, axis):
    scan = np.random.default_rng(0).random((30, 32, 2))
    cam = np.full(scan.shape, 0.5)
    cam[3, 4, 1] = 1
    review = review_of(scan, cam, np.diag([1, 1, 5, 1.0]), axis=axis, prediction=cam > 0.9)
    WRITERS[writer](tmp_path, review)
    assert list(tmp_path.iterdir())


def test_an_empty_mask_is_said_to_be_empty(tmp_path):
    scan, cam, affine = blob_case()
    with written_words() as lines:
        save_slices(tmp_path, review_of(scan, cam, affine, slices=6, truth=cam > 2))
    assert "truth: empty" in lines


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["cam", "prediction", "truth"])
def test_other_shapes_are_refused_with_both_shapes(name):
    arrays = {"cam": np.zeros((4, 5, 6)), name: np.zeros((4, 5, 7))}
    message = rf"{name} is \(4, 5, 7\), scan is \(4, 5, 6\)"
    with pytest.raises(InputError, match=message):
        review_of(np.zeros((4, 5, 6)), affine=np.eye(4), **arrays)


@pytest.mark.parametrize(
    ("scan", "message"),
    [
        (np.zeros((4, 4)), r"scan must be \(X, Y, Z\) with at least one voxel, not \(4, 4\)"),
        (np.zeros((4, 0, 4)), "at least one voxel"),
        (np.zeros((4, 4, 4), complex), "real numbers, not complex128"),
        (np.zeros((1, 4, 4, 4)), r"not \(1, 4, 4, 4\)"),
    ],
)
def test_bad_scans_are_refused(scan, message):
    with pytest.raises(InputError, match=message):
        review_of(scan, scan, np.eye(4))


def test_label_maps_are_refused_as_masks():
    volume = np.zeros((3, 3, 3), np.uint8)
    volume[0] = 2
    with pytest.raises(InputError, match=r"prediction must be a mask of 0 and 1; .* == label"):
        review_of(volume, volume * 0, np.eye(4), prediction=volume)


@pytest.mark.parametrize("name", ["threshold", "opacity"])
@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan])
def test_fractions_outside_0_to_1_are_refused(name, value):
    volume = np.zeros((3, 3, 3))
    with pytest.raises(ConfigError, match=rf"{name} must be in 0\.\.1"):
        review_of(volume, volume, np.eye(4), **{name: value})


def test_slice_out_of_range_writes_nothing(tmp_path):
    scan, cam, affine = blob_case()
    with pytest.raises(InputError, match=r"slice index 12 is outside 0\.\.11"):
        save_slices(tmp_path / "new", review_of(scan, cam, affine, slices=[3, 12]))
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- the module


def test_public_names():
    assert seg3dcam.review.__all__ == [
        "WINDOWS",
        "Look",
        "Report",
        "Review",
        "review_explanation",
        "review_volumes",
        "save_cine",
        "save_features",
        "save_montage",
        "save_planes",
        "save_profile",
        "save_report",
        "save_slices",
        "save_thumbnail",
    ]
    assert seg3dcam.review.save_slices is save_slices


@pytest.mark.parametrize("of_component", [False, True], ids=["a region", "a lesion"])
def test_a_region_is_called_a_prediction_only_where_it_is_one(of_component, tmp_path):
    """As false negatives, which are no part of the prediction."""
    explanation = make_phantom()
    region = explanation.mask
    if not of_component:
        region = region.roll(3, dims=0) & ~region
    name = "prediction" if of_component else "explained region"
    found = replace(silent(explanation, "zero"), region=region, of_component=of_component)
    review = review_explanation(found)
    assert set(review.masks) == {"truth", name}
    np.testing.assert_array_equal(review.masks[name], region)
    assert review.profile.volumes[name].any()
    with written_words() as lines:
        save_planes(tmp_path / "planes.png", review)
    said = " ".join(lines)
    assert f"the middle of the {name}" in said
    assert name in lines  # in the legend
