"""Scans in: the voxels and the affine are those that nibabel reads, and bad input is named."""

from __future__ import annotations

import gzip
import os
import tracemalloc
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from scipy.spatial.transform import Rotation

from seg3dcam.errors import ScanError, Seg3dcamWarning
from seg3dcam.geometry import corner_gap
from seg3dcam.scan import Scan, load_labels, load_scan

TURN = Rotation.from_euler("xyz", [7, -1, 9], degrees=True).as_matrix()
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = TURN * [-0.7, 0.7, 2.45]
OBLIQUE[:3, 3] = 90.3, -120.7, -519.1


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def save(path, array, affine=OBLIQUE, sform=1, qform=1, **fields):
    header = nib.Nifti1Header()
    header.set_data_dtype(array.dtype)
    for field, value in fields.items():
        header[field] = value
    image = nib.Nifti1Image(array, affine, header)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    nib.save(image, path)
    return path


def edit_header(path, offset, raw):
    content = bytearray(path.read_bytes())
    content[offset : offset + len(raw)] = raw
    path.write_bytes(content)


# ------------------------------------------------------------------------------- what is read


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 7)] * 3),
    channels=st.integers(1, 3),
    dtype=st.sampled_from(["u1", "i2", ">i2", "u2", "i4", "f4", ">f4", "f8"]),
    suffix=st.sampled_from([".nii", ".nii.gz"]),
    version=st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]),
    seed=st.integers(0, 99),
)
def test_equals_nibabel(tmp_path_factory, shape, channels, dtype, suffix, version, seed):
    path = tmp_path_factory.mktemp("scan") / f"case{suffix}"
    voxels = np.random.default_rng(seed).integers(1, 200, (*shape, channels)).astype(dtype)
    image = version(voxels, OBLIQUE)
    image.header.set_data_dtype(np.dtype(dtype))
    nib.save(image, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Seg3dcamWarning)  # a channel of one voxel is constant
        scan = load_scan(path)
    expected = nib.load(path).get_fdata().astype(np.float32)
    if channels == 1:
        expected = expected.reshape(*shape, 1)
    np.testing.assert_array_equal(scan.data.numpy(), np.moveaxis(expected, -1, 0))
    np.testing.assert_array_equal(scan.affine, nib.load(path).affine)
    assert scan.data.dtype == torch.float32
    assert scan.data.is_contiguous()
    assert scan.affine.dtype == np.float64
    assert scan.name == "case"


def test_slabs_are_joined_without_a_seam(tmp_path, rng, monkeypatch):
    voxels = rng.integers(-1000, 3000, (5, 6, 7, 2)).astype(np.int16)
    path = save(tmp_path / "ct.nii.gz", voxels)
    monkeypatch.setattr("seg3dcam.files.readers.plan.SLAB_VOXELS", 5 * 6 * 3)
    np.testing.assert_array_equal(load_scan(path).data.numpy(), np.moveaxis(voxels, -1, 0))


def test_header_scaling_is_applied_in_float64(tmp_path, rng):
    path = save(tmp_path / "ct.nii", rng.integers(-1000, 3000, (4, 5, 6)).astype(np.int16))
    edit_header(path, 112, np.array([0.37, -1024.25], "<f4").tobytes())  # scl_slope, scl_inter
    expected = nib.load(path).get_fdata().astype(np.float32)
    assert expected.min() < -1024
    np.testing.assert_array_equal(load_scan(path).data[0].numpy(), expected)


@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (1, 1), (4, 1)])
def test_affine_is_nibabels_for_every_pair_of_codes(tmp_path, rng, codes):
    path = save(tmp_path / "a.nii", rng.random((4, 5, 6)), sform=codes[0], qform=codes[1])
    np.testing.assert_array_equal(load_scan(path).affine, nib.load(path).affine)


