"""Signed pictures: each sign in its own colour, at its place, on one scale; nothing at zero."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from helpers_phantom import (
    against_mm,
    make_phantom,
    make_phantom_against,
    make_signed_phantom,
    marker_mm,
)
from helpers_review import decode, lines_of, written_words

from seg3dcam.errors import InputError
from seg3dcam.review import review_explanation, review_volumes, save_cine
from seg3dcam.review.look import FULL_OPACITY, Look, colours
from seg3dcam.review.pictures import display, draw, frame, montage, planes, profile, slices

SIGNED = Look(window="soft tissue", signed=True)


def blend_slowly(grey, cam, look):
    """Every pixel in float64, from the meaning of `Look`; red, green, blue."""
    rgb = np.repeat(grey[..., None].astype(float), 3, -1)
    table = colours(look.colormap).astype(float)
    for place, value in np.ndenumerate(cam):
        if abs(value) < look.threshold:
            continue
        alpha = look.opacity * min(1, abs(value) / FULL_OPACITY)
        colour = table[round((value + 1) / 2 * 255)]
        rgb[place] = grey[place] * (1 - alpha) + colour * alpha
    return rgb


def signs(bgr):
    """How blue and how orange every pixel is."""
    blue, red = bgr[..., 0].astype(float), bgr[..., 2].astype(float)
    return np.maximum(blue - red - 25, 0), np.maximum(red - blue - 25, 0)


def middle(weights):
    rows, columns = np.indices(weights.shape) + 0.5
    return np.array([(rows * weights).sum(), (columns * weights).sum()]) / weights.sum()


def voxel_at(explanation, mm):
    return (np.linalg.inv(explanation.affine) @ [*mm, 1])[:3]


# ---------------------------------------------------------------- colours


@pytest.mark.parametrize("colormap", ["", "coolwarm", "inferno"])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_heat_of_both_signs_follows_the_formula(colormap, threshold):
    look = Look(threshold=threshold, opacity=0.6, colormap=colormap, signed=True)
    cam = np.linspace(-1, 1, 161, dtype=np.float32)[None].repeat(3, 0)
    grey = np.array([[0], [100], [255]], np.uint8).repeat(161, 1)
    found = draw.draw_heat(grey, cam, threshold, draw.make_palette(look))[..., ::-1]
    np.testing.assert_allclose(found, blend_slowly(grey, cam, look), atol=2.5)


def test_where_the_cam_is_zero_the_scan_is_unchanged():
    """At threshold 0 too, where zero lies between two levels of the colours."""
    grey = np.arange(256, dtype=np.uint8)[None]
    palette = draw.make_palette(Look(threshold=0, opacity=1.0, signed=True))
    picture = draw.draw_heat(grey, np.zeros((1, 256), np.float32), 0.0, palette)
    np.testing.assert_array_equal(picture, cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR))


def test_the_colour_bar_runs_from_against_to_for():
    palette = draw.make_palette(SIGNED)
    bar = frame.draw_colour_bar(palette, 0.2)
    np.testing.assert_array_equal(bar[12, 10], palette.pure[255, 0])
    np.testing.assert_array_equal(bar[frame.BAR_HEIGHT - 13, 10], palette.pure[0, 0])
    assert (bar[125:176, 10:20] == 0).all()  # from -0.18 to 0.18
    blue, orange = signs(bar[:, 10:20])
    assert blue[200:280].all()
    assert orange[20:100].all()
    with written_words() as lines:
        frame.draw_colour_bar(palette, 0.2)
    assert {"1.0", "-1.0", "0.20", "-0.20"} <= set(lines)


# ---------------------------------------------------------------- places


@pytest.mark.parametrize("axis", display.PLANES)
@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR"])
def test_each_sign_is_drawn_where_it_is_in_the_patient(axis, codes):
    explanation = make_signed_phantom(codes, height=2.0)
    review = review_explanation(explanation, SIGNED, axis=axis)
    size = display.picture_size(review.view, 400, long_side=1024)
    places = {
        0: against_mm(explanation),
        1: marker_mm(explanation.affine, explanation.scan.shape),
    }
    for sign, mm in places.items():
        voxel = voxel_at(explanation, mm)
        index = round(voxel[review.view.slice_axis])
        raw, overlay = slices.draw_pair(review.along(axis, index), index, size)
        heat = signs(overlay)[sign] * (np.abs(overlay.astype(int) - raw).max(-1) > 0)
        off = middle(heat) - display.pixel_of(review.view, voxel, size)
        outlined = 3.0 if sign else 0.6  # the outlines lie around the marker
        assert np.abs(off).max() < outlined * size.pixels_per_mm * 1.6
        assert heat[tuple(np.int64(display.pixel_of(review.view, voxel, size)))] > 0


def test_both_signs_share_one_scale():
    """The marker's 0.5 has the colour of 0.5, and not that of the positive side's maximum."""
    explanation = make_signed_phantom("RAS")
    review = review_explanation(explanation, Look(signed=True, opacity=1.0))
    size = display.picture_size(review.view, 400, long_side=1024)
    for mm, value in (
        (against_mm(explanation), -1.0),
        (marker_mm(explanation.affine, explanation.scan.shape), 0.5),
    ):
        voxel = voxel_at(explanation, mm)
        index = round(voxel[2])
        _, overlay = slices.draw_pair(review, index, size)
        row, column = np.int64(display.pixel_of(review.view, voxel, size))
        wanted = colours("blue_orange")[round((value + 1) / 2 * 255)].astype(int)
        assert np.abs(overlay[row, column, ::-1] - wanted).max() < 16


def test_the_strongest_place_is_the_one_that_is_shown_and_it_is_said(tmp_path):
    explanation = make_signed_phantom()
    review = review_explanation(explanation, SIGNED)
    mm = (explanation.affine @ [*review.peak, 1])[:3]
    assert np.linalg.norm(mm - against_mm(explanation)) < 3
    k = round(voxel_at(explanation, against_mm(explanation))[2])
    assert k in review.indices
    assert review_explanation(explanation).peak == explanation.peak()[0]
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(planes, "build_page", lambda *args: said.extend(args[2]) or args[1])
        planes.draw_planes(review)
    assert "planes through the CAM's peak against the target" in " ".join(said)
    assert review.range_in(review.peak_slice).startswith("-1.00 to 0.")
    assert review_explanation(explanation).range_in(k).startswith("max ")


@pytest.mark.parametrize("draw_all", [montage.draw_montage, planes.draw_planes])
def test_every_picture_of_a_case_shows_both_signs(draw_all):
    blue, orange = signs(draw_all(review_explanation(make_signed_phantom(height=2.0), SIGNED)))
    legend = signs(frame.draw_colour_bar(draw.make_palette(SIGNED), 0.2))
    for found, in_legend in zip((blue, orange), legend, strict=True):
        assert (found > 0).sum() > (in_legend > 0).sum() + 500


def test_pictures_of_a_map_that_is_all_against_are_blue_and_the_usual_ones_say_why_not():
    phantom = make_phantom_against()
    review = review_explanation(phantom, SIGNED)
    assert review.notice == ""
    blue, _ = signs(montage.draw_montage(review))
    in_legend, _ = signs(frame.draw_colour_bar(draw.make_palette(SIGNED), 0.2))
    assert (blue > 0).sum() > (in_legend > 0).sum() + 500
    assert "all evidence speaks against the target: at most 1.99, in sum" in " ".join(
        review.caption
    )
    words = "no CAM: all evidence speaks against the target; the signed view shows it"
    usual = review_explanation(phantom)
    assert usual.notice == words
    assert phantom.volume().count_nonzero() == 0


def test_beside_another_layer_one_that_is_all_against_is_left_out_of_the_usual_view_alone():
    phantom = make_signed_phantom(layers=("a", "b"), height=2.0)
    maps = {"a": phantom.maps["a"], "b": -phantom.maps["a"].abs()}
    phantom = replace(phantom, maps=maps, status={"a": "ok", "b": "zero"}, only_against=["b"])
    assert (phantom.left_out(), phantom.left_out(scale="signed")) == (["b"], [])
    mean = (maps["a"] + maps["b"]) / 2
    wanted = (mean / mean.abs().max()).numpy()
    np.testing.assert_allclose(phantom.volume(scale="signed").numpy(), wanted, atol=1e-6)
    assert "b" in " ".join(review_explanation(phantom).caption)
    assert "not usable" not in " ".join(review_explanation(phantom, SIGNED).caption)


def test_the_film_shows_evidence_against(tmp_path):
    explanation = make_signed_phantom()
    k = round(voxel_at(explanation, against_mm(explanation))[2])
    review = review_explanation(explanation, SIGNED, slices=[k, 0])
    shown, empty = (
        (signs(np.array(one)[..., ::-1])[0] > 0).sum()
        for one in decode(save_cine(tmp_path / "film.webp", review))[0]
    )
    assert shown > empty + 500


# ---------------------------------------------------------------- figures and words


def test_the_profile_has_a_curve_for_each_sign():
    explanation = make_signed_phantom("PIR")
    review = review_explanation(explanation, SIGNED)
    lines = lines_of(profile.plot_profile(review))
    cam = explanation.volume(scale="signed").double().numpy()
    cam = np.moveaxis(cam, review.view.slice_axis, 0).reshape(review.view.slice_count, -1)
    np.testing.assert_allclose(lines["CAM max"][1], cam.max(1), rtol=1e-5)
    np.testing.assert_allclose(lines["CAM min"][1], cam.min(1), rtol=1e-5)
    share = 100 * np.abs(cam).sum(1) / np.abs(cam).sum()
    np.testing.assert_allclose(lines["share of the sum"][1], share, rtol=1e-5)


def test_a_map_that_is_nowhere_above_zero_is_shown():
    scan, cam = np.ones((8, 8, 4)), np.zeros((8, 8, 4))
    cam[2, 3, 1] = -1
    review = review_volumes(scan, cam, np.eye(4), look=SIGNED)
    assert (review.notice, review.peak, review.indices) == ("", (2, 3, 1), [1])
    assert review_volumes(scan, 0 * cam, np.eye(4), look=SIGNED).notice == "no CAM: the map is zero"
    faint = review_volumes(scan, 0.1 * cam, np.eye(4), look=SIGNED)
    assert faint.notice == "no CAM at the threshold 0.20: the map's maximum is 0.1"
    with pytest.raises(InputError, match=r"cam must be in 0\.\.1, but goes from -1 to 0"):
        review_volumes(scan, cam, np.eye(4))
    with pytest.raises(InputError, match=r"cam must be in -1\.\.1, .* cam / abs\(cam\)\.max"):
        review_volumes(scan, 1.1 * cam, np.eye(4), look=SIGNED)


def test_the_footer_says_that_a_map_is_mostly_against():
    words = " ".join(review_explanation(make_signed_phantom(height=0.1)).caption)
    assert "caution: mostly evidence against the target: at most 0.0974 for it" in words
    assert "caution" not in " ".join(review_explanation(make_phantom()).caption)
    assert "caution" not in " ".join(review_explanation(make_signed_phantom()).caption)
