"""The voxel size as ITK and nibabel read it: compared with nnU-Net's own readers of the file."""

from __future__ import annotations

import sys
import warnings

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (its usual name)
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from seg3dcam import load_scan
from seg3dcam.errors import MissingExtraError, ScanError, Seg3dcamWarning
from seg3dcam.geometry import LPS_TO_RAS
from seg3dcam.models.spacing import (
    _geometry,
    affine_as_read_by,
    spacing_as_read_by,
    tell_difference,
)
from seg3dcam.scan import Scan

TURNED = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.2, -0.15, 0.1) @ np.diag([-0.9, 1.1, 2.4]), [12.0, -30.0, 55.0]
)
UNIT = np.diag([-1.0, -1, 1, 1])
PERMUTED = np.array([[0, 0, 2.0, 5], [-1.0, 0, 0, 7], [0, 3.0, 0, -9], [0, 0, 0, 1]])

#: qform and its code, sform and its code, pixdim where it is not the qform's, unit of lengths.
HEADERS = {
    "both forms agree": (TURNED, 1, TURNED, 1, None, "mm"),
    "only a qform": (TURNED, 1, None, 0, None, "mm"),
    "only a sform": (None, 0, TURNED, 1, (0.9, 1.1, 2.4), "mm"),
    "unit sform, thick pixdim": (
        np.diag([-1.3, -1.3, 10, 1]),
        1,
        np.diag([-1, -1, 1, 1]),
        1,
        0,
        "mm",
    ),
    "unit sform alone": (None, 0, UNIT, 1, (1.3, 1.3, 10), "mm"),
    "unit pixdim, thick sform": (None, 0, np.diag([1.3, 1.3, 10, 1]), 1, (1, 1, 1), "mm"),
    "sform permutes other axes": (np.diag([1.0, 3, 2, 1]), 1, PERMUTED, 1, None, "mm"),
    "metres": (TURNED / [[1e3], [1e3], [1e3], [1]], 1, None, 0, None, "meter"),
    "microns": (np.diag([900.0, 900, 2400, 1]), 1, None, 0, None, "micron"),
}


def written(case: str, folder, kind: type = nib.Nifti1Image):
    """Return a NIfTI file with one of the headers above."""
    qform, qcode, sform, scode, pixdim, unit = HEADERS[case]
    image = kind(np.arange(1, 121, dtype=np.float32).reshape(4, 5, 6), None)
    image.set_sform(sform, code=scode)
    image.set_qform(qform, code=qcode)
    if pixdim:
        image.header["pixdim"][1:4] = pixdim
    image.header.set_xyzt_units(unit)
    image.header["descrip"] = b"Doe, Jane"
    file = folder / "scan.nii.gz"
    nib.save(image, file)
    return file


def loaded(file) -> Scan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Seg3dcamWarning)  # of the unit, or of forms that differ
        return load_scan(file)


@pytest.mark.parametrize("case", HEADERS)
def test_what_the_readers_themselves_say(case, tmp_path):
    file = written(case, tmp_path)
    scan = loaded(file)
    for reader, theirs in (("itk", SimpleITKIO), ("nibabel", NibabelIO)):
        _, properties = theirs().read_images([str(file)])
        assert spacing_as_read_by(scan, reader) == tuple(properties["spacing"][::-1])
    image = sitk.ReadImage(str(file))
    corners = np.array([[0, 0, 0], [3, 0, 0], [0, 4, 0], [0, 0, 5]], dtype=float)
    lps = [image.TransformContinuousIndexToPhysicalPoint(corner) for corner in corners]
    ras = nib.affines.apply_affine(LPS_TO_RAS, lps)
    found = nib.affines.apply_affine(affine_as_read_by(scan, "itk"), corners)
    assert np.allclose(found, ras, atol=1e-4 * max(1, np.abs(ras).max()))
    assert np.array_equal(affine_as_read_by(scan, "nibabel"), nib.load(file).affine)


def test_what_a_reader_makes_differently_is_said(tmp_path):
    scan = loaded(written("unit sform alone", tmp_path))
    with pytest.warns(Seg3dcamWarning, match=r"1\.3 x 1\.3 x 10 mm; by the affine .*1 x 1 x 1 mm"):
        tell_difference(scan, spacing_as_read_by(scan, "itk"), "SimpleITKIO")
    scan = loaded(written("both forms agree", tmp_path))
    tell_difference(scan, spacing_as_read_by(scan, "itk"), "SimpleITKIO")  # says nothing


def test_a_scan_without_a_nifti_header_has_one_voxel_size(tmp_path):
    scan = load_scan(np.arange(24.0).reshape(2, 3, 4), affine=TURNED)
    for reader in ("itk", "nibabel"):
        assert spacing_as_read_by(scan, reader) == (0.9, 1.1, 2.4)  # to the last digit
        assert np.array_equal(affine_as_read_by(scan, reader), TURNED)


@pytest.mark.filterwarnings("ignore:.*the header says two")
def test_a_header_that_itk_refuses(tmp_path, capfd):
    sheared = np.diag([1.0, 1, 2, 1])
    sheared[0, 1] = 0.4
    image = nib.Nifti1Image(np.ones((4, 5, 6), np.float32) * range(6), None)
    image.set_sform(sheared, code=1)
    file = tmp_path / "scan.nii.gz"
    nib.save(image, file)
    with pytest.raises(RuntimeError, match="orthonormal"):
        SimpleITKIO().read_images([str(file)])
    capfd.readouterr()
    scan = load_scan(file)
    with pytest.raises(ScanError, match=r"scan: ITK.*refuses this header.*orthonormal.*Repair"):
        spacing_as_read_by(scan, "itk")
    assert spacing_as_read_by(scan, "nibabel")
    assert capfd.readouterr() == ("", "")


def test_nifti_2_is_read_as_nifti_1(tmp_path):
    scan = loaded(written("unit sform, thick pixdim", tmp_path, nib.Nifti2Image))
    assert np.allclose(spacing_as_read_by(scan, "itk"), (1.3, 1.3, 10), rtol=1e-6)


def test_only_the_geometry_is_handed_to_itk(tmp_path):
    scan = loaded(written("both forms agree", tmp_path))
    assert b"Doe" in scan.header.binaryblock
    assert b"Doe" not in _geometry(scan, scan.header)


def test_without_simpleitk_the_package_is_named(tmp_path, monkeypatch):
    scan = loaded(written("both forms agree", tmp_path))
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(MissingExtraError, match="pip install SimpleITK"):
        spacing_as_read_by(scan, "itk")
