"""The files: where things are in them, what they say, and what happens when writing fails."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pytest
from helpers_review import (
    MARKER_MM,
    ORIENTATIONS,
    SPACINGS,
    blob_case,
    brightest,
    make_affine,
    make_scan,
    read,
    review_of,
    written_words,
)

from seg3dcam.errors import InputError, OutputError
from seg3dcam.review import save_montage, save_slices
from seg3dcam.review.pictures import display, draw, page, slices, text

TILT = nibabel.eulerangles.euler2mat(0.25, 0.1, 0.2)
# Where the marker's mm go: (across the picture from its centre to the right, and down).
RIGHT_DOWN = {
    "axial": np.array([[-1, 0, 0], [0, -1, 0]]),
    "coronal": np.array([[-1, 0, 0], [0, 0, -1]]),
    "sagittal": np.array([[0, -1, 0], [0, 0, -1]]),
}


def panels(picture, view, short=slices.SLICE_SHORT):
    """The scan and the overlay inside their margins, from a PNG of one slice without a title."""
    size = display.picture_size(view, short, long_side=slices.SLICE_LONG)
    cell = max(short, size.height), max(short, size.width)
    top = text.MARGIN + (cell[0] - size.height) // 2
    left = text.MARGIN + (cell[1] - size.width) // 2
    second = left + cell[1] + 2 * text.MARGIN + text.GAP
    down = slice(top, top + size.height)
    return picture[down, left : left + size.width], picture[down, second : second + size.width]


# ---------------------------------------------------------------- orientation in the file


@pytest.mark.few(17)
@pytest.mark.parametrize("axis", display.PLANES)
@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_marker_is_where_the_patient_has_it(tmp_path, axis, codes, spacing):
    shape, affine = make_affine(codes, SPACINGS[spacing])
    scan, voxel = make_scan(shape, affine, MARKER_MM)
    view = display.plan_view(shape, affine, axis)
    index = int(voxel[view.slice_axis])
    cam = scan == 100
    (file,) = save_slices(
        tmp_path, review_of(scan, cam, affine, axis=axis, slices=index, window=(100, 50), opacity=0)
    )
    assert file.name == f"{axis}_{index:03d}.png"
    for picture in panels(read(file), view):
        row, column = brightest(picture)
        found = np.array([column - picture.shape[1] / 2, row - picture.shape[0] / 2])
        size = display.picture_size(view, slices.SLICE_SHORT, long_side=slices.SLICE_LONG)
        expected = RIGHT_DOWN[axis] @ nibabel.affines.apply_affine(affine, voxel)
        half_voxel = min(display.spacing_mm(view)) / 2
        np.testing.assert_allclose(found / size.pixels_per_mm, expected, atol=half_voxel)
        # Said plainly: the marker, right, anterior and superior, is always at the top left.
        assert (found < 0).all()


@pytest.mark.parametrize("axis", display.PLANES)
@pytest.mark.parametrize("codes", ["RAS", "LPI", "PIR"])
def test_marker_of_an_oblique_scan_is_on_the_same_side(tmp_path, axis, codes):
    shape, affine = make_affine(codes, SPACINGS["even"], TILT)
    scan, voxel = make_scan(shape, affine, MARKER_MM)
    view = display.plan_view(shape, affine, axis)
    (file,) = save_slices(
        tmp_path, review_of(scan, scan * 0, affine, axis=axis, slices=int(voxel[view.slice_axis]))
    )
    raw, _ = panels(read(file), view)
    row, column = brightest(raw)
    # Along the scan's own axes: the rotation taken back.
    own = TILT.T @ nibabel.affines.apply_affine(affine, voxel)
    size = display.picture_size(view, slices.SLICE_SHORT, long_side=slices.SLICE_LONG)
    found = np.array([column - raw.shape[1] / 2, row - raw.shape[0] / 2]) / size.pixels_per_mm
    np.testing.assert_allclose(found, RIGHT_DOWN[axis] @ own, atol=1)
    assert (found < 0).all()


@pytest.mark.parametrize("axis", display.PLANES)
def test_all_storage_orders_of_one_patient_give_the_same_picture(tmp_path, axis):
    scan, cam, affine = blob_case((24, 26, 28), (1.0, 1.5, 2.0))
    prediction = cam > 0.5
    start = nibabel.io_orientation(affine)
    pictures = []
    for codes in ORIENTATIONS:
        change = nibabel.orientations.ornt_transform(
            start, nibabel.orientations.axcodes2ornt(codes)
        )

        def store(volume, change=change):
            return nibabel.orientations.apply_orientation(volume, change)

        stored = affine @ nibabel.orientations.inv_ornt_aff(change, scan.shape)
        view = display.plan_view(store(scan).shape, stored, axis)
        reference = display.plan_view(scan.shape, affine, axis)
        index = 6 if codes[view.slice_axis] in "RAS" else view.slice_count - 1 - 6
        assert display.position_text(view, index) == display.position_text(reference, 6)
        review = review_of(store(scan), store(cam), stored, prediction=store(prediction), axis=axis)
        size = display.picture_size(view, 320, long_side=1024)
        pictures.append(np.hstack(slices.draw_pair(review, index, size)))
    for picture in pictures[1:]:
        np.testing.assert_array_equal(picture, pictures[0])


@pytest.mark.parametrize("axis", display.PLANES)
def test_a_cube_in_mm_is_square_in_the_file(tmp_path, axis):
    shape, affine = (100, 100, 40), np.diag([-0.8, -0.8, 5, 1])
    scan = np.zeros(shape)
    scan[30:80, 20:70, 12:20] = 1  # 40 mm each way
    view = display.plan_view(shape, affine, axis)
    index = {"axial": 15, "coronal": 40, "sagittal": 50}[axis]
    (file,) = save_slices(
        tmp_path, review_of(scan, scan, affine, axis=axis, slices=index, window=(1, 0.5))
    )
    bright = panels(read(file), view)[0][..., 0] > 127
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert abs(height - width) <= 2
    size = display.picture_size(view, slices.SLICE_SHORT, long_side=slices.SLICE_LONG)
    assert height == pytest.approx(40 * size.pixels_per_mm, abs=2)


# ---------------------------------------------------------------- heat


def test_overlay_equals_the_scan_exactly_where_the_cam_is_below_the_threshold(tmp_path):
    scan, cam, affine = blob_case((30, 32, 12))
    view = display.plan_view(scan.shape, affine, "axial")
    (file,) = save_slices(tmp_path, review_of(scan, cam, affine, slices=6, threshold=0.3))
    raw, overlay = panels(read(file), view)
    size = display.picture_size(view, slices.SLICE_SHORT, long_side=slices.SLICE_LONG)
    heat = draw.resize_smooth(display.cut(view, cam, 6), size)
    below = heat < 0.299
    np.testing.assert_array_equal(overlay[below], raw[below])
    assert (overlay[heat > 0.301] != raw[heat > 0.301]).any(-1).mean() > 0.99
    assert below.any()


def test_the_same_value_has_the_same_colour_in_every_slice(tmp_path):
    scan = np.full((20, 20, 4), 50.0)
    cam = np.zeros_like(scan)
    cam[2:8, 2:8] = 0.4  # in every slice
    cam[12:18, 12:18, 1] = 1.0  # only here
    view = display.plan_view(scan.shape, np.eye(4), "axial")
    files = save_slices(tmp_path, review_of(scan, cam, np.eye(4), slices=[0, 1, 3]))
    overlays = [panels(read(file), view)[1] for file in files]
    size = display.picture_size(view, slices.SLICE_SHORT, long_side=slices.SLICE_LONG)
    there = draw.resize_mask(display.cut(view, (cam == 0.4), 0), size) > 0
    there = cv2.erode(there.astype(np.uint8), np.ones((41, 41), np.uint8)) > 0
    colours = [np.unique(overlay[there], axis=0) for overlay in overlays]
    assert len(colours[0]) == 1
    for colour in colours[1:]:
        np.testing.assert_array_equal(colour, colours[0])


def test_scan_and_overlay_share_the_window_over_the_volume(tmp_path):
    scan = np.zeros((20, 20, 3))
    scan[..., 0], scan[..., 1], scan[..., 2] = 10, 20, 30
    review = review_of(scan, np.zeros_like(scan), np.eye(4), slices="all")
    size = display.picture_size(review.view, 64, long_side=1024)
    greys = [np.unique(slices.draw_pair(review, n, size)[0]).tolist() for n in range(3)]
    assert greys == [[0], [128], [255]]


def one_voxel(value):
    cam = np.full((9, 9, 9), 0.5)
    cam[2, 3, 6] = value
    return cam


@pytest.mark.parametrize(
    ("cam", "words"),
    [
        (np.zeros((9, 9, 9)), "no CAM: the map is zero"),
        (np.full((9, 9, 9), np.nan), "no CAM: the map holds NaN or infinite values"),
        (one_voxel(np.nan), "no CAM: the map holds NaN or infinite values"),
        (one_voxel(np.inf), "no CAM: the map holds NaN or infinite values"),
        (one_voxel(-np.inf), "no CAM: the map holds NaN or infinite values"),
        (np.full((9, 9, 9), 0.1), r"no CAM at the threshold 0.20: the map's maximum is 0.1"),
    ],
)
def test_no_heat_is_said_in_words_and_drawn_nowhere(tmp_path, cam, words):
    scan = np.random.default_rng(0).random((9, 9, 9))
    review = review_of(scan, cam, np.eye(4), slices="all")
    assert words in review.notice
    size = display.picture_size(review.view, 400, long_side=1024)
    raw, overlay = slices.draw_pair(review, 4, size)
    np.testing.assert_array_equal(overlay, raw)
    (file,) = save_slices(tmp_path, review_of(scan, cam, np.eye(4), slices=4))
    raw, overlay = panels(read(file), review.view)
    differs = (raw != overlay).any(-1)
    assert differs.any()  # the words
    amber = (overlay == text.AMBER).all(-1)
    assert amber.sum() > 50
    assert not differs[overlay.shape[0] // 4 :].any()


def test_only_the_threshold_decides_that_a_map_is_shown():
    scan, cam, affine = blob_case()
    assert review_of(scan, cam, affine, threshold=1.0).notice == ""
    assert review_of(scan, cam, affine, threshold=0.0).indices == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(("low", "high"), [(0, 37.5), (-0.2, 1)])
def test_a_map_on_another_scale_is_refused(low, high):
    cam = np.linspace(low, high, 64).reshape(4, 4, 4)
    with pytest.raises(InputError, match=rf"goes from {low} to {high}: scale it once"):
        review_of(cam, cam, np.eye(4))


# ---------------------------------------------------------------- what is shown


def test_relevant_slices_are_those_with_heat_or_prediction(tmp_path):
    scan, cam, affine = blob_case()
    prediction = np.zeros(scan.shape, np.uint8)
    prediction[3, 3, 1] = 1
    # cam: 0.1, 0.28, 0.46, ... in slices 3 to 8
    files = save_slices(
        tmp_path, review_of(scan, cam, affine, prediction=prediction, threshold=0.2)
    )
    expected = [f"axial_{n:03d}.png" for n in (1, 4, 5, 6, 7, 8)]
    assert [file.name for file in files] == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == expected


def test_outlines_are_on_the_overlay_only(tmp_path):
    scan, cam, affine = blob_case()
    kinds = {"prediction": cam > 0.5, "truth": cam > 0.7}
    review = review_of(scan, cam, affine, **kinds)
    size = display.picture_size(review.view, 320, long_side=1024)
    raw, overlay = slices.draw_pair(review, 7, size)
    assert (raw[..., 0] == raw[..., 2]).all()
    for line in draw.LINES.values():
        assert (overlay == line.colour).all(-1).any()


def test_all_slices_of_a_case_have_one_size(tmp_path):
    scan, cam, affine = blob_case((30, 32, 120))
    cam = np.zeros(scan.shape)
    cam[..., 99] = 1
    files = save_slices(
        tmp_path, review_of(scan, cam, affine, slices=[0, 9, 99, 119], title="A title")
    )
    assert len({read(file).shape for file in files}) == 1


def footer_words(tmp_path, *args, **keywords):
    """Everything that is written into the pictures of slices."""
    with written_words() as lines:
        save_slices(tmp_path, review_of(*args, **keywords))
    return " ".join(lines)


def test_the_footer_says_what_a_reader_needs(tmp_path):
    scan, cam, affine = blob_case()
    words = footer_words(
        tmp_path,
        scan,
        cam,
        affine,
        slices=8,
        window="brain",
        threshold=0.25,
        title="Case 7",
        caption={"class": "tumour", "layer": "encoder.4", "method": "Grad-CAM"},
        prediction=cam > 0.5,
    )
    for said in (
        "Case 7",
        "axial slice 9/12 (voxel index k = 8)",
        "S 24.0 mm",
        "CAM max in slice 1.00",
        "peak slice",
        "W 80 L 40 (brain)",
        "class: tumour",
        "layer: encoder.4",
        "method: Grad-CAM",
        "CAM shown from 0.25",
        "research use only",
        "prediction",
        "5 mm",
    ):
        assert said in words
    assert "oblique" not in words
    assert "truth" not in words


def test_obliquity_is_mentioned_from_ten_degrees(tmp_path):
    scan, cam, _ = blob_case()
    for degrees, said in ((9, False), (12, True)):
        affine = np.eye(4)
        affine[:3, :3] = nibabel.eulerangles.euler2mat(z=np.radians(degrees))
        words = footer_words(tmp_path, scan, cam, affine, slices=6)
        assert (f"oblique scan: {degrees}°" in words) == said
        assert ("mm at a slice's centre" in words) == said


def test_extreme_shapes_can_be_drawn(tmp_path):
    for shape in ((1, 1, 1), (300, 2, 5), (2, 2, 90), (1200, 1100, 1)):
        scan = np.ones(shape)
        for axis in display.PLANES:
            save_slices(
                tmp_path, review_of(scan, scan, np.eye(4), axis=axis, slices=0, prediction=scan)
            )


# ---------------------------------------------------------------- files


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    scan, cam, affine = blob_case()
    (file,) = save_slices(tmp_path, review_of(scan, cam, affine, slices=6))
    before = file.read_bytes()
    real = Path.write_bytes

    def write_half(self, data):
        real(self, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OutputError, match=r"axial_006\.png cannot be written \(No space left"):
        save_slices(tmp_path, review_of(scan, cam, affine, slices=6, window=(1, 0)))
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_files_are_renamed_from_their_own_folder(tmp_path, monkeypatch):
    scan, cam, affine = blob_case()
    moves = []
    real = Path.replace

    def spy(self, target):
        assert cv2.imread(str(self)) is not None or self.read_bytes()[:4] == b"\x89PNG"
        assert not Path(target).exists()
        moves.append((self, Path(target)))
        return real(self, target)

    monkeypatch.setattr(Path, "replace", spy)
    (file,) = save_slices(tmp_path, review_of(scan, cam, affine, slices=6))
    ((temporary, target),) = moves
    assert target == file
    assert temporary.parent == file.parent
    assert temporary.name.startswith(".")
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_cannot_be_made_or_used(tmp_path):
    scan, cam, affine = blob_case()
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match=r"cannot make the folder .*file"):
        save_slices(tmp_path / "file", review_of(scan, cam, affine))
    with pytest.raises(OutputError, match=r"cannot make the folder .*file"):
        save_montage(tmp_path / "file" / "case.png", review_of(scan, cam, affine))
    (tmp_path / "case.png").mkdir()
    with pytest.raises(OutputError, match=r"case\.png is a folder"):
        save_montage(tmp_path / "case.png", review_of(scan, cam, affine))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["case.png", "file"]


def test_inputs_are_not_changed(tmp_path):
    scan, cam, affine = blob_case()
    arrays = [scan, cam, affine, cam > 0.5]
    copies = [array.copy() for array in arrays]
    for array in arrays:
        array.flags.writeable = False
    save_slices(tmp_path, review_of(*arrays[:3], prediction=arrays[3], truth=arrays[3]))
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("kind", ["<f2", ">i2", "u1", ">f8", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_any_real_type_and_memory_order(tmp_path, kind, order):
    scan, cam, affine = blob_case()
    scan = np.asarray(scan.clip(0, 255), dtype=kind, order=order)
    save_slices(tmp_path, review_of(scan, (cam > 0.5).astype(kind, order=order), affine, slices=6))


# ---------------------------------------------------------------- several at a time


@pytest.mark.parametrize("workers", [2, 5])
def test_threads_write_the_same_bytes_in_the_same_order(tmp_path, monkeypatch, workers):
    scan, cam, affine = blob_case()
    review = review_of(scan, cam, affine, slices=[7, 2, 5, 3, 11, 0], prediction=cam > 0.4)
    monkeypatch.setattr(page, "WORKERS", 1)
    alone = save_slices(tmp_path / "alone", review)
    monkeypatch.setattr(page, "WORKERS", workers)
    together = save_slices(tmp_path / "together", review)
    names = [f"axial_{n:03d}.png" for n in (7, 2, 5, 3, 11, 0)]
    assert [file.name for file in alone] == [file.name for file in together] == names
    for one, other in zip(alone, together, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_after_an_error_no_further_slice_is_begun(monkeypatch):
    monkeypatch.setattr(page, "WORKERS", 2)
    begun = []

    def work(index):
        begun.append(index)
        if index == 3:
            raise OutputError("the disk is full")
        time.sleep(0.01)

    with pytest.raises(OutputError, match="the disk is full"):
        page.each_slice(work, range(500))
    assert len(begun) < 50
