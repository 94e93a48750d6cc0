"""NRRD, MetaImage and MGH: voxels and place are those that SimpleITK and nibabel read."""

from __future__ import annotations

import gzip

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (its own convention)
from helpers_readers import TURN, VOXEL, check_equals_itk, itk_image, place_of, ras_of

from seg3dcam.errors import ScanError, Seg3dcamWarning
from seg3dcam.files.writers.nifti import write_nifti
from seg3dcam.files.writers.nrrd import segment, write_nrrd, write_segments
from seg3dcam.scan import load_labels, load_scan


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# ------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("suffix", ["nrrd", "nhdr", "mha", "mhd"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "int64", "float32", "float64"])
def test_equals_simple_itk(tmp_path, rng, suffix, dtype, packed):
    path = tmp_path / f"case_7.{suffix}"
    sitk.WriteImage(itk_image(rng, dtype), str(path), packed)
    scan = load_scan(path)
    check_equals_itk(scan, path)
    assert scan.name == "case_7"
    assert scan.header is None


@pytest.mark.parametrize("suffix", [".mgh", ".mgz"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32"])
def test_mgh_equals_nibabel(tmp_path, rng, suffix, dtype):
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = TURN * (0.7, 1.5, 3), (-10, 22, 35.5)
    path = tmp_path / f"brain{suffix}"
    nib.save(nib.MGHImage(rng.integers(1, 90, (5, 4, 6)).astype(dtype), affine), path)
    scan = load_scan(path)
    image = mgh_by_nibabel(path)
    np.testing.assert_array_equal(scan.data[0].numpy(), image.get_fdata())
    np.testing.assert_allclose(scan.affine, image.affine, atol=1e-6)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-4)
    assert scan.name == "brain"


def mgh_by_nibabel(path):
    content = path.read_bytes()  # nibabel's own way to open a file leaves it open
    return nib.MGHImage.from_bytes(gzip.decompress(content) if path.suffix == ".mgz" else content)


def nrrd(path, fields, voxels):
    """Write an NRRD file from its lines and an array x, y, z."""
    plain = {
        "type": "short",
        "dimension": 3,
        "space": "left-posterior-superior",
        "sizes": " ".join(map(str, voxels.shape)),
        "space directions": "(0,2,0) (0,0,3) (1.5,0,0)",
        "kinds": "domain domain domain",
        "endian": "little",
        "encoding": "raw",
        "space origin": "(10,20,30)",
    }
    lines = [f"{key}: {value}" for key, value in (plain | fields).items() if value is not None]
    order = ">" if fields.get("endian") == "big" else "<"
    raw = voxels.astype(f"{order}i2").tobytes(order="F")
    raw = gzip.compress(raw) if fields.get("encoding") in ("gzip", "gz") else raw
    path.write_bytes("\n".join(["NRRD0004", "# made by hand", *lines, "", ""]).encode() + raw)
    return path


@pytest.fixture
def voxels(rng):
    return rng.integers(-99, 99, (4, 3, 5)).astype(np.int16)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"space": "RAS"},
        {"space": "right-anterior-superior"},
        {"space": "Left-Anterior-Superior"},
        {"endian": "big"},
        {"encoding": "gz"},
        {"type": "signed short int", "space units": '"mm" "mm" "mm"'},
        {"kinds": None, "measurement frame": "(1,0,0) (0,1,0) (0,0,1)"},
    ],
    ids=lambda fields: " ".join(f"{key}={value}" for key, value in fields.items()) or "plain",
)
def test_nrrd_of_every_space_lies_where_itk_puts_it(tmp_path, voxels, fields):
    path = nrrd(tmp_path / "a.nrrd", fields, voxels)
    check_equals_itk(load_scan(path), path)


@pytest.mark.parametrize(
    ("fields", "lost"),
    [
        (
            {"space": None, "space directions": None, "space origin": None, "spacings": "1 2 3"},
            "space",
        ),
        ({"space": "scanner-xyz"}, "space"),
        ({"space": None, "space dimension": 3}, "space"),
        ({"space origin": None}, "space origin"),
    ],
    ids=["no space", "another space", "space dimension", "no origin"],
)
def test_nrrd_that_does_not_say_where_it_lies(tmp_path, voxels, fields, lost):
    order = {key: fields[key] for key in fields if key == "space dimension"}
    path = nrrd(tmp_path / "a.nrrd", order | fields, voxels)
    if "space dimension" in fields:  # which must come before the directions
        lines = path.read_bytes().replace(b"space dimension: 3\n", b"", 1)
        path.write_bytes(lines.replace(b"dimension: 3\n", b"dimension: 3\nspace dimension: 3\n", 1))
    with pytest.warns(Seg3dcamWarning, match=rf"no usable '{lost}', so it does not say where"):
        scan = load_scan(path)
    check_equals_itk(scan, path)


def test_nrrd_with_an_axis_of_one_value(tmp_path, voxels):
    fields = {
        "dimension": 4,
        "sizes": "1 4 3 5",
        "kinds": "list domain domain domain",
        "space directions": "none (0,2,0) (0,0,3) (1.5,0,0)",
    }
    scan = load_scan(nrrd(tmp_path / "a.nrrd", fields, voxels))
    np.testing.assert_array_equal(scan.data[0].numpy(), voxels)


