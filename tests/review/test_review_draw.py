"""Compositing: numbers of single pixels, worked out again slowly."""

from __future__ import annotations

import cv2
import matplotlib
import numpy as np
import pytest

from seg3dcam.errors import ConfigError
from seg3dcam.review.look import GreyWindow, Look
from seg3dcam.review.pictures import draw, frame, text
from seg3dcam.review.pictures.display import Letters, Size

RNG = np.random.default_rng(3)


def blend_slowly(grey, cam, threshold, opacity, colormap):
    """The formula in float64, pixel by pixel: alpha = opacity * min(1, v / 0.5)."""
    out = np.zeros((*grey.shape, 3))
    for row, column in np.ndindex(grey.shape):
        value = float(cam[row, column])
        alpha = 0.0 if value < threshold else opacity * min(1, value / 0.5)
        red, green, blue, _ = matplotlib.colormaps[colormap](value)
        colour = 255 * np.array([blue, green, red])
        out[row, column] = (1 - alpha) * grey[row, column] + alpha * colour
    return out


@pytest.mark.parametrize("colormap", ["inferno", "jet", "viridis_r"])
@pytest.mark.parametrize("opacity", [0.0, 0.5, 1.0])
def test_heat_follows_the_formula(colormap, opacity):
    grey = RNG.integers(0, 256, (24, 25), dtype=np.uint8)
    cam = (RNG.integers(0, 256, (24, 25)) / 255).astype(np.float32)  # on the 256 levels
    heat = draw.draw_heat(
        grey, cam, 0.3, draw.make_palette(Look(colormap=colormap, opacity=opacity))
    )
    # Three roundings to whole numbers.
    np.testing.assert_allclose(heat, blend_slowly(grey, cam, 0.3, opacity, colormap), atol=1.5)


def test_below_the_threshold_every_grey_is_unchanged():
    grey = np.arange(256, dtype=np.uint8)[None].repeat(50, 0)
    cam = np.linspace(0, 0.1999, 50, dtype=np.float32)[:, None].repeat(256, 1)
    heat = draw.draw_heat(grey, cam, 0.2, draw.make_palette(Look(colormap="inferno", opacity=1.0)))
    np.testing.assert_array_equal(heat, grey[..., None].repeat(3, -1))
    at_threshold = np.full_like(cam, 0.2)
    assert (
        draw.draw_heat(
            grey, at_threshold, 0.2, draw.make_palette(Look(colormap="inferno", opacity=1.0))
        )
        != heat
    ).any()


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7])
def test_a_value_at_the_threshold_is_drawn_also_between_two_levels(threshold):
    grey, cam = np.full((1, 1), 90, np.uint8), np.full((1, 1), threshold, np.float32)
    look = Look(threshold=threshold, opacity=1.0)
    heat = draw.draw_heat(grey, cam, threshold, draw.make_palette(look))
    assert (heat != 90).any()


def test_zero_is_never_drawn_even_without_a_threshold():
    grey = np.arange(256, dtype=np.uint8)[None]
    heat = draw.draw_heat(
        grey,
        np.zeros((1, 256), np.float32),
        0,
        draw.make_palette(Look(colormap="jet", opacity=1.0)),
    )
    np.testing.assert_array_equal(heat, grey[..., None].repeat(3, -1))


def test_grey_is_the_window_in_whole_steps():
    plane = np.array([[-50, 0, 20, 40, 80, 900, np.nan, np.inf, -np.inf]])
    grey = draw.draw_grey(plane, GreyWindow(0, 80, ""), Size(1, 9, 1))
    np.testing.assert_array_equal(grey, [[0, 0, 64, 128, 255, 255, 0, 255, 0]])


def test_masks_scan_and_cam_stay_aligned_when_enlarged():
    plane = np.zeros((7, 11), np.float32)
    plane[2, 6] = 1
    size = Size(7 * 13, 11 * 7, 1)
    smooth, mask = draw.resize_smooth(plane, size), draw.resize_mask(plane > 0, size)
    rows, columns = np.indices(smooth.shape) + 0.5
    for weight in (smooth, mask):
        assert (rows * weight).sum() / weight.sum() == pytest.approx(2.5 * 13, abs=1e-3)
        assert (columns * weight).sum() / weight.sum() == pytest.approx(6.5 * 7, abs=1e-3)
    assert mask.sum() == 13 * 7


def test_mask_pixels_take_the_voxel_under_their_centre():
    plane = np.random.default_rng(5).random((7, 9)) > 0.5
    rows = np.floor((np.arange(10) + 0.5) * 0.7).astype(int)
    columns = np.floor((np.arange(24) + 0.5) * 9 / 24).astype(int)
    expected = plane[np.ix_(rows, columns)]
    np.testing.assert_array_equal(draw.resize_mask(plane, Size(10, 24, 1)), expected)


def test_a_small_lesion_is_not_lost_when_shrinking():
    plane = np.zeros((512, 512), bool)
    plane[101, 333] = True
    assert draw.resize_mask(plane, Size(128, 128, 1)).sum() == 1


