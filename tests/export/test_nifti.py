"""NIfTI out: the values bit by bit, exactly where the scan is, or no file at all."""

from __future__ import annotations

import errno
import gzip
import os
import tracemalloc
from contextlib import nullcontext

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seg3dcam.errors import OutputError, Seg3dcamWarning
from seg3dcam.export import write_nifti
from seg3dcam.scan import load_scan

SPACING = np.diag([0.7, 0.8, 2.45, 1.0])
FIELDS = {
    "qform": ["quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"],
    "sform": ["srow_x", "srow_y", "srow_z"],
}


def rotation():
    orthogonal, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))
    return orthogonal * np.sign(np.linalg.det(orthogonal))


def affine_of(kind):
    turn = np.eye(4)
    if kind != "plain":
        turn[:3, :3] = rotation()
    if kind == "flipped":
        turn[:, 1] *= -1
    affine = turn @ SPACING
    if kind == "sheared":
        affine[:3, 2] += 0.4 * affine[:3, 1]
    affine[:3, 3] = [-90.3, 120.7, -519.1]
    return affine


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def volume(rng):
    return rng.normal(size=(4, 5, 6)).astype(np.float32)


def source(path, affine, qcode, scode, shape=(4, 5, 6)):
    """An int16 CT with scaling and a patient's name in its header."""
    image = nib.Nifti1Image(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), affine)
    image.set_sform(affine, scode)
    image.set_qform(affine, qcode)
    image.header["descrip"] = b"DOE^JANE"
    image.header["db_name"] = b"DOE^JANE"
    image.header["cal_max"] = 3000
    nib.save(image, path)
    return path


def read(path):
    image = nib.load(path)
    return np.asanyarray(image.dataobj), image.affine, image.header


# -------------------------------------------------------------------------------------- values


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    suffix=st.sampled_from([".nii", ".nii.gz"]),
    order=st.sampled_from("CF"),
    as_tensor=st.booleans(),
    depth=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_round_trip(tmp_path_factory, shape, suffix, order, as_tensor, depth, seed):
    bits = np.random.default_rng(seed).integers(0, 2**32, shape, dtype=np.uint32)
    bits[bits & 0x7F800000 == 0x7F800000] &= 0xFF800000  # a NaN's payload need not survive
    volume = np.asarray(bits.view(np.float32), order=order)
    path = tmp_path_factory.mktemp("out") / f"map{suffix}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seg3dcam.files.writers.volumes._SLAB_BYTES", 4 * shape[0] * shape[1] * depth)
        given_volume = torch.as_tensor(volume) if as_tensor else volume
        assert write_nifti(path, given_volume, affine_of("flipped")) == path
    found, affine, _ = read(path)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), volume.view(np.uint32))
    np.testing.assert_array_equal(affine, affine_of("flipped").astype(np.float32))


def test_raw_values_are_kept(tmp_path, volume):
    volume[0, 0, :4] = [np.nan, np.inf, -np.inf, -0.0]
    np.testing.assert_array_equal(
        read(write_nifti(tmp_path / "a.nii.gz", volume, np.eye(4)))[0], volume
    )


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_tensors_of_every_type(tmp_path, volume, dtype):
    tensor = torch.as_tensor(volume * 3).to(dtype)
    found = read(write_nifti(tmp_path / "a.nii", tensor, np.eye(4)))[0]
    assert torch.equal(torch.as_tensor(found), tensor.float())


def test_a_tensor_with_a_graph_and_a_meta_tensor(tmp_path, volume):
    from monai.data import MetaTensor

    for tensor in (torch.tensor(volume, requires_grad=True), MetaTensor(volume)):
        found = read(write_nifti(tmp_path / "a.nii", tensor, np.eye(4)))[0]
        np.testing.assert_array_equal(found, volume)


def test_views_are_written_as_they_look(tmp_path, rng):
    volume = rng.random((6, 7, 8)).transpose(2, 0, 1)[::-1, :, ::2]
    found = read(write_nifti(tmp_path / "a.nii", volume, np.eye(4)))[0]
    np.testing.assert_array_equal(found, volume.astype(np.float32))


