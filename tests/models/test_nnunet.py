"""nnU-Net v2 folders: nnU-Net's own prediction, in its place, and no foreign code unasked."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from helpers_cases import Calls, seg3dcam, write_yaml
from helpers_crossed import crossed
from helpers_nnunet import (
    INSTANCE_NORM,
    OLD_UNET,
    TORCH_RESAMPLING,
    bright,
    predicted,
    write_case,
    write_folder,
)
from nnunetv2.imageio import simpleitk_reader_writer
from scipy import ndimage

from seg3dcam import explain, load_model, load_scan
from seg3dcam.cams.attributions import Gradient
from seg3dcam.errors import ConfigError, MissingExtraError, ModelError, ScanError, Seg3dcamWarning
from seg3dcam.network.ensemble import Ensemble
from seg3dcam.targets import ClassLogit

LAYER = "encoder.stages.0"

#: Turned about two axes, flipped, and thick: voxel -> RAS mm.
OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.2, -0.15, 0.1) @ np.diag([-0.9, 1.1, 2.4]), [12.0, -30.0, 55.0]
)


def noise(channels: int = 1, shape: tuple[int, ...] = (26, 22, 17), seed: int = 0) -> np.ndarray:
    """Return smooth noise with a rim of zeros, which nnU-Net crops away, (C, X, Y, Z)."""
    values = np.random.default_rng(seed).normal(size=(channels, *shape))
    values = ndimage.gaussian_filter(values, (0, 1.5, 1.5, 1.0))
    data = np.zeros_like(values)
    inner = (slice(None), slice(3, -2), slice(1, -4), slice(2, -1))
    data[inner] = values[inner] * 5 + 10
    return data


UNIT = np.diag([-1.0, -1, 1, 1])
TURNED = OBLIQUE[:3, :3] / np.linalg.norm(OBLIQUE[:3, :3], axis=0)

#: qform and its code, sform and its code, and pixdim: what public files say of the voxel size.
HEADERS = {
    "thick by pixdim, both forms": (np.diag([-1.3, -1.3, 4, 1]), 1, UNIT, 1, (1.3, 1.3, 4)),
    "thick by pixdim, sform alone": (None, 0, UNIT, 1, (1.3, 1.3, 4)),
    "along the axes, sform alone": (None, 0, np.eye(4), 1, (1.3, 1.3, 4)),
    "thick by the sform": (None, 0, np.diag([-1.3, 1.3, 4, 1]), 1, (1, 1, 1)),
    "oblique": (None, 0, nib.affines.from_matvec(TURNED, [5, 6, 7]), 1, (0.9, 1.1, 2.4)),
    "another order of axes": (
        np.diag([0.9, 1.1, 2.4, 1]),
        1,
        np.array([[0, 0, 2.4, 0], [-0.9, 0, 0, 4], [0, 1.1, 0, 0], [0, 0, 0, 1]]),
        1,
        (0.9, 1.1, 2.4),
    ),
}


@pytest.mark.filterwarnings("ignore:.*the header says two")
@pytest.mark.parametrize(
    ("case", "reader"), crossed(HEADERS, ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"])
)
def test_headers_that_say_two_voxel_sizes(case, reader, tmp_path):
    qform, qcode, sform, scode, pixdim = HEADERS[case]
    folder = write_folder(tmp_path, reader=reader, spacing=(4.0, 1.3, 1.3), patch=(8, 16, 16))
    image = nib.Nifti1Image(noise()[0].astype(np.float32), None)
    image.set_sform(sform, code=scode)
    image.set_qform(qform, code=qcode)
    image.header["pixdim"][1:4] = pixdim
    file = tmp_path / "case_0000.nii.gz"
    nib.save(image, file)
    *_, segmentation = predicted(folder, [file])

    scan, model = load_scan(file), load_model(f"nnunet:{folder}")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = explain(scan, model, ClassLogit(0, "volume"), method="gradient")
    assert np.array_equal(found.prediction.numpy().argmax(0), segmentation)
    assert np.array_equal(found.affine, nib.load(file).affine)
    assert found.volume().shape == scan.shape
    by_pixdim = reader != "NibabelIOWithReorient" or case == "along the axes, sform alone"
    differs = not np.allclose(pixdim, scan.spacing)
    own = [str(warning.message) for warning in said if warning.category is Seg3dcamWarning]
    assert any(f"{reader}, by which the model reads" in text for text in own) == (
        by_pixdim and differs
    )


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_other_formats_of_itk_are_prepared_as_nnunet_does(ending, tmp_path):
    """Their voxel size is written once, so that the affine says what the reader reads."""
    folder = write_folder(tmp_path)
    damaged(folder, "dataset.json", lambda dataset: dataset.update(file_ending=ending))
    nifti = write_case(tmp_path, noise(), OBLIQUE)
    scan = load_scan(nifti)
    image = SimpleITK.ReadImage(str(nifti[0]))
    image.SetSpacing([0.75, 1.1, 2.5])  # what no float32 changes, in the one or the other
    file = tmp_path / f"case_0000{ending}"
    SimpleITK.WriteImage(image, str(file))
    lps = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine = np.diag([-1, -1, 1, 1]) @ nib.affines.from_matvec(lps, image.GetOrigin())
    model = load_model(f"nnunet:{folder}")
    scan = load_scan(scan.data[0].numpy(), affine=affine)
    data, _, _ = prepared_by_nnunet(folder, [file])
    assert np.array_equal(model.prepare(scan).numpy(), data)


REGIONS = {"background": 0, "whole": [1, 2], "core": [2]}

FOLDERS = {
    "labels": {},
    "regions": {"labels": REGIONS},
    "folds and flips": {"folds": (0, 1), "mirror": (0, 1, 2)},
    "permuted, two channels": {"transpose": (1, 2, 0), "channels": 2, "spacing": (1, 1.2, 2)},
    "thick slices": {"spacing": (4.0, 1.0, 1.0), "patch": (8, 16, 16)},
    "one window": {"patch": (48, 48, 48)},
    "2d": {"configuration": "2d", "patch": (16, 16), "spacing": (1.2, 1.2), "mirror": (0, 1)},
    "2d, permuted": {
        "configuration": "2d",
        "patch": (16, 12),
        "spacing": (1.2, 1.2),
        "transpose": (2, 0, 1),
    },
    "reoriented": {"reader": "NibabelIOWithReorient"},
    "read by nibabel": {"reader": "NibabelIO"},
    "CT": {"norm": "CTNormalization"},
    "normalized inside": {"use_mask_for_norm": [True]},
    "residual encoder": {"network": "ResidualEncoderUNet", "arguments": INSTANCE_NORM},
    "resampled by torch": TORCH_RESAMPLING,
    "ignored label": {"labels": {"background": 0, "organ": 1, "lesion": 2, "ignore": 3}},
    "regions, ignored label": {"labels": {**REGIONS, "ignore": 3}},
}
if hasattr(simpleitk_reader_writer, "SimpleITKIOWithReorient"):  # since nnU-Net 2.6.2
    FOLDERS["reoriented by ITK"] = {"reader": "SimpleITKIOWithReorient"}


#: The others are slow where they are predicted, and not where they are prepared.
QUICK = ("labels", "regions", "folds and flips", "2d, permuted", "residual encoder")


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (case not in QUICK)) for case in FOLDERS],
)
def test_the_prediction_is_nnunets_own(case, tmp_path):
    settings = FOLDERS[case]
    folder = write_folder(tmp_path, **settings)
    files = write_case(tmp_path, noise(settings.get("channels", 1)), OBLIQUE)
    logits, in_half, segmentation = predicted(folder, files)

    model = load_model(f"nnunet:{folder}")
    scan = load_scan(files)
    # The gradient of the input is the map that costs least, and the prediction is that of any.
    found = explain(scan, model, ClassLogit(0, "volume"), method="gradient")
    prepared = model.prepare(scan)
    gradient = Gradient(model.module, sliding_window=model.window, activation=model.activation)
    own = gradient(prepared.as_tensor()[None], ClassLogit(0, "volume")).logits[0]
    assert (own - logits).abs().max() < 1e-4
    # Summed up in half precision, nnU-Net's own logits vanish in the corners of the volume.
    assert (own - in_half).abs().median() < 2e-3 * own.abs().max()
    assert np.array_equal(found.affine, nib.load(files[0]).affine)

    masks = found.prediction.numpy()
    if model.activation == "sigmoid":
        labels = np.where(masks[1], 2, np.where(masks[0], 1, 0))  # the later region wins
    else:
        assert (masks.sum(0) == 1).all()
        labels = masks.argmax(0)
    assert np.sort(np.bincount(labels.ravel()))[-2] > 50  # something to compare
    assert np.array_equal(labels, segmentation)


@pytest.mark.few(6)
@pytest.mark.parametrize("case", FOLDERS)
def test_what_the_network_sees_is_what_nnunet_prepares(case, tmp_path):
    settings = FOLDERS[case]
    folder = write_folder(tmp_path, **settings)
    files = write_case(tmp_path, noise(settings.get("channels", 1)), OBLIQUE)
    scan = load_scan(files)
    before = scan.data.clone()
    prepared = load_model(f"nnunet:{folder}").prepare(scan)
    assert torch.equal(scan.data, before)

    data, _, _ = prepared_by_nnunet(folder, files, settings.get("configuration", "3d_fullres"))
    assert np.array_equal(prepared.numpy(), data)


def prepared_by_nnunet(folder: Path, files: list[Path], configuration: str = "3d_fullres"):
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(str(folder / "plans.json"))
    planned = plans.get_configuration(configuration)
    return planned.preprocessor_class(verbose=False).run_case(
        [str(file) for file in files], None, plans, planned, str(folder / "dataset.json")
    )


BLOB = (9, 13, 11)


def with_blob() -> np.ndarray:
    """Return a case with one bright ball in noise."""
    data = noise(shape=(26, 30, 21))
    inside = data != 0
    data[inside] = 10 + 0.05 * (data[inside] - 10)
    grid = np.stack(np.meshgrid(*map(np.arange, data.shape[1:]), indexing="ij"), -1)
    distance = np.linalg.norm((grid - BLOB) * [0.9, 1.1, 2.4], axis=-1)
    return data + 10 * np.exp(-((distance / 3.5) ** 2)) * inside


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "case",
    crossed(
        ["labels", "2d", "folds and flips", "permuted", "2d, permuted", "thick slices"], rows=3
    ),
)
def test_a_planted_cue_is_found_at_its_place(case, tmp_path):
    settings = {**FOLDERS.get(case, {"transpose": (2, 0, 1), "spacing": (1.0, 1.4, 1.9)})}
    folder = write_folder(
        tmp_path, **{**settings, "labels": {"background": 0, "blob": 1}, "fill": bright}
    )
    files = write_case(tmp_path, with_blob(), OBLIQUE)
    found = explain(load_scan(files), load_model(f"nnunet:{folder}"), "blob", layers=LAYER)
    assert found.status[LAYER] == "ok"
    _, position = found.peak()
    place = nib.affines.apply_affine(found.affine, BLOB)
    assert np.linalg.norm(np.subtract(position, place)) < 1.3  # within half a voxel's diagonal
    volume, mask = found.volume().numpy(), found.mask.numpy()
    centre = ndimage.center_of_mass(volume**2)
    assert np.linalg.norm((np.subtract(centre, BLOB)) * [0.9, 1.1, 2.4]) < 0.5
    assert mask[BLOB]
    assert mask.sum() > 10


def test_the_class_that_is_asked_for_is_explained(tmp_path):
    folder = write_folder(tmp_path)
    scan = load_scan(write_case(tmp_path, noise(), OBLIQUE))
    model = load_model(f"nnunet:{folder}")
    seen = []
    head = model.module.decoder.seg_layers[-1]
    explain(scan, model, ClassLogit(1, "volume"), layers=LAYER)  # gets to know the network

    def note(module, given, output):
        if output.requires_grad:
            output.register_hook(seen.append)

    for index in (1, 2):
        handle = head.register_forward_hook(note)
        found = explain(scan, model, ClassLogit(index, "volume"), layers=LAYER)
        handle.remove()
        upstream = torch.cat(seen)
        seen.clear()
        others = [channel for channel in range(3) if channel != index]
        assert not upstream[:, others].any()
        assert upstream[:, index].any()
        map_ = found.maps[LAYER]
        if index == 1:
            first = map_
    assert (first - map_).abs().max() > 0.1 * first.abs().max()
    correlation = np.corrcoef(first.flatten(), map_.flatten())[0, 1]
    assert correlation < 0.99


def test_classes_are_named_in_the_order_of_the_channels(tmp_path):
    labels = {"lesion": 2, "background": 0, "organ": 1, "ignore": 3}
    model = load_model(f"nnunet:{write_folder(tmp_path / 'labels', labels=labels)}")
    assert (model.class_names, model.activation) == (("background", "organ", "lesion"), "softmax")
    labels = {"background": 0, "core": [2], "whole": [1, 2], "edge": 1, "ignore": 3}
    model = load_model(f"nnunet:{write_folder(tmp_path / 'regions', labels=labels)}")
    assert (model.class_names, model.activation) == (("core", "whole", "edge"), "sigmoid")


def test_plans_of_older_versions_are_read(tmp_path):
    """Before nnU-Net 2.5 plans described a U-Net by keys of their own."""
    folder = write_folder(tmp_path, arguments=INSTANCE_NORM)
    new = load_model(f"nnunet:{folder}")

    def outdate(plans):
        configuration = plans["configurations"]["3d_fullres"]
        del configuration["architecture"]
        configuration |= {"UNet_class_name": "PlainConvUNet", **OLD_UNET}

    damaged(folder, "plans.json", outdate)
    old = load_model(f"nnunet:{folder}")
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(old.module(x), new.module(x))


def test_settings_of_the_folder(tmp_path):
    folder = write_folder(tmp_path, folds=(0, 2), mirror=(1,), channels=2, labels=REGIONS)
    model = load_model(f"nnunet:{folder}")
    assert isinstance(model.module, Ensemble)
    assert [member.flips for member in model.module.members] == [(), (1,), (), (1,)]
    assert (model.class_names, model.activation) == (("whole", "core"), "sigmoid")
    assert (model.in_channels, model.window.overlap) == (2, 0.5)
    assert model.spec["folds"] == [0, 2]
    assert model.spec["channels"] == {"0": "channel 0", "1": "channel 1"}
    assert str(tmp_path) not in json.dumps(dict(model.spec))
    plain = load_model(f"nnunet:{folder}", folds=[2], mirroring=False, tile_step_size=0.25)
    assert not isinstance(plain.module, Ensemble)
    assert plain.window.overlap == 0.75
    spec = write_yaml(folder.parent / "model.yaml", {"nnunet": folder.name, "folds": [2]})
    assert load_model(spec).spec["folds"] == [2]


# ---------------------------------------------------------------- trained by nnU-Net itself


@pytest.mark.slow
def test_what_nnunets_trainer_leaves_is_explained(tmp_path):
    """Balls in noise, learned in a minute: the checkpoint is real, and loads without trust."""
    script = Path(__file__).parents[1] / "train_nnunet.py"
    environment = {**os.environ, "nnUNet_compile": "f"}
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        environment[name] = str(tmp_path / name)
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = (tmp_path / "nnUNet_results").glob("*/*")
    file = tmp_path / "nnUNet_raw" / "Dataset901_Balls" / "imagesTr" / "case_00_0000.nii.gz"
    truth = nib.load(file.parents[1] / "labelsTr" / "case_00.nii.gz").get_fdata() > 0

    *_, segmentation = predicted(folder, [file])
    model, scan = load_model(f"nnunet:{folder}"), load_scan(file)
    found = explain(scan, model, "ball")
    assert isinstance(model.module, Ensemble)  # the trainer allows all flips
    assert len(model.module.members) == 8
    assert np.array_equal(found.mask.numpy(), segmentation == 1)
    overlap = 2 * (found.mask.numpy() & truth).sum() / (found.mask.numpy().sum() + truth.sum())
    assert overlap > 0.5  # it has learned
    assert set(found.status.values()) == {"ok"}
    heat = found.volume().numpy()
    assert heat[truth].mean() > 2 * heat[~truth].mean()  # at the bottleneck, of 4 x 4 x 6 mm
    heat = explain(scan, model, "ball", layers="decoder.stages.1").volume().numpy()
    gap = np.subtract(ndimage.center_of_mass(heat), ndimage.center_of_mass(truth))
    assert np.linalg.norm(gap * scan.spacing) < 1


# ---------------------------------------------------------------- the command line


def test_the_command_line_explains_a_case(tmp_path, capsys):
    folder = write_folder(tmp_path, channels=2, folds=(0, 1))
    files = write_case(tmp_path, noise(2), OBLIQUE)
    out = tmp_path / "out"
    outcome = seg3dcam(
        *("explain", *files, "--model", f"nnunet:{folder}", "--target", "organ"),
        *("--layer", LAYER, "--format", "nifti", "--out", out),
    )
    assert outcome.code == 0, outcome.err
    assert "nnUNet_raw" not in outcome.out
    cam = nib.load(out / "cam_organ.nii.gz")
    assert np.array_equal(cam.affine, nib.load(files[0]).affine)
    assert cam.get_data_dtype() == np.float32
    record = json.loads((out / "case.json").read_text())
    assert record["explanations"][0]["model"]["name"] == "nnU-Net Dataset900_Tiny 3d_fullres"
    outcome = seg3dcam("layers", "--model", f"nnunet:{folder}")
    assert outcome.code == 0, outcome.err
    assert "encoder.stages.1" in outcome.out
    outcome = seg3dcam("explain", files[0], "--model", f"nnunet:{folder}", "--out", out)
    assert outcome.code == 1
    assert "has 1 channel, the model takes 2" in " ".join(outcome.err.split())


# ---------------------------------------------------------------- bad folders


def one(plans):
    return plans["configurations"]["3d_fullres"]


def damaged(folder: Path, file: str, change) -> None:
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))


def test_a_folder_that_is_none_says_what_one_looks_like(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        load_model(f"nnunet:{tmp_path / 'none'}")
    with pytest.raises(ModelError, match=r"plans.json and dataset.json missing.*fold_0/checkpoint"):
        load_model(f"nnunet:{tmp_path}")
    folder = write_folder(tmp_path)
    for outer in (folder.parent, tmp_path):
        with pytest.raises(ModelError, match=f"name one of them: nnunet:{folder}"):
            load_model(f"nnunet:{outer}")
    with pytest.raises(ModelError, match=rf"is one fold.*give nnunet:{folder}, and folds: \[0\]"):
        load_model(f"nnunet:{folder / 'fold_0'}")
    with pytest.raises(ModelError, match=r"plans.json is no folder: unzip"):
        load_model(f"nnunet:{folder / 'plans.json'}")
    (folder / "dataset.json").unlink()
    with pytest.raises(ModelError, match=r"dataset.json missing"):
        load_model(f"nnunet:{folder}")
    (folder / "dataset.json").write_text("{")
    with pytest.raises(ConfigError, match=r"dataset.json: cannot be read as JSON"):
        load_model(f"nnunet:{folder}")


def test_folds_and_checkpoints_that_are_not_there_are_named(tmp_path):
    folder = write_folder(tmp_path, folds=(0, 1))
    with pytest.raises(ModelError, match=r"_final.pth of fold 3; there is one of 0, 1"):
        load_model(f"nnunet:{folder}", folds=[0, 3])
    for fold in (0, 1):
        place = folder / f"fold_{fold}"
        (place / "checkpoint_final.pth").rename(place / "checkpoint_best.pth")
    with pytest.raises(ModelError, match=r"there is checkpoint_best.pth: set checkpoint"):
        load_model(f"nnunet:{folder}")
    assert load_model(f"nnunet:{folder}", checkpoint="checkpoint_best.pth").spec["folds"] == [0, 1]
    with pytest.raises(ConfigError, match="unknown key, did you mean 'checkpoint'"):
        load_model(f"nnunet:{folder}", checkpoints="checkpoint_best.pth")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("plans.json", lambda p: p["configurations"].clear(), "no configuration '3d_fullres'"),
        ("plans.json", lambda p: one(p).update(preprocessor_name="Mine"), "name 'Mine': there is"),
        ("plans.json", lambda p: one(p).update(resampling_fn_data="mine"), "data 'mine': nnU-Net"),
        (
            "plans.json",
            lambda p: one(p).update(normalization_schemes=["My"]),
            "'My': there is none",
        ),
        ("dataset.json", lambda d: d["labels"].update(more=3), "seg_layers.*the network has"),
    ],
)
def test_files_that_do_not_fit_each_other(file, change, message, tmp_path):
    folder = write_folder(tmp_path)
    damaged(folder, file, change)
    with pytest.raises(ModelError, match=message):
        load_model(f"nnunet:{folder}")


@pytest.mark.parametrize("way", ["data", "probabilities"])
def test_what_nnunet_fails_at_is_said(way, tmp_path, monkeypatch):
    from nnunetv2.preprocessing.resampling import default_resampling

    folder = write_folder(tmp_path)
    scan = load_scan(write_case(tmp_path, noise(), OBLIQUE))
    model = load_model(f"nnunet:{folder}")
    if way == "data":
        monkeypatch.delattr(default_resampling, "resample_data_or_seg")
        with pytest.raises(ScanError, match=r"case_0000: nnU-Net's preparation fails: NameError"):
            model.prepare(scan)
    else:
        prepared = model.prepare(scan)
        monkeypatch.delattr(default_resampling, "resample_data_or_seg")
        with pytest.raises(ScanError, match=r"case_0000: nnU-Net's way back fails: NameError"):
            model.restore(torch.zeros(3, *prepared.shape[1:]), scan, prepared)


def test_a_second_stage_is_refused(tmp_path):
    folder = write_folder(tmp_path, previous_stage="3d_lowres")
    with pytest.raises(ModelError, match=r"second stage of a cascade.*3d_lowres"):
        load_model(f"nnunet:{folder}")


def test_damaged_weights_are_refused(tmp_path):
    def broken(network, fold):
        next(network.parameters()).data[:] = float("nan")

    folder = write_folder(tmp_path, fill=broken)
    with pytest.raises(ModelError, match=r"fold_0/checkpoint_final.pth: the weights hold NaN"):
        load_model(f"nnunet:{folder}")
    file = folder / "fold_0" / "checkpoint_final.pth"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ModelError, match="cannot be read as a checkpoint"):
        load_model(f"nnunet:{folder}")
    torch.save({"state_dict": {}}, file)
    with pytest.raises(ModelError, match=r"nnU-Net v2:\s+init_args: missing\s+network_w"):
        load_model(f"nnunet:{folder}")
    torch.save({"network_weights": 1, "trainer_name": "nnUNetTrainer", "init_args": {}}, file)
    with pytest.raises(
        ModelError, match=r"nnU-Net v2:\s+init_args.configuration: missing\s+network_weights"
    ):
        load_model(f"nnunet:{folder}")


def test_a_malicious_checkpoint_runs_nothing(tmp_path):
    folder, marker = write_folder(tmp_path), tmp_path / "ran"
    file = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    torch.save({**content, "evil": Calls(os.system, f"touch {marker}")}, file)
    with pytest.raises(ModelError, match=r"posix.system.*--trust"):
        load_model(f"nnunet:{folder}")
    assert not marker.exists()
    outcome = seg3dcam(
        "explain", "x.nii.gz", "--model", f"nnunet:{folder}", "--out", tmp_path / "o"
    )
    assert outcome.code == 1
    assert not marker.exists()
    with file.open("wb") as stream:
        pickle.dump(Calls(os.system, f"touch {marker}"), stream)
    with pytest.raises(ModelError):
        load_model(f"nnunet:{folder}")
    assert not marker.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"network_class_name": "os.system"},
        {"nonlin": "torch.nn.functional.torch.os.system", "nonlin_kwargs": {"command": "touch {}"}},
        {"conv_op": "subprocess.Popen"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_malicious_plans_run_nothing(change, tmp_path):
    folder, marker = write_folder(tmp_path), tmp_path / "ran"

    def spoil(plans):
        architecture = plans["configurations"]["3d_fullres"]["architecture"]
        for key, value in change.items():
            place = architecture if key in architecture else architecture["arch_kwargs"]
            place[key] = json.loads(json.dumps(value).replace("{}", str(marker)))

    damaged(folder, "plans.json", spoil)
    with pytest.raises(ModelError, match=r"run its code.*--trust"):
        load_model(f"nnunet:{folder}")
    assert not marker.exists()


def change_checkpoint(folder: Path, **changes) -> None:
    file = folder / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(file, weights_only=False), **changes}, file)


def test_a_trusted_checkpoint_may_hold_more_than_tensors(tmp_path):
    folder = write_folder(tmp_path)
    change_checkpoint(folder, made_by=Path("training"))
    with pytest.raises(ModelError, match=r"more than tensors and numbers \(pathlib.*--trust"):
        load_model(f"nnunet:{folder}")
    plain = load_model(f"nnunet:{write_folder(tmp_path / 'plain')}")
    assert load_model(f"nnunet:{folder}", trust=True).fingerprint() == plain.fingerprint()


def test_wrapped_networks_are_unwrapped(tmp_path):
    folder = write_folder(tmp_path)
    plain = load_model(f"nnunet:{folder}").fingerprint()
    weights = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)[
        "network_weights"
    ]
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        wrapped = {prefix + key: value for key, value in weights.items()}
        change_checkpoint(folder, network_weights=wrapped)
        assert load_model(f"nnunet:{folder}").fingerprint() == plain


@pytest.mark.parametrize("name", ["nnUNetTrainerOfMine", "torch"])
def test_a_trainer_of_somebodys_own_must_be_findable(name, tmp_path):
    folder = write_folder(tmp_path)
    change_checkpoint(folder, trainer_name=name)
    for trust in (False, True):
        with pytest.raises(ModelError, match=f"trainer '{name}' is not in the installed nnU-Net"):
            load_model(f"nnunet:{folder}", trust=trust)


def test_trainers_in_other_places_need_trust(tmp_path, monkeypatch):
    pytest.importorskip("nnunetv2.utilities.find_objects", reason="since nnU-Net 2.8")
    folder, place, marker = write_folder(tmp_path), tmp_path / "trainers", tmp_path / "ran"
    place.mkdir()
    (place / "of_mine.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class nnUNetTrainerOfMine(nnUNetTrainer): pass\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", str(place))
    change_checkpoint(folder, trainer_name="nnUNetTrainerOfMine")
    with pytest.raises(ModelError, match=r"nnUNet_extTrainer.*--trust"):
        load_model(f"nnunet:{folder}")
    assert not marker.exists()
    assert load_model(f"nnunet:{folder}", trust=True).spec["trainer"] == "nnUNetTrainerOfMine"
    assert marker.exists()


def test_without_nnunet_the_extra_is_named(tmp_path, monkeypatch):
    folder = write_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "nnunetv2.utilities.label_handling", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'seg3dcam\[nnunet\]'"):
        load_model(f"nnunet:{folder}")
