"""The way back from a bundle's logits: voxel for voxel the file that MONAI writes."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers_bundles import SPLEEN, metadata, of_prediction, run_by_monai, write_bundle, write_scan
from helpers_crossed import crossed
from scipy import ndimage

from seg3dcam import explain, load_model, load_scan
from seg3dcam.errors import Seg3dcamWarning
from seg3dcam.targets import ClassLogit

pytest.importorskip("SimpleITK")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:layer .* (explains|shows) nothing"),
]

AFFINE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.2, -0.15, 0.1) @ np.diag([0.9, 1.1, 2.4]) @ np.diag([-1, 1, 1]),
    [12.0, -30.0, 55.0],
)

SOFTMAX = of_prediction("Activationsd", softmax=True)
SIGMOID = of_prediction("Activationsd", sigmoid=True)
ARGMAX = of_prediction("AsDiscreted", argmax=True)
THRESHOLD = of_prediction("AsDiscreted", threshold=0.5)
ONE_HOT = of_prediction("AsDiscreted", argmax=True, to_onehot=3)
KEEP = of_prediction("KeepLargestConnectedComponentd", applied_labels=[1, 2])


def invert(nearest: bool) -> dict:
    return of_prediction(
        "Invertd", transform="@preprocessing", orig_keys="image", nearest_interp=nearest
    )


def save(**more) -> dict:
    return of_prediction("SaveImaged", **{"output_dir": "@output_dir", **more})


#: Postprocessing whose file holds labels.
LABELS = {
    "argmax, then back": [SOFTMAX, ARGMAX, invert(False), save()],
    "argmax, then back, nearest": [SOFTMAX, ARGMAX, invert(True), save()],
    "argmax of logits, largest, back": [ARGMAX, KEEP, invert(False), save(resample=False)],
    "whole numbers cut fractions off": [ARGMAX, invert(False), save(output_dtype="uint8")],
    "back, then argmax": [SOFTMAX, invert(False), ARGMAX, save()],
    "back, nearest, then argmax": [SOFTMAX, invert(True), ARGMAX, save()],
    "back, then argmax, then largest": [SOFTMAX, invert(False), ARGMAX, KEEP, save()],
    "back by the saver": [SOFTMAX, ARGMAX, save(resample=True)],
    "back by the saver, linearly": [SOFTMAX, ARGMAX, save(resample=True, mode="bilinear")],
    "sigmoid, but argmax": [SIGMOID, invert(False), ARGMAX, save()],
}

#: Postprocessing whose file holds one channel for each class.
CHANNELS = {
    "sigmoid, back, threshold": [SIGMOID, invert(False), THRESHOLD, save()],
    "back, sigmoid, threshold": [invert(False), SIGMOID, THRESHOLD, save()],
    "sigmoid, threshold, back": [SIGMOID, THRESHOLD, invert(False), save()],
    "sigmoid, threshold, back, nearest": [SIGMOID, THRESHOLD, invert(True), save()],
    "sigmoid, threshold of its own": [
        SIGMOID,
        invert(False),
        of_prediction("AsDiscreted", threshold=0.55),
        save(),
    ],
    "threshold of logits": [
        invert(False),
        of_prediction("AsDiscreted", threshold=0.0),
        save(),
    ],
    "probabilities": [SIGMOID, invert(False), save()],
    "one-hot, nearest": [SOFTMAX, ONE_HOT, invert(True), save()],
    "softmax, threshold": [SOFTMAX, invert(False), THRESHOLD, save()],
    "by the saver": [SIGMOID, THRESHOLD, save(resample=True)],
}


def noise(shape: tuple[int, ...] = (26, 30, 17)) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(1, *shape))
    return ndimage.gaussian_filter(values, (0, 1.5, 1.5, 1.0)) * 500 + 60


def masks_and_file(root: Path, post: list[dict], scan: Path, classes: int) -> tuple:
    def change(config):
        config["network_def"]["out_channels"] = classes
        config["postprocessing"]["transforms"] = post

    about = metadata(1, [f"class {number}" for number in range(classes)])
    write_bundle(root, SPLEEN, change=change, about=about)
    _, written = run_by_monai(root, scan)
    # Thresholds of logits say nothing of how classes exclude each other; a name does.
    model = load_model(f"bundle:{root}", trust=True)
    # The gradient of the input is the map that costs least, and the prediction is that of any.
    found = explain(load_scan(scan), model, ClassLogit(0, "volume"), method="gradient")
    return found.prediction.numpy(), written


@pytest.mark.parametrize("way", crossed(LABELS, rows=4))
def test_labels_are_those_of_monais_file(way, tmp_path):
    scan = write_scan(tmp_path / "scan.nii.gz", noise(), AFFINE)
    masks, written = masks_and_file(tmp_path / "b", LABELS[way], scan, 3)
    values = np.asarray(written.dataobj)
    assert np.array_equal(masks.sum(0), np.ones(values.shape))  # no voxel falls out
    assert np.array_equal(masks.argmax(0), np.rint(values))
    assert len(np.unique(masks.argmax(0))) > 1


@pytest.mark.parametrize(("way", "classes"), crossed(CHANNELS, [3, 1], rows=5))
def test_channels_are_those_of_monais_file(way, classes, tmp_path):
    if classes == 1 and "soft" in str(CHANNELS[way]) + way:
        pytest.skip("one class excludes no other")
    if classes == 3 and way == "threshold of logits":
        pytest.skip("whether these exclude each other is not said")
    scan = write_scan(tmp_path / "scan.nii.gz", noise(), AFFINE)
    masks, written = masks_and_file(tmp_path / "b", CHANNELS[way], scan, classes)
    values = np.asarray(written.dataobj).reshape(*masks.shape[1:], classes)
    assert np.array_equal(np.moveaxis(masks, 0, -1), values > 0.5)
    assert masks.any()
    assert not masks.all()


def test_what_is_done_to_a_joined_map_is_said(tmp_path):
    post = [
        SIGMOID,
        invert(False),
        THRESHOLD,
        of_prediction("Lambdad", func="$lambda x: x.sum(0, keepdim=True)"),
        of_prediction("FillHolesd"),
        save(),
    ]
    scan = write_scan(tmp_path / "scan.nii.gz", noise(), AFFINE)
    with pytest.warns(Seg3dcamWarning, match="joins classes into one map.*not seen: FillHolesd"):
        masks_and_file(tmp_path / "b", post, scan, 3)


def test_nothing_is_written_on_the_way(tmp_path):
    post = [SOFTMAX, invert(False), ARGMAX, save(), save(output_dir="elsewhere")]
    post.append(of_prediction("WriteFileMappingd", mapping_file_path=str(tmp_path / "map.json")))
    root = write_bundle(
        tmp_path / "b", SPLEEN, change=lambda c: c["postprocessing"].update(transforms=post)
    )
    before = sorted(tmp_path.rglob("*"))
    scan = load_scan(noise()[0], affine=AFFINE)
    model = load_model(f"bundle:{root}", trust=True)
    explain(scan, model, ClassLogit(0, "volume"), method="gradient")
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------- the reader of the images


#: MONAI's ITKReader without the package itk: the affine is made as there.
READER = """
import numpy as np
import SimpleITK
from monai.data import NibabelReader
from monai.data.utils import orientation_ras_lps

