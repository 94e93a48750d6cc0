"""A run is known again only where nothing that decides on its results has changed."""

from __future__ import annotations

import json
import sys

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from helpers_bundles import SPLEEN, write_bundle
from helpers_cases import LESION, OBLIQUE, voxels, write_model, write_scan, write_yaml
from helpers_dicom import write_series
from helpers_nnunet import write_folder

from seg3dcam import load_model, load_scan
from seg3dcam.job.keys import case_keys
from seg3dcam.job.settings import Job
from seg3dcam.scan import load_labels, place_code

#: A value for each setting of a job that decides on what is written, other than the default.
SETTINGS = {
    "target": "lesion",
    "score": "logit",
    "region": "boundary",
    "against": "organ",
    "label": 2,
    "min_voxels": 3,
    "layer": "model.0",
    "method": "grad_cam",
    "settings": {"window": 4},
    "set": {"inferer#overlap": 0.5},
    "frame": "qform",
    "case": "A",
    "format": ["png"],
    "axis": ["coronal"],
    "slice": 3,
    "intensity_window": [400, 40],
    "threshold": 0.5,
    "colormap": "jet",
    "signed": True,
    "verdict": True,
}


def key_of(place, model=None, truth=None, **settings):
    job = Job(scan=str(place.scan), model=str(model or place.model), **settings)
    labels = None if truth is None else load_labels(truth)
    network = load_model(job.model, trust=True)
    return case_keys(load_scan(place.scan, frame=job.frame), network, job, labels).all


def test_every_setting_of_a_job_is_tried():
    """What is left out here names the inputs, and where results go."""
    inputs = {"scan", "model", "truth", "out", "device"}
    assert set(SETTINGS) | inputs == set(Job.model_fields)


@pytest.mark.few(7)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting(place, name):
    before = key_of(place)
    assert key_of(place) == before
    assert key_of(place, **{name: SETTINGS[name]}) != before


@pytest.mark.parametrize("setting", ["out", "device"])
def test_what_decides_on_nothing(place, setting):
    assert key_of(place, **{setting: "cpu"}) == key_of(place)


def _header(**values):
    def change(place):
        image = nib.load(place.scan)
        for name, value in values.items():
            image.header[name] = value
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), place.scan)

    return change


def _voxel(place):
    array = voxels()
    array[3, 3, 3] += 1e-3
    write_scan(place.scan, array)


def _affine(place):
    moved = OBLIQUE.copy()
    moved[0, 3] += 0.5
    write_scan(place.scan, affine=moved)


def _model(**changes):
    return lambda place: write_model(place.folder, **changes)


#: What else may change between two runs, each alone.
CHANGES = {
    "a voxel": _voxel,
    "the affine": _affine,
    "the qform alone": _header(qoffset_x=3),
    "the qform's code": _header(qform_code=2),
    "the sform's code": _header(sform_code=3),
    "the unit": _header(xyzt_units=2),
    "a weight": _model(biases=[0, -3, -16]),
    "a class's name": _model(classes=["background", "organ", "tumour"]),
    "the activation": _model(activation="sigmoid"),
    "the window": _model(window={"roi_size": 16, "overlap": 0.5}),
    "the preparation": _model(prepare={"intensity": {"zscore": "all"}}),
}


@pytest.mark.filterwarnings("ignore:.*two places")
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_scan_or_the_model(place, change):
    before = key_of(place)
    CHANGES[change](place)
    assert key_of(place) != before


def test_the_truth(place):
    truth = place.folder / "truth.nii.gz"
    labels = np.zeros(voxels().shape, np.float32)
    keys = [key_of(place)]
    for lesion in (0, 1, 2):
        labels[LESION] = lesion
        write_scan(truth, labels)
        keys.append(key_of(place, truth=truth))
    assert len(set(keys)) == 4


CODE = """
import torch
from blocks import parts

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, x):
        return self.conv(x) * parts.FACTOR

def build():
    return Net()
"""


