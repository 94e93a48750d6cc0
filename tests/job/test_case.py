"""What a case leaves on disk: complete, in the scan's own geometry, and nobody else's loss."""

from __future__ import annotations

import gzip
import json

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from helpers_cases import (
    IN_LESION,
    OBLIQUE,
    PICTURE,
    PICTURES,
    Place,
    contents,
    voxels,
    write_model,
    write_scan,
)

from seg3dcam.errors import OutputError
from seg3dcam.files import unique_names
from seg3dcam.job.record import record_of

pytestmark = pytest.mark.usefixtures("explained_once")


def file_names(place):
    return {str(path.relative_to(place.out)) for path in place.out.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    "affine",
    [
        OBLIQUE,
        np.diag([-0.7, -0.7, 3.0, 1]),
        np.array([[0, 0, 2.0, -9], [1.1, 0, 0, 5], [0, -1.3, 0, 77], [0, 0, 0, 1]]),
    ],
    ids=["oblique", "LPS", "axes permuted"],
)
def test_every_volume_lies_exactly_on_its_scan(place, affine):
    write_scan(place.scan, affine=affine)
    assert place.explain().code == 0
    scan = nib.load(place.scan)
    volumes = [nib.load(path) for path in place.out.glob("*.nii.gz")]
    assert len(volumes) == 5  # a prediction, and of two classes the CAM and one layer's raw map
    for volume in volumes:
        assert volume.shape == scan.shape
        assert np.array_equal(volume.affine, scan.affine)
        assert np.array_equal(volume.get_qform(), scan.get_qform())
        assert volume.header["sform_code"] == scan.header["sform_code"]
        assert volume.header["qform_code"] == scan.header["qform_code"]


def test_a_preparation_on_another_grid_comes_back_to_the_scan(tmp_path):
    place = Place.at(tmp_path, prepare={"orientation": "RAS", "spacing": [1.5, 1.5, 1.5]})
    assert place.explain("--target", "lesion").code == 0
    assert np.array_equal(
        nib.load(place.out / "cam_lesion.nii.gz").affine, nib.load(place.scan).affine
    )
    assert place.volume("prediction.nii.gz")[IN_LESION] == 2
    assert place.volume("cam_lesion.nii.gz")[IN_LESION] > 0.5


def test_raw_map_is_signed_and_the_cam_is_its_positive_part(place):
    assert place.explain("--target", "lesion", "--layer", "model.0").code == 0
    raw = place.volume("raw_lesion_model_0.nii.gz")
    cam = place.volume("cam_lesion.nii.gz")
    assert np.allclose(cam, np.clip(raw, 0, None) / raw.max(), atol=1e-6)


def test_volumes_of_a_signed_case_keep_both_signs_on_one_scale(place):
    formats = ("--format", "nifti", "--format", "nrrd", "--layer", "model.0", "--signed")
    assert place.explain("--target", "organ", *formats).code == 0
    raw = place.volume("raw_organ_model_0.nii.gz")
    assert raw.min() < 0 < raw.max()
    wanted = raw / np.abs(raw).max()
    cam = nib.load(place.out / "cam_organ.nii.gz")
    np.testing.assert_allclose(np.asarray(cam.dataobj), wanted, atol=1e-6)
    assert (cam.header["cal_min"], cam.header["cal_max"]) == (-1, 1)
    assert (np.asarray(cam.dataobj)[raw == 0] == 0).all()
    found = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(place.out / "cam_organ.nrrd"))
    np.testing.assert_allclose(found.T, wanted, atol=1e-6)
    assert (place.record["job"]["signed"], place.record["job"]["colormap"]) == (True, "blue_orange")
    options = ("--layer", "model.0", "--out", place.folder / "usual")
    assert place.explain("--target", "organ", *options).code == 0
    usual = nib.load(place.folder / "usual" / "cam_organ.nii.gz")
    assert np.asarray(usual.dataobj).min() == 0


@pytest.mark.slow
def test_every_format_of_a_signed_case(place):
    kinds = ("nifti", "png", "cine", "html", "slicer", "nrrd", "fused")
    options = [word for kind in kinds for word in ("--format", kind)]
    assert place.explain("--target", "organ", "--signed", *options).code == 0
    assert file_names(place) == {*place.record["files"], "case.json"}
    assert "blue_orange" in (place.out / "slicer" / "cam.ctbl").read_text()
    assert '"signed":true' in (place.out / "report.html").read_text()