class ItkGeometry(NibabelReader):
    def _get_affine(self, img):
        found = SimpleITK.ReadImage(img.get_filename())
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(found.GetDirection(), (3, 3)) @ np.diag(found.GetSpacing())
        affine[:3, 3] = found.GetOrigin()
        return orientation_ras_lps(affine)
"""


def with_itk(config: dict) -> None:
    config["preprocessing"]["transforms"][0]["reader"] = "@reader"
    config["reader"] = "ITKReader"


def test_a_header_that_agrees_needs_no_itk(tmp_path):
    scan = write_scan(tmp_path / "scan.nii.gz", noise(), AFFINE)
    root = write_bundle(tmp_path / "b", SPLEEN, change=with_itk)
    plain = write_bundle(tmp_path / "c", SPLEEN)
    one, two = (
        load_model(f"bundle:{r}", trust=True).prepare(load_scan(scan)) for r in (root, plain)
    )
    assert torch.equal(one.as_tensor(), two.as_tensor())
    assert torch.equal(one.affine, two.affine)


@pytest.mark.few(2)
@pytest.mark.filterwarnings("ignore:.*(sform|qform)")  # a scan that says two places
@pytest.mark.parametrize("kind", ["pixdim", "qform", "neither form"])
def test_an_itk_readers_spacing_is_the_networks(kind, tmp_path):
    """The reference is MONAI's own run with an affine that ITK reads in the file."""
    image = nib.Nifti1Image(noise()[0].astype(np.float32), AFFINE)
    image.set_sform(AFFINE, 1)
    if kind == "pixdim":
        image.set_qform(None, 0)
        image.header["pixdim"][1:4] = [1.3, 1.4, 3.1]
    elif kind == "neither form":
        image.set_sform(AFFINE, 0)
        image.set_qform(AFFINE, 0)
    else:
        turned = AFFINE @ np.diag([1.2, 1.2, 1.2, 1])
        image.set_qform(turned, 1)
        image.header["pixdim"][1:4] = [1.08, 1.32, 2.88]
    nib.save(image, tmp_path / "scan.nii.gz")
    zooms = nib.load(tmp_path / "scan.nii.gz").header.get_zooms()
    assert np.allclose(zooms, [0.9, 1.1, 2.4]) == (kind == "neither form")
    scripts = {"reader": READER}
    root = write_bundle(tmp_path / "b", SPLEEN, change=with_itk, scripts=scripts)
    logits, written = run_by_monai(
        root,
        tmp_path / "scan.nii.gz",
        preprocessing__transforms__0__reader={"_target_": "scripts.reader.ItkGeometry"},
    )

    scan = load_scan(tmp_path / "scan.nii.gz")
    model = load_model(f"bundle:{root}", trust=True)
    with pytest.warns(Seg3dcamWarning, match="reads it with ITK, which takes its header otherwise"):
        prepared = model.prepare(scan)
    with pytest.warns(Seg3dcamWarning, match="results lie where the affine says"):
        found = explain(scan, model, ClassLogit(0, "volume"), method="gradient")
    assert tuple(prepared.shape[1:]) == tuple(logits.shape[1:])
    assert np.array_equal(found.prediction.numpy().argmax(0), np.asarray(written.dataobj))
    # The same voxel of the scan, by way of ITK's mm and by way of the scan's.
    own = np.linalg.inv(scan.affine) @ prepared.affine.numpy()
    steps = np.linalg.norm(written.affine[:3, :3] @ own[:3, :3], axis=0)
    assert np.allclose(steps, [1.5, 1.5, 2.0], atol=1e-3)
    assert json.dumps(dict(model.spec))
