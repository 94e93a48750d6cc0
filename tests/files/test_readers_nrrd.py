"""NRRD headers that say their grid axis by axis, and what ITK makes of them."""

from __future__ import annotations

import gzip

import pytest
from helpers_readers import check_equals_itk

from seg3dcam.errors import ScanError, Seg3dcamWarning
from seg3dcam.scan import load_scan

IN_SPACE = {
    "space": "left-posterior-superior",
    "space directions": "(0,2,0) (0,0,3) (1.5,0,0)",
    "space origin": "(10,20,30)",
}


def nrrd(path, fields, voxels, packed=None):
    plain = {
        "type": "short",
        "dimension": 3,
        "sizes": " ".join(map(str, voxels.shape)),
        "endian": "little",
        "encoding": "raw" if packed is None else "gzip",
    }
    lines = [f"{key}: {value}" for key, value in (plain | fields).items()]
    raw = voxels.tobytes(order="F") if packed is None else packed
    path.write_bytes("\n".join(["NRRD0005", *lines, "", ""]).encode() + raw)
    return path


@pytest.mark.parametrize(
    "fields",
    [
        {"axis mins": "5 6 7"},
        {"axis mins": "5 6 7", "centers": "node node node"},
        {"axis mins": "5 -6 7", "centers": "cell cell cell"},
        {"axismins": "5 6 7", "centerings": "NODE ??? none"},
        {"axis mins": "5 6 7", "axis maxs": "9 16 99", "centers": "cell node cell"},
        {"axis mins": "nan nan nan"},
        {"axis maxs": "9 16 99", "centers": "cell cell cell"},
        {"axis maxs": "9 16 99", "spacings": "nan nan nan"},
        {"spacings": "1 nan 3"},
        {
            "dimension": 4,
            "sizes": "1 4 5 6",
            "kinds": "list domain domain domain",
            "spacings": "nan 1 2 3",
            "axis mins": "nan 5 6 7",
            "centers": "??? cell node cell",
        },
    ],
    ids=lambda fields: " ".join(f"{key}={value}" for key, value in fields.items()),
)
def test_grids_axis_by_axis_lie_where_itk_puts_them(tmp_path, voxels, fields):
    path = nrrd(tmp_path / "a.nrrd", {"spacings": "1 2 3"} | fields, voxels)
    with pytest.warns(Seg3dcamWarning, match=r"no usable 'space', so it does not say where"):
        scan = load_scan(path)
    check_equals_itk(scan, path)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"axis mins": "5 6 7"}, r"'axis mins' is '5 6 7'. Legal: axis mins beside spacings"),
        (
            {"axis mins": "5 6 7", "spacings": "1 nan 3"},
            r"'axis mins' is '5 6 7'. Legal: axis mins beside spacings of every axis",
        ),
        (
            {"axis mins": "5 nan 7", "spacings": "1 2 3"},
            r"'axis mins' is '5 nan 7'. Legal: a finite number per axis of space",
        ),
        ({"axis mins": "5 6", "spacings": "1 2 3"}, r"'axis mins' is '5 6'. Legal: 3 numbers"),
        ({"axis mins": "5 6 inf", "spacings": "1 2 3"}, r"'axis mins' is 'inf'. Legal: 1 finite"),
        ({"centers": "cell node"}, r"'centers' is 'cell node'. Legal: 3 of cell, node"),
        ({"centers": "cell node middle"}, r"'centers' is 'cell node middle'. Legal: 3 of cell"),
        ({"spacings": "1 -2 3"}, r"'spacings' is '1 -2 3'. Legal: distances above 0"),
        ({"spacings": "1 2"}, r"'spacings' is '1 2'. Legal: 3 numbers, one per axis"),
        (
            IN_SPACE | {"axis mins": "5 6 7"},
            r"'axis mins' is '5 6 7'. Legal: nan, .* beside 'space'",
        ),
        (IN_SPACE | {"spacings": "1 nan 3"}, r"'spacings' is '1 nan 3'. Legal: nan, or no such"),
        ({"space": "LPS", "spacings": "1 2 3"}, r"'spacings' is '1 2 3'. Legal: nan, or no such"),
        ({"space origin": "(1,2,3)"}, r"'space origin' is '\(1,2,3\)'. Legal: no such field where"),
        (
            {"space": "LAST", "space directions": "(0,1,0,0) (-2,0,0,0) (0,0,3,0)"},
            r"'space' is 'last'. Legal: a space of three axes, .* each time point as a volume",
        ),
        ({"space": "left-anterior-superior-time"}, r"Legal: a space of three axes"),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_grids_that_are_not_read(tmp_path, voxels, fields, found):
    path = nrrd(tmp_path / "a.nrrd", fields, voxels)
    with pytest.raises(ScanError, match=found):
        load_scan(path)


def test_nan_beside_a_space_says_nothing(tmp_path, voxels):
    fields = IN_SPACE | {"spacings": "nan nan nan", "axis mins": "nan nan nan"}
    path = nrrd(tmp_path / "a.nrrd", fields, voxels)
    check_equals_itk(load_scan(path), path)


def test_voxels_at_the_end_of_a_file_that_is_cut_short(tmp_path, voxels):
    path = nrrd(tmp_path / "a.nrrd", IN_SPACE | {"byte skip": -1}, voxels)
    check_equals_itk(load_scan(path), path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ScanError, match=r"it holds at most 237 of the 240 bytes"):
        load_scan(path)


# ------------------------------------------------------------------------------------ packed voxels


@pytest.mark.parametrize("behind", [b"j", b"junkjunk", b"\0" * 100, b"\x1f"])
def test_bytes_behind_packed_voxels_are_left_alone(tmp_path, voxels, behind):
    packed = gzip.compress(voxels.tobytes(order="F"))
    path = nrrd(tmp_path / "a.nrrd", IN_SPACE, voxels, packed + behind)
    check_equals_itk(load_scan(path), path)


def test_packed_in_several_parts(tmp_path, voxels):
    raw = voxels.tobytes(order="F")
    parts = [gzip.compress(raw[start : start + 100]) for start in range(0, len(raw), 100)]
    path = nrrd(tmp_path / "a.nrrd", IN_SPACE, voxels, b"".join(parts) + b"junk")
    check_equals_itk(load_scan(path), path)


def test_packed_voxels_behind_others(tmp_path, voxels):
    packed = gzip.compress(b"1234567" + voxels.tobytes(order="F"))
    path = nrrd(tmp_path / "a.nrrd", IN_SPACE | {"byte skip": 7}, voxels, packed)
    check_equals_itk(load_scan(path), path)


@pytest.mark.parametrize("part", [0, 1, 2], ids=["first", "middle", "last"])
def test_a_wrong_checksum_is_found_in_every_part(tmp_path, voxels, part):
    raw = voxels.tobytes(order="F")
    parts = [gzip.compress(raw[start : start + 80]) for start in range(0, len(raw), 80)]
    parts[part] = parts[part][:-8] + b"\0\0\0\0" + parts[part][-4:]
    path = nrrd(tmp_path / "a.nrrd", IN_SPACE, voxels, b"".join(parts))
    with pytest.raises(ScanError, match=r"compressed file is damaged .*incorrect data check"):
        load_scan(path)
