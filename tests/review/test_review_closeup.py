"""The close-up of a place: how much it shows, and that it shows that place."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_review import (
    CUBE_MM,
    MARKER_MM,
    ORIENTATIONS,
    SPACINGS,
    brightest,
    make_affine,
    make_scan,
    read,
    review_of,
)

from seg3dcam.review import save_montage, save_planes
from seg3dcam.review.pictures import display, montage, text
from seg3dcam.review.pictures.closeup import LEAST, MOST, USUAL, closeup_mm, draw_closeup
from seg3dcam.review.pictures.slices import draw_pair


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_the_place_is_in_the_middle(codes, spacing, axis):
    shape, affine = make_affine(codes, SPACINGS[spacing])
    scan, voxel = make_scan(shape, affine, MARKER_MM)
    cam = (scan == 100).astype(float)
    plane = review_of(scan, cam, affine, window=(100, 50)).along(axis)
    raw, heat = draw_closeup(plane, voxel.tolist(), 40, 200)
    raw, heat = (p[text.MARGIN : -text.MARGIN, text.MARGIN : -text.MARGIN] for p in (raw, heat))
    row, column = brightest(raw)
    step = max(display.spacing_mm(plane.view)) / 40 * 200  # a voxel in pixels
    assert abs(row - raw.shape[0] / 2) <= 0.6 * step
    assert abs(column - raw.shape[1] / 2) <= 0.6 * step
    assert np.ptp(heat.astype(int), axis=2).max() > 60  # in colour
    assert np.ptp(raw.astype(int), axis=2).max() == 0


def test_at_the_edge_the_picture_is_moved_and_not_cut():
    shape, affine = make_affine("RAS", SPACINGS["even"])
    scan = np.full(shape, 10, np.float32)
    scan[0, -1, 5] = 100  # left, in front
    review = review_of(scan, scan / 100, affine, window=(100, 50))
    raw, _ = draw_closeup(review, (0, shape[1] - 1, 5), 40, 200)
    inner = raw[text.MARGIN : -text.MARGIN, text.MARGIN : -text.MARGIN]
    assert inner.shape[:2] == (200, 200)
    y, x = np.unravel_index(inner[..., 0].argmax(), inner.shape[:2])
    assert y < 10
    assert x > 190


def test_a_scan_smaller_than_the_close_up_is_shown_whole():
    scan = np.random.default_rng(0).random((6, 9, 4))
    raw, _ = draw_closeup(review_of(scan, scan, np.eye(4)), (3, 3, 3), 100, 90)
    letters = 2 * text.MARGIN
    assert raw.shape[:2] == (90 + letters, 90 + letters)
    wide = np.flatnonzero(raw[text.MARGIN + 45, :, 0])
    assert len(wide) > 50


def heat_of(side: int, shape=(80, 100, 120)) -> np.ndarray:
    heat = np.zeros(shape)
    heat[20 : 20 + side, 20:26, 20:26] = 1
    heat[70:, 90:, 110:] = 1  # another place, which does not count
    return heat


@pytest.mark.parametrize(
    ("side", "wanted"),
    [(2, 100 * LEAST), (24, 40.0), (50, 100 * MOST)],
    ids=["dot", "lesion", "all"],
)
def test_a_close_up_is_as_near_as_what_it_shows_is_large(side, wanted):
    heat = heat_of(side)
    assert closeup_mm(heat.shape, np.eye(4), (21, 22, 22), heat, 0.2) == pytest.approx(wanted)


def test_the_side_is_in_mm_and_usual_where_nothing_stands_out():
    heat = heat_of(24)
    affine = np.diag([0.5, 0.5, 0.5, 1])
    assert closeup_mm(heat.shape, affine, (21, 22, 22), heat, 0.2) == pytest.approx(20)
    for strength in (None, heat * 0.1, np.full_like(heat, np.nan)):
        found = closeup_mm(heat.shape, affine, (21, 22, 22), strength, 0.2)
        assert found == pytest.approx(50 * USUAL)


def test_planes_and_montage_show_it(tmp_path):
    """The lesion of the phantom is drawn larger than in the whole slice, in both pictures."""
    shape, affine = make_affine("LPS", SPACINGS["even"])
    at = np.linalg.inv(affine) @ [*MARKER_MM, 1]
    grid = np.stack(np.indices(shape), -1)
    cam = (np.linalg.norm(grid - at[:3], axis=-1) < 4).astype(float)
    scan = np.random.default_rng(0).normal(100, 5, shape)
    review = review_of(scan, cam, affine, slices=[int(np.rint(at[2]))], colormap="autumn")

    def red(picture):
        return (picture[..., 2].astype(int) - picture[..., 0] > 40).sum()

    planes = read(save_planes(tmp_path / "planes.png", review))
    middle = planes.shape[0] * 2 // 3
    assert red(planes[middle:]) > 1.5 * red(planes[:middle])
    page = read(save_montage(tmp_path / "montage.png", review))
    tile = display.picture_size(
        review.view, montage.MONTAGE_SHORT, long_side=768, keep_detail=False
    )
    _, whole = draw_pair(review, review.indices[0], tile)
    assert red(page) > 4 * red(whole)
    assert CUBE_MM > 100


def test_a_montage_without_a_cam_has_no_close_up():
    scan = np.random.default_rng(0).random((16, 16, 8))
    without, with_cam = (
        montage.draw_montage(review_of(scan, cam, np.eye(4), slices=[3, 4]))
        for cam in (0 * scan, scan)
    )
    assert without.shape[1] < with_cam.shape[1]