# ----------------------------------------------------------------------------------- case.json


def test_case_json_lists_every_file(place):
    assert place.explain(*PICTURES).code == 0
    assert file_names(place) == {*place.record["files"], "case.json"}
    assert "slices/lesion/axial_008.png" in place.record["files"]


def test_figures_are_those_of_the_files(place):
    assert place.explain("--target", "lesion").code == 0
    found = place.record["explanations"][0]["found"]
    mask = place.volume("prediction.nii.gz") == 2
    cam = place.volume("cam_lesion.nii.gz").astype(np.float64)
    affine = nib.load(place.scan).affine
    assert found["predicted_voxels"] == mask.sum()
    assert found["predicted_ml"] == pytest.approx(mask.sum() * abs(np.linalg.det(affine)) / 1000)
    assert found["cam_inside_prediction"] == pytest.approx(cam[mask].sum() / cam.sum(), rel=1e-5)
    assert cam[tuple(found["peak_voxel"])] == 1
    assert np.allclose(found["peak_mm"], affine[:3] @ [*found["peak_voxel"], 1], atol=1e-4)


@pytest.mark.slow
def test_nothing_says_where_the_scan_was(tmp_path):
    """A folder may name a patient."""
    folder = tmp_path / "Smith_John_1970"
    folder.mkdir()
    place = Place.at(folder)
    elsewhere = tmp_path / "results"
    assert place.explain(*PICTURES, "--out", elsewhere).code == 0
    for name, content in contents(elsewhere).items():
        if content is None:
            continue
        plain = gzip.decompress(content) if name.endswith(".gz") else content
        assert b"Smith" not in plain, name
        assert str(tmp_path).encode() not in plain, name
    assert (elsewhere / "case.json").is_file()


def test_case_json_says_how_the_scan_was_prepared(tmp_path):
    """A map cannot be made again without the preparation's settings."""
    place = Place.at(tmp_path, prepare={"intensity": {"percentiles": [1.5, 97.25]}})
    place.explain("--target", "1")
    assert "97.25" in json.dumps(place.record)


# ------------------------------------------------------------------- a run that dies, and reruns


def refuse(*args, **kwargs):
    raise OutputError("montage.png cannot be written")