@pytest.mark.parametrize("changed", ["nets_of_mine.py", "blocks/parts.py", "unrelated.py"])
@pytest.mark.parametrize("factory", ["Net", "build"])
def test_the_code_of_a_users_network(place, changed, factory):
    """The same weights, and another `forward`; what has nothing to do with it does not count."""
    model = write_yaml(
        place.folder / "own.yaml",
        {"factory": f"nets_of_mine:{factory}", "weights": "own.pt", "classes": ["a", "b"]},
    )
    weights = torch.nn.ModuleDict({"conv": torch.nn.Conv3d(1, 2, 3)}).state_dict()
    torch.save(weights, place.folder / "own.pt")
    (place.folder / "nets_of_mine.py").write_text(CODE)
    (place.folder / "blocks").mkdir()
    for file in ("blocks/__init__.py", "blocks/parts.py", "unrelated.py"):
        (place.folder / file).write_text("FACTOR = 1\n")
    before = key_of(place, model)
    with (place.folder / changed).open("a") as file:
        file.write("FACTOR = 2\n")
    assert (key_of(place, model) == before) == (changed == "unrelated.py")


@pytest.mark.parametrize("changed", ["making.py", "layers.py"])
def test_the_code_of_an_installed_package(place, changed, monkeypatch):
    """The factory's module, and the one of the network's class."""
    package = place.folder / "lib" / "package_of_mine"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "parts.py").write_text("FACTOR = 1\n")
    (package / "layers.py").write_text(CODE.replace("from blocks", "from package_of_mine"))
    (package / "making.py").write_text("from package_of_mine.layers import build\n")
    monkeypatch.syspath_prepend(place.folder / "lib")
    model = write_yaml(
        place.folder / "own.yaml",
        {"factory": "package_of_mine.making:build", "weights": "own.pt", "classes": ["a", "b"]},
    )
    weights = torch.nn.ModuleDict({"conv": torch.nn.Conv3d(1, 2, 3)}).state_dict()
    torch.save(weights, place.folder / "own.pt")
    before = key_of(place, model)
    with (package / changed).open("a") as file:
        file.write("# changed\n")
    assert key_of(place, model) != before
    for name in [n for n in sys.modules if n.startswith("package_of_mine")]:
        del sys.modules[name]


def test_a_network_is_the_same_after_another_one_was_compiled(place, monkeypatch):
    """`torch.compile` exchanges a function of `nn.Module` for one of its own, for good."""
    before = key_of(place)

    def exchanged(self, state):
        self.__dict__.update(state)

    assert key_of(place) == before
    monkeypatch.setattr(torch.nn.Module, "__setstate__", exchanged)
    assert key_of(place) == before


#: The same job in other words.
ALIKE = {
    "method": [{"method": "hires_cam"}, {"method": ["hires_cam"]}, {"method": 2 * ["hires_cam"]}],
    "target": [{"target": 2}, {"target": "lesion"}, {"target": ["lesion"]}],
    "layer": [{"layer": "auto"}, {"layer": ["auto"]}, {}],
    "format": [{"format": ["nifti", "png"]}, {"format": ["png", "nifti", "png"]}],
    "axis": [{"axis": ["axial"]}, {"axis": None}, {"axis": "axial"}],
    "region": [{"target": 2, "region": "predicted"}, {"target": 2}],
    "case": [{"case": ""}, {"case": None}],
    "colormap": [{"colormap": None}, {"colormap": "inferno"}],
}


@pytest.mark.parametrize("name", ALIKE)
def test_the_same_job_in_other_words(place, name):
    assert len({key_of(place, **settings) for settings in ALIKE[name]}) == 1


@pytest.mark.parametrize("what", ["preprocessing", "a script"])
def test_a_bundles_own_settings(place, what):
    root = write_bundle(place.folder / "bundle", SPLEEN, scripts={"steps": "factor = 1"})
    before = key_of(place, f"bundle:{root}")
    if what == "a script":
        (root / "scripts" / "steps.py").write_text("factor = 2")
    else:
        file = root / "configs" / "inference.json"
        file.write_text(file.read_text().replace("-57", "-58"))
    assert key_of(place, f"bundle:{root}") != before


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_an_nnunet_folders_plans(place, name):
    folder = write_folder(place.folder)
    before = key_of(place, f"nnunet:{folder}")
    content = json.loads((folder / name).read_text())
    content["overwrite_image_reader_writer"] = "another"
    (folder / name).write_text(json.dumps(content))
    assert key_of(place, f"nnunet:{folder}") != before


def test_a_dicom_header(tmp_path):
    """Of a series, whatever its objects are written with."""
    files = write_series(tmp_path / "ct", np.arange(60.0).reshape(5, 4, 3), np.diag([1, 1, 3, 1]))
    before = place_code(load_scan(tmp_path / "ct"))
    assert place_code(load_scan(tmp_path / "ct")) == before
    for file in files:
        header = pydicom.dcmread(file)
        header.StudyDescription = "another"
        header.save_as(file)
    assert place_code(load_scan(tmp_path / "ct")) != before
