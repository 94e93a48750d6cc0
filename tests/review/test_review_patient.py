"""The oblique phantom: the marker, right, in front and above, is there in every picture."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from helpers_crossed import crossed
from helpers_phantom import MARKER_MM, OBLIQUE, SPACING, make_phantom
from helpers_review import find, read

from seg3dcam.review import review_explanation, save_planes, save_slices
from seg3dcam.review.look import Look
from seg3dcam.review.pictures import display, slices, text

# Patient directions in RAS mm.
DIRECTIONS = dict(
    zip("RLAPSI", np.repeat(np.eye(3), 2, 0) * np.tile([[1], [-1]], (3, 1)), strict=True)
)
EXPECTED = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}
#: Body (40 HU) is black, the marker (180 HU) white.
MARKER_ONLY = Look(window=(2, 170), opacity=0.0)

CODES = ["LPS", "RAS", "PIR", "SLA"]
STORED = pytest.mark.parametrize("codes", crossed(CODES, rows=2))
STORED_AND_SEEN = pytest.mark.parametrize(("codes", "axis"), crossed(CODES, display.PLANES))


def own_direction(affine, letter):
    """The unit vector of the scan's own axis that is nearest to a patient direction."""
    units = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    along = units.T @ DIRECTIONS[letter]
    axis = np.abs(along).argmax()
    return units[:, axis] * np.sign(along[axis])


@STORED_AND_SEEN
def test_mean_position_from_the_pixels_of_all_slices(codes, axis):
    explanation = make_phantom(codes)
    review = review_explanation(explanation, MARKER_ONLY, axis=axis, slices="all")
    view, size = review.view, display.picture_size(review.view, 400, long_side=1024)
    left, right, top, bottom = EXPECTED[axis]
    to_right, down = (own_direction(review.affine, letter) for letter in (right, bottom))
    across = review.affine[:3, view.slice_axis]  # one slice further
    total, weights = np.zeros(3), 0.0
    for index in range(view.slice_count):
        picture = slices.draw_pair(review, index, size)[0][..., 0].astype(float)
        rows, columns = np.indices(picture.shape) + 0.5
        weight = picture.sum()
        if not weight:
            continue
        x = (columns * picture).sum() / weight - size.width / 2
        y = (rows * picture).sum() / weight - size.height / 2
        place = (x * to_right + y * down) / size.pixels_per_mm
        total += weight * (place + (index - (view.slice_count - 1) / 2) * across)
        weights += weight
    error = np.linalg.norm(total / weights - MARKER_MM)
    assert error < min(SPACING) / 2
    assert {left, top} < set("RAS")  # so the marker is up and to the left


@STORED_AND_SEEN
def test_letters_in_the_file_are_on_the_right_sides(tmp_path, codes, axis):
    explanation = make_phantom(codes)
    review = review_explanation(explanation, MARKER_ONLY, axis=axis)
    review = review.along(axis, [review.peak_slice])
    (file,) = save_slices(tmp_path, review)
    picture = read(file)
    raw, _ = slices.draw_pair(
        review,
        review.peak_slice,
        display.picture_size(review.view, slices.SLICE_SHORT, long_side=slices.SLICE_LONG),
    )
    top, left = find(picture, raw)
    height, width = raw.shape[:2]
    margin, middle = text.MARGIN, (top + height // 2, left + width // 2)
    places = {
        "left": (middle[0], left - margin // 2),
        "right": (middle[0], left + width + margin // 2),
        "top": (top - margin // 2, middle[1]),
        "bottom": (top + height + margin // 2, middle[1]),
    }
    for (y, x), letter in zip(places.values(), EXPECTED[axis], strict=True):
        around = picture[y - 14 : y + 14, x - 12 : x + 12, 0]
        assert letter == read_letter(around)
    # The marker is on the side of the first and of the third letter.
    y, x = np.argwhere(raw[..., 0] > 127).mean(0)
    assert x < width / 2
    assert y < height / 2


def read_letter(picture):
    """The letter that a small picture shows."""

    def likeness(letter):
        mask = text.text_mask(letter, text.LETTER_SIZE, True)
        mask = np.pad(mask, 1)  # so that P does not look like a part of R
        return cv2.matchTemplate(np.pad(picture, 8), mask, cv2.TM_CCOEFF_NORMED).max()

    return max("RLAPSI", key=likeness)


@STORED
def test_planes_cut_through_the_peak_and_point_to_it(tmp_path, codes):
    explanation = make_phantom(codes)
    review = review_explanation(explanation, Look(window=(2, 170)))
    picture = read(save_planes(tmp_path / "new" / "planes.png", review))
    peak = explanation.peak()[0]
    scales = set()
    for axis in display.PLANES:
        plane = review.along(axis)
        index = peak[plane.view.slice_axis]
        assert plane.peak_slice == index
        extent = np.array(plane.view.shape) * np.linalg.norm(review.affine[:3, :3], axis=0)
        raw, overlay, size = shown_pair(picture, plane, index)
        scales.add(size.pixels_per_mm)
        height, width = raw[2:]
        assert height / width == pytest.approx(
            extent[plane.view.row_axis] / extent[plane.view.column_axis], rel=0.01
        )
        assert overlay[0] > raw[0]  # below the scan
        assert overlay[1] == raw[1]
        for top, left, *_ in (raw, overlay):
            marker = plane.scan > 170
            assert marker[peak]
            y, x = display.pixel_of(plane.view, peak, size)
            for edge in (picture[top - 1], picture[top + height]):
                at = np.flatnonzero((edge[left : left + width] == text.AMBER).all(-1))
                assert abs(at.mean() + 0.5 - x) <= 1
            for edge in (picture[:, left - 1], picture[:, left + width]):
                at = np.flatnonzero((edge[top : top + height] == text.AMBER).all(-1))
                assert abs(at.mean() + 0.5 - y) <= 1
    assert len(scales) == 1


def shown_pair(picture, plane, index):
    """Where scan and overlay stand: (top, left, height, width) each; and their size."""
    from seg3dcam.review.pictures import planes

    reviews = [plane.along(axis) for axis in display.PLANES]
    size = planes._sizes(reviews)[list(display.PLANES).index(plane.view.axis)]
    pair = slices.draw_pair(plane, index, size)
    raw, overlay = ((*find(picture, part), *part.shape[:2]) for part in pair)
    return raw, overlay, size


@pytest.mark.parametrize("rotation", [OBLIQUE, np.eye(3)], ids=["oblique", "straight"])
def test_a_pixel_is_where_its_voxel_is(rotation):
    """`pixel_of` against the picture of a single bright voxel."""
    explanation = make_phantom("PIR", rotation=rotation)
    shape = explanation.scan.shape
    voxel = (11, 7, 60)
    scan = np.zeros(shape, np.float32)
    scan[voxel] = 1
    from helpers_review import review_of

    for axis in display.PLANES:
        review = review_of(scan, scan, explanation.affine, axis=axis, window=(2, 1), opacity=0)
        size = display.picture_size(review.view, 400, long_side=1024)
        picture = slices.draw_pair(review, voxel[review.view.slice_axis], size)[0][..., 0]
        rows, columns = np.indices(picture.shape) + 0.5
        found = ((rows * picture).sum(), (columns * picture).sum())
        expected = display.pixel_of(review.view, voxel, size)
        np.testing.assert_allclose(np.divide(found, picture.sum(dtype=float)), expected, atol=0.3)
