"""Pictures of channels: which pixel has which colour, where each tile is, what it says."""

from __future__ import annotations

import itertools

import cv2
import matplotlib
import numpy as np
import pytest
from helpers_review import ORIENTATIONS, make_affine

from seg3dcam.cams.feature_maps import FeatureMaps
from seg3dcam.errors import ConfigError, InputError, OutputError
from seg3dcam.geometry import FeatureGrid
from seg3dcam.review import save_features
from seg3dcam.review.pictures import display
from seg3dcam.review.pictures import features as drawing

RNG = np.random.default_rng(7)


def flat(values, stride=(1.0, 1.0), **more):
    """The feature maps of a 2D layer."""
    values = np.asarray(values, np.float32)
    grid = FeatureGrid(values.shape[1:], stride, (0.0, 0.0))
    return FeatureMaps(values, "stage.1", grid, **more)


def read(file):
    picture = cv2.imread(str(file))
    assert picture is not None
    return picture


def colour(value, name="viridis"):
    """The colormap's colour of a number from 0 to 1, blue green red, on 256 levels."""
    red, green, blue, _ = matplotlib.colormaps[name](round(float(value) * 255))
    return np.round(255 * np.array([blue, green, red])).astype(np.uint8)


def tiles_of(picture, size):
    """Find the framed tiles of a mosaic, row by row: [(top, left)] of what is in the frames."""
    frame = (picture == drawing.FRAME).all(-1)
    height, width = (n + 2 for n in size)
    found = []
    for top, left in np.argwhere(frame):
        ring = frame[top : top + height, left : left + width]
        if ring.shape == (height, width) and all(
            side.all() for side in (ring[0], ring[-1], ring[:, 0], ring[:, -1])
        ):
            found.append((int(top) + 1, int(left) + 1))
    return found


# --------------------------------------------------------------------------------- single pictures


@pytest.mark.parametrize("colormap", ["viridis", "gray"])
def test_every_voxel_is_a_block_of_its_colour(tmp_path, colormap):
    features = flat(RNG.normal(size=(2, 4, 6)))
    files = save_features(tmp_path, features, colormap=colormap)
    assert [file.name for file in files] == ["channel_000.png", "channel_001.png", "mosaic.png"]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    side = 512 // 6
    for file, plane in zip(files, features.values.astype(float), strict=False):
        picture = read(file)
        assert picture.shape == (4 * side, 6 * side, 3)
        scaled = (plane - plane.min()) / (plane.max() - plane.min())
        for row, column in np.ndindex(plane.shape):
            block = picture[row * side : (row + 1) * side, column * side : (column + 1) * side]
            expected = colour(scaled[row, column], colormap)
            np.testing.assert_array_equal(block, np.broadcast_to(expected, block.shape))


def test_colours_of_opencv_are_known_too():
    sheet = drawing.prepare(flat([[[0, 1]]]), colormap="deepgreen")
    picture = drawing.draw_channel(sheet, 0)
    expected = cv2.applyColorMap(np.array([[0, 255]], np.uint8), cv2.COLORMAP_DEEPGREEN)[0]
    np.testing.assert_array_equal(picture[0, [0, -1]], expected)


def test_scale_of_the_layer_is_that_of_all_channels(tmp_path):
    features = flat([[[0, 1]], [[2, 4]], [[3, 3]]])
    *files, _ = save_features(tmp_path, features, scale="layer")
    for file, values in zip(files, [(0, 1), (2, 4), (3, 3)], strict=True):
        picture = read(file)
        np.testing.assert_array_equal(picture[0, 0], colour(values[0] / 4))
        np.testing.assert_array_equal(picture[0, -1], colour(values[1] / 4))


@pytest.mark.parametrize("value", [0.0, -2.5, 1e30])
def test_a_constant_channel_is_black(tmp_path, value):
    constant = np.full((1, 3, 4), value)
    noisy = constant * (1 + 1e-7 * RNG.random((1, 3, 4)))  # as blended windows leave it
    features = flat(np.concatenate([constant, noisy]))
    *files, _ = save_features(tmp_path, features)
    assert not any(read(file).any() for file in files)
    *files, _ = save_features(tmp_path, flat(constant), scale="layer")
    assert not read(files[0]).any()