@pytest.mark.parametrize("name", draw.LINES)
def test_outline_surrounds_the_region_and_leaves_it_free(name):
    mask = np.zeros((60, 60), np.uint8)
    mask[20:40, 15:45] = 1
    picture = np.full((60, 60, 3), 200, np.uint8)
    draw.draw_outlines(picture, {name: mask})
    coloured = (picture == draw.LINES[name].colour).all(-1)
    distance = cv2.distanceTransform(1 - mask, cv2.DIST_C, 3)
    inside = cv2.distanceTransform(mask, cv2.DIST_C, 3)
    assert distance[coloured].max() <= 2
    assert inside[coloured].max(initial=0) <= 1
    changed = (picture != 200).any(-1)
    beside = (cv2.dilate(coloured.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0) & ~coloured
    assert (picture[beside] == 200 // 3).all()
    assert changed[coloured].all()
    assert not changed[inside > 3].any()
    assert not changed[distance > 4].any()


def test_the_two_outlines_differ_in_colour_and_in_style():
    mask = np.zeros((80, 80), np.uint8)
    mask[20:60, 20:60] = 1
    covered = {}
    for name, line in draw.LINES.items():
        picture = np.zeros((80, 80, 3), np.uint8)
        draw.draw_outlines(picture, {name: mask})
        covered[name] = (picture == line.colour).all(-1).sum()
    assert 0.4 < covered["prediction"] / covered["truth"] < 0.8  # dashed, solid
    assert draw.LINES["prediction"].colour != draw.LINES["truth"].colour


def test_where_two_outlines_coincide_both_are_seen():
    mask = np.zeros((80, 80), np.uint8)
    mask[20:60, 20:60] = 1
    picture = np.full((80, 80, 3), 200, np.uint8)
    draw.draw_outlines(picture, {"truth": mask, "prediction": mask})
    seen = {name: (picture == line.colour).all(-1).sum() for name, line in draw.LINES.items()}
    assert seen["truth"] > 0.3 * seen["prediction"]
    assert seen["prediction"] > 0.3 * seen["truth"]


@pytest.mark.parametrize("colormap", ["inferno", "jet", "viridis"])
def test_outlines_stand_out_from_any_heat_on_any_grey(colormap):
    grey = np.arange(256, dtype=np.uint8)[None].repeat(256, 0)
    cam = np.linspace(0, 1, 256, dtype=np.float32)[:, None].repeat(256, 1)
    heat = draw.draw_heat(
        grey, cam, 0.2, draw.make_palette(Look(colormap=colormap, opacity=0.5))
    ).astype(int)
    for line in draw.LINES.values():
        # Against the heat itself or against the dark rim beside the line.
        contrast = np.abs(heat - line.colour).max(-1)
        rim = np.abs(heat // 3 - line.colour).max(-1)
        assert np.maximum(contrast, rim).min() > 100


def test_unknown_colormap_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown colormap 'infrno'; did you mean 'inferno'"):
        draw.make_palette(Look(colormap="infrno", opacity=0.5))


def test_scale_bar_has_its_length_in_pixels():
    picture = np.zeros((400, 400, 3), np.uint8)
    framed = frame.frame_picture(picture, Letters("", "", "", ""), 2.5, (400, 400))
    row = framed[-text.MARGIN // 2, :, 0]
    length = frame.scale_length(0.22 * 400 / 2.5)
    assert length == 20
    assert (row[text.MARGIN :][: length_pixels(length, 2.5)] == text.WHITE[0]).all()
    assert row[text.MARGIN + length_pixels(length, 2.5)] == 0


def length_pixels(length, pixels_per_mm):
    return round(length * pixels_per_mm)


@pytest.mark.parametrize("longest", [0.011, 0.5, 0.99, 1, 3, 49, 50, 51, 1234])
def test_scale_length_is_round_and_long(longest):
    length = frame.scale_length(longest)
    assert longest / 2.5 < length <= longest
    assert f"{length:e}"[0] in "125"


def test_the_frame_leaves_the_picture_untouched_and_centred():
    picture = RNG.integers(0, 256, (100, 60, 3), dtype=np.uint8)
    framed = frame.frame_picture(picture, Letters("R", "L", "A", "P"), 1.0, (320, 320))
    top, left = text.MARGIN + 110, text.MARGIN + 130
    np.testing.assert_array_equal(framed[top : top + 100, left : left + 60], picture)
    assert framed.shape == (320 + 2 * text.MARGIN, 320 + 2 * text.MARGIN, 3)


def test_wrapped_text_fits_and_loses_nothing():
    items = ["short", "a" * 300, "several words " * 30, "layer: encoder.4", ""]
    lines = text.wrap_items(items, 300)
    assert max(text.text_width(line) for line in lines) <= 300
    kept = "".join(lines).replace(" ", "").replace("·", "")
    assert kept == "".join(items).replace(" ", "")


def test_text_becomes_one_line_without_control_characters():
    assert text.clean_text("a\nb\t\x1bc\u202ed  e") == "a b c d e"


def test_names_in_letters_that_the_typeface_lacks_stay_different():
    assert text.spelled("Läsion, опухоль 3 mm²") == "Läsion, опухоль 3 mm²"
    assert text.spelled("肝", bold=True) == "\\u809d"
    masks = [text.text_mask(name) for name in ("肝", "肺", "🙂")]
    assert [mask.shape[1] for mask in masks] == [text.text_width(n) for n in ("肝", "肺", "🙂")]
    assert not np.array_equal(masks[0], masks[1])


def test_text_is_drawn_and_stays_inside_the_picture():
    picture = np.zeros((30, 40, 3), np.uint8)
    text.put_text(picture, "µ longer than the picture", -5, 20)
    assert picture.max() > 200
    assert (picture[:20] == 0).all()


def test_colour_bar_shows_the_colormap_and_nothing_below_the_threshold():
    palette = draw.make_palette(Look(colormap="inferno", opacity=0.5))
    bar = frame.draw_colour_bar(palette, 0.5)
    np.testing.assert_array_equal(bar[12, 10], palette.pure[255, 0])
    np.testing.assert_array_equal(bar[80, 10], palette.pure[round(255 * (1 - 68 / 275)), 0])
    assert (bar[200:280, 10:20] == 0).all()