def test_spacing_shape_and_words(tmp_path, rng):
    scan = load_scan(save(tmp_path / "a.b.nii.gz", rng.random((4, 5, 6)), np.diag([-1, 2, 3, 1])))
    assert scan.spacing == (1, 2, 3)
    assert scan.shape == (4, 5, 6)
    assert scan.name == "a.b"
    assert repr(scan) == "Scan('a.b', 1 channel(s), 4 x 5 x 6 voxels of 1 x 2 x 3 mm)"
    assert load_scan(scan) is scan
    np.testing.assert_allclose(
        Scan(scan.data, OBLIQUE, "x").spacing, nib.affines.voxel_sizes(OBLIQUE)
    )


def test_trailing_axes_of_one_are_dropped(tmp_path, rng):
    voxels = rng.random((4, 5, 6, 1, 1)).astype(np.float32)
    assert load_scan(save(tmp_path / "a.nii", voxels)).data.shape == (1, 4, 5, 6)
    assert load_scan(save(tmp_path / "b.nii", voxels[:, :, :1, 0, 0])).shape == (4, 5, 1)


def test_header_is_kept_without_extensions(tmp_path, rng):
    image = nib.Nifti1Image(rng.random((4, 5, 6)).astype(np.float32), OBLIQUE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE^JANE" * 4))
    nib.save(image, tmp_path / "a.nii.gz")
    scan = load_scan(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(scan.data[0].numpy(), image.get_fdata(dtype=np.float32))
    assert len(scan.header.extensions) == 0
    np.testing.assert_array_equal(scan.header.get_sform(), scan.affine)


def test_a_wrong_suffix_does_no_harm(tmp_path, rng):
    path = save(tmp_path / "a.nii", rng.random((4, 5, 6)))
    zipped = save(tmp_path / "b.nii.gz", rng.random((4, 5, 6)))
    expected = load_scan(path).data, load_scan(zipped).data
    assert torch.equal(load_scan(path.rename(tmp_path / "a.NII.GZ")).data, expected[0])
    assert torch.equal(load_scan(zipped.rename(tmp_path / "b.nii")).data, expected[1])


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_memory_is_one_copy(tmp_path, rng, suffix):
    path = save(tmp_path / f"a{suffix}", rng.integers(0, 9, (192, 192, 160)).astype(np.int32))
    if suffix == ".nii":
        edit_header(path, 112, np.array([2, 1], "<f4").tobytes())  # the scaling needs no copy
    tracemalloc.start()
    data = load_scan(path).data
    extra = tracemalloc.get_traced_memory()[1] - data.numel() * 4
    tracemalloc.stop()
    assert extra < 30 * 2**20  # float64 would be 45 MiB, a second copy 22


def test_units_other_than_mm(tmp_path, rng):
    path = save(tmp_path / "a.nii", rng.random((4, 5, 6)), xyzt_units=1)
    with pytest.warns(Seg3dcamWarning, match=r"measures in metre, .*multiplied by 1000"):
        scan = load_scan(path)
    np.testing.assert_allclose(scan.affine[:3], nib.load(path).affine[:3] * 1000)
    path = save(tmp_path / "b.nii", rng.random((4, 5, 6)), xyzt_units=3)
    with pytest.warns(Seg3dcamWarning, match=r"measures in micron, .*multiplied by 0.001"):
        scan = load_scan(path)
    np.testing.assert_allclose(scan.affine[:3], nib.load(path).affine[:3] / 1000)


# ----------------------------------------------------------------------------- several files


def test_a_list_gives_one_channel_per_file(tmp_path, rng):
    voxels = rng.random((3, 4, 5, 6)).astype(np.float32)
    paths = [save(tmp_path / f"p_100_{i:04}.nii.gz", v) for i, v in enumerate(voxels)]
    scan = load_scan(paths)
    np.testing.assert_array_equal(scan.data.numpy(), voxels)
    assert scan.name == "p_100"
    assert load_scan([str(path) for path in paths[1::-1]]).name == "p_100"
    assert load_scan(paths[:1]).name == load_scan(paths[0]).name == "p_100_0000"
    assert load_scan([save(tmp_path / "t1.nii", voxels[0]), paths[1]]).name == "t1"


def test_a_list_may_differ_by_rounding(tmp_path, rng):
    nudged = OBLIQUE.copy()
    nudged[0, 3] += 0.0009
    paths = [save(tmp_path / "a.nii", rng.random((4, 5, 6)))]
    paths += [save(tmp_path / "b.nii", rng.random((4, 5, 6)), nudged)]
    np.testing.assert_array_equal(load_scan(paths).affine, nib.load(paths[0]).affine)


def test_a_list_on_two_grids_is_refused(tmp_path, rng):
    one = save(tmp_path / "one.nii", rng.random((4, 5, 6)), np.eye(4))
    moved = np.eye(4)
    moved[2, 3] = 0.002
    other = save(tmp_path / "two.nii", rng.random((4, 5, 6)), moved)
    found = r"one.nii and .*two.nii are not on the same grid: the same voxel lies up to 0.002 mm"
    with pytest.raises(ScanError, match=rf"{found} apart; origin .*0.002\) mm. .*resample"):
        load_scan([one, other])
    other = save(tmp_path / "two.nii", rng.random((4, 5, 7)), np.diag([1, 1, 2, 1]))
    found = r"shape \(4, 5, 6\) and \(4, 5, 7\); .* 5 mm apart; spacing \(1, 1, 1\) and \(1, 1, 2\)"
    with pytest.raises(ScanError, match=found):
        load_scan([one, other])
    both = save(tmp_path / "both.nii", rng.random((4, 5, 6, 2)), np.eye(4))
    with pytest.raises(ScanError, match=r"both.nii: the file holds 2 channels, .*Legal: one file"):
        load_scan([one, both])


def test_corner_gap_is_the_largest_over_all_voxels(rng):
    one, other = OBLIQUE, OBLIQUE + np.vstack([rng.normal(size=(3, 4)) * 0.1, np.zeros(4)])
    voxels = np.stack(np.meshgrid(*map(np.arange, (4, 5, 6)), indexing="ij"), -1).reshape(-1, 3)
    points = [nib.affines.apply_affine(affine, voxels) for affine in (one, other)]
    slow = np.linalg.norm(points[0] - points[1], axis=1).max()
    assert corner_gap(one, other, (4, 5, 6)) == pytest.approx(slow, rel=1e-12)


# ------------------------------------------------------------------------------- from memory


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64, bool])
@pytest.mark.parametrize("shape", [(4, 5, 6), (2, 4, 5, 6)])
def test_arrays_and_tensors(rng, make, dtype, shape):
    voxels = rng.integers(0, 2, shape).astype(dtype)
    scan = load_scan(make(voxels), affine=OBLIQUE.tolist())
    np.testing.assert_array_equal(scan.data.numpy(), voxels.reshape(-1, 4, 5, 6))
    np.testing.assert_array_equal(scan.affine, OBLIQUE)
    assert scan.data.dtype == torch.float32
    assert scan.name == "scan"
    assert scan.header is None


