"""A case read back is the explanation that was written, whole."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers_cases import OBLIQUE, SHAPE, Place, voxels, write_model, write_scan

from seg3dcam import explain_each, load_explanation, load_model, load_scan
from seg3dcam.errors import InputError
from seg3dcam.explaining.findings import findings
from seg3dcam.files import plain
from seg3dcam.targets import Boundary, ClassLogOdds, EveryComponent

pytestmark = pytest.mark.usefixtures("explained_once", "measured_once")

#: Two lesions beside each other.
SMALL, LARGE = np.s_[2:5, 2:5, 2:5], np.s_[9:15, 10:16, 6:12]
FORMATS = ("--format", "nifti", "--format", "slicer")


def two_lesions():
    array = voxels(lesion=False, organ=False)
    array[SMALL] += 0.9
    array[LARGE] += 0.9
    return array


@pytest.fixture
def place(tmp_path):
    place = Place.at(tmp_path, window=None)
    write_scan(place.scan, two_lesions())
    return place


def write_truth(place):
    """The large lesion, one voxel further; and something that was not predicted."""
    truth = np.zeros(SHAPE, np.uint8)
    truth[10:16, 10:16, 6:12] = 2
    truth[16:19, 2:5, 14:17] = 2
    image = nib.Nifti1Image(truth, OBLIQUE)
    image.set_sform(OBLIQUE, 1)
    nib.save(image, place.folder / "truth.nii.gz")
    return place.folder / "truth.nii.gz"


def same(one, other):
    assert list(one.maps) == list(other.maps)
    for layer in one.maps:
        assert torch.equal(one.maps[layer].float(), other.maps[layer])
    assert torch.equal(one.prediction, other.prediction)
    assert torch.equal(one.scan.data, other.scan.data)
    assert np.array_equal(one.affine, other.affine)
    for name in ("truth", "region"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)
    for name in ("status", "class_names", "only_against", "native_spacing"):
        assert plain(_listed(getattr(one, name))) == plain(_listed(getattr(other, name)))
    for name in ("target", "method", "class_index", "score", "label", "has_background"):
        assert getattr(one, name) == getattr(other, name)
    assert (one.over_mask, one.of_component) == (other.over_mask, other.of_component)
    assert json.loads(json.dumps(plain(one.provenance))) == other.provenance
    assert plain(findings(one)) == plain(findings(other))


def _listed(value):
    return dict(value) if hasattr(value, "items") else list(value)


@pytest.mark.few(3)
@pytest.mark.parametrize("region", ["predicted", "components", "boundary"])
@pytest.mark.parametrize("copy", [True, False], ids=["scan in the case", "scan given"])
def test_what_is_read_is_what_was_written(place, region, copy):
    truth = write_truth(place)
    options = ("--target", "lesion", "--region", region, "--truth", truth, "--label", 2)
    layers = ("--layer", "model.0", "--layer", "model.1.submodule")
    assert place.explain(*options, *layers, *FORMATS[: 4 if copy else 2]).code == 0
    families = {"components": EveryComponent(2), "predicted": ClassLogOdds(2)}
    target = families.get(region) or ClassLogOdds(2, region=Boundary())
    wanted = list(
        explain_each(
            place.scan,
            load_model(place.model),
            [target],
            layers=["model.0", "model.1.submodule"],
        )
    )
    entries = place.record["explanations"]
    assert len(entries) == len(wanted) == (2 if region == "components" else 1)
    for entry, one in zip(entries, wanted, strict=True):
        found = load_explanation(place.out, entry["name"], scan=None if copy else place.scan)
        same(one.with_truth(truth, 2), found)


@pytest.mark.parametrize(
    "model",
    [
        {"activation": "sigmoid"},
        {"gains": [[10]], "biases": [-7], "classes": ["lesion"], "activation": "sigmoid"},
    ],
    ids=["overlapping classes", "one channel"],
)
def test_masks_of_classes_that_may_overlap(place, model):
    write_model(place.folder, window=None, **model)
    assert place.explain("--target", "lesion").code == 0
    (wanted,) = explain_each(place.scan, load_model(place.model), ["lesion"])
    same(wanted, load_explanation(place.out, scan=place.scan))


def test_channels_of_a_copy(tmp_path):
    place = Place.at(tmp_path, gains=[[0, 0], [10, 0], [0, 30]], window=None)
    both = np.stack([voxels(lesion=False), two_lesions()], axis=-1)
    write_scan(place.scan, both)
    assert place.explain("--target", "organ", *FORMATS).code == 0
    assert torch.equal(load_explanation(place.out).scan.data, load_scan(place.scan).data)


def test_one_lesions_figures_are_its_own(place):
    """Two lesions: each has its volume, its Dice with what of the truth touches it, its mass."""
    truth = write_truth(place)
    options = ("--target", "lesion", "--region", "components", "--truth", truth, "--label", 2)
    assert place.explain(*options).code == 0
    large, small = (entry["found"] for entry in place.record["explanations"])
    affine = nib.load(place.scan).affine
    ml = abs(np.linalg.det(affine)) / 1000
    regions = [
        np.asarray(nib.load(place.out / entry["region_file"]).dataobj) > 0
        for entry in place.record["explanations"]
    ]
    prediction = place.volume("prediction.nii.gz") == 2
    for found, region in zip((large, small), regions, strict=True):
        assert found["predicted_voxels"] == region.sum()
        assert found["predicted_ml"] == pytest.approx(region.sum() * ml)
        assert region.sum() < prediction.sum()
    touched = np.zeros(SHAPE, bool)
    touched[10:16, 10:16, 6:12] = True
    both = (regions[0] & touched).sum()
    assert large["dice"] == pytest.approx(2 * both / (regions[0].sum() + touched.sum()))
    assert (large["truth_voxels"], small["truth_voxels"], small["dice"]) == (216, 0, 0)
    for entry, region in zip(place.record["explanations"], regions, strict=True):
        cam = place.volume(f"cam_{entry['name']}.nii.gz").astype(np.float64)
        inside = entry["found"]["cam_inside_prediction"]
        assert inside == pytest.approx(cam[region].sum() / cam.sum(), rel=1e-5)


def test_a_part_of_a_lesion_has_no_dice(place):
    truth = write_truth(place)
    options = ("--target", "lesion", "--region", "boundary", "--truth", truth, "--label", 2)
    assert place.explain(*options).code == 0
    (entry,) = place.record["explanations"]
    assert entry["found"]["dice"] is None
    region = np.asarray(nib.load(place.out / entry["region_file"]).dataobj) > 0
    assert entry["found"]["predicted_voxels"] == region.sum()


# ------------------------------------------------------------------------------------- refused


def test_of_several_one_is_named(place):
    write_scan(place.scan, voxels())
    assert place.explain().code == 0
    with pytest.raises(InputError, match=r"holds 2 explanations: name one of \['organ', 'lesion'"):
        load_explanation(place.out, scan=place.scan)
    with pytest.raises(InputError, match=r"no explanation 'lesions': did you mean 'lesion'"):
        load_explanation(place.out, "lesions", scan=place.scan)
    assert load_explanation(place.out, "lesion", scan=place.scan).label == "lesion"


def test_another_scan_is_refused(place):
    assert place.explain("--target", "lesion").code == 0
    with pytest.raises(InputError, match="no copy of the scan"):
        load_explanation(place.out)
    other = write_scan(place.folder / "other.nii.gz", two_lesions() + 0.01)
    with pytest.raises(InputError, match="other is another scan"):
        load_explanation(place.out, scan=other)
    moved = OBLIQUE.copy()
    moved[0, 3] += 5
    elsewhere = write_scan(place.folder / "elsewhere.nii.gz", two_lesions(), moved)
    with pytest.raises(InputError, match="elsewhere lies elsewhere"):
        load_explanation(place.out, scan=elsewhere)


@pytest.mark.few(4)
@pytest.mark.parametrize("first", ["nifti", "slicer", "html"])
@pytest.mark.parametrize("second", ["nifti", "slicer", "html"])
def test_of_runs_in_several_formats_the_volumes_are_read(place, first, second):
    """Whichever of them wrote the maps, and whichever the scan."""
    for kind in (first, second):
        assert place.explain("--target", "lesion", "--format", kind).code == 0
    given = None if "slicer" in (first, second) else place.scan
    if "nifti" in (first, second):
        assert load_explanation(place.out, "lesion", scan=given).label == "lesion"
        assert load_explanation(place.out, scan=place.scan).label == "lesion"
    else:
        with pytest.raises(InputError, match="no raw maps were written"):
            load_explanation(place.out, "lesion", scan=given)


@pytest.mark.filterwarnings("ignore:.*two places")
def test_a_scan_is_read_by_the_frame_that_its_run_took(place):
    image = nib.load(place.scan)
    moved = image.affine.copy()
    moved[0, 3] += 20
    image.set_qform(moved, 1)
    nib.save(image, place.scan)
    assert place.explain("--target", "lesion", "--frame", "qform").code == 0
    found = load_explanation(place.out, scan=place.scan)
    assert np.allclose(found.affine, moved, atol=1e-4)
    with pytest.raises(InputError, match="lies elsewhere in the patient"):
        load_explanation(place.out, scan=load_scan(place.scan, frame="sform"))


@pytest.mark.parametrize("how", ["gone", "truncated", "changed"])
def test_a_damaged_file_is_refused(place, how):
    assert place.explain("--target", "lesion").code == 0
    file = place.out / "prediction.nii.gz"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    if how != "gone":
        file.write_bytes(content[:10] if how == "truncated" else content)
    with pytest.raises(InputError, match=r"prediction\.nii\.gz is gone, or not as written"):
        load_explanation(place.out, scan=place.scan)


def test_without_volumes_nothing_is_read(place):
    assert place.explain("--target", "lesion", "--format", "html").code == 0
    with pytest.raises(InputError, match=r"no raw maps were written.*--format nifti"):
        load_explanation(place.out, scan=place.scan)


@pytest.mark.parametrize(
    "content",
    ["", "\x00", "[]", "{}", "[" * 100_000, '{"files": ' + "9" * 5000 + "}", "NaN", "null"],
    ids=["empty", "NUL", "list", "no keys", "deep", "long number", "NaN", "null"],
)
def test_what_is_no_case_is_refused(tmp_path, content):
    (tmp_path / "case.json").write_text(content)
    with pytest.raises(InputError, match=r"case\.json"):
        load_explanation(tmp_path)


@pytest.mark.few(6)
@pytest.mark.parametrize(
    "change",
    [
        {"raw_files": {"a": "../../secret.nii.gz"}},
        {"raw_files": {"a": "/etc/passwd"}},
        {"region_file": "../secret.nii.gz"},
        {"layers": {"a": 3}},
        {"layers": {}},
        {"target": {}},
        {"name": 3},
        {"model": {}},
        {"model": {"classes": []}},
        {"target": {"name": "a", "class_index": 99, "score": 1}},
        {"target": {"name": "a", "class_index": -1, "score": 1}},
        {"layers": {"model.1.submodule": {"status": "ok", "spacing_mm": []}}},
        {"raw_files": {"model.1.submodule": "x" * 300}},
        {"raw_files": {"model.1.submodule": "a\0b"}},
        {"truth_file": "."},
        {"truth_file": ""},
        {"run": "?"},
    ],
    ids=lambda change: ascii(change)[:60],
)
def test_a_strangers_record_reads_nothing_elsewhere(place, change):
    assert place.explain("--target", "lesion").code == 0
    record = place.record
    record["explanations"][0] |= change
    (place.out / "case.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"out"):
        load_explanation(place.out, scan=place.scan)


def test_a_record_without_its_prediction(place):
    assert place.explain("--target", "lesion").code == 0
    record = place.record
    record["runs"][0]["prediction_files"] = []
    (place.out / "case.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="0 files of a prediction, and 3 classes"):
        load_explanation(place.out, scan=place.scan)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(InputError, match="name the folder of a case"):
        load_explanation(tmp_path / "nowhere")


def test_print_is_a_few_lines(place):
    (found,) = explain_each(place.scan, load_model(place.model), ["lesion"])
    lines = repr(found).splitlines()
    assert len(lines) <= 4
    assert max(map(len, lines)) < 120
    assert "lesion" in lines[0]
    assert "hires_cam" in lines[0]
