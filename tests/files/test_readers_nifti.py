"""Where the voxels of a NIfTI file start, and what lies behind them."""

from __future__ import annotations

import gzip
import struct
import zlib

import nibabel as nib
import numpy as np
import pytest

from seg3dcam.errors import ScanError, Seg3dcamWarning
from seg3dcam.files.readers import plan
from seg3dcam.scan import load_scan


@pytest.mark.parametrize(
    ("kind", "place", "first", "others"),
    [
        (nib.Nifti1Image, (108, "<f"), 352, "ITK reads from byte 348, nibabel from byte 0"),
        (nib.Nifti2Image, (168, "<q"), 544, "nibabel reads from byte 0"),
    ],
    ids=["NIfTI-1", "NIfTI-2"],
)
def test_a_header_that_does_not_say_where_voxels_start(
    tmp_path, voxels, kind, place, first, others
):
    content = bytearray(kind(voxels, np.diag([1.0, 2, 3, 1])).to_bytes())
    struct.pack_into(place[1], content, place[0], 0)
    path = tmp_path / "a.nii"
    path.write_bytes(content)
    with pytest.warns(Seg3dcamWarning, match=rf"vox_offset is 0, .* from byte {first}, .*{others}"):
        scan = load_scan(path)
    np.testing.assert_array_equal(scan.data[0].numpy(), voxels)


@pytest.mark.parametrize("suffix", ["nii.gz", "mgz"])
def test_bytes_behind_a_packed_file_are_left_alone(tmp_path, voxels, suffix):
    kind = nib.MGHImage if suffix == "mgz" else nib.Nifti1Image
    small = voxels[:2, :2, :2].astype(np.float32)
    content = kind(small, np.diag([1.0, 2, 3, 1])).to_bytes()
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(gzip.compress(content) + b"junk")
    np.testing.assert_array_equal(load_scan(path).data[0].numpy(), small)


def zeros_behind(content: bytes, size: int) -> bytes:
    """Return a gzip file of some bytes and a lot of zeros."""
    pack = zlib.compressobj(1, wbits=31)
    pieces = [pack.compress(content)]
    pieces += [pack.compress(bytes(2**20)) for _ in range(size // 2**20)]
    return b"".join([*pieces, pack.flush()])


def test_a_small_file_that_unpacks_to_much_is_not_read_to_its_end(tmp_path, voxels, monkeypatch):
    content = nib.Nifti1Image(voxels, np.diag([1.0, 2, 3, 1])).to_bytes()
    path = tmp_path / "a.nii.gz"
    path.write_bytes(zeros_behind(content, 2**28))
    read = []
    inflate = plan.Decompressor.read
    monkeypatch.setattr(
        plan.Decompressor, "read", lambda self, size: read.append(inflate(self, size)) or read[-1]
    )
    np.testing.assert_array_equal(load_scan(path).data[0].numpy(), voxels)
    assert sum(map(len, read)) <= 2**24 + 2 * len(content) + 540


@pytest.mark.parametrize("size", [0, 2**22], ids=["nothing", "4 MB"])
def test_the_checksum_behind_the_voxels_is_looked_at(tmp_path, voxels, size):
    content = nib.Nifti1Image(voxels, np.diag([1.0, 2, 3, 1])).to_bytes()
    packed = zeros_behind(content, size)
    path = tmp_path / "a.nii.gz"
    path.write_bytes(packed)
    load_scan(path)
    for damaged in (packed[:-8] + b"\0\0\0\0" + packed[-4:], packed[:-3]):
        path.write_bytes(damaged)
        with pytest.raises(ScanError, match=r"the compressed file is damaged or cut short"):
            load_scan(path)


def test_a_part_may_end_where_a_read_of_the_file_does():
    class Pieces:
        def __init__(self):
            self.left = [gzip.compress(b"one"), gzip.compress(b"two"), b"junk"]

        def read(self, size):
            return self.left.pop(0) if self.left else b""

    assert plan.Decompressor(Pieces()).read(99) == b"onetwo"
