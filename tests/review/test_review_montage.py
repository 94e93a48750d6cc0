"""Several slices in one picture."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from helpers_review import blob_case, find, read, review_of

from seg3dcam.errors import ConfigError
from seg3dcam.review import save_montage
from seg3dcam.review.pictures import display, montage, slices, text


def test_montage_holds_the_pairs_of_its_slices(tmp_path):
    scan, cam, affine = blob_case()
    path = save_montage(
        tmp_path / "new" / "case.png", review_of(scan, cam, affine, slices=[4, 8]), columns=1
    )
    picture = read(path)
    review = review_of(scan, cam, affine, slices=[4, 8])
    size = display.picture_size(
        review.view, montage.MONTAGE_SHORT, long_side=3 * montage.MONTAGE_SHORT, keep_detail=False
    )
    (raw_a, heat_a), (raw_b, heat_b) = (
        [find(picture, side) for side in slices.draw_pair(review, index, size)] for index in (4, 8)
    )
    assert raw_a[0] == heat_a[0] < raw_b[0] == heat_b[0]
    assert raw_a[1] == raw_b[1] < heat_a[1] == heat_b[1]


def test_columns_decide_the_shape_of_the_montage():
    scan, cam, affine = blob_case()
    review = review_of(scan, cam, affine, slices=[3, 4, 5, 6])
    heights, widths, _ = zip(
        *(montage.draw_montage(review, n).shape for n in (1, 2, 4)), strict=True
    )
    assert heights[0] > heights[1] > heights[2]
    assert widths[0] < widths[1] < widths[2]


@pytest.mark.slow
def test_a_montage_of_very_many_slices_stays_small():
    scan = np.random.default_rng(0).random((16, 16, 200))
    picture = montage.draw_montage(review_of(scan, scan, np.eye(4), slices="all"))
    assert picture.shape[0] * picture.shape[1] < 2 * montage.MONTAGE_PIXELS


def test_bad_montage_settings_are_refused(tmp_path):
    scan, cam, affine = blob_case()
    with pytest.raises(ConfigError, match=r"must end in \.png, not 'case\.jpg'"):
        save_montage(tmp_path / "case.jpg", review_of(scan, cam, affine))
    with pytest.raises(ConfigError, match="columns must be 1 or more"):
        save_montage(tmp_path / "case.png", review_of(scan, cam, affine), columns=0)


def test_the_scale_in_mm_is_beside_the_letter_also_in_the_smallest_tiles():
    volume = np.random.default_rng(0).random((16, 16, 200))
    review = review_of(volume, volume, np.diag([40, 40, 40, 1.0]), slices="all")
    side = montage._tile_side(200)
    assert side == montage.MONTAGE_SMALLEST
    size = display.picture_size(review.view, side, long_side=3 * side, keep_detail=False)
    framed, _ = slices.draw_framed_pair(review, 3, size, (side, side))
    below = framed[-text.MARGIN :]
    letter, words = text.text_mask("P", text.LETTER_SIZE, True), text.text_mask("100 mm")
    for mask in (letter, words):  # both whole: neither is drawn over the other
        match = cv2.matchTemplate(below[..., 0], mask, cv2.TM_CCORR_NORMED)
        assert match.max() > 0.99