def test_slicers_own_files_are_read_back(tmp_path, rng):
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = TURN * (0.7, 1.5, 3), (-10, 22, 35.5)
    volume = rng.random((5, 4, 6)).astype(np.float32)
    scan = load_scan(write_nrrd(tmp_path / "scan.nrrd", volume, affine))
    np.testing.assert_array_equal(scan.data[0].numpy(), volume)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-12)
    masks = [segment(volume > 0.8, "high", (1, 0, 0)), segment(volume < 0.2, "low", (0, 1, 0))]
    path = write_segments(tmp_path / "masks.seg.nrrd", masks, volume.shape, affine)
    labels = load_labels(path)
    np.testing.assert_array_equal(labels.data[0].numpy(), (volume > 0.8) + 2.0 * (volume < 0.2))
    assert labels.name == "masks"
    with pytest.raises(ScanError, match=r"a segmentation of 3D Slicer, not a scan"):
        load_scan(path)
    overlap = [masks[0], segment(volume > 0.5, "half", (1, 1, 0))]
    path = write_segments(tmp_path / "two.seg.nrrd", overlap, volume.shape, affine)
    with pytest.raises(ScanError, match=r"segments that overlap.*export a label map"):
        load_labels(path)


@pytest.mark.parametrize("suffix", ["nrrd", "mha", "mgz"])
def test_what_is_written_for_such_a_scan_lies_on_it_in_every_program(tmp_path, rng, suffix):
    path = tmp_path / f"case.{suffix}"
    image = itk_image(rng)
    if suffix == "mgz":
        affine = np.diag([-1.0, -1, 1, 1]) @ affine_lps(image)
        voxels = sitk.GetArrayFromImage(image).T.astype(np.float32)
        nib.save(nib.MGHImage(voxels, affine), path)
    else:
        sitk.WriteImage(image, str(path))
    scan = load_scan(path)
    cam = write_nifti(tmp_path / "cam.nii.gz", scan.data[0], scan.affine, reference=scan.header)
    by_slicer = write_nrrd(tmp_path / "cam.nrrd", scan.data[0], scan.affine)
    places = [
        place_of(scan),
        ras_of(sitk.ReadImage(str(cam))),
        ras_of(sitk.ReadImage(str(by_slicer))),
        nib.affines.apply_affine(nib.load(cam).get_qform(), VOXEL),
        nib.affines.apply_affine(nib.load(cam).get_sform(), VOXEL),
    ]
    np.testing.assert_allclose(places, [ras_of(image)] * 5, atol=2e-4)


def affine_lps(image):
    lps = np.eye(4)
    lps[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    lps[:3, 3] = image.GetOrigin()
    return lps


def test_a_list_may_mix_formats(tmp_path, rng):
    image = itk_image(rng, "float32")
    paths = [tmp_path / "p_0000.nrrd", tmp_path / "p_0001.mha"]
    for path in paths:
        sitk.WriteImage(image, str(path))
    scan = load_scan(paths)
    assert scan.data.shape == (2, 5, 4, 6)
    assert scan.name == "p"


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"sizes": "4 3"}, r"'sizes' is '4 3'. Legal: 3 whole numbers from 1 up"),
        ({"sizes": "4 3 0"}, r"'sizes' is '4 3 0'"),
        ({"sizes": "4 3 999999999999"}, r"cut short"),
        ({"sizes": "4 3 " + "9" * 5000}, r"'sizes' is '4 3 9{76}…'"),
        ({"type": "block"}, r"'type' is 'block'"),
        ({"endian": None}, r"no field 'endian'"),
        ({"encoding": "bzip2"}, r"'encoding' is 'bzip2'. Legal: raw, gzip"),
        ({"space": "right-up"}, r"'space' is 'right-up'. Legal: left-posterior-superior"),
        ({"space origin": "(nan,0,0)"}, r"'space origin' is 'nan 0 0'. Legal: 3 finite numbers"),
        ({"space directions": "(1,0,0) (0,1,0)"}, r"'space directions' is"),
        ({"space directions": "(1,0,0) (1,0,0) (0,0,1)"}, r"the affine is singular"),
        ({"space units": '"cm" "cm" "cm"'}, r"'space units' is 'cm'. Legal: mm"),
        ({"byte skip": "-7"}, r"'byte skip' is '-7'"),
        ({"data file": "/etc/passwd"}, r"'data file' is '/etc/passwd'. Legal: the name of one"),
        ({"data file": "../other.raw"}, r"Legal: the name of one file in the same folder"),
        (
            {"data file": "gone.raw"},
            r"a.nrrd: its voxels should be in the file 'gone.raw' beside it",
        ),
        (
            {
                "dimension": 4,
                "sizes": "3 4 1 5",
                "kinds": "RGB-color domain domain domain",
                "space directions": "none (0,2,0) (0,0,3) (1.5,0,0)",
            },
            r"several values per voxel, sizes \[3, 4, 1, 5\] \(RGB-color\)",
        ),
        (
            {"dimension": 2, "sizes": "4 15", "kinds": None, "space directions": "(0,2,0) (0,0,3)"},
            r"the image is 2-D",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_nrrd_outside_of_its_schema(tmp_path, voxels, fields, found):
    path = nrrd(tmp_path / "a.nrrd", fields, voxels)
    with pytest.raises(ScanError, match=found) as error:
        load_scan(path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("NDims = 3", "NDims = three", r"'NDims' is 'three'"),
        ("DimSize = 5 4 6", "DimSize = 5 4 -6", r"'DimSize' is '5 4 -6'"),
        ("DimSize = 5 4 6", "DimSize = 5 4 99999999", r"cut short"),
        ("ElementType = MET_SHORT", "ElementType = MET_SHORT_ARRAY", r"'ElementType' is"),
        (" 1.5 3", " inf 3", r"Legal: 3 finite numbers"),
        (" 1.5 3", " -1.5 3", r"Legal: distances above 0"),
        ("BinaryData = True", "BinaryData = maybe", r"'BinaryData' is 'maybe'"),
        ("ElementDataFile = LOCAL", "ElementDataFile = /etc/passwd", r"Legal: the name of one"),
        (
            "ElementDataFile = LOCAL",
            "ElementDataFile = LIST",
            r"'LIST'. Legal: the name of one file; voxels in several",
        ),
        ("NDims = 3", "NDims = 3\nElementNumberOfChannels = 3", r"several values per voxel"),
        ("NDims = 3", "NDims = 3\nDistanceUnits = cm", r"'DistanceUnits' is 'cm'"),
        ("NDims = 3", "hello", r"'line' is 'hello'. Legal: 'Key = Value'. .* 'BinaryData' is lost"),
        ("ElementDataFile", "ElementFile", r"not a MetaImage: it does not start with lines"),
    ],
    ids=lambda text: text.split()[0] if isinstance(text, str) else "",
)
def test_meta_image_outside_of_its_schema(tmp_path, rng, old, new, found):
    path = tmp_path / "a.mha"
    sitk.WriteImage(itk_image(rng), str(path))
    content = path.read_bytes()
    assert old.encode() in content
    path.write_bytes(content.replace(old.encode(), new.encode(), 1))
    with pytest.raises(ScanError, match=found) as error:
        load_scan(path)
    assert str(tmp_path) in str(error.value)