def test_arrays_that_torch_cannot_share(rng):
    voxels = rng.random((4, 5, 6)).astype(np.float32)[::-1, :, ::2]
    voxels.setflags(write=False)
    scan = load_scan(voxels, OBLIQUE)
    np.testing.assert_array_equal(scan.data[0].numpy(), voxels)


def test_an_array_is_copied_and_a_float32_tensor_shared(rng):
    voxels = rng.random((4, 5, 6)).astype(np.float32)
    copied, shared = load_scan(voxels, OBLIQUE), load_scan(torch.from_numpy(voxels), OBLIQUE)
    voxels[0, 0, 0] = 7
    assert copied.data[0, 0, 0, 0] != 7
    assert shared.data[0, 0, 0, 0] == 7


def test_a_tensor_leaves_its_graph():
    data = load_scan(torch.rand(4, 5, 6, requires_grad=True), OBLIQUE).data
    assert not data.requires_grad


@pytest.mark.parametrize("space", [None, "RAS", "LPS"])
def test_meta_tensor(rng, space):
    voxels = rng.random((2, 4, 5, 6))
    meta = {"filename_or_obj": "/data/doe/ct.nii.gz"} | ({"space": space} if space else {})
    to_ras = np.diag([-1, -1, 1, 1]) if space == "LPS" else np.eye(4)
    image = MetaTensor(torch.as_tensor(voxels), affine=torch.as_tensor(to_ras @ OBLIQUE), meta=meta)
    scan = load_scan(image)
    np.testing.assert_array_equal(scan.affine, OBLIQUE)
    np.testing.assert_array_equal(scan.data.numpy(), voxels.astype(np.float32))
    assert type(scan.data) is torch.Tensor
    assert scan.name == "ct"
    assert load_scan(image[0]).data.shape == (1, 4, 5, 6)


