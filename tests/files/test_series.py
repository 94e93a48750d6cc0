"""A DICOM folder in: the same values at the same places as other readers, or a clear refusal."""

from __future__ import annotations

import shutil
import sys
import warnings

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK
from helpers_dicom import complaints, write_file, write_series
from helpers_phantom import MARKER_RADIUS_MM, make_grid, make_phantom, marker_mm, offset_mm
from pydicom.dataset import Dataset
from pydicom.uid import JPEGLSLossless, RLELossless

from seg3dcam.errors import MissingExtraError, ScanError, Seg3dcamWarning
from seg3dcam.files.series import read_series
from seg3dcam.geometry import corner_gap
from seg3dcam.scan import load_scan

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
#: Columns, rows, slices towards: as acquired, and with the slices from head to feet.
PLANES = {"axial": "LPS", "coronal": "LIP", "sagittal": "PIR", "head first": "LPI"}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def small(rng, shape=(9, 7, 6)):
    return rng.integers(-1000, 2000, shape).astype(float)


def values_at(voxels, affine, mm):
    """Return the voxel at each of the positions, which must be voxel centres."""
    index = np.linalg.solve(affine, np.concatenate([mm, np.ones((len(mm), 1))], 1).T)[:3].T
    assert np.abs(index - index.round()).max() * 5 < 1e-4
    return voxels[tuple(index.round().astype(int).T)]


def some_positions(scan, rng, count=500):
    voxels = rng.integers(0, scan.shape, (count, 3))
    mm = voxels @ scan.affine[:3, :3].T + scan.affine[:3, 3]
    return mm, scan.data[0].numpy()[tuple(voxels.T)]


# ---------------------------------------------------------------------------------- what is read


@pytest.mark.few(2)
@pytest.mark.parametrize("plane", PLANES)
def test_the_marker_is_right_anterior_and_superior(tmp_path, plane):
    phantom = make_phantom(PLANES[plane], spacing=(2.0, 2.5, 4.0))
    write_series(tmp_path, phantom.scan.data[0].numpy(), phantom.affine)
    scan = load_scan(tmp_path)
    bright = (scan.data[0].numpy() > 100).astype(float)
    wanted = marker_mm(phantom.affine, phantom.scan.shape)
    assert offset_mm(bright, scan.affine, wanted) < 0.5 * min(scan.spacing)
    ball = 4 / 3 * np.pi * MARKER_RADIUS_MM**3
    assert bright.sum() * np.prod(scan.spacing) == pytest.approx(ball, rel=0.1)
    assert np.linalg.det(LPS[:3, :3] @ scan.affine[:3, :3]) > 0  # slices along row x column
    assert (scan.name, scan.header) == ("scan", None)


@pytest.mark.few(5)
@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
@pytest.mark.parametrize("plane", PLANES)
def test_equals_simple_itk_and_highdicom(tmp_path, rng, plane, modality):
    shape, affine = make_grid(PLANES[plane], spacing=(13.0, 12.0, 17.0))
    files = write_series(tmp_path, small(rng, shape), affine, modality)
    scan = load_scan(tmp_path)
    mm, values = some_positions(scan, rng)

    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path))
    image = SimpleITK.ReadImage(names)
    index = [image.TransformPhysicalPointToContinuousIndex(p) for p in (mm * [-1, -1, 1]).tolist()]
    assert np.abs(index - np.round(index)).max() * max(scan.spacing) < 1e-4
    read = SimpleITK.GetArrayFromImage(image).T[tuple(np.round(index).astype(int).T)]
    # For a whole PET series SimpleITK takes one slope: only slice by slice it is right.
    if modality != "PT":
        np.testing.assert_array_equal(values, read)

    volume = highdicom.get_volume_from_series([pydicom.dcmread(file) for file in files])
    np.testing.assert_allclose(
        values, values_at(volume.array, LPS @ volume.affine, mm), rtol=1e-6, atol=1e-4
    )


