"""qform and sform apart: said, chosen, and written as one place."""

from __future__ import annotations

import warnings

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (its own convention)
from helpers_cases import Place, seg3dcam
from scipy.spatial.transform import Rotation

from seg3dcam.errors import ScanError, Seg3dcamWarning
from seg3dcam.files.writers.nifti import write_nifti
from seg3dcam.files.writers.nrrd import write_nrrd
from seg3dcam.geometry import corner_gap
from seg3dcam.scan import load_labels, load_scan, place_code

SHAPE, VOXEL = (12, 10, 8), (3, 1, 2)
SFORM = np.diag([-2.0, 2, 3, 1])
MOVED = SFORM + np.array([[0, 0, 0, 20], *[[0] * 4] * 3])


def save(path, sform=SFORM, qform=SFORM, codes=(2, 1), **fields):
    image = nib.Nifti1Image(np.random.default_rng(0).integers(1, 9, SHAPE).astype("i2"), None)
    image.set_sform(sform, codes[0])
    image.set_qform(qform, codes[1])
    for field, value in fields.items():
        image.header[field] = value
    path.write_bytes(image.to_bytes())
    return path


def places(tmp_path, scan):
    """Where the programs put one voxel of what is written for a scan."""
    volume = scan.data[0]
    cam = write_nifti(tmp_path / "cam.nii", volume, scan.affine, reference=scan.header)
    nrrd = write_nrrd(tmp_path / "cam.nrrd", volume, scan.affine)
    found = [nib.load(cam).get_qform(), nib.load(cam).get_sform(), nib.load(cam).affine]
    by_itk = [
        np.array(sitk.ReadImage(str(path)).TransformIndexToPhysicalPoint(VOXEL)) * (-1, -1, 1)
        for path in (cam, nrrd)
    ]
    return [*(nib.affines.apply_affine(affine, VOXEL) for affine in found), *by_itk]