@pytest.mark.filterwarnings("ignore:.*NvImgCodec")  # one of MONAI's readers, where pydicom is
def test_meta_tensor_as_monai_loads_it(tmp_path, rng):
    from monai.transforms import LoadImage

    path = save(tmp_path / "ct.nii.gz", rng.random((4, 5, 6)).astype(np.float32))
    loaded, direct = load_scan(LoadImage()(path)), load_scan(path)
    assert torch.equal(loaded.data, direct.data)
    np.testing.assert_array_equal(loaded.affine, direct.affine)
    assert loaded.name == direct.name


# ------------------------------------------------------------------------- what is refused


def test_missing_folder_and_suffix(tmp_path):
    with pytest.raises(ScanError, match=r"no.nii: there is no such file. Check the spelling"):
        load_scan(tmp_path / "no.nii")
    with pytest.raises(ScanError, match=r"is a folder. Legal: one .nii or .nii.gz file.*dcm2niix"):
        load_scan(str(tmp_path))
    for name, found in (("a.gipl", "'.gipl'"), ("a", "''")):
        (tmp_path / name).write_bytes(b"NRRD0004")
        with pytest.raises(ScanError, match=rf"ends with {found}. Legal: .nii, .*.mgz. Convert"):
            load_scan(tmp_path / name)
    with pytest.raises(ScanError, match=r"the file cannot be read \(File name too long\)"):
        load_scan("x" * 300 + ".nii")


def test_unreadable(tmp_path, rng, monkeypatch):
    path = save(tmp_path / "a.nii", rng.random((4, 5, 6)))

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ScanError, match=r"a.nii: the file cannot be read \(Permission denied\)"):
        load_scan(path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "it holds only 0 bytes"),
        (b"hello" * 200, "it does not start with a NIfTI header"),
        (b"\0" * 1000, "it does not start with a NIfTI header"),
    ],
)
def test_not_a_nifti(tmp_path, content, found):
    (tmp_path / "a.nii").write_bytes(content)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content))
    for name in ("a.nii", "a.nii.gz"):
        with pytest.raises(ScanError, match=rf"{name}: not a NIfTI file: {found}. Legal: NIfTI-1"):
            load_scan(tmp_path / name)


def test_half_of_a_pair(tmp_path, rng):
    nib.save(nib.Nifti1Pair(rng.random((4, 5, 6)), OBLIQUE), tmp_path / "a.hdr")
    path = (tmp_path / "a.hdr").rename(tmp_path / "a.nii")
    with pytest.raises(ScanError, match=r"one half of a .hdr/.img pair"):
        load_scan(path)


def test_cut_short(tmp_path, rng):
    path = save(tmp_path / "a.nii", rng.random((20, 20, 20)).astype(np.float32))
    zipped = save(tmp_path / "a.nii.gz", rng.random((20, 20, 20)).astype(np.float32))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ScanError, match=r"cut short: it holds at most 31993 of the 32000 bytes"):
        load_scan(path)
    whole = zipped.read_bytes()
    for end in (len(whole) // 2, len(whole) - 3):
        zipped.write_bytes(whole[:end])
        with pytest.raises(ScanError, match=r"a.nii.gz: the compressed file is damaged or cut"):
            load_scan(zipped)
    zipped.write_bytes(gzip.compress(gzip.decompress(whole)[:-4]))
    with pytest.raises(ScanError, match=r"it holds 31996 of the 32000 bytes of voxels"):
        load_scan(zipped)
    zipped.write_bytes(whole[:-8] + b"\0\0\0\0" + whole[-4:])
    with pytest.raises(ScanError, match=r"damaged or cut short \(.*incorrect data check"):
        load_scan(zipped)


def test_a_lying_header_takes_no_memory(tmp_path, rng):
    path = save(tmp_path / "a.nii.gz", rng.random((4, 5, 6)))
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[42:48] = np.array([30000] * 3, "<i2").tobytes()
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ScanError, match=r"of the 216000000000000 bytes of voxels"):
        load_scan(path)