def test_headers_follow_the_last_axis(tmp_path, rng):
    shape, affine = make_grid("LPI", spacing=(13.0, 12.0, 17.0))
    volume = small(rng, shape)
    write_series(tmp_path, volume, affine)
    scan = load_scan(tmp_path)
    assert scan.series is not None
    for k, header in enumerate(scan.series):
        place = scan.affine @ [0, 0, k, 1] @ LPS
        np.testing.assert_allclose(place[:3], header.ImagePositionPatient, atol=1e-4)
        assert "PixelData" not in header
    np.testing.assert_array_equal(scan.data[0], volume[:, :, ::-1])
    assert len(scan.series) == scan.shape[2]


def test_every_slice_has_its_own_slope(tmp_path, rng):
    def scale(header, k):
        header.RescaleSlope, header.RescaleIntercept = str(1 + k / 4), str(-10 * k)

    volume = small(rng).round()
    write_series(tmp_path, volume, np.diag([-1.0, -1, 2, 1]), change=scale)
    k = np.arange(volume.shape[2])
    np.testing.assert_array_equal(load_scan(tmp_path).data[0], volume * (1 + k / 4) - 10 * k)


@pytest.mark.parametrize("syntax", [JPEGLSLossless, RLELossless])
def test_compressed_slices(tmp_path, rng, syntax):
    volume = small(rng, (10, 8, 6))
    for file in write_series(tmp_path, volume, np.diag([-1.0, -1, 2, 1])):
        image = pydicom.dcmread(file)
        image.compress(syntax, generate_instance_uid=False)
        image.save_as(file)
    np.testing.assert_array_equal(load_scan(tmp_path).data[0], volume)


def test_a_list_of_files_and_what_else_lies_in_a_folder(tmp_path, rng):
    files = write_series(tmp_path / "s", small(rng), np.diag([-1.0, -1, 2, 1]))
    for name in ("README.txt", ".DS_Store", "VERSION"):
        (tmp_path / "s" / name).write_text("no slice")
    (tmp_path / "s" / "more").mkdir()
    directory = Dataset()
    directory.SOPClassUID, directory.SOPInstanceUID = "1.2.840.10008.1.3.10", "1.2.3"
    write_file(tmp_path / "s" / "DICOMDIR", directory)
    folder, listed = load_scan(tmp_path / "s"), load_scan(files)
    np.testing.assert_array_equal(folder.data, listed.data)
    np.testing.assert_array_equal(folder.affine, listed.affine)
    assert load_scan(files[:3]).shape == (9, 7, 3)


def test_two_slices_and_rounded_positions(tmp_path, rng):
    def rounded(header, k):
        header.ImagePositionPatient = [f"{float(x):.2f}" for x in header.ImagePositionPatient]

    shape, affine = make_grid("LPS", spacing=(13.0, 12.0, 1.23456))
    volume = small(rng, shape)
    write_series(tmp_path / "all", volume, affine, change=rounded)
    assert corner_gap(load_scan(tmp_path / "all").affine, affine, shape) < 0.015
    write_series(tmp_path / "two", volume[:, :, :2], affine)
    assert corner_gap(load_scan(tmp_path / "two").affine, affine, shape) < 0.015


def test_a_tilted_gantry_is_exact_and_said(tmp_path, rng):
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    affine[1, 2] = 2 * np.tan(np.radians(15))
    volume = small(rng)
    write_series(tmp_path, volume, affine)
    with pytest.warns(Seg3dcamWarning, match=r"stacked at 15 degrees .* \(gantry tilt\)"):
        scan = load_scan(tmp_path)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-8)
    np.testing.assert_array_equal(scan.data[0], volume)


def test_odd_values_in_a_header_are_no_concern(tmp_path, rng):
    def odd(header, k):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header.add(pydicom.DataElement("SeriesTime", "TM", "no time", validation_mode=0))

    write_series(tmp_path, small(rng), np.diag([-1.0, -1, 2, 1]), change=odd)
    assert load_scan(tmp_path).shape == (9, 7, 6)


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
def test_the_synthetic_slices_are_good_dicom(tmp_path, rng, modality):
    file = write_series(tmp_path, small(rng), np.diag([-1.0, -1, 2, 1]), modality)[0]
    assert complaints(file) == []


