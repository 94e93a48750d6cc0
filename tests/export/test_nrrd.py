"""NRRD out: the values bit by bit, the place in full precision, and masks that overlap."""

from __future__ import annotations

import tracemalloc

import nrrd
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (its own convention)
import slicerio
import torch
from helpers_phantom import make_grid, make_phantom
from hypothesis import given, settings
from hypothesis import strategies as st

from seg3dcam.errors import OutputError
from seg3dcam.export import write_nrrd
from seg3dcam.files.writers.nrrd import segment, write_segments

CYAN, GREEN, PINK = (0.0, 1.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.4, 0.8)


def sheared(affine):
    tilted = affine.copy()
    tilted[:3, 2] += 0.3 * tilted[:3, 1]
    return tilted


@pytest.fixture
def volume():
    return np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)


def affine_of(header):
    """RAS, of a file in LPS."""
    assert header["space"] == "left-posterior-superior"
    affine = np.eye(4)
    affine[:3, :3] = header["space directions"][-3:].T
    affine[:3, 3] = header["space origin"]
    return np.diag([-1, -1, 1, 1]) @ affine


# -------------------------------------------------------------------------------------- volumes


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    order=st.sampled_from("CF"),
    as_tensor=st.booleans(),
    depth=st.integers(1, 4),
)
def test_round_trip(tmp_path_factory, shape, order, as_tensor, depth):
    volume = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    volume = np.asarray(volume, order=order)
    path = tmp_path_factory.mktemp("out") / "map.nrrd"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seg3dcam.files.writers.volumes._SLAB_BYTES", 4 * shape[0] * shape[1] * depth)
        write_nrrd(path, torch.as_tensor(volume) if as_tensor else volume, np.eye(4))
    found, header = nrrd.read(str(path))
    assert header["type"] == "float"
    np.testing.assert_array_equal(found, volume)


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR", "SLA"])
@pytest.mark.parametrize("shear", [False, True])
def test_the_place_is_kept_to_the_last_digit(tmp_path, codes, shear):
    shape, affine = make_grid(codes)
    affine = sheared(affine) if shear else affine
    path = write_nrrd(tmp_path / "cam.nrrd", np.zeros(shape), affine)
    np.testing.assert_array_equal(affine_of(nrrd.read_header(str(path))), affine)
    image = sitk.ReadImage(str(path))
    corner = tuple(size - 1 for size in shape)
    lps = image.TransformIndexToPhysicalPoint(corner)
    expected = affine @ [*corner, 1]
    np.testing.assert_allclose(lps * np.array([-1, -1, 1]), expected[:3], atol=1e-9)


def test_itk_reads_the_same_values(tmp_path, volume):
    path = write_nrrd(tmp_path / "cam.nrrd", volume, np.diag([1, 2, 3, 1]))
    found = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    np.testing.assert_array_equal(found.T, volume)