def test_complex_and_colour(tmp_path, rng):
    path = save(tmp_path / "a.nii", rng.random((4, 5, 6)).astype(np.complex64))
    with pytest.raises(ScanError, match=r"voxels are complex64, NIfTI datatype 32. Legal: integ"):
        load_scan(path)
    colour = np.zeros((4, 5, 6), [(letter, "u1") for letter in "RGB"])
    path = save(tmp_path / "b.nii", colour)
    with pytest.raises(ScanError, match=r"voxels are colour \(RGB\), NIfTI datatype 128."):
        load_scan(path)
    for array in (np.ones((4, 5, 6), complex), np.array([[["a"]]]), colour):
        with pytest.raises(ScanError, match=r"scan: the voxels are .*Legal: integers or real"):
            load_scan(array, OBLIQUE)
    with pytest.raises(ScanError, match=r"the voxels are torch.complex64"):
        load_scan(torch.ones(4, 5, 6, dtype=torch.complex64), OBLIQUE)


def test_unknown_datatype(tmp_path, rng):
    path = save(tmp_path / "a.nii", rng.random((4, 5, 6)))
    edit_header(path, 70, np.array([1], "<i2").tobytes())  # binary, one bit per voxel
    with pytest.raises(ScanError, match=r"a.nii: the NIfTI header cannot be used \(.*Write the"):
        load_scan(path)


def test_broken_scaling(tmp_path, rng):
    path = save(tmp_path / "a.nii", rng.random((4, 5, 6)))
    edit_header(path, 112, np.array([1, np.nan], "<f4").tobytes())
    with pytest.raises(ScanError, match=r"the header cannot be used \(Valid slope but invalid"):
        load_scan(path)


def test_axes(tmp_path, rng):
    path = save(tmp_path / "a.nii", rng.random((4, 5)))
    with pytest.raises(ScanError, match=r"the image is 2-D, shape \(4, 5\). .*has shape \(X, Y, 1"):
        load_scan(path)
    path = save(tmp_path / "b.nii", rng.random((4, 5, 6, 1, 3)))
    with pytest.raises(ScanError, match=r"the image is 5-D, shape \(4, 5, 6, 1, 3\). Legal: .*vec"):
        load_scan(path)
    with pytest.raises(ScanError, match=r"has 2 axes, shape \(4, 5\). .*one slice: shape \(X, Y"):
        load_scan(np.ones((4, 5)), OBLIQUE)
    with pytest.raises(ScanError, match=r"has 5 axes, .*without a batch axis"):
        load_scan(np.ones((1, 1, 4, 5, 6)), OBLIQUE)


def test_no_voxels(tmp_path):
    path = save(tmp_path / "a.nii", np.ones((4, 0, 6), np.float32))
    with pytest.raises(ScanError, match=r"a.nii: the volume has no voxels, shape \(4, 0, 6\)"):
        load_scan(path)
    with pytest.raises(ScanError, match=r"the volume has no voxels, shape \(0, 4, 5, 6\)"):
        load_scan(np.ones((0, 4, 5, 6)), OBLIQUE)


