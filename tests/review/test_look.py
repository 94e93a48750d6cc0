"""How scan and CAM are shown: one formula and one table for every format."""

from __future__ import annotations

import cv2
import matplotlib
import numpy as np
import pytest

from seg3dcam.errors import ConfigError
from seg3dcam.review.look import WINDOWS, Look, choose_window, colours, width_level


@pytest.mark.parametrize("name", ["inferno", "viridis", "jet", "gray_r"])
def test_colours_of_matplotlib(name):
    exact = matplotlib.colormaps[name](np.arange(256))[:, :3] * 255
    assert np.abs(colours(name) - exact).max() <= 0.5


@pytest.mark.parametrize(("name", "number"), [("parula", cv2.COLORMAP_PARULA), ("deepgreen", 21)])
def test_colours_of_opencv_are_red_green_blue(name, number):
    bgr = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], number)[:, 0]
    assert np.array_equal(colours(name), bgr[:, ::-1])


def test_matplotlib_comes_first_where_both_know_a_name():
    exact = matplotlib.colormaps["hot"](np.arange(256))[:, :3] * 255
    assert np.abs(colours("hot") - exact).max() <= 0.5


def test_the_default_rises_in_brightness():
    """Else a middling value looks strongest, as with jet."""

    def brightness(name):
        return colours(name) @ np.array([0.2126, 0.7152, 0.0722])

    assert (np.diff(brightness(Look().colormap)) > -0.5).all()
    assert (np.diff(brightness("jet")) < -0.5).any()


def lightness(rgb):
    return cv2.cvtColor(rgb[None].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0, :, 0]


def test_signed_colours_brighten_with_the_strength_alike_on_both_sides():
    against, speaks_for = np.split(lightness(colours(Look(signed=True).colormap)), [128])
    assert (np.diff(against[::-1]) > -0.1).all()
    assert (np.diff(speaks_for) > -0.1).all()
    assert np.abs(against[::-1] - speaks_for).max() < 5
    assert lightness(colours("RdBu_r"))[[0, -1]].max() < 40  # why it is none of matplotlib's


def test_blue_is_against_and_orange_for():
    table = colours("blue_orange").astype(int)
    assert (table[:120, 2] > table[:120, 0]).all()
    assert (table[136:, 0] > table[136:, 2]).all()


def test_only_a_signed_look_without_a_name_has_diverging_colours():
    assert Look().colormap == Look(colormap="inferno").colormap == "inferno"
    assert Look(signed=True).colormap == "blue_orange"
    assert Look(signed=True, colormap="viridis").colormap == "viridis"
    assert Look(colormap="blue_orange").signed is False


def test_a_signed_look_goes_by_the_size_of_a_value():
    cam = np.array([-1.0, -0.5, -0.25, -0.19, 0, 0.19, 0.25, 1])
    look = Look(threshold=0.2, opacity=0.4, signed=True)
    assert look.alpha(cam) == pytest.approx([0.4, 0.4, 0.2, 0, 0, 0, 0.2, 0.4])
    assert look.level(cam) == pytest.approx((cam + 1) / 2)
    assert Look().level(np.abs(cam)) == pytest.approx(np.abs(cam))


def test_alpha_is_zero_below_the_threshold_and_full_from_a_half():
    cam = np.array([0, 0.19, 0.2, 0.25, 0.5, 1.0])
    assert Look(threshold=0.2, opacity=0.4).alpha(cam) == pytest.approx([0, 0, 0.16, 0.2, 0.4, 0.4])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"colormap": "infernoo"}, "unknown colormap 'infernoo'; did you mean 'inferno'"),
        ({"colormap": "parulla"}, "did you mean 'parula'"),
        ({"window": "lungs"}, "unknown window 'lungs'; did you mean 'lung'"),
        ({"window": (0, 40)}, "width > 0"),
        ({"window": (1, 2, 3)}, r"\(width, level\)"),
        ({"threshold": 1.01}, "threshold must be in 0..1"),
        ({"opacity": float("nan")}, "opacity must be in 0..1"),
    ],
)
def test_what_cannot_be_shown(settings, said):
    with pytest.raises(ConfigError, match=said):
        Look(**settings)


@pytest.mark.parametrize("name", WINDOWS)
def test_presets_by_any_spelling(name):
    assert width_level(name.upper().replace(" ", "-")) == WINDOWS[name]


def test_a_ct_is_shown_in_soft_tissue_and_an_mr_by_its_percentiles():
    rng = np.random.default_rng(0)
    ct = rng.normal(40, 12, (20, 20, 20))
    ct[:10] = -1000
    assert choose_window(ct, None)[:2] == (-160, 240)
    assert "soft tissue" in choose_window(ct, None).text
    assert choose_window(ct, "lung")[:2] == (-1350, 150)
    mr = rng.gamma(4, 100, (20, 20, 20))
    assert choose_window(mr, None)[:2] == pytest.approx(np.percentile(mr, (0.5, 99.5)), rel=1e-6)