# ------------------------------------------------------------------------------- what is refused


@pytest.fixture
def folder(tmp_path, rng):
    """A sound series of 12 slices, 2 mm apart."""
    write_series(tmp_path / "series", small(rng, (9, 7, 12)), np.diag([-1.0, -1, 2, 1]))
    return tmp_path / "series"


def at(folder, k):
    """Return the file of the slice at 2 k mm."""
    return folder / f"IM{12 - k:04d}.dcm"


def edit(path, **fields):
    image = pydicom.dcmread(path)
    for name, value in fields.items():
        if value is None:
            del image[name]
        else:
            setattr(image, name, value)
    image.save_as(path)


def refused(folder, match):
    with pytest.raises(ScanError, match=match):
        load_scan(folder)


def test_missing_slices_which_simple_itk_stretches(folder):
    at(folder, 5).unlink()
    at(folder, 8).unlink()
    at(folder, 9).unlink()
    refused(
        folder,
        r"3 slices are missing: 1 between 8 and 12 mm, 2 between 14 and 20 mm along .* where "
        r"slices are 2 mm apart. 9 slices were found",
    )
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    assert (
        SimpleITK.ReadImage(names).GetSpacing()[2] > 2.5
    )  # why this file does not use that reader
    with pytest.raises(ValueError, match="volume"):
        highdicom.get_volume_from_series([pydicom.dcmread(name) for name in names])


def test_one_slice_missing_of_three(folder):
    for k in (2, 4, 5, 6, 7, 8, 9, 10, 11):
        at(folder, k).unlink()
    refused(folder, r"1 slice is missing: 1 between 2 and 6 mm")


def test_uneven_slices(folder):
    edit(at(folder, 11), ImagePositionPatient=["0", "0", "22.7"])
    refused(folder, r"not evenly spaced: 12 slices, with 2 to 2.7 mm from one to the next")


def test_a_slice_to_the_side(folder):
    edit(at(folder, 5), ImagePositionPatient=["0", "3", "10"])
    refused(folder, r"do not lie in a straight line: one is 3 mm to the side")


def test_echoes_and_copies(folder, tmp_path):
    for k in range(12):
        other = folder / f"E2_{k}.dcm"
        shutil.copy(at(folder, k), other)
        edit(at(folder, k), EchoTime="4.6")
        edit(other, EchoTime="9.2", SOPInstanceUID=f"1.2.{k}")
    refused(
        folder,
        r"24 images, but only 12 positions; up to 2 images share one \(EchoTime 4.6, 9.2\).*"
        r"several phases, echoes or time points.*list of files",
    )
    only = load_scan(sorted(folder.glob("E2_*.dcm")))
    assert only.shape == (9, 7, 12)
    for k in range(12):
        (folder / f"E2_{k}.dcm").unlink()
    shutil.copy(at(folder, 3), folder / "copy.dcm")
    refused(folder, r"the same image is there twice: IM0009.dcm and copy.dcm")


def test_several_series(folder, rng):
    write_series(
        folder, small(rng, (5, 4, 3)), np.eye(4), "MR", seed="other", name="MR{:04d}",
        change=lambda header, k: setattr(header, "SeriesNumber", 7),
    )  # fmt: skip
    structures = Dataset()
    structures.SOPClassUID, structures.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.481.3", "1.2.9"
    structures.SeriesInstanceUID, structures.Modality = "1.2.8", "RTSTRUCT"
    structures.SeriesNumber, structures.SeriesDescription = 9, "SECRET^NAME"
    write_file(folder / "RS.dcm", structures)
    with pytest.raises(ScanError) as error:
        load_scan(folder)
    assert (
        "holds 3 series: series 3 (CT): 12 images of 9 x 7, such as IM0001.dcm; series 7 (MR): 3 "
        "images of 5 x 4, such as MR0001; series 9 (RTSTRUCT): 1 object without an image, such as "
        "RS.dcm. Legal: the slices of one series. Move them to a folder of their own, or give them "
        "as a list of files."
    ) in str(error.value)
    assert "SECRET" not in str(error.value)


