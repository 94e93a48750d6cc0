"""A file is complete or not there, and an error names it."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
from pathlib import Path

import numpy as np
import pytest

from seg3dcam.errors import OutputError
from seg3dcam.files import atomic, check_writable, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def raising(code):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return refuse


def test_nothing_has_the_final_name_before_the_end(tmp_path):
    final = tmp_path / "new" / "folder" / "map.nii.gz"
    with atomic(final) as temporary:
        temporary.write_text("half")
        assert not final.exists()
        assert temporary.parent == final.parent
        assert temporary.name.startswith(".")
        assert temporary.name.endswith(".nii.gz")
        temporary.write_text("whole")
    assert final.read_text() == "whole"
    assert names(final.parent) == ["map.nii.gz"]


def test_two_writers_do_not_meet(tmp_path):
    with atomic(tmp_path / "a") as one, atomic(tmp_path / "a") as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "one"  # the outer block ends last


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError, SystemExit])
def test_any_failure_leaves_what_was_there(tmp_path, error):
    (tmp_path / "old.txt").write_text("good")

    def fail(name):
        with atomic(tmp_path / name) as temporary:
            temporary.write_text("half")
            raise error

    for name in ("old.txt", "new.txt"):
        with pytest.raises(error):
            fail(name)
    assert names(tmp_path) == ["old.txt"]
    assert (tmp_path / "old.txt").read_text() == "good"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, r"\(No space left on device\). The disk is full: free some space"),
        (errno.EDQUOT, r"Your disk quota is used up"),
        (errno.EACCES, r"\(Permission denied\). Nothing may be written there: choose another"),
        (errno.EPERM, r"Nothing may be written there: choose another folder, or change its perm"),
        (errno.EROFS, r"The disk is read-only: choose another folder"),
        (errno.EIO, r"\(Input/output error\). Check the folder and the disk"),
    ],
)
@pytest.mark.parametrize("where", ["os.replace", "os.fsync", "os.open"])
def test_what_the_system_refuses(tmp_path, monkeypatch, where, code, advice):
    (tmp_path / "a.json").write_text("good")
    with monkeypatch.context() as patch:
        patch.setattr(where, raising(code))
        with pytest.raises(OutputError, match=rf"a.json cannot be written .*{advice}") as caught:
            write_json(tmp_path / "a.json", [1, 2])
    assert caught.value.errno == code
    assert "Nothing half-written was left behind" in str(caught.value)
    assert names(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "good"


def test_a_fault_in_the_block(tmp_path):
    def fill():
        with atomic(tmp_path / "a.txt"), open("/dev/full", "w") as full:  # noqa: PTH123
            full.write("x" * 100_000)

    if Path("/dev/full").exists():
        with pytest.raises(OutputError, match=r"a.txt cannot be written .*disk is full"):
            fill()
        assert names(tmp_path) == []


def test_a_really_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a file system cannot be mounted here")
    try:
        write_json(disk / "a.json", "good")
        with pytest.raises(OutputError, match=r"a.json cannot be written .*The disk is full"):
            write_json(disk / "a.json", "x" * 100_000)
        assert names(disk) == ["a.json"]
        assert json.loads((disk / "a.json").read_text()) == "good"
        (disk / "fill").write_bytes(b"\0" * (60 * 1024))
        with pytest.raises(OutputError, match=r"disk cannot be written .*The disk is full"):
            check_writable(disk)
        assert names(disk) == ["a.json", "fill"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_impossible_places(tmp_path):
    (tmp_path / "file").write_text("good")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(OutputError, match=r"a.json cannot be written .*is a file, not a fold"):
            write_json(folder / "a.json", 1)
        with pytest.raises(OutputError, match=r"file.* cannot be written .*is a file, not a fold"):
            check_writable(folder)
    with pytest.raises(OutputError, match=r"is a folder. Give the name of a file in it"):
        write_json(tmp_path, 1)
    with pytest.raises(OutputError, match=r"cannot be written .*The name is too long"):
        write_json(tmp_path / ("x" * 300), 1)
    assert names(tmp_path) == ["file"]


def test_our_own_error_in_the_block_stays(tmp_path):
    with pytest.raises(OutputError, match=r"^mine$"), atomic(tmp_path / "a"):
        raise OutputError("mine")


def test_check_writable(tmp_path, monkeypatch):
    assert check_writable(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert names(tmp_path / "a" / "b") == []
    monkeypatch.setattr(Path, "write_bytes", raising(errno.EROFS))
    with pytest.raises(OutputError, match=r"/a cannot be written .*read-only"):
        check_writable(tmp_path / "a")
    assert names(tmp_path / "a") == ["b"]


def test_json(tmp_path):
    found = {
        "case": Path("kä.nii"),
        "peak": np.float32(0.5),
        "index": np.array([1, 2]),
        "scores": (1.0, float("nan"), -np.inf, np.float64("inf")),
        "ok": np.bool_(True),
        "none": None,
    }
    path = write_json(tmp_path / "case.json", found)
    text = path.read_text(encoding="utf-8")
    assert "kä.nii" in text
    assert text.endswith("}\n")
    assert json.loads(text) == {
        "case": "kä.nii",
        "peak": 0.5,
        "index": [1, 2],
        "scores": [1.0, "nan", "-inf", "inf"],
        "ok": True,
        "none": None,
    }
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {1: object()})
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    "given",
    [
        *("s3://bucket/out", " S3://bucket/out", "file:///out", "any://out", "dir::s3://b/out"),
        *(Path("s3://bucket/out"), Path("memory://out"), Path("simplecache::s3://b/out")),
    ],
)
def test_an_address_is_no_folder_here(tmp_path, monkeypatch, given):
    """Not a folder of the name "s3:" with results that nobody finds."""
    monkeypatch.chdir(tmp_path)
    for write in (check_writable, lambda path: write_json(path, {})):
        with pytest.raises(OutputError, match="is an address"):
            write(given)
    assert list(tmp_path.iterdir()) == []
    for name in ("case:1", "na:/x", tmp_path / "s3:" / "x"):
        assert check_writable(name).is_dir()


def test_a_name_that_is_no_utf_8_can_be_written_down(tmp_path):
    name = os.fsdecode(b"scan\xff.nii.gz")
    assert json.loads(write_json(tmp_path / "a.json", {"scan": name}).read_text()) == {"scan": name}
    assert write_text(tmp_path / "a.log", name).read_text() == "scan\\udcff.nii.gz"
