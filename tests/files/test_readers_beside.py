"""Which file a header may name: one in its folder, and through links none elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (its own convention)
from helpers_readers import check_equals_itk, itk_image

from seg3dcam.errors import ScanError
from seg3dcam.scan import load_scan

KEYS = {"mhd": b"ElementDataFile = ", "nhdr": b"data file: "}


@pytest.fixture(params=["mhd", "nhdr"])
def header(request, tmp_path):
    """A header and its `a.raw` beside it, in a folder of their own."""
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / f"a.{request.param}"
    sitk.WriteImage(itk_image(np.random.default_rng(0)), str(path))
    return path


def stored(path, folder, link=True):
    """Move a file into a folder and leave a link to it."""
    folder.mkdir(parents=True)
    path.rename(folder / path.name)
    if link:
        path.symlink_to(folder / path.name)
    return folder / path.name


# --------------------------------------------------------------------------------- what is followed


def test_a_link_within_the_folder(header):
    raw = header.with_name("a.raw")
    raw.rename(raw.with_name("b.raw"))
    raw.symlink_to("b.raw")
    check_equals_itk(load_scan(header), header)


def test_a_link_to_the_header_beside_its_voxels(header, tmp_path):
    stored(header, tmp_path / "elsewhere")
    check_equals_itk(load_scan(header), header)


def test_links_to_both_in_one_folder(header, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in (header.name, "a.raw"):
        (mine / name).symlink_to(header.with_name(name))
    check_equals_itk(load_scan(mine / header.name), mine / header.name)


def test_a_folder_that_is_a_link(header, tmp_path):
    (tmp_path / "mine").symlink_to(header.parent)
    check_equals_itk(load_scan(tmp_path / "mine" / header.name), header)


@pytest.mark.parametrize("annexed", [["a.raw"], ["a.raw", "header"]], ids=["voxels", "both"])
@pytest.mark.parametrize("store", [".git", ".git/modules/set"])
def test_git_annex_has_its_files_in_a_store(header, tmp_path, annexed, store):
    for name in annexed:
        path = header if name == "header" else header.with_name(name)
        stored(path, tmp_path / store / "annex" / "objects" / "Q1" / "f0" / name)
    check_equals_itk(load_scan(header), header)


# ---------------------------------------------------------------------------------- what is refused

ELSEWHERE = r"the file 'a.raw' beside it, and that is a link to .*Legal: a file in the header's own"


@pytest.mark.parametrize(
    "folder",
    ["secret", "set/deeper", ".git/objects", "other/.git/annex/objects", "annex/objects"],
)
def test_a_link_out_of_the_folder(header, tmp_path, folder):
    secret = stored(header.with_name("a.raw"), tmp_path / folder)
    with pytest.raises(ScanError, match=ELSEWHERE) as error:
        load_scan(header)
    assert str(header) in str(error.value)
    assert str(secret) in str(error.value)


@pytest.mark.parametrize("link", [".git", ".git/annex", ".git/annex/objects"])
def test_a_store_that_is_a_link_itself(header, tmp_path, link):
    """What came with a stranger's header must not make a store of any folder."""
    rest = ".git/annex/objects".removeprefix(link).lstrip("/")
    raw = header.with_name("a.raw")
    stored(raw, tmp_path / "secret" / rest)
    (header.parent / link).parent.mkdir(parents=True, exist_ok=True)
    (header.parent / link).symlink_to(tmp_path / "secret")
    raw.unlink()
    raw.symlink_to(header.parent / ".git" / "annex" / "objects" / "a.raw")
    assert raw.is_file()
    with pytest.raises(ScanError, match=ELSEWHERE):
        load_scan(header)


def test_a_linked_header_does_not_open_other_folders(header, tmp_path):
    stored(header, tmp_path / "elsewhere")
    stored(header.with_name("a.raw"), tmp_path / "secret")
    with pytest.raises(ScanError, match=ELSEWHERE):
        load_scan(header)


def test_a_link_to_nothing(header, tmp_path):
    stored(header.with_name("a.raw"), tmp_path / "store").unlink()
    with pytest.raises(ScanError, match=r"'a.raw' beside it, and the link there leads to no file"):
        load_scan(header)


@pytest.mark.parametrize("name", [b"LIST", b"LIST 2", b"a%03d.raw 1 6 1"])
def test_voxels_in_several_files(header, name):
    key = KEYS[header.suffix[1:]]
    start = header.read_bytes().split(key)[0]
    header.write_bytes(start + key + name + (b"\na.raw\n" if b"LIST" in name else b"\n\n"))
    with pytest.raises(ScanError, match=r"Legal: the name of one file; voxels in several files"):
        load_scan(header)
