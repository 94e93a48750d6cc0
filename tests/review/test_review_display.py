"""Geometry, windows and the choice of slices."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
from helpers_review import MARKER_MM, ORIENTATIONS, SPACINGS, make_affine, make_scan

from seg3dcam.errors import ConfigError, InputError
from seg3dcam.review import look
from seg3dcam.review.look import WINDOWS, choose_window
from seg3dcam.review.pictures import display

# Patient directions in RAS mm.
DIRECTIONS = {
    "R": (1, 0, 0),
    "L": (-1, 0, 0),
    "A": (0, 1, 0),
    "P": (0, -1, 0),
    "S": (0, 0, 1),
    "I": (0, 0, -1),
}
EXPECTED = {
    "axial": ("R", "L", "A", "P"),
    "coronal": ("R", "L", "S", "I"),
    "sagittal": ("A", "P", "S", "I"),
}
TILT = nibabel.eulerangles.euler2mat(0.25, 0.1, 0.2)


def world_of_pixels(view, shape, affine, index):
    """RAS mm of every pixel of a cut, (rows, columns, 3): cuts the coordinates themselves."""
    coordinates = nibabel.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    return np.stack([display.cut(view, coordinates[..., n], index) for n in range(3)], axis=-1)


@pytest.mark.parametrize("axis", display.PLANES)
@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("tilt", [None, TILT], ids=["straight", "oblique"])
def test_pixels_run_towards_the_letters_at_the_edges(axis, codes, tilt):
    shape, affine = make_affine(codes, SPACINGS["thick"], tilt)
    view = display.plan_view(shape, affine, axis)
    letters = display.edge_letters(view)
    assert tuple(letters) == EXPECTED[axis]

    world = world_of_pixels(view, shape, affine, 3)
    along_columns = world[0, 1] - world[0, 0]
    along_rows = world[1, 0] - world[0, 0]
    # Within 45 degrees of the direction that each letter names.
    for step, letter in (
        (along_columns, letters.right),
        (-along_columns, letters.left),
        (along_rows, letters.bottom),
        (-along_rows, letters.top),
    ):
        assert step @ DIRECTIONS[letter] > 0.7 * np.linalg.norm(step)
    spacing = display.spacing_mm(view)
    np.testing.assert_allclose((np.linalg.norm(along_rows), np.linalg.norm(along_columns)), spacing)


@pytest.mark.parametrize("axis", display.PLANES)
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_slice_index_is_the_voxel_index_and_the_position_is_in_mm(axis, codes):
    shape, affine = make_affine(codes, SPACINGS["thick"])
    scan, voxel = make_scan(shape, affine, MARKER_MM)
    view = display.plan_view(shape, affine, axis)
    index = int(voxel[view.slice_axis])
    assert display.cut(view, scan, index).max() == 100
    largest, _ = display.slice_profile(view, scan)
    assert largest.argmax() == index
    letter, mm, unit = display.position_text(view, index).split()
    world = nibabel.affines.apply_affine(affine, voxel)["RAS".index(letter)]
    assert unit == "mm"
    assert float(mm) == pytest.approx(world, abs=0.051)


def test_position_names_the_other_side_below_the_origin():
    view = display.plan_view((5, 5, 5), np.diag([-2.0, 2, 2, 1]), "sagittal")
    assert display.position_text(view, 3) == "L 6.0 mm"


@pytest.mark.parametrize("axis", display.PLANES)
def test_pixels_are_square_in_mm(axis):
    affine = np.diag([-0.8, -0.8, 5, 1])
    view = display.plan_view((200, 180, 40), affine, axis)
    for keep in (True, False):
        size = display.picture_size(view, 320, long_side=1024, keep_detail=keep)
        row_mm, column_mm = display.spacing_mm(view)
        mm_per_pixel = (
            row_mm * view.shape[view.row_axis] / size.height,
            column_mm * view.shape[view.column_axis] / size.width,
        )
        np.testing.assert_allclose(mm_per_pixel, 1 / size.pixels_per_mm, rtol=0.003)
        assert min(size[:2]) >= 320
        assert max(size[:2]) <= 1024


def test_long_side_wins_for_long_thin_pictures():
    view = display.plan_view((1000, 4, 4), np.eye(4), "axial")
    assert display.picture_size(view, 320, long_side=1024)[:2] == (4, 1024)


def test_obliquity_is_the_angle_of_the_rotation():
    turn = nibabel.eulerangles.euler2mat(z=np.radians(17))
    for codes in ORIENTATIONS:
        _, affine = make_affine(codes, SPACINGS["thick"], turn)
        assert display.obliquity_degrees(affine) == pytest.approx(17)
        _, straight = make_affine(codes, SPACINGS["thick"])
        assert display.obliquity_degrees(straight) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (np.eye(3), r"has shape \(3, 3\). Legal: a \(4, 4\)"),
        (np.diag([1, np.nan, 1, 1]), "NaN or infinite"),
        (np.diag([1.0, 0, 1, 1]), "singular"),
        (np.ones((4, 4)), r"last row is \[1.0, 1.0, 1.0, 1.0\]. Legal: .*\(0, 0, 0, 1\)"),
        (np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "singular"),
    ],
)
def test_unusable_affines_are_refused(affine, message):
    with pytest.raises(InputError, match=message):
        display.plan_view((4, 4, 4), affine, "axial")


def test_unknown_axis_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown axis 'axail'; did you mean 'axial'"):
        display.plan_view((4, 4, 4), np.eye(4), "axail")


# ---------------------------------------------------------------- window


def test_automatic_window_ignores_zero_and_nan_over_the_volume():
    rng = np.random.default_rng(0)
    inside = rng.normal(1000, 100, 5000)
    scan = np.concatenate([np.zeros(20000), inside, [np.nan, np.inf, -np.inf]]).reshape(1, 1, -1)
    window = choose_window(scan, None)
    expected = np.percentile(inside, (0.5, 99.5))
    np.testing.assert_allclose((window.low, window.high), expected, rtol=1e-5)


def test_thinned_out_window_is_close_to_the_full_one(monkeypatch):
    scan = np.random.default_rng(0).gamma(2, 100, (80, 70, 60))
    full = choose_window(scan, None)
    monkeypatch.setattr(look, "AUTO_SAMPLE", 50_000)
    thin = choose_window(scan, None)
    assert thin.low != full.low
    np.testing.assert_allclose((thin.low, thin.high), (full.low, full.high), rtol=0.15)


@pytest.mark.parametrize("value", [0.0, 7.0, -1000.0, 1e6, 1e20])
def test_constant_scan_still_has_a_window(value):
    window = choose_window(np.full((3, 3, 3), value), None)
    assert np.isfinite((window.low, window.high)).all()
    assert window.low <= value <= window.high
    assert np.float32(window.low) < np.float32(window.high)
    assert "no value but" in window.text
    assert "%" not in window.text


def test_two_values_with_equal_percentiles_are_both_inside_the_window():
    scan = np.full((50, 50, 50), 5.0)
    scan[0, 0, 0] = 9
    window = choose_window(scan, None)
    assert (window.low, window.high) == (5, 9)
    assert window.text == "W 4 L 7 (all values of the volume)"


@pytest.mark.parametrize("name", WINDOWS)
def test_presets(name):
    width, level = WINDOWS[name]
    scan = np.zeros((2, 2, 2))
    named = choose_window(scan, name.upper().replace(" ", "_"))
    assert (named.high - named.low, (named.high + named.low) / 2) == (width, level)
    assert named[:2] == choose_window(scan, (width, level))[:2]
    assert named.text == f"W {width} L {level} ({name})"


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ("lungs", "unknown window 'lungs'; did you mean 'lung'"),
        ("qq", "legal: 'brain', 'lung', 'soft tissue', 'abdomen', 'bone'"),
        ((0, 40), r"width > 0, not \(0, 40\)"),
        ((80, np.nan), "finite"),
        ((80, 40, 1), r"must be \(width, level\)"),
        (80, r"must be \(width, level\), not 80"),
    ],
)
def test_bad_windows_are_refused(window, message):
    with pytest.raises(ConfigError, match=message):
        choose_window(np.zeros((2, 2, 2)), window)


# ---------------------------------------------------------------- slices


def mask(count, *where):
    relevant = np.zeros(count, bool)
    relevant[list(where)] = True
    return relevant


def test_relevant_slices_are_all_shown_when_few():
    assert display.choose_slices("relevant", mask(9, 2, 3, 7), 3) == [2, 3, 7]


@pytest.mark.parametrize("peak", range(10, 90))
def test_relevant_slices_are_capped_spread_and_hold_the_peak(peak):
    chosen = display.choose_slices("relevant", mask(100, *range(10, 90)), peak)
    assert len(chosen) == len(set(chosen)) == display.MAX_RELEVANT
    assert chosen == sorted(chosen)
    assert peak in chosen
    assert {10, 89} & set(chosen)
    assert max(np.diff(chosen)) <= 2 * 80 / display.MAX_RELEVANT


def test_without_relevant_slices_they_are_spread_over_the_volume():
    chosen = display.choose_slices("relevant", mask(200), None)
    assert chosen[0] == 0
    assert chosen[-1] == 199
    assert len(chosen) == display.MAX_RELEVANT
    assert display.choose_slices("relevant", mask(3), None) == [0, 1, 2]


def test_the_peak_is_shown_even_where_it_is_below_the_threshold():
    assert display.choose_slices("relevant", mask(9, 1), 5) == [1, 5]


@pytest.mark.parametrize(
    ("slices", "expected"),
    [("all", [0, 1, 2, 3]), (2, [2]), ([3, 1, 3], [3, 1]), (np.int16(1), [1]), (range(2), [0, 1])],
)
def test_slices_setting(slices, expected):
    assert display.choose_slices(slices, mask(4), None) == expected


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        (4, r"slice index 4 is outside 0\.\.3"),
        (-1, r"slice index -1 is outside 0\.\.3"),
        ([0, 9], r"slice index 9 is outside 0\.\.3"),
        (1.5, "whole number, not 1.5"),
        (True, "outside 0"),
        ([], "slices is empty"),
        ("relevnt", "unknown slices 'relevnt'; did you mean 'relevant'"),
    ],
)
def test_bad_slices_are_refused(slices, message):
    with pytest.raises(InputError, match=message):
        display.choose_slices(slices, mask(4), None)