def test_case_json_comes_last(place, monkeypatch):
    monkeypatch.setattr("seg3dcam.job.writers.save_montage", refuse)
    outcome = place.explain("--target", "lesion", *PICTURES)
    assert outcome.code == 1
    assert "montage.png cannot be written" in outcome.err
    assert not any(place.out.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("again", [("--method", "grad_cam"), ("--force",)], ids=" ".join)
def test_a_failure_leaves_the_earlier_case_as_it_was(place, again, monkeypatch):
    assert place.explain("--target", "lesion", *PICTURES).code == 0
    before = contents(place.out)
    monkeypatch.setattr("seg3dcam.job.writers.save_montage", refuse)
    assert place.explain("--target", "lesion", *PICTURES, *again).code == 1
    assert contents(place.out) == before


def test_the_run_after_a_failure_is_whole(place, tmp_path_factory, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("seg3dcam.job.writers.save_montage", refuse)
        place.explain("--target", "lesion", *PICTURES)
    assert place.explain("--target", "lesion", *PICTURES).code == 0
    fresh = Place.at(tmp_path_factory.mktemp("fresh"))
    fresh.explain("--target", "lesion", *PICTURES)
    assert contents(place.out) == contents(fresh.out)


def test_no_temporary_file_stays(place, monkeypatch):
    monkeypatch.setattr("seg3dcam.job.writers.save_montage", refuse)
    place.explain("--target", "lesion", *PICTURES)
    assert not [name for name in file_names(place) if "/." in f"/{name}"]


# ------------------------------------------------------------------------------- foreign files


def test_foreign_files_stay(place):
    mine = {
        "notes.txt": b"mine",
        "cam_other.nii.gz": b"mine too",
        "slices/lesion/own.png": b"and this",
    }
    for name, content in mine.items():
        (place.out / name).parent.mkdir(parents=True, exist_ok=True)
        (place.out / name).write_bytes(content)
    place.explain("--target", "lesion", *PICTURE)
    place.explain("--target", "organ")
    assert mine.items() <= contents(place.out).items()


def test_the_scan_itself_is_never_overwritten(place):
    """A scan that has a name of ours, in the folder of the results."""
    place.out.mkdir()
    scan = place.scan.rename(place.out / "prediction.nii.gz")
    before = scan.read_bytes()
    place.explain(scans=[scan])
    assert scan.read_bytes() == before


@pytest.mark.parametrize("listed", ["../precious.txt", "{folder}/precious.txt", "sub/../../x"])
def test_a_forged_case_json_removes_nothing_elsewhere(place, listed):
    precious = place.folder / "precious.txt"
    precious.write_text("keep")
    place.out.mkdir()
    files = [listed.format(folder=place.folder)]
    (place.out / "case.json").write_text(json.dumps({"seg3dcam": "1", "files": files}))
    assert place.explain().code == 0
    assert precious.read_text() == "keep"


def test_another_programs_case_json_removes_nothing(place):
    place.out.mkdir()
    (place.out / "notes.txt").write_text("keep")
    (place.out / "case.json").write_text(json.dumps({"files": ["notes.txt"]}))
    assert place.explain().code == 0
    assert (place.out / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "\x00"]
    + [f'{{"seg3dcam": "1", "files": {files}}}' for files in ("null", "3", "[1, null]")],
)
def test_what_may_be_somebodys_case_json_stays(place, content):
    """Whether another program's, or a damaged one of a case whose files lie beside it."""
    place.out.mkdir()
    (place.out / "case.json").write_text(content)
    outcome = place.explain()
    assert outcome.code == 0
    (folder,) = [path for path in place.out.iterdir() if path.is_dir()]
    assert f"none of seg3dcam, or damaged: this one goes to {folder}" in outcome.out
    assert (place.out / "case.json").read_text() == content
    assert {path.name for path in place.out.iterdir()} == {"case.json", folder.name}
    assert record_of(folder) is not None
    assert "holds this case already" in place.explain().out


# ---------------------------------------------------------------------------------- class names


@pytest.mark.parametrize(
    ("names", "safe"),
    [
        (["../x", "a/b"], ["x", "a_b"]),
        (["..", "/"], ["target", "target_2"]),
        (["", " "], ["target", "target_2"]),
        (["Läsion"], ["L_sion"]),
        (["肝臓", "腫瘍"], ["target", "target_2"]),
        (["con\x00nul", "C:\\x"], ["con_nul", "C_x"]),
        (["a b", "a_b", "a-b"], ["a_b", "a_b_2", "a-b"]),
        (["a", "a", "a_2"], ["a", "a_2", "a_2_2"]),
        (["a", "a_2", "a"], ["a", "a_2", "a_3"]),
        (["Lesion", "lesion"], ["Lesion", "lesion_2"]),
        (["x" * 300], ["x" * 60]),
        (["y" * 300, "y" * 301], ["y" * 60, "y" * 60 + "_2"]),
    ],
    ids=repr,
)
def test_unique_names(names, safe):
    """Safe in a file name, and different, also where a disk takes capitals for small letters."""
    assert unique_names(names) == safe


@pytest.mark.slow
def test_odd_class_names_stay_inside_the_folder(place):
    write_model(place.folder, classes=["background", "../../x", "Läsion a/b"])
    before = contents(place.folder)
    assert place.explain(*PICTURE).code == 0
    outside = {k: v for k, v in contents(place.folder).items() if not k.startswith("out")}
    assert outside == before
    classes = [case["target"]["class"] for case in place.record["explanations"]]
    assert classes == ["../../x", "Läsion a/b"]
    assert {"cam_x.nii.gz", "cam_L_sion_a_b.nii.gz"} <= file_names(place)
    assert place.explain(*PICTURE, "--target", "Läsion a/b").code == 0


# ----------------------------------------------------------------------------- odd, but legal


def test_a_scan_smaller_than_the_window(tmp_path):
    place = Place.at(tmp_path, window={"roi_size": [32, 32, 32]})
    assert place.explain().code == 0
    assert place.record["explanations"][0]["model"]["windows"] == 1
    assert place.volume("prediction.nii.gz")[IN_LESION] == 2
    assert place.volume("cam_lesion.nii.gz")[IN_LESION] > 0.5


def test_a_scan_of_integers_with_a_scaling(place):
    image = nib.Nifti1Image(np.round(voxels() * 1000).astype(np.int16), OBLIQUE)
    image.header.set_slope_inter(0.001, 0)
    nib.save(image, place.scan)
    assert place.explain().code == 0
    assert place.volume("prediction.nii.gz")[IN_LESION] == 2