@pytest.mark.few(5)
@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, r"1 of them are localizers \(scouts"),
        ({"Rows": 9, "Columns": 7}, r"11 images of 9 x 7, 1 image of 7 x 9. All slices must have"),
        ({"PixelSpacing": ["1", "1.5"]}, r"different pixel spacings: 1 x 1, 1.5 x 1 mm"),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, r"2 orientations, up to 90 degrees"),
        ({"ImagePositionPatient": None}, r"1 of them have no usable ImagePositionPatient"),
        ({"ImageOrientationPatient": None}, r"no usable ImageOrientationPatient"),
        ({"PixelSpacing": None}, r"1 of them have no usable PixelSpacing, such as IM0006.dcm"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, r"the picture is RGB, 3 samp"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, r"picture is MONOCHROME1.*dark to bright"),
        ({"NumberOfFrames": 30}, r"is a multi-frame \(enhanced\) image.*single-frame.*dcm2niix"),
        ({"Modality": "SEG"}, r"is no scan but a SEG object"),
        ({"Rows": None}, r"IM0006.dcm: the DICOM file is damaged: its header ends early"),
        ({"ModalityLUTSequence": [Dataset()]}, r"scaled by a lookup table \(Modality LUT\)"),
    ],
)  # fmt: skip
def test_one_odd_slice(folder, fields, match):
    edit(at(folder, 6), **fields)
    refused(folder, match)


def test_directions_that_are_none(folder):
    for k in range(12):
        edit(at(folder, k), ImageOrientationPatient=[1, 0, 0, 1, 0, 0])
    refused(folder, r"ImageOrientationPatient 1 x 0 x 0 x 1 x 0 x 0 or PixelSpacing 1 x 1 is wrong")


def test_one_slice(folder):
    refused([at(folder, 3)], r"the list of 1 files holds series 3 \(CT\).*One slice is no volume")
    refused(at(folder, 3), r"One slice is no volume: give the folder of all slices")


def test_damaged_files(folder):
    sound = at(folder, 6).read_bytes()
    for length in (0, 100, 140, 600, len(sound) - 40):
        at(folder, 6).write_bytes(sound[:length])
        refused(folder, r"IM0006.dcm: the DICOM file is damaged")
    at(folder, 6).write_bytes(sound)
    assert load_scan(folder).shape == (9, 7, 12)


def test_a_damaged_compressed_file(folder):
    image = pydicom.dcmread(at(folder, 6))
    image.compress(JPEGLSLossless, generate_instance_uid=False)
    image.save_as(at(folder, 6))
    whole = at(folder, 6).read_bytes()
    at(folder, 6).write_bytes(whole[: len(whole) - 60])
    refused(folder, r"IM0006.dcm: the voxels cannot be decoded. The file is damaged, or")


def test_no_series_in_a_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "notes.txt").write_text("no slice")
    refused(tmp_path, r"is a folder.*holds no DICOM image, 1 other files and 1 folders.*dcm2niix")
    refused(tmp_path / "absent", r"ends with ''|no such file")
    (tmp_path / "x.dcm").write_text("no slice")
    refused(tmp_path, r"x.dcm: the DICOM file is damaged: it does not start as a DICOM file does")


def test_constant_and_empty_scans(tmp_path):
    write_series(tmp_path / "one", np.full((4, 5, 6), 7.0), np.eye(4))
    with pytest.warns(Seg3dcamWarning, match="the scan is constant"):
        load_scan(tmp_path / "one")
    write_series(tmp_path / "nil", np.zeros((4, 5, 6)), np.eye(4))
    refused(tmp_path / "nil", "the scan is empty: all voxels are 0")


@pytest.mark.parametrize("package", ["pydicom", "SimpleITK"])
def test_without_the_extra(folder, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf'{package} is not.*"seg3dcam\[dicom\]"'):
        read_series(folder)