@pytest.mark.parametrize(
    ("affine", "found"),
    [
        (np.diag([0, 0, 0, 1]), "is all zero"),
        (np.diag([1, 0, 1, 1]), r"is singular, .*spacing \(1, 0, 1\) mm"),
        (np.array([[1, 2, 0, 0], [1, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "is singular"),
        (np.diag([1, np.nan, 1, 1]), "holds NaN or infinite values"),
    ],
)
def test_affines_that_are_none(tmp_path, rng, affine, found):
    path = save(tmp_path / "a.nii", rng.random((4, 5, 6)))
    edit_header(path, 280, affine[:3].astype("<f4").tobytes())  # srow_x, srow_y, srow_z
    with pytest.raises(ScanError, match=rf"a.nii: the affine {found}.*Correct the sform or qform"):
        load_scan(path)
    with pytest.raises(ScanError, match=rf"scan: the affine {found}"):
        load_scan(rng.random((4, 5, 6)), affine)


def test_affine_arguments(tmp_path, rng):
    voxels = rng.random((4, 5, 6))
    with pytest.raises(ScanError, match=r"the affine has shape \(3, 3\). Legal: a \(4, 4\)"):
        load_scan(voxels, np.eye(3))
    with pytest.raises(ScanError, match=r"last row is \[0.0, 0.0, 1.0, 1.0\]"):
        load_scan(voxels, np.eye(4) + np.eye(4, k=-1) * [0, 0, 1, 0])
    with pytest.raises(ScanError, match=r"the affine is not a matrix of numbers. Legal"):
        load_scan(voxels, "RAS")
    with pytest.raises(ScanError, match=r"does not say where it lies.* Give load_scan"):
        load_scan(voxels)
    with pytest.raises(ScanError, match=r"does not say where it lies.* Give load_scan"):
        load_scan(torch.rand(4, 5, 6))
    path = save(tmp_path / "a.nii", voxels)
    for source in (path, [path], load_scan(path), MetaTensor(voxels)):
        with pytest.raises(ScanError, match=r"affine= is for arrays and plain tensors"):
            load_scan(source, affine=OBLIQUE)
    with pytest.raises(ScanError, match=r"meta\['space'\] is 'MNI'. Legal: 'RAS', 'LPS'"):
        load_scan(MetaTensor(voxels, meta={"space": "MNI"}))


@pytest.mark.parametrize(
    ("source", "found"),
    [(None, "NoneType"), ([], "an empty list"), (["a.nii", 3], "a list that holds int")],
)
def test_other_sources(source, found):
    with pytest.raises(ScanError, match=rf"a scan cannot be made of {found}. Legal: a path to"):
        load_scan(source)


def test_empty_scan(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.zeros((4, 5, 6), np.int16))
    with pytest.raises(ScanError, match=r"a.nii.gz: the scan is empty: all voxels are 0. Check"):
        load_scan(path)
    with pytest.raises(ScanError, match=r"scan: the scan is empty"):
        load_scan(torch.zeros(2, 4, 5, 6), OBLIQUE)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_nonfinite_voxels(tmp_path, rng, bad):
    voxels = rng.random((4, 5, 6))
    voxels[1, 2, 3] = voxels[2, 0, 0] = bad
    path = save(tmp_path / "a.nii", voxels)
    found = r"2 of 120 voxels are NaN or infinite as float32, the first is voxel \(1, 2, 3\)\."
    with pytest.raises(ScanError, match=rf"a.nii: {found} .*replace them"):
        load_scan(path)
    with pytest.raises(ScanError, match=r"2 of 240 .*voxel \(1, 2, 3\) of channel 1\."):
        load_scan(np.stack([np.ones_like(voxels), voxels]), OBLIQUE)


# ------------------------------------------------------------------------------ what is warned


def test_no_codes(tmp_path, rng):
    path = save(tmp_path / "a.nii", rng.random((4, 5, 6)), sform=0, qform=0)
    with pytest.warns(Seg3dcamWarning, match=r"a.nii: qform and sform codes are both 0.*Left and"):
        scan = load_scan(path)
    np.testing.assert_array_equal(scan.affine, nib.load(path).affine)


def test_constant_scan(tmp_path, rng):
    path = save(tmp_path / "a.nii", np.full((4, 5, 6), 7, np.int16))
    with pytest.warns(Seg3dcamWarning, match=r"a.nii: the scan is constant: all voxels are 7"):
        load_scan(path)
    with pytest.warns(Seg3dcamWarning, match=r"channel 1 is constant: all voxels are 0"):
        load_scan(np.stack([rng.random((4, 5, 6)), np.zeros((4, 5, 6))]), OBLIQUE)


# ------------------------------------------------------------------- what no header should hold


def _field(path, offset, kind, *values):
    edit_header(path, offset, np.array(values, kind).tobytes())


@pytest.mark.parametrize(
    ("offset", "kind", "values", "found"),
    [
        (108, "<f4", [np.inf], r"vox_offset is inf. Legal: the byte at which the voxels start"),
        (108, "<f4", [np.nan], r"vox_offset is nan"),
        (108, "<f4", [-8], r"vox_offset is -8"),
        (108, "<f4", [3e38], r"vox_offset is 3"),
        (108, "<f4", [2**30], r"cut short"),
        (40, "<i2", [0], r"not a NIfTI|header cannot be used|dim\[0\] is 0"),
        (40, "<i2", [-3], r"a.nii: "),
        (40, "<i2", [300], r"a.nii: "),
        (42, "<i2", [-4], r"dim is \[-4, 5, 6\]. Legal: whole numbers from 1 up"),
        (42, "<i2", [0], r"the volume has no voxels"),
        (42, "<i2", [32767, 32767, 32767], r"cut short: it holds at most 960 of the"),
        (70, "<i2", [9999], r"header cannot be used \(data code 9999"),
        (70, "<i2", [32], r"complex64"),
        (70, "<i2", [128], r"colour \(RGB\)"),
        (112, "<f4", [np.inf, 0], r"scl_slope is inf"),
        (80, "<f4", [np.nan], r"pixdim is"),
        (344, "u1", [0], r"not a NIfTI file"),
    ],
    ids=lambda value: str(value).replace(" ", "") if isinstance(value, list) else "",
)
def test_nifti_fields_outside_of_their_schema(tmp_path, rng, offset, kind, values, found):
    path = save(tmp_path / "a.nii", rng.random((4, 5, 6)))
    _field(path, offset, kind, *values)
    with pytest.raises(ScanError, match=found) as error:
        load_scan(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("slope", [0, np.nan])
def test_a_slope_that_is_none(tmp_path, rng, slope):
    path = save(tmp_path / "a.nii", rng.integers(1, 9, (4, 5, 6)).astype(np.int16))
    _field(path, 112, "<f4", slope, 7)
    np.testing.assert_array_equal(load_scan(path).data[0].numpy(), nib.load(path).get_fdata())


def test_odd_fields_that_nibabel_repairs_are_said(tmp_path, rng, caplog):
    path = save(tmp_path / "a.nii", rng.random((4, 5, 6)), np.diag([1, 1, 3, 1]), qform=0)
    _field(path, 76, "<f4", 7)  # qfac
    _field(path, 252, "<i2", 99)  # qform_code
    with pytest.warns(Seg3dcamWarning, match=r"header is odd.*qform_code 99 not valid"):
        load_scan(path)
    assert not caplog.records  # nibabel prints nothing by itself


def test_paths_that_are_none(tmp_path):
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    with pytest.raises(ScanError, match=r"loop.nii: the file cannot be read"):
        load_scan(tmp_path / "loop.nii")
    (tmp_path / "folder.nii").mkdir()
    with pytest.raises(ScanError, match=r"folder.nii"):
        load_scan(tmp_path / "folder.nii")
    with pytest.raises(ScanError, match=r"must not hold the character NUL"):
        load_scan("a\0b.nii")
    with pytest.raises(ScanError, match=r"must not hold the character NUL"):
        load_labels("a\0b.nii")
    os.mkfifo(tmp_path / "pipe.nii")
    with pytest.raises(ScanError, match=r"pipe.nii is no regular file"):
        load_scan([tmp_path / "pipe.nii"])
    with pytest.raises(ScanError, match=r"no such file.*Legal: a file \(.nii.*DICOM series"):
        load_labels(tmp_path / "gone.mha")