def test_the_bytes_are_the_same_every_time(tmp_path, volume, monkeypatch):
    first = write_nifti(tmp_path / "a.nii.gz", volume, np.eye(4)).read_bytes()
    monkeypatch.setattr("time.time", lambda: 2_000_000_000.0)
    again = write_nifti(tmp_path / "b.nii.gz", volume.copy(order="F"), np.eye(4)).read_bytes()
    assert first == again
    assert gzip.decompress(first) == write_nifti(tmp_path / "c.nii", volume, np.eye(4)).read_bytes()


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_memory_is_bounded(tmp_path, rng, suffix):
    volume = np.zeros((256, 256, 200), np.float32)
    volume[::4, ::4] = rng.random((64, 64, 200))
    tracemalloc.start()
    write_nifti(tmp_path / f"a{suffix}", volume, np.eye(4))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 * 2**20  # the volume is 50 MiB


# ------------------------------------------------------------------------------------ geometry


@pytest.mark.filterwarnings("ignore:.*sheared:seg3dcam.errors.Seg3dcamWarning")
@pytest.mark.filterwarnings("ignore:.*codes are both 0:seg3dcam.errors.Seg3dcamWarning")
@pytest.mark.parametrize("kind", ["plain", "oblique", "flipped", "sheared"])
@pytest.mark.parametrize("codes", [(0, 1), (1, 0), (0, 0), (1, 1), (4, 1), (0, 2), (3, 0)])
def test_a_map_lies_on_its_scan(tmp_path, volume, kind, codes):
    scan = load_scan(source(tmp_path / "ct.nii", affine_of(kind), *codes))
    _, affine, header = read(
        write_nifti(tmp_path / "map.nii", volume, scan.affine, reference=scan.header)
    )
    qcode, scode = codes
    assert int(header["qform_code"]) == (qcode or scode or 1)
    assert int(header["sform_code"]) == (scode or qcode or 1)
    if scode:
        np.testing.assert_array_equal(affine, scan.affine)
        for field in FIELDS["sform"]:
            assert header[field].tobytes() == scan.header[field].tobytes()
    else:  # the scan's affine was computed in float64 from its qform
        np.testing.assert_array_equal(affine, scan.affine.astype(np.float32))
    if qcode:
        for field in FIELDS["qform"]:
            assert header[field].tobytes() == scan.header[field].tobytes()
        assert header["pixdim"][:4].tobytes() == scan.header["pixdim"][:4].tobytes()
    elif kind != "sheared":
        np.testing.assert_allclose(header.get_qform(), scan.affine, atol=1e-4)
    np.testing.assert_allclose(header.get_zooms(), nib.affines.voxel_sizes(affine), rtol=1e-6)


@pytest.mark.parametrize("frame", [None, "sform", "qform"])
def test_of_forms_that_disagree_the_taken_one_is_written_twice(tmp_path, volume, frame):
    image = nib.load(source(tmp_path / "ct.nii", affine_of("oblique"), 1, 4))
    image.set_qform(np.diag([-2.0, 3, 4, 1]), 1)
    nib.save(image, tmp_path / "mni.nii")
    said = pytest.warns(Seg3dcamWarning, match="two places") if frame is None else nullcontext()
    with said:
        scan = load_scan(tmp_path / "mni.nii", frame=frame)
    header = read(write_nifti(tmp_path / "map.nii", volume, scan.affine, reference=scan.header))[2]
    taken = np.diag([-2.0, 3, 4, 1]) if frame == "qform" else image.get_sform()
    np.testing.assert_array_equal(scan.affine, taken)
    np.testing.assert_allclose(header.get_qform(), taken, atol=1e-4)
    np.testing.assert_array_equal(header.get_sform(), taken)
    code = 1 if frame == "qform" else 4
    assert (int(header["qform_code"]), int(header["sform_code"])) == (code, code)


def test_nothing_else_of_the_source_is_copied(tmp_path, volume):
    scan = load_scan(source(tmp_path / "ct.nii", affine_of("plain"), 1, 1))
    path = write_nifti(tmp_path / "map.nii", volume, scan.affine, reference=scan.header)
    found, _, header = read(path)
    np.testing.assert_array_equal(found, volume)  # not cut to the source's int16
    assert header.get_data_dtype() == np.float32
    assert header["cal_max"] == 1
    assert b"DOE" not in path.read_bytes()