@pytest.mark.parametrize("scale", ["channel", "layer"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_channel_that_is_not_finite_is_black_and_spoils_no_other(tmp_path, scale, bad):
    values = np.stack([np.linspace(0, 1, 6).reshape(2, 3)] * 2)
    values[0, 1, 1] = bad
    sheet = drawing.prepare(flat(values), scale=scale)
    assert not drawing.draw_channel(sheet, 0).any()
    np.testing.assert_array_equal(drawing.draw_channel(sheet, 1)[-1, -1], colour(1))
    assert drawing.label_of(sheet, 0) == ["channel 0", "NaN or infinite"]


def test_pixels_are_square_in_the_input():
    voxels = RNG.random((1, 10, 20))
    sheet = drawing.prepare(flat(voxels, stride=(5.0, 2.0)))
    picture = drawing.draw_channel(sheet, 0)
    assert picture.shape == (500, 400, 3)  # 10 x 5 by 20 x 2
    level = (voxels[0] - voxels.min()) / np.ptp(voxels)
    np.testing.assert_array_equal(picture[499, 0], colour(level[9, 0]))
    np.testing.assert_array_equal(picture[125, 210], colour(level[2, 10]))


def test_a_large_layer_keeps_a_pixel_for_each_voxel():
    voxels = np.arange(600.0 * 3).reshape(1, 3, 600)
    assert drawing.draw_channel(drawing.prepare(flat(voxels)), 0).shape == (3, 600, 3)
    assert drawing.block_size((3, 600), (1, 1), 100, shrink=True) == (1, 100)


# --------------------------------------------------------------------------------- in the patient


@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_slice_is_turned_as_the_volume_is(codes, axis):
    spacing = (2.0, 3.0, 5.0)
    shape, affine = make_affine(codes, spacing)
    volume, index = RNG.random(shape), 4
    features = FeatureMaps(
        volume.take(index, axis)[None],
        "layer",
        FeatureGrid(shape, (1.0,) * 3, (0.0,) * 3),
        axis=axis,
        index=index,
        affine=affine,
    )
    sheet = drawing.prepare(features)
    view = next(
        view
        for view in (display.plan_view(shape, affine, name) for name in display.PLANES)
        if view.slice_axis == axis
    )
    np.testing.assert_array_equal(sheet.planes[0], display.cut(view, volume, index))
    assert sheet.pixel == pytest.approx(display.spacing_mm(view))
    assert display.position_text(view, index) in " ".join(drawing.facts_of(sheet))


# --------------------------------------------------------------------------------------- the mosaic


@pytest.mark.parametrize("columns", [None, 1, 3])
def test_tiles_stand_in_order_row_by_row(tmp_path, columns):
    weights = np.array([0.0, 3.0, -1.0, 2.0, 0.5])
    features = flat(RNG.normal(size=(5, 8, 8)), weights=weights, target="the lesion")
    *files, mosaic = save_features(tmp_path, features, columns=columns)
    assert [file.name for file in files] == [
        "rank_000_channel_001.png",
        "rank_001_channel_003.png",
        "rank_002_channel_004.png",
        "rank_003_channel_000.png",
        "rank_004_channel_002.png",
    ]
    picture = read(mosaic)
    sheet = drawing.prepare(features)
    size, _ = drawing._layout(sheet)
    assert size == (256, 256)
    corners = tiles_of(picture, size)
    assert len(corners) == 5
    for (top, left), channel in zip(corners, [1, 3, 4, 0, 2], strict=True):
        plane = features.values[channel].astype(float)
        scaled = (plane - plane.min()) / (plane.max() - plane.min())
        for row, column in itertools.product((0, 3, 7), repeat=2):
            pixel = picture[top + row * 32 + 16, left + column * 32 + 16]
            np.testing.assert_array_equal(pixel, colour(scaled[row, column]))
    tops, lefts = zip(*corners, strict=True)
    across = columns or 3
    assert len(set(lefts)) == across
    assert len(set(tops)) == -(-5 // across)
    assert len(set(np.diff(sorted(set(lefts))))) <= 1, "equal gaps"


def test_labels_name_channel_weight_and_range():
    features = flat([[[0.125, 3]], [[2, 2]]], weights=np.array([-0.02, 1.5]), target="x")
    sheet = drawing.prepare(features)
    assert drawing.label_of(sheet, 0) == ["channel 0", "weight -0.02", "0.125 … 3"]
    assert drawing.label_of(sheet, 1) == ["channel 1", "weight +1.5", "2, constant"]


def test_header_says_layer_shape_slice_and_scale():
    grid = FeatureGrid((5, 4, 6), (8.0, 4.0, 4.0), (3.5, 0.0, 0.0), measured=False)
    features = FeatureMaps(
        RNG.random((3, 4, 6)), "encoder[0]", grid, 0, 2, np.ones(3), "log-odds of class 1"
    )
    words = " ".join(drawing.facts_of(drawing.prepare(features)))
    for part in (
        "grid 5 x 4 x 6",
        "stride 8 x 4 x 4 input voxels (assumed)",
        "slice 2 of 0–4 along axis 0 (input voxel 19.5)",
        "axis 1 runs down, axis 2 to the right",
        "ranked by Grad-CAM weight for log-odds of class 1",
        "each channel on its own scale",
    ):
        assert part in words
    assert "one scale for all" in " ".join(
        drawing.facts_of(drawing.prepare(features, scale="layer"))
    )


def test_chosen_channels_in_the_order_given(tmp_path):
    features = flat(RNG.random((12, 4, 4)), weights=np.arange(12.0), target="x")
    files = save_features(tmp_path, features, channels=[3, 11, 3])
    assert [f.name for f in files[:-1]] == ["rank_008_channel_003.png", "rank_000_channel_011.png"]
    files = save_features(tmp_path, features, top=2)
    assert [f.name for f in files[:-1]] == ["rank_000_channel_011.png", "rank_001_channel_010.png"]


@pytest.mark.slow
def test_a_layer_of_512_channels_is_one_page_that_opens(tmp_path):
    sheet = drawing.prepare(flat(RNG.random((512, 6, 6))))
    picture = drawing.draw_mosaic(sheet)
    assert picture.shape[0] * picture.shape[1] <= 13_000_000
    assert len(tiles_of(picture, (96, 96))) == 512


def test_more_channels_than_fit_fill_several_pages(tmp_path, monkeypatch):
    for limit in ("MONTAGE_PIXELS", "MOSAIC_PIXELS"):
        monkeypatch.setattr(drawing, limit, 400_000)
    features = flat(RNG.random((30, 3, 3)))
    files = save_features(tmp_path, features)
    names = [file.name for file in files if "mosaic" in file.name]
    assert names == [f"mosaic_{page + 1}.png" for page in range(len(names))]
    assert len(names) > 1
    pages = drawing._pages(drawing.prepare(features), None)
    assert list(itertools.chain(*pages)) == list(range(30))
    for name, page in zip(names, pages, strict=True):
        assert len(tiles_of(read(tmp_path / name), (96, 96))) == len(page)


def test_a_shrunk_mosaic_shows_voxels_of_the_layer_and_says_so(monkeypatch):
    for limit in ("MONTAGE_PIXELS", "MOSAIC_PIXELS"):
        monkeypatch.setattr(drawing, limit, 60_000)
    features = flat(RNG.random((2, 192, 192)))
    sheet = drawing.prepare(features)
    size, _ = drawing._layout(sheet)
    assert 96 <= size[0] < 192
    header = drawing._header(sheet, 900, size, "")
    assert (header[2] == np.array([60, 190, 255])).all(-1).any(), "an amber notice"
    plane = features.values[0].astype(float)
    level = np.rint((plane - plane.min()) / np.ptp(plane) * 255) / 255
    at = ((np.arange(size[0]) + 0.5) * 192 / size[0]).astype(int)
    for row, column in itertools.product((0, 5, size[0] - 1), repeat=2):
        np.testing.assert_array_equal(
            drawing._draw_plane(sheet, 0, size)[row, column], colour(level[at[row], at[column]])
        )


# ---------------------------------------------------------------------------------------- refusals

REFUSED = {
    "channel": ({"channels": [0, 2]}, InputError, "channel 2 of layer 'stage.1': legal are 0 to 1"),
    "no channel": ({"channels": []}, InputError, "no channel given"),
    "scale": ({"scale": "layr"}, ConfigError, "did you mean 'layer'"),
    "colormap": ({"colormap": "viridi"}, ConfigError, "did you mean 'viridis'"),
    "columns": ({"columns": 0}, ConfigError, "columns must be 1 or more"),
    "top": ({"top": 0}, ConfigError, "top must be 1 or more"),
}


@pytest.mark.parametrize(("given", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_say_what_is_legal_and_write_nothing(tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        save_features(tmp_path / "new", flat(RNG.random((2, 3, 3))), **given)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "values", [np.zeros((2, 3)), np.zeros((0, 3, 3)), np.zeros((1, 2, 2), "c8")]
)
def test_values_that_are_no_feature_maps_are_refused(tmp_path, values):
    features = FeatureMaps(values, "0", FeatureGrid.of_voxels((3, 3)))
    with pytest.raises(InputError, match=r"must be real numbers \(C, h, w\)"):
        save_features(tmp_path, features)


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        save_features(tmp_path / "file", flat(RNG.random((1, 3, 3))))