@pytest.mark.parametrize(
    ("qform", "words"),
    [
        (MOVED, r"up to 20 mm apart\."),
        (np.diag([-2.0, 2, 4, 1]), r"up to 7 mm apart, with voxels of 2 x 2 x 3 and 2 x 2 x 4 mm"),
        (np.diag([2.0, 2, 3, 1]), r"up to 44 mm apart, and one is the other's mirror image"),
        (np.diag([-2.0, 2, 3.02, 1]), r"up to 0.14 mm apart"),
    ],
    ids=["moved", "spacing", "mirrored", "slightly"],
)
@pytest.mark.parametrize("codes", [(2, 1), (1, 1), (1, 4)], ids=str)
def test_two_places_are_said_and_written_as_one(tmp_path, qform, words, codes):
    path = save(tmp_path / "c.nii", qform=qform, codes=codes)
    said = rf"c.nii: the header says two places. sform and qform lie {words}.*--frame qform"
    with pytest.warns(Seg3dcamWarning, match=said):
        scan = load_scan(path)
    np.testing.assert_array_equal(scan.affine, nib.load(path).affine)
    for frame, affine in (("sform", SFORM), ("qform", qform)):
        chosen = load_scan(path, frame=frame)  # a choice is said no more
        np.testing.assert_allclose(chosen.affine, affine, atol=1e-5)
        expected = nib.affines.apply_affine(affine, VOXEL)
        np.testing.assert_allclose(places(tmp_path, chosen), [expected] * 5, atol=1e-4)
        np.testing.assert_allclose(load_labels(path, frame=frame).affine, affine, atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_rounding_of_a_quaternion_is_no_second_place(tmp_path, seed):
    """Turns of nearly 180 degrees lose up to a thousandth in a qform of float32."""
    rng = np.random.default_rng(seed)
    turn = np.diag([-1, -1, 1]) @ Rotation.from_rotvec(rng.normal(size=3) * 1e-3).as_matrix()
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * (0.7, 0.7, 1), rng.normal(size=3) * 200
    image = nib.Nifti1Image(
        np.ones((500, 400, 1), "u1") + np.eye(500, 400, dtype="u1")[..., None], affine
    )
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    (tmp_path / "c.nii").write_bytes(image.to_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_scan(tmp_path / "c.nii")


def test_shear_is_said(tmp_path):
    """As after an affine registration: the qform that programs write beside it has none."""
    sheared = SFORM @ np.array([[1, 0.05, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    image = nib.Nifti1Image(np.arange(60, dtype=np.float32).reshape(5, 4, 3), sheared)
    image.set_sform(sheared, 1)
    image.set_qform(sheared, 1, strip_shears=True)
    (tmp_path / "c.nii").write_bytes(image.to_bytes())
    gap = corner_gap(sheared, nib.load(tmp_path / "c.nii").get_qform(), image.shape)
    with pytest.warns(Seg3dcamWarning, match=rf"the sform is sheared .* up to {gap:.3g} mm off"):
        scan = load_scan(tmp_path / "c.nii")
    np.testing.assert_allclose(scan.affine, sheared, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_scan(tmp_path / "c.nii", frame="sform")  # a choice is said no more


def test_pixdim_beside_an_sform_of_unit_scale(tmp_path):
    path = save(tmp_path / "c.nii", np.diag([-1.0, -1, 1, 1]), codes=(1, 0))
    content = bytearray(path.read_bytes())
    content[80:92] = np.array([1.32, 1.32, 10], "<f4").tobytes()
    path.write_bytes(content)
    said = r"two voxel sizes: the sform 1 x 1 x 1 mm, pixdim 1.32 x 1.32 x 10 mm"
    with pytest.warns(Seg3dcamWarning, match=said):
        scan = load_scan(path)
    assert scan.spacing == (1, 1, 1)
    np.testing.assert_allclose(scan.header.get_zooms(), (1.32, 1.32, 10))  # as the file says
    expected = nib.affines.apply_affine(scan.affine, VOXEL)
    np.testing.assert_allclose(places(tmp_path, scan), [expected] * 5, atol=1e-4)


def test_a_qform_that_is_no_rotation(tmp_path):
    path = save(tmp_path / "c.nii", quatern_b=0.9, quatern_c=0.9, quatern_d=0.9)
    with pytest.warns(Seg3dcamWarning, match=r"the qform cannot be used: its quaternion \[0.8999"):
        scan = load_scan(path)
    expected = nib.affines.apply_affine(SFORM, VOXEL)
    np.testing.assert_allclose(places(tmp_path, scan), [expected] * 5, atol=1e-4)
    with pytest.raises(ScanError, match=r"its qform is none: .*Or choose the other form: .*sform"):
        load_scan(path, frame="qform")


def test_a_form_that_is_not_there(tmp_path):
    path = save(tmp_path / "c.nii", codes=(1, 0))
    with pytest.raises(
        ScanError, match=r"frame 'qform' was chosen, and the header has only a sform"
    ):
        load_scan(path, frame="qform")
    with pytest.warns(Seg3dcamWarning, match=r"only a sform, which is taken"):
        assert np.array_equal(load_labels(path, frame="qform").affine, SFORM)
    with pytest.raises(ScanError, match=r"frame 'both'. Legal: 'sform', 'qform'"):
        load_scan(path, frame="both")
    with pytest.raises(ScanError, match=r"frame 'qform' chooses between"):
        load_scan(np.ones((4, 5, 6)), np.eye(4), frame="qform")


@pytest.mark.filterwarnings("ignore:.*:seg3dcam.errors.Seg3dcamWarning")
@pytest.mark.parametrize(
    "change",
    [
        {"qform": MOVED},
        {"sform": MOVED},
        {"codes": (1, 1)},
        {"codes": (2, 4)},
        {"xyzt_units": 1},
    ],
    ids=lambda change: next(iter(change)) + str(change.get("codes", "")),
)
def test_the_code_of_a_place_holds_everything_that_is_written(tmp_path, change):
    before = place_code(load_scan(save(tmp_path / "c.nii")))
    assert place_code(load_scan(save(tmp_path / "c.nii"))) == before
    assert place_code(load_scan(save(tmp_path / "c.nii", **change))) != before
    assert place_code(load_scan(save(tmp_path / "c.nii"), frame=None)) == before


# ------------------------------------------------------------------------------ the command


def _in_itk(file):
    return np.array(sitk.ReadImage(str(file)).GetOrigin())[:3] * (-1, -1, 1)


@pytest.mark.few(2)
@pytest.mark.parametrize("frame", [None, "sform", "qform"])
def test_the_command_writes_where_it_was_told(tmp_path, frame):
    """Every file, and the truth beside it, in ITK and in nibabel."""
    place = Place.at(tmp_path)
    image = nib.load(place.scan)
    moved = image.affine.copy()
    moved[0, 3] += 20
    image.set_qform(moved, 1)
    nib.save(image, place.scan)
    truth = nib.Nifti1Image((np.asarray(image.dataobj) > 0.7).astype(np.uint8), None, image.header)
    truth.set_data_dtype(np.uint8)
    nib.save(truth, tmp_path / "truth.nii.gz")
    words = [word for kind in ("nifti", "nrrd", "slicer", "fused") for word in ("--format", kind)]
    chosen = [] if frame is None else ["--frame", frame]
    shown = ("--truth", tmp_path / "truth.nii.gz", "--label", 1)
    options = ("--target", "lesion", *shown, *words, *chosen)
    outcome = place.explain(*options)
    assert outcome.code == 0, outcome.err
    assert ("the header says two places" in outcome.complaint) == (frame is None)
    where = (moved if frame == "qform" else image.affine)[:3, 3]
    volumes = [f for f in place.out.rglob("*") if f.name.endswith((".nii.gz", ".nrrd"))]
    assert len(volumes) >= 8
    for file in volumes:
        np.testing.assert_allclose(_in_itk(file), where, atol=1e-3, err_msg=file.name)
        if file.name.endswith(".nii.gz"):
            np.testing.assert_allclose(nib.load(file).affine[:3, 3], where, atol=1e-3)
    assert place.record["explanations"][0]["found"]["dice"] > 0.5
    assert "holds this case already" in place.explain(*options).out


@pytest.mark.parametrize("command", ["explain", "features"])
def test_a_frame_that_is_none(tmp_path, command):
    place = Place.at(tmp_path)
    outcome = seg3dcam(command, place.scan, "--model", place.model, "--frame", "mni")
    assert outcome.code == 2
    assert "sform" in outcome.complaint
    assert "qform" in outcome.complaint