def test_another_grid_takes_only_the_codes(tmp_path, volume):
    scan = load_scan(source(tmp_path / "ct.nii", affine_of("oblique"), 1, 4))
    moved = scan.affine.copy()
    moved[0, 3] += 0.01
    for array, affine in ((volume, moved), (volume[:, :, :5], scan.affine)):
        path = write_nifti(tmp_path / "map.nii", array, affine, reference=scan.header)
        header = read(path)[2]
        np.testing.assert_array_equal(header.get_sform(), affine.astype(np.float32))
        np.testing.assert_allclose(header.get_qform(), affine, atol=1e-4)
        assert (int(header["qform_code"]), int(header["sform_code"])) == (1, 4)


def test_a_scan_in_metres_gives_a_map_in_mm(tmp_path, volume):
    image = nib.load(source(tmp_path / "ct.nii", affine_of("oblique"), 1, 1))
    image.header["xyzt_units"] = 1
    nib.save(image, tmp_path / "m.nii")
    with pytest.warns(Seg3dcamWarning, match="measures in metre"):
        scan = load_scan(tmp_path / "m.nii")
    path = write_nifti(tmp_path / "map.nii", volume, scan.affine, reference=scan.header)
    _, affine, header = read(path)
    assert header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(affine, scan.affine, rtol=1e-6)
    np.testing.assert_allclose(header.get_zooms(), scan.spacing, rtol=1e-6)


def test_a_channels_last_and_a_nifti2_source_count_as_the_same_grid(tmp_path, volume):
    path = source(tmp_path / "ct.nii", affine_of("oblique"), 1, 1, shape=(4, 5, 6, 2))
    nib.save(nib.Nifti2Image.from_image(nib.load(path)), tmp_path / "two.nii")
    for name in ("ct.nii", "two.nii"):
        scan = load_scan(tmp_path / name)
        path = write_nifti(tmp_path / "map.nii", volume, scan.affine, reference=scan.header)
        np.testing.assert_array_equal(read(path)[1], scan.affine)


@pytest.mark.parametrize(("shear", "warned"), [(5e-5, False), (2e-4, True), (0.3, True)])
def test_shear(tmp_path, volume, shear, warned, recwarn):
    affine = affine_of("oblique")
    affine[:3, 2] += shear * affine[:3, 1] * 2.45 / 0.8
    _, found, header = read(write_nifti(tmp_path / "map.nii", volume, affine))
    np.testing.assert_array_equal(found, affine.astype(np.float32))
    directions = header.get_qform()[:3, :3] / header.get_zooms()
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-6)
    assert [bool("the affine is sheared" in str(w.message)) for w in recwarn] == [True] * warned


def test_the_shear_warning_says_how_far_off(tmp_path, volume):
    affine = np.eye(4)
    affine[0, 2] = 0.5
    with pytest.warns(Seg3dcamWarning, match=r"map.nii: the affine is sheared.* up to 1.\d+ mm"):
        write_nifti(tmp_path / "map.nii", volume, affine)


# -------------------------------------------------------------------------------------- header


def test_header_of_a_map(tmp_path, volume):
    path = write_nifti(
        tmp_path / "a.nii.gz", volume, np.eye(4), intent_name="liver tumour", description="GradCAM"
    )
    header = read(path)[2]
    assert header.get_xyzt_units() == ("mm", "unknown")
    assert header.get_slope_inter() == (None, None)  # nibabel resets them after reading
    raw = nib.Nifti1Header(gzip.decompress(path.read_bytes())[:348])
    assert (raw["scl_slope"], raw["scl_inter"], raw["vox_offset"]) == (1, 0, 352)
    assert (raw["cal_min"], raw["cal_max"]) == (0, 1)
    assert raw["intent_code"] == 0
    assert raw["intent_name"].item() == b"liver tumour"
    assert raw["descrip"].item() == b"GradCAM"
    assert raw["magic"].item() == b"n+1"


