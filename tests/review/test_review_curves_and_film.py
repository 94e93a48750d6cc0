"""The profile's numbers, and the film's frames."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_phantom import make_phantom, silent
from helpers_review import blob_case, decode, lines_of, read, review_of
from PIL import Image

from seg3dcam.errors import ConfigError
from seg3dcam.review import review_explanation, save_cine, save_planes, save_profile
from seg3dcam.review.pictures import cine, display, profile, text

# ---------------------------------------------------------------- profile


@pytest.mark.parametrize("axis", display.PLANES)
def test_curves_hold_the_numbers_of_every_slice(axis):
    explanation = make_phantom("PIR")
    review = review_explanation(explanation, axis=axis)
    lines = lines_of(profile.plot_profile(review))
    cam = np.moveaxis(explanation.volume().numpy().astype(float), review.view.slice_axis, 0)
    voxel_ml = abs(np.linalg.det(explanation.affine[:3, :3])) / 1000
    for label, expected in {
        "CAM max": [plane.max() for plane in cam],
        "share of the sum": [100 * plane.sum() / cam.sum() for plane in cam],
        "prediction": [
            plane.sum() * voxel_ml
            for plane in np.moveaxis(explanation.mask.numpy(), review.view.slice_axis, 0)
        ],
        "truth": [
            plane.sum() * voxel_ml
            for plane in np.moveaxis(explanation.truth.numpy(), review.view.slice_axis, 0)
        ],
    }.items():
        x, y = lines[label]
        np.testing.assert_array_equal(x, np.arange(len(cam)))
        np.testing.assert_allclose(y, expected, rtol=1e-5)
    assert lines["prediction"][1].sum() == pytest.approx(explanation.mask.sum() * voxel_ml)
    peak = explanation.peak()[0][review.view.slice_axis]
    np.testing.assert_array_equal(lines["peak slice"][0], peak)
    np.testing.assert_allclose(lines["threshold"][1], review.look.threshold)


@pytest.mark.parametrize("codes", ["LPS", "LPI"])
def test_the_upper_scale_is_the_place_in_mm(codes):
    explanation = make_phantom(codes)
    figure = profile.plot_profile(review_explanation(explanation))
    figure.canvas.draw()
    (top,) = (axes for axes in figure.axes if axes.get_xlabel().startswith("mm"))
    assert top.get_xlabel() == "mm towards S"
    centre = (np.array(explanation.scan.shape) - 1) / 2
    for index in (0, 5, explanation.scan.shape[2] - 1):
        mm = (explanation.affine @ [*centre[:2], index, 1])[2]
        above = top.transData.transform((mm, 0))[0]
        assert above == pytest.approx(figure.axes[1].transData.transform((index, 0))[0])


def test_without_masks_there_is_one_panel_and_without_heat_no_curve():
    scan, cam, affine = blob_case()
    figure = profile.plot_profile(review_of(scan, cam, affine))
    assert not {"prediction", "truth"} & set(lines_of(figure))
    figure = profile.plot_profile(review_explanation(silent(make_phantom(), "zero")))
    assert not {"CAM max", "share of the sum", "peak slice"} & set(lines_of(figure))
    assert {"prediction", "truth"} < set(lines_of(figure))


def test_the_profile_is_a_picture_with_title_and_footer(tmp_path):
    scan, cam, affine = blob_case()
    with_title = review_of(scan, cam, affine, title="Case 7")
    file = save_profile(tmp_path / "new" / "profile.png", with_title)
    picture = read(file)
    assert picture.shape[1] == 1100
    np.testing.assert_array_equal(picture, profile.draw_profile(with_title))
    assert len(picture) > len(profile.draw_profile(review_of(scan, cam, affine)))


# ---------------------------------------------------------------- film


@pytest.mark.slow
def test_frames_are_the_slices_in_order(tmp_path):
    review = review_explanation(make_phantom(spacing=(3.0, 3.0, 10.0)), slices="all")
    frames, times, loops = decode(save_cine(tmp_path / "new" / "case.webp", review))
    drawn = np.stack([np.asarray(frame) for frame in cine.draw_frames(review)])
    assert len(frames) == review.view.slice_count == 14
    assert frames.shape == drawn.shape
    assert loops == 0  # for ever
    amber = np.array(text.AMBER)  # blue green red
    assert (drawn[0] == amber[::-1]).all(-1).any()
    assert not (drawn[0] == amber).all(-1).any()
    assert set(times) == {200}
    assert np.abs(frames.astype(np.int16) - drawn).mean((1, 2, 3)).max() < 2.5
    few = frames[:, None, ::3, ::3].astype(np.int16) - drawn[:, ::3, ::3]
    np.testing.assert_array_equal(np.abs(few).mean((2, 3, 4)).argmin(1), range(14))


def test_the_reviews_own_order_is_kept(tmp_path):
    scan, cam, affine = blob_case()
    frames, _, _ = decode(
        save_cine(tmp_path / "a.webp", review_of(scan, cam, affine, slices=[8, 3]))
    )
    other, _, _ = decode(
        save_cine(tmp_path / "b.webp", review_of(scan, cam, affine, slices=[3, 8]))
    )
    assert np.abs(frames[0].astype(int) - other[1]).mean() < 1.5
    assert np.abs(frames[0].astype(int) - other[0]).mean() > 3


def test_a_single_slice_is_a_film_too(tmp_path):
    scan, cam, affine = blob_case()
    file = save_cine(tmp_path / "a.webp", review_of(scan, cam, affine, slices=6))
    with Image.open(file) as film:
        assert film.n_frames == 1


def test_long_films_are_quick_small_and_limited(monkeypatch):
    assert [cine._frame_ms(n) for n in (1, 75, 100, 300)] == [200, 200, 150, 50]
    assert [cine._frame_side(n) for n in (1, 100, 200, 300)] == [384, 384, 384, 317]
    monkeypatch.setattr(cine, "MOST_FRAMES", 5)
    scan, cam, affine = blob_case()
    review = review_of(scan, cam, affine, slices="all")
    frames = cine.draw_frames(review)
    assert len(frames) == 5
    assert len({frame.size for frame in frames}) == 1


def test_thinned_out_slices_are_spread_and_hold_the_peak():
    for peak in range(100):
        chosen = display.thin_out(range(100), 12, keep=peak)
        assert len(set(chosen)) == 12
        assert chosen == sorted(chosen)
        assert peak in chosen
        assert max(np.diff(chosen)) <= 18


@pytest.mark.parametrize(
    ("writer", "name", "message"),
    [
        (save_cine, "a.gif", r"the film's path must end in \.webp, not 'a\.gif'"),
        (save_profile, "a.pdf", r"the profile's path must end in \.png"),
        (save_planes, "a", r"the planes' path must end in \.png, not 'a'"),
    ],
)
def test_other_formats_are_refused(tmp_path, writer, name, message):
    scan, cam, affine = blob_case()
    with pytest.raises(ConfigError, match=message):
        writer(tmp_path / "new" / name, review_of(scan, cam, affine))
    assert not (tmp_path / "new").exists()