def test_values_that_are_no_numbers_and_whole_numbers(tmp_path, volume):
    volume[0, 0, :3] = [np.nan, np.inf, -np.inf]
    path = write_nrrd(tmp_path / "a.nrrd", volume, np.eye(4))
    np.testing.assert_array_equal(nrrd.read(str(path))[0], volume)
    whole = np.array([[[-1000, 0, 3000]]])
    path = write_nrrd(tmp_path / "b.nrrd", whole, np.eye(4), dtype=np.int16)
    found, header = nrrd.read(str(path))
    assert header["type"] == "int16"
    np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize(
    ("name", "volume", "affine", "dtype", "match"),
    [
        ("a.nii", np.zeros((2, 2, 2)), np.eye(4), "f4", r"a\.nii ends with .* Legal .* \.nrrd"),
        ("a.nrrd", np.zeros((2, 2)), np.eye(4), "f4", r"shape \(2, 2\)"),
        ("a.nrrd", np.zeros((2, 2, 2)), np.zeros((4, 4)), "f4", "affine's last row is"),
        ("a.nrrd", np.zeros((2, 2, 2)), np.eye(4), "c8", "complex64 cannot be written. Legal: flo"),
        ("a.nrrd", np.full((2, 2, 2), 0.5), np.eye(4), "u1", "0.5 does not fit"),
    ],
)
def test_what_cannot_be_written(tmp_path, name, volume, affine, dtype, match):
    with pytest.raises(OutputError, match=match):
        write_nrrd(tmp_path / name, volume, affine, dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_the_bytes_are_the_same_every_time_and_name_nobody(tmp_path, volume):
    one = write_nrrd(tmp_path / "DOE_JANE.nrrd", volume, np.eye(4)).read_bytes()
    other = write_nrrd(tmp_path / "b.nrrd", volume.copy(order="F"), np.eye(4)).read_bytes()
    assert one == other
    assert b"DOE" not in one


@pytest.mark.slow
def test_memory_is_bounded(tmp_path):
    volume = np.zeros((256, 256, 200), np.float32)
    mask = volume == 0
    segments = [segment(mask, "all", CYAN), segment(mask, "again", GREEN)]
    tracemalloc.start()
    write_nrrd(tmp_path / "a.nrrd", volume, np.eye(4))
    write_segments(tmp_path / "a.seg.nrrd", segments, volume.shape, np.eye(4))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < volume.nbytes  # 52 MB; three slabs of 8 MB are held


# ----------------------------------------------------------------------------------------- masks


@pytest.fixture(scope="module")
def phantom():
    return make_phantom()


@pytest.fixture
def masks(phantom):
    """Prediction and truth overlap; the rest of the body and nothing at all do not."""
    shape = phantom.scan.shape
    far = np.zeros(shape, bool)
    far[-3:, -3:, -3:] = True
    return {
        "prediction": phantom.mask.numpy(),
        "truth": phantom.truth.numpy(),
        "far": far,
        "nothing": np.zeros(shape, bool),
    }


def write(path, masks, affine, colours=(CYAN, GREEN, PINK, PINK)):
    segments = [segment(m, n, c) for (n, m), c in zip(masks.items(), colours, strict=False)]
    return write_segments(path, segments, next(iter(masks.values())).shape, affine)


def read_back(path):
    """Name -> (mask, colour), by slicerio's reading of the fields and pynrrd's of the voxels."""
    described = slicerio.read_segmentation(str(path))
    voxels, _ = nrrd.read(str(path))
    voxels = voxels if voxels.ndim == 4 else voxels[None]
    return {
        one["name"]: (voxels[one["layer"]] == one["labelValue"], one["color"], one["extent"])
        for one in described["segments"]
    }


@pytest.mark.parametrize("slab", [2**23, 94 * 81 * 2 * 3])
def test_masks_come_back_whole_overlapping_or_not(tmp_path, phantom, masks, slab, monkeypatch):
    monkeypatch.setattr("seg3dcam.files.writers.nrrd._SLAB_VOXELS", slab)
    path = write(tmp_path / "masks.seg.nrrd", masks, phantom.affine)
    found = read_back(path)
    assert list(found) == list(masks)
    for name, mask in masks.items():
        np.testing.assert_array_equal(found[name][0], mask)
    assert found["prediction"][1] == list(CYAN)
    assert found["far"][1] == pytest.approx(PINK)
    where = np.argwhere(masks["truth"])
    assert found["truth"][2] == np.stack([where.min(0), where.max(0)], 1).ravel().tolist()
    np.testing.assert_array_equal(affine_of(nrrd.read_header(str(path))), phantom.affine)


def test_masks_share_a_layer_where_they_can(tmp_path, phantom, masks):
    path = write(tmp_path / "two.seg.nrrd", masks, phantom.affine)
    assert nrrd.read_header(str(path))["sizes"].tolist() == [2, *phantom.scan.shape]
    apart = {name: mask for name, mask in masks.items() if name != "truth"}
    path = write(tmp_path / "one.seg.nrrd", apart, phantom.affine)
    assert nrrd.read_header(str(path))["sizes"].tolist() == list(phantom.scan.shape)
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T
    np.testing.assert_array_equal(image, masks["prediction"] + 2 * masks["far"])


def test_more_masks_than_a_layer_has_labels(tmp_path):
    lesions = {f"lesion {n}": np.arange(300).reshape(10, 10, 3) == n for n in range(300)}
    path = write(tmp_path / "many.seg.nrrd", lesions, np.eye(4), [PINK] * 300)
    found = read_back(path)
    assert len(found) == 300
    for name, mask in lesions.items():
        np.testing.assert_array_equal(found[name][0], mask)


def test_a_name_is_one_line_of_utf_8(tmp_path):
    mask = np.ones((1, 1, 1), bool)
    path = write(tmp_path / "a.seg.nrrd", {"Läsion 肝\nSegment0_Color:=9 9 9 \\": mask}, np.eye(4))
    lines = path.read_bytes().split(b"\n\n")[0].decode().splitlines()
    assert "Segment0_Name:=Läsion 肝 Segment0_Color:=9 9 9 \\\\" in lines
    assert "Segment0_Color:=0 1 1" in lines


def test_a_segment_keeps_no_volume():
    mask = np.zeros((50, 50, 50), bool)
    mask[3:5, 4, 5:8] = True
    kept = segment(mask, "", CYAN)
    assert kept.inside.base is None
    assert kept.inside.shape == (2, 1, 3)


def test_segments_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match="at least one segment"):
        write_segments(tmp_path / "a.seg.nrrd", [], (1, 1, 1), np.eye(4))
    with pytest.raises(OutputError, match=r"Legal .* \.seg\.nrrd"):
        write(tmp_path / "a.nrrd", {"all": np.ones((1, 1, 1), bool)}, np.eye(4))