def test_display_range(tmp_path, volume):
    for wanted, found in (((-1, 0.5), (-1, 0.5)), (None, (0, 0))):
        path = write_nifti(tmp_path / "a.nii", volume, np.eye(4), display_range=wanted)
        header = read(path)[2]
        assert (header["cal_min"], header["cal_max"]) == found


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("x" * 40, b"x" * 15),
        ("Läsion Leber", b"Lasion Leber"),
        ("Lebermetastase ä", b"Lebermetastase "),
        ("肝臓", b"??"),
        ("a\nb\0c", b"a b c"),
        ("", b""),
    ],
)
def test_text_is_ascii_and_fits(tmp_path, volume, text, name):
    path = write_nifti(tmp_path / "a.nii", volume, np.eye(4), intent_name=text, description=text)
    raw = path.read_bytes()
    assert raw[328:344].rstrip(b"\0") == name
    assert raw[148:228].rstrip(b"\0").startswith(name)
    assert raw[343] == 0


def test_description_is_cut_at_the_end_of_its_field(tmp_path, volume):
    raw = write_nifti(tmp_path / "a.nii", volume, np.eye(4), description="é" * 200).read_bytes()
    assert raw[148:228] == b"e" * 79 + b"\0"
    assert raw[228:252] == b"\0" * 24  # aux_file behind it


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32])
def test_labels(tmp_path, rng, dtype):
    labels = torch.as_tensor(rng.integers(0, 100, (4, 5, 6)))
    found, _, header = read(write_nifti(tmp_path / "a.nii.gz", labels, np.eye(4), dtype=dtype))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, labels.numpy())
    assert header["intent_code"] == 1002
    assert (header["cal_min"], header["cal_max"]) == (0, 0)


@pytest.mark.parametrize("value", [256, -1, 0.5, np.nan, np.inf])
def test_labels_that_do_not_fit(tmp_path, value):
    volume = np.zeros((4, 5, 6))
    volume[3, 4, 5] = value
    with pytest.raises(OutputError, match=rf"a.nii: the value {value}.* does not fit the label ty"):
        write_nifti(tmp_path / "a.nii", volume, np.eye(4), dtype=np.uint8)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"path": "a.nrrd"}, r"a.nrrd ends with '.nrrd'. Legal for NIfTI: .nii, .nii.gz"),
        ({"path": "a.gz"}, r"a.gz ends with '.gz'. Legal"),
        ({"volume": np.ones((4, 5))}, r"the volume has shape \(4, 5\). Legal: \(X, Y, Z\)"),
        ({"volume": np.ones((2, 4, 5, 6))}, r"shape \(2, 4, 5, 6\). .*Write one file per class"),
        ({"volume": np.ones((4, 0, 6))}, r"shape \(4, 0, 6\). Legal"),
        ({"volume": np.ones((1, 1, 32768))}, r"NIfTI-1 can hold 32767 voxels per axis. Write it"),
        ({"dtype": bool}, r"dtype bool cannot be written. Legal: float32, float64, and for lab"),
        ({"dtype": np.float16}, r"dtype float16 cannot be written"),
        ({"dtype": np.complex64}, r"dtype complex64 cannot be written"),
        ({"affine": np.eye(3)}, r"the affine has shape \(3, 3\). Legal: a \(4, 4\) invertible"),
        ({"affine": np.diag([1, 0, 1, 1])}, r"the affine is singular.* Legal"),
        ({"affine": np.diag([1, np.nan, 1, 1])}, r"the affine holds NaN.* Legal"),
        ({"affine": np.eye(4) * 2}, r"the affine's last row is \[0.0, 0.0, 0.0, 2.0\]. Legal"),
    ],
)
def test_refused(tmp_path, volume, change, found):
    arguments = {"path": "a.nii", "volume": volume, "affine": np.eye(4)} | change
    arguments["path"] = tmp_path / arguments["path"]
    with pytest.raises(OutputError, match=found):
        write_nifti(**arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("moment", ["replace", "write"])
def test_a_failed_rewrite_leaves_the_good_file(tmp_path, volume, suffix, moment, monkeypatch):
    path = write_nifti(tmp_path / f"a{suffix}", volume, np.eye(4))
    good = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half(array):
        yield array[:, :, :2]
        full()

    with monkeypatch.context() as patch:
        if moment == "replace":
            patch.setattr("os.replace", full)
        else:
            patch.setattr("seg3dcam.files.writers.nifti.slabs", half)
        for name in (path.name, f"new{suffix}"):
            with pytest.raises(OutputError, match=rf"{name} cannot be written .*The disk is full"):
                write_nifti(tmp_path / name, volume + 1, np.eye(4))
    assert path.read_bytes() == good
    assert list(tmp_path.iterdir()) == [path]
