"""MetaImage headers as ITK writes and reads them: other fields, texts, and where voxels start."""

from __future__ import annotations

import zlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (its own convention)
from helpers_dicom import write_series
from helpers_readers import TURN, check_equals_itk, itk_image

from seg3dcam.errors import ScanError
from seg3dcam.scan import load_scan

AFFINE = np.eye(4)
AFFINE[:3, :3], AFFINE[:3, 3] = TURN * (0.7, 1.5, 3), (-10, 22, 35.5)


# -------------------------------------------------------------------------- what ITK writes itself


def of_nifti(folder, voxels):
    path = folder / "a.nii.gz"
    nib.save(nib.Nifti1Image(voxels, AFFINE), path)
    return path


def of_nrrd(folder, voxels):
    image = itk_image(np.random.default_rng(0))
    image.SetMetaData("a key of my own", "1 = 2: 3")
    sitk.WriteImage(image, str(folder / "a.nrrd"))
    return folder / "a.nrrd"


def of_dicom_slice(folder, voxels):
    def comment(header, k):
        header.ImageComments = "first line\r\nsecond line\r\n\r\nfourth: line"
        header.PatientComments = "ElementSpacing of nobody"

    return write_series(folder / "ct", voxels.astype(float), AFFINE, change=comment)[2]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("suffix", ["mha", "mhd"])
@pytest.mark.parametrize("make", [of_nifti, of_nrrd, of_dicom_slice])
def test_what_itk_converts_is_read(tmp_path, voxels, make, suffix, packed):
    path = tmp_path / f"converted.{suffix}"
    sitk.WriteImage(sitk.ReadImage(str(make(tmp_path, voxels))), str(path), packed)
    header = path.read_bytes()
    if make is of_nifti:
        assert b"\ndim[0] = 3\n" in header
    if make is of_dicom_slice:
        assert b"\n0008|0060 = CT\n" in header
        assert b"\nsecond line" in header
    check_equals_itk(load_scan(path), path)


# ------------------------------------------------------------------------------- headers by hand


def header(**fields):
    """Return a header that ends before ElementDataFile; None leaves a field out."""
    plain = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "TransformMatrix": "0 1 0 -1 0 0 0 0 1",
        "Offset": "7 8 9",
        "ElementSpacing": "1 2 3",
        "DimSize": "4 5 6",
        "ElementType": "MET_SHORT",
    }
    return "".join(f"{key} = {value}\n" for key, value in (plain | fields).items()).encode()


def local(path, head, voxels, before=b"", packed=False):
    raw = voxels.tobytes(order="F")
    path.write_bytes(
        head + b"ElementDataFile = LOCAL\n" + before + (zlib.compress(raw) if packed else raw)
    )
    return path


@pytest.mark.parametrize(
    "extra",
    [
        b"dim[0] = 3\n",
        b"0008|0008 = ORIGINAL\\PRIMARY\\AXIAL\r\n",
        b"a: b = c : d\n",
        b"key of several words = \n\n  \n",
        b"text = one\ntwo\n\nthree\nnext = 1\n",
        b"\xe9 = \xe9\0\x85Offset = 1 1 1\n",
        b"long = " + b"x" * 5000 + b"\n",
        b"twice = 1\ntwice = 2\n",
        b"= 3\n",
    ],
    ids=lambda extra: extra[:12].decode("latin-1"),
)
def test_fields_of_others_are_read_over(tmp_path, voxels, extra):
    head = header().replace(b"Offset", extra + b"Offset")
    path = local(tmp_path / "a.mha", head, voxels)
    check_equals_itk(load_scan(path), path)


def test_a_colon_parts_as_well(tmp_path, voxels):
    path = local(tmp_path / "a.mha", header().replace(b"Offset =", b"Offset :"), voxels)
    check_equals_itk(load_scan(path), path)


@pytest.mark.parametrize(
    ("extra", "found"),
    [
        (b"text = one\ntwo\n\n", r"'line' is 'two'. Legal: 'Key = Value'. ITK .* 'Offset' is lost"),
        (b"Position = 1 2 3\n", r"'Offset' is '7 8 9'. Legal: one value; another one is '1 2 3'"),
        (b"x = " + b"y" * 2**16 + b"Offset = 1 2 3\n", r"not a MetaImage: it does not start with"),
    ],
    ids=["torn", "twice", "endless"],
)
def test_fields_that_count_are_not_guessed(tmp_path, voxels, extra, found):
    head = header().replace(b"Offset", extra + b"Offset")
    with pytest.raises(ScanError, match=found):
        load_scan(local(tmp_path / "a.mha", head, voxels))


# ------------------------------------------------------------------------- where the voxels start

BEFORE = b"1234567"


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("place", ["LOCAL", "a.raw"])
@pytest.mark.parametrize("size", ["0", "-1", "start"])
def test_header_size_counts_as_in_itk(tmp_path, voxels, size, place, packed):
    path = tmp_path / "a.mhd"
    data = voxels.tobytes(order="F")
    data = zlib.compress(data) if packed else data
    packing = {"CompressedData": packed, "CompressedDataSize": len(data)} if packed else {}
    end = f"ElementDataFile = {place}\n".encode()
    before = b"" if size == "0" else BEFORE
    start = len(header(**packing, HeaderSize="0000") + end) if place == "LOCAL" else 0
    said = f"{start + len(before):04}" if size == "start" else size
    head = header(**packing, HeaderSize=said) + end
    (tmp_path / "a.raw").write_bytes(before + data)
    path.write_bytes(head + (before + data if place == "LOCAL" else b""))
    if packed and size == "-1":
        with pytest.raises(ScanError, match=r"'HeaderSize' is '-1'. Legal: -1 where Compressed"):
            load_scan(path)
        return
    scan = load_scan(path)
    np.testing.assert_array_equal(scan.data[0].numpy(), voxels)
    check_equals_itk(scan, path)


@pytest.mark.parametrize(
    ("size", "found"),
    [
        ("7", r"'HeaderSize' is '7'. Legal: 0, -1, or from 2\d\d up, where the header ends"),
        ("-2", r"'HeaderSize' is '-2'. Legal: a whole number from -1 up"),
        ("1000", r"cut short: it holds at most 0 of the 240 bytes"),
    ],
)
def test_header_size_that_leads_nowhere(tmp_path, voxels, size, found):
    with pytest.raises(ScanError, match=found):
        load_scan(local(tmp_path / "a.mha", header(HeaderSize=size), voxels, BEFORE))


def test_voxels_at_the_end_of_a_file_that_is_cut_short(tmp_path, voxels):
    path = local(tmp_path / "a.mha", header(HeaderSize="-1"), voxels)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ScanError, match=r"it holds at most 237 of the 240 bytes"):
        load_scan(path)