def test_meta_image_that_does_not_say_where_it_lies(tmp_path, rng):
    path = tmp_path / "a.mha"
    sitk.WriteImage(itk_image(rng), str(path))
    lines = [
        n for n in path.read_bytes().split(b"\n") if not n.startswith((b"Offset", b"Transform"))
    ]
    path.write_bytes(b"\n".join(lines))
    with pytest.warns(Seg3dcamWarning, match=r"no Offset and no TransformMatrix, so it does not"):
        scan = load_scan(path)
    check_equals_itk(scan, path)


def test_mgh_that_does_not_say_where_it_lies(tmp_path, rng):
    path = tmp_path / "a.mgh"
    nib.save(nib.MGHImage(rng.random((4, 5, 6)).astype(np.float32), np.eye(4)), path)
    content = bytearray(path.read_bytes())
    content[28:30] = b"\0\0"  # goodRASFlag
    path.write_bytes(content)
    with pytest.warns(Seg3dcamWarning, match=r"goodRASFlag is 0"):
        scan = load_scan(path)
    np.testing.assert_allclose(scan.affine, mgh_by_nibabel(path).affine)


@pytest.mark.parametrize(
    ("name", "advice"),
    [("a.hdr", "does not say for certain where left is"), ("a.img", "pair"), ("a.dcm", "folder")],
)
def test_what_cannot_be_read_says_why(tmp_path, name, advice):
    (tmp_path / name).write_bytes(b"0" * 400)
    with pytest.raises(ScanError, match=rf"Legal: .nii, .nii.gz, .nrrd.*{advice}"):
        load_scan(tmp_path / name)


@pytest.mark.parametrize("suffix", ["nii", "nii.gz", "nrrd", "mha", "mgh", "mgz"])
@pytest.mark.parametrize("content", [b"", b"hello\n" * 200, b"\x1f\x8b garbage" * 50])
def test_what_is_no_image_at_all(tmp_path, suffix, content):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ScanError, match=rf"a.{suffix}: "):
        load_scan(path)


@pytest.mark.parametrize("suffix", ["nrrd", "mha", "mgh"])
def test_frame_is_of_nifti_alone(tmp_path, rng, suffix):
    path = tmp_path / f"a.{suffix}"
    nib.save(nib.MGHImage(rng.random((4, 5, 6)).astype(np.float32), np.eye(4)), tmp_path / "a.mgh")
    if suffix != "mgh":
        sitk.WriteImage(itk_image(rng), str(path))
    with pytest.raises(ScanError, match=r"frame 'qform' chooses between the two forms"):
        load_scan(path, frame="qform")
    labels = write_nrrd(tmp_path / "l.nrrd", np.ones((4, 5, 6)), np.eye(4))
    assert load_labels(labels, frame="qform").shape == (4, 5, 6)
