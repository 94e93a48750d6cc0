"""A user's mistake: the exit code, what is said, and that nothing half-written is left.

Every row breaks one thing in a case that works. What is said must name what is wrong and what is
legal. Exit codes: 1 what was given cannot be used, 2 the command itself is wrong.
"""

from __future__ import annotations

import errno
import gzip
import os
import pickle
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers_cases import (
    OBLIQUE,
    PICTURE,
    PICTURES,
    SHAPE,
    Calls,
    Place,
    arguments,
    brightness_network,
    contents,
    seg3dcam,
    voxels,
    write_model,
    write_scan,
    write_yaml,
)
from safetensors.torch import save_file

pytestmark = pytest.mark.usefixtures("explained_once", "measured_once")


def refused(place, code, said, *options, scans=()):
    """Run, and check the exit code, every word of the message, and that no file appeared."""
    before = contents(place.folder)
    outcome = place.explain(*options, scans=scans)
    assert outcome.code == code, outcome.err
    for words in said:
        assert words in outcome.complaint
    assert outcome.err.startswith(("error: ", "warning: "))
    assert outcome.out == ""
    after = contents(place.folder)
    after.pop("out", None)  # an empty folder may be there
    assert after == before
    return outcome


# --------------------------------------------------------------------------------------- scans


def header_edited(place, **fields):
    """Write the scan without any help of nibabel, which would repair it."""
    image = nib.Nifti1Image(voxels(), OBLIQUE)
    image.set_sform(OBLIQUE, 1)
    image.set_qform(None, 0)
    nib.save(image, place.scan)
    raw = bytearray(gzip.decompress(place.scan.read_bytes()))
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    for field, value in fields.items():
        header[field] = value
    raw[:348] = header.binaryblock
    place.scan.write_bytes(gzip.compress(bytes(raw)))


def with_voxel(value):
    array = voxels()
    array[3, 4, 5] = value
    return array


NO_ROWS = {"srow_x": 0, "srow_y": 0, "srow_z": 0}

BAD_SCANS = {
    "no such file": (
        lambda place: place.scan.unlink(),
        ["scan.nii.gz", "there is no such file"],
    ),
    "a folder": (
        lambda place: (place.scan.unlink(), place.scan.mkdir()),
        ["scan.nii.gz", "is a folder", "Legal: one .nii or .nii.gz file"],
    ),
    "not a NIfTI": (
        lambda place: place.scan.write_bytes(b"a photograph" * 99),
        ["scan.nii.gz", "not a NIfTI file", "Legal: NIfTI-1 or NIfTI-2"],
    ),
    "an empty file": (
        lambda place: place.scan.write_bytes(b""),
        ["scan.nii.gz", "it holds only 0 bytes"],
    ),
    "truncated gzip": (
        lambda place: place.scan.write_bytes(place.scan.read_bytes()[:-2000]),
        ["scan.nii.gz", "damaged or cut short", "again"],
    ),
    "4-D where 3-D is meant": (
        lambda place: write_scan(place.scan, np.stack([voxels()] * 2, axis=-1)),
        ["the scan has 2 channels, the model takes 1", "Channels are the 4th axis"],
    ),
    "5-D": (
        lambda place: write_scan(place.scan, np.ones((*SHAPE, 2, 3), np.float32)),
        ["scan.nii.gz", "5-D", "Legal: (X, Y, Z)"],
    ),
    "2-D": (
        lambda place: write_scan(place.scan, np.ones((20, 24), np.float32)),
        ["scan.nii.gz", "2-D", "Legal: (X, Y, Z)"],
    ),
    "zero affine": (
        lambda place: header_edited(place, **NO_ROWS),
        ["scan.nii.gz", "the affine is all zero", "Legal: a (4, 4) invertible matrix"],
    ),
    "NaN in the affine": (
        lambda place: header_edited(place, srow_x=np.nan),
        ["scan.nii.gz", "the affine holds NaN", "Legal: a (4, 4) invertible matrix"],
    ),
    "flat affine": (
        lambda place: header_edited(place, srow_z=0),
        ["scan.nii.gz", "the affine is singular", "Legal: a (4, 4) invertible matrix"],
    ),
    "NaN voxel": (
        lambda place: write_scan(place.scan, with_voxel(np.nan)),
        ["scan.nii.gz", "1 of 8640 voxels are NaN", "(3, 4, 5)", "must be finite"],
    ),
    "infinite voxel": (
        lambda place: write_scan(place.scan, with_voxel(-np.inf)),
        ["scan.nii.gz", "1 of 8640 voxels are NaN or infinite", "(3, 4, 5)"],
    ),
    "all zero": (
        lambda place: write_scan(place.scan, np.zeros(SHAPE, np.float32)),
        ["scan.nii.gz", "all voxels are 0"],
    ),
    "complex": (
        lambda place: write_scan(place.scan, voxels().astype(np.complex64)),
        ["scan.nii.gz", "complex", "Legal: integers or real"],
    ),
}


@pytest.mark.parametrize(("spoil", "said"), BAD_SCANS.values(), ids=BAD_SCANS)
def test_bad_scan(place, spoil, said):
    spoil(place)
    refused(place, 1, said)


@pytest.mark.parametrize("name", ["truncated gzip", "NaN voxel"])
def test_a_bad_scan_leaves_the_earlier_case_as_it_was(place, name):
    assert place.explain().code == 0
    case = contents(place.out)
    BAD_SCANS[name][0](place)
    assert place.explain().code == 1
    assert contents(place.out) == case


def test_a_scan_of_another_format(place):
    other = place.scan.rename(place.folder / "scan.mha")
    refused(place, 1, ["scan.mha", "not a MetaImage"], scans=[other])
    other = other.rename(place.folder / "scan.img.xz")
    refused(place, 1, ["scan.img.xz", "Legal: .nii, .nii.gz"], scans=[other])


def test_channels_on_different_grids(place):
    other = write_scan(place.folder / "other.nii.gz", affine=OBLIQUE + np.eye(4, k=3))
    said = ["scan.nii.gz", "other.nii.gz", "not on the same grid", "resample the second"]
    refused(place, 1, said, scans=[place.scan, other])


def test_too_few_channels(tmp_path):
    place = Place.at(tmp_path, gains=[[0, 0], [10, 0], [30, 0]])
    refused(place, 1, ["the scan has 1 channel, the model takes 2", "one file each"])


def test_form_codes_of_zero_only_warn(place):
    header_edited(place, sform_code=0, qform_code=0)
    outcome = place.explain()
    assert outcome.code == 0
    (line,) = outcome.err.splitlines()
    assert line.startswith("warning: ")
    assert "qform and sform codes are both 0" in line


def test_a_class_that_is_not_predicted(place):
    write_scan(place.scan, voxels(lesion=False))
    said = ["log-odds of", "the region is empty", "Predicted: "]
    refused(place, 1, said, "--target", "lesion")


def test_no_class_is_predicted_at_all(place):
    write_scan(place.scan, voxels(lesion=False, organ=False))
    refused(place, 1, ["predicts no foreground class", "orientation, spacing and intensity"])


def test_cropping_leaves_nothing(place):
    write_model(place.folder, prepare={"intensity": {"range": [50, 100]}, "crop_foreground": True})
    refused(place, 1, ["scan: nothing is left after preparation", "intensity settings"])


# ------------------------------------------------------------------------------------- weights


def weights(place):
    return place.folder / "model.safetensors"


def save_weights(place, change):
    state = brightness_network().state_dict()
    change(state)
    save_file(state, weights(place))


HEAD, DOWN = "model.2.conv.bias", "model.0.conv.weight"

NOISE = np.random.default_rng(0).bytes(999)

BAD_WEIGHTS = {
    "missing": (
        lambda place: weights(place).unlink(),
        ["model.safetensors: no such weights file", "relative to the model's YAML"],
    ),
    "corrupt": (
        lambda place: weights(place).write_bytes(NOISE),
        ["model.safetensors: cannot be read as weights", "Legal are .safetensors"],
    ),
    "cut short": (
        lambda place: weights(place).write_bytes(weights(place).read_bytes()[:-9]),
        ["model.safetensors: cannot be read as weights", "Legal are .safetensors"],
    ),
    "empty": (
        lambda place: weights(place).write_bytes(b""),
        ["model.safetensors: cannot be read as weights", "Legal are .safetensors"],
    ),
    "a key is missing": (
        lambda place: save_weights(place, lambda state: state.pop(HEAD)),
        ["the weights do not fit monai.networks.nets:UNet", f"missing in the file: {HEAD}"],
    ),
    "a key is unknown": (
        lambda place: save_weights(place, lambda state: state.update(extra=torch.ones(1))),
        ["the weights do not fit", "unknown to the network: extra"],
    ),
    "another shape": (
        lambda place: save_weights(
            place, lambda state: state.update({DOWN: torch.ones(4, 2, 3, 3, 3)})
        ),
        ["do not fit", f"{DOWN} is (4, 2, 3, 3, 3), the network has (4, 1, 3, 3, 3)"],
    ),
    "NaN": (
        lambda place: save_weights(place, lambda state: state[HEAD].fill_(torch.nan)),
        ["NaN"],
    ),
}


@pytest.mark.parametrize(("spoil", "said"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_bad_weights(place, spoil, said):
    spoil(place)
    refused(place, 1, said)


GIT_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\x80\x02}q\x00", b"PK\x03\x04 no zip", NOISE, GIT_LFS],
    ids=["empty", "text", "cut pickle", "cut zip", "noise", "git-lfs pointer"],
)
def test_bad_pytorch_file(place, content):
    (place.folder / "net.pt").write_bytes(content)
    write_model(place.folder, weights="net.pt")
    refused(place, 1, ["net.pt: cannot be read as weights", "Legal are .safetensors"])


@pytest.mark.parametrize("writer", ["torch", "pickle"])
@pytest.mark.parametrize("trust", [(), ("--trust",)], ids=["", "--trust"])
def test_a_malicious_pickle_does_not_run(place, writer, trust, tmp_path_factory):
    mark = tmp_path_factory.mktemp("elsewhere") / "mark"
    state = {**brightness_network().state_dict(), "extra": Calls(open, str(mark), "w")}
    if writer == "torch":
        torch.save(state, place.folder / "net.pt")
    else:
        (place.folder / "net.pt").write_bytes(pickle.dumps(state))
    write_model(place.folder, weights="net.pt")
    refused(place, 1, ["net.pt: cannot be read as weights"], *trust)
    assert not mark.exists()


# ------------------------------------------------------------------------------------- the spec

UNET = "monai.networks.nets:UNet"

BAD_MODELS = {
    "factory without colon": ({"factory": "UNet"}, 2, ["model.yaml", "factory", "'UNet'"]),
    "unknown class": (
        {"factory": "monai.networks.nets:Unett"},
        1,
        ["model.yaml", "no 'Unett' in monai.networks.nets", "did you mean", "'UNet'"],
    ),
    "unknown module": ({"factory": "monai.networks.nets.nope:UNet"}, 1, ["model.yaml", "nope"]),
    "not a network": (
        {"factory": "monai.networks.nets.unet:Sequence"},
        1,
        ["monai.networks.nets.unet:Sequence is no torch.nn.Module class", "--trust"],
    ),
    "foreign module": (
        {"factory": "my_networks:Net"},
        1,
        ["my_networks:Net is not from monai.networks.nets", "run its code", "--trust"],
    ),
    "trusted name as a prefix only": (
        {"factory": "monai.networks.nets_of_mine:Net"},
        1,
        ["monai.networks.nets_of_mine:Net is not from", "--trust"],
    ),
    "unknown argument": (
        {"arguments": {**arguments(), "chanels": 3}},
        1,
        ["model.yaml", "UNet does not accept these arguments", "'chanels'"],
    ),
    "missing argument": (
        {"arguments": {"spatial_dims": 3}},
        1,
        ["model.yaml", "UNet does not accept these arguments", "'in_channels'"],
    ),
    "unknown key": (
        {"activaton": "softmax"},
        2,
        ["model.yaml", "activaton: unknown key, did you mean 'activation'"],
    ),
    "unknown key, one level down": (
        {"window": {"roi_size": 16, "overlaps": 0.5}},
        2,
        ["window.overlaps: unknown key, did you mean 'overlap'"],
    ),
    "unknown key, two levels down": (
        {"prepare": {"intensity": {"zscor": "all"}}},
        2,
        ["prepare.intensity.zscor: unknown key, did you mean 'zscore'"],
    ),
    "key with a hyphen": (
        {"window": {"roi-size": 16}},
        2,
        ["window.roi-size: unknown key, did you mean 'roi_size'"],
    ),
    "weights not named": ({"weights": None}, 2, ["model.yaml", "weights: missing"]),
    "overlap of 1.5": (
        {"window": {"roi_size": 16, "overlap": 1.5}},
        2,
        ["window.overlap", "less than 1", "1.5"],
    ),
    "roi size 0": ({"window": {"roi_size": 0}}, 2, ["window.roi_size", "0"]),
    "roi size -5": ({"window": {"roi_size": -5}}, 2, ["window.roi_size", "-5"]),
    "roi size of two axes": (
        {"window": {"roi_size": [16, 16]}},
        2,
        ["roi_size (16, 16) has 2 numbers; the volume has 3 axes"],
    ),
    "roi size of text": (
        {"window": {"roi_size": "large"}},
        2,
        ["window.roi_size: ", "'large'"],
    ),
    "roi size that the network cannot take": (
        {"window": {"roi_size": 15}},
        1,
        ["(15, 15, 15)", "(1, 3, 16, 16, 16)"],
    ),
    "unknown window mode": (
        {"window": {"roi_size": 16, "mode": "gauss"}},
        2,
        ["window.mode", "'gaussian' or 'constant'", "'gauss'"],
    ),
    "reflection of more than there is": (
        {"window": {"roi_size": 64, "padding_mode": "reflect"}},
        2,
        ["reflect"],
    ),
    "orientation XYZ": (
        {"prepare": {"orientation": "XYZ"}},
        2,
        ["prepare.orientation", "'XYZ'", "RAS"],
    ),
    "orientation RRS": ({"prepare": {"orientation": "RRS"}}, 2, ["prepare.orientation", "'RRS'"]),
    "spacing 0": ({"prepare": {"spacing": [0, 1, 1]}}, 2, ["prepare.spacing", "0"]),
    "spacing -1": ({"prepare": {"spacing": [1, 1, -1]}}, 2, ["prepare.spacing", "-1"]),
    "spacing NaN": ({"prepare": {"spacing": [1, float("nan"), 1]}}, 2, ["prepare.spacing", "nan"]),
    "spacing of two axes": ({"prepare": {"spacing": [1, 1]}}, 2, ["prepare.spacing", "missing"]),
    "two intensity keys": (
        {"prepare": {"intensity": {"range": [0, 1], "zscore": "all"}}},
        2,
        ["prepare.intensity: give exactly one of range, percentiles, zscore"],
    ),
    "no intensity key": (
        {"prepare": {"intensity": {}}},
        2,
        ["prepare.intensity: give exactly one of range, percentiles, zscore"],
    ),
    "range upside down": (
        {"prepare": {"intensity": {"range": [200, -100]}}},
        2,
        ["the lower bound must be below the upper one", "[200.0, -100.0]"],
    ),
    "infinite range": (
        {"prepare": {"intensity": {"range": [float("-inf"), 100]}}},
        2,
        ["prepare.intensity", "-inf"],
    ),
    "percentile of 200": (
        {"prepare": {"intensity": {"percentiles": [1, 200]}}},
        2,
        ["percentiles lie between 0 and 100", "200"],
    ),
    "unknown zscore": (
        {"prepare": {"intensity": {"zscore": "some"}}},
        2,
        ["prepare.intensity.zscore", "'all' or 'nonzero'", "'some'"],
    ),
    "too few class names": (
        {"classes": ["background", "organ"]},
        1,
        ["output has 3 channels, but 2 classes are named: background, organ"],
    ),
    "no class names": ({"classes": []}, 2, ["model.yaml", "classes"]),
    "a class name twice": (
        {"classes": ["background", "lesion", "lesion"]},
        2,
        ["model.yaml", "classes", "'lesion'"],
    ),
    "class name that YAML takes for a boolean": (
        {"classes": ["background", False, "lesion"]},
        2,
        ["classes.1", "valid string", "False"],
    ),
    "unknown activation": (
        {"activation": "relu"},
        2,
        ["activation", "'softmax' or 'sigmoid'", "'relu'"],
    ),
    "output that does not exist": (
        {"output": 3},
        1,
        ["output=3 does not exist", "(1, 3, 16, 16, 16)"],
    ),
}


@pytest.mark.parametrize(("change", "code", "said"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_bad_model(place, change, code, said):
    write_model(place.folder, **change)
    refused(place, code, said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, ["model.yaml: no such file"]),
        ("a: [", ["model.yaml: not valid YAML"]),
        ("- a\n- b", ["model.yaml: expected 'key: value' lines, found list"]),
        ("", ["model.yaml: expected 'key: value' lines"]),
        ("\xe4".encode("latin-1"), ["model.yaml: cannot be read as text"]),
        ("!!python/object/apply:os.getcwd []", ["model.yaml: not valid YAML"]),
    ],
    ids=["missing", "not YAML", "a list", "empty", "not UTF-8", "Python object"],
)
def test_model_file_that_is_no_spec(place, text, said):
    place.model.unlink()
    if text is not None:
        place.model.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(place, 2, said)


# ------------------------------------------------------------------------------------- options

BAD_OPTIONS = {
    "unknown class": (["--target", "lesio"], ["class 'lesio'", "did you mean 'lesion'"]),
    "unknown class index": (
        ["--target", "7"],
        ["class 7 does not exist", "0 background, 1 organ, 2 lesion"],
    ),
    "a digit that is no number": (["--target", "²"], ["class '²' does not exist"]),
    "no class": (["--target", ""], ["class '' does not exist", "'lesion'"]),
    "unknown layer": (
        ["--layer", "model.1.submodul"],
        ["no layer 'model.1.submodul' in UNet", "did you mean 'model.1.submodule'"],
    ),
    "unknown method": (["--method", "gradcam"], ["method 'gradcam'", "did you mean 'grad_cam'"]),
    "unknown score": (["--score", "logits"], ["score", "'log_odds', 'logit'", "'logits'"]),
    "score without a class": (["--score", "logit"], ["score 'logit' needs a class", "--target"]),
    "the mask output of a class": (
        ["--score", "mask_output", "--target", "organ"],
        ["mask_output", "target"],
    ),
    "unknown axis": (["--axis", "transverse"], ["axis", "'axial', 'coronal'", "'transverse'"]),
    "threshold of 1.5": (["--threshold", "1.5"], ["threshold", "less than 1", "1.5"]),
    "slice behind the scan": (["--slice", 18], ["axial slice 18: legal are 0 to 17"]),
    "slice before the scan": (["--slice", -1], ["axial slice -1: legal are 0 to 17"]),
    "coronal slice": (["--slice", 24, "--axis", "coronal"], ["coronal slice 24", "0 to 23"]),
    "unknown colormap": (
        [*PICTURES, "--colormap", "infernoo"],
        ["colormap 'infernoo'", "did you mean 'inferno'"],
    ),
    "unknown intensity window": (
        [*PICTURES, "--intensity-window", "lungs"],
        ["window 'lungs'", "did you mean 'lung'"],
    ),
    "negative intensity window": (
        [*PICTURES, "--intensity-window", "-5,3"],
        ["window", "width > 0", "-5"],
    ),
}


@pytest.mark.parametrize(("options", "said"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_option(place, options, said):
    refused(place, 2, said, *options)


@pytest.mark.parametrize("name", ["unknown class", "unknown layer", "unknown colormap"])
def test_a_bad_option_leaves_the_earlier_case_as_it_was(place, name):
    assert place.explain(*PICTURE).code == 0
    case = contents(place.out)
    assert place.explain(*PICTURE, *BAD_OPTIONS[name][0]).code == 2
    assert contents(place.out) == case


@pytest.mark.parametrize("layer", ["auto", "all"])
def test_the_words_for_layers_work_as_an_option(place, layer):
    outcome = place.explain("--target", "lesion", "--layer", layer)
    assert outcome.code == 0, outcome.err


# ------------------------------------------------------------------------------------ job files

JOB = {"scan": "scan.nii.gz", "model": "model.yaml"}

BAD_JOBS = {
    "unknown key": ({"metod": "grad_cam"}, ["job.yaml", "metod: unknown key", "'method'"]),
    "key as the option is written": (
        {"intensity-window": "lung"},
        ["job.yaml", "intensity-window: unknown key, did you mean 'intensity_window'"],
    ),
    "no scan": ({"scan": None}, ["job.yaml", "scan"]),
    "empty list of scans": ({"scan": []}, ["job.yaml", "scan"]),
    "scan is a number": ({"scan": 5}, ["job.yaml", "scan: "]),
    "slice is a fraction": ({"slice": 1.5}, ["slice", "valid integer", "1.5"]),
    "layer is a number": ({"layer": 3}, ["job.yaml", "layer: ", "3"]),
    "target is a mapping": ({"target": {"name": "lesion"}}, ["job.yaml", "target: "]),
    "key is a number": ({1: 2}, ["job.yaml", "1"]),
    "intensity window of one number": ({"intensity_window": 5}, ["intensity_window: ", "5"]),
}


@pytest.mark.parametrize(("change", "said"), BAD_JOBS.values(), ids=BAD_JOBS)
def test_bad_job(place, change, said):
    job = write_yaml(place.folder / "job.yaml", {**JOB, "out": str(place.out), **change})
    before = contents(place.folder)
    outcome = seg3dcam("explain", "--config", job)
    assert outcome.code == 2, outcome.err
    for words in said:
        assert words in outcome.complaint
    for inner in (".str:", ".int:"):  # pydantic's own names for the ways to read a value
        assert inner not in outcome.complaint
    assert contents(place.folder) == before


def test_several_problems_are_said_at_once(place):
    job = write_yaml(place.folder / "job.yaml", {"metod": "x", "threshold": 2, "slices": 3})
    problems, usage, _ = seg3dcam("explain", "--config", job).err.partition("Usage: ")
    assert usage
    lines = problems.splitlines()
    assert lines[0].endswith("job.yaml:")
    keys = [line.split(":")[0].strip() for line in lines[1:]]
    assert keys == ["metod", "model", "scan", "slices", "threshold"]


def test_no_such_job_file(tmp_path):
    outcome = seg3dcam("explain", "--config", tmp_path / "job.yaml")
    assert outcome.code == 2
    assert "job.yaml: no such file" in outcome.complaint


@pytest.mark.parametrize("shape", ["b", "16,16,", "0,1,2", "16,16,-16", "1.5,2,3"])
def test_bad_shape_for_layers(place, shape):
    outcome = seg3dcam("layers", "--model", place.model, "--shape", shape)
    assert outcome.code == 2
    assert "--shape" in outcome.complaint
    assert "96,96,96" in outcome.complaint


@pytest.mark.parametrize("shape", ["16,16", "10,10,10"])
def test_shape_that_the_network_cannot_take(place, shape):
    deeper = {"channels": [4, 8, 8], "strides": [2, 2]}
    write_model(place.folder, weights="random", arguments={**arguments(), **deeper})
    outcome = seg3dcam("layers", "--model", place.model, "--shape", shape)
    assert outcome.code == 1
    assert "the network failed on an input of shape (1, 1, 1" in outcome.complaint


# ------------------------------------------------------------- where nothing can be written


def test_output_below_a_file(place):
    (place.folder / "file").write_text("in the way")
    said = ["file/out", "cannot be written", "is a file, not a folder", "choose another folder"]
    refused(place, 1, said, "--out", place.folder / "file" / "out")


def test_output_is_a_file(place):
    (place.folder / "file").write_text("in the way")
    refused(place, 1, ["file", "cannot be written", "another"], "--out", place.folder / "file")


def failing(code, after):
    """Return os.fsync, which fails at call number `after`."""
    calls = iter(range(after))
    real = os.fsync

    def fsync(descriptor):
        if next(calls, None) is None:
            raise OSError(code, os.strerror(code))
        return real(descriptor)

    return fsync


@pytest.mark.parametrize(
    ("code", "after", "advice"),
    [(errno.ENOSPC, after, "The disk is full") for after in (0, 1, 4, 9, 12)]
    + [(errno.EROFS, 0, "The disk is read-only"), (errno.EDQUOT, 5, "Your disk quota is used up")],
)
def test_the_disk_refuses_at_some_point(place, monkeypatch, code, after, advice):
    """Whenever it happens: no half file under a final name, no temporary one, no case.json."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(code, after))
        outcome = place.explain()
    assert outcome.code == 1
    assert "cannot be written" in outcome.complaint
    assert advice in outcome.complaint
    assert_only_whole_files(place.out)
    assert place.explain().code == 0


def assert_only_whole_files(folder):
    assert not (folder / "case.json").exists()
    for path in folder.rglob("*"):
        assert not path.name.startswith("."), path
        if path.name.endswith(".nii.gz"):
            assert np.isfinite(nib.load(path).get_fdata()).all()


#: A disk of 64 KB of its own, seen by this process alone; exit code 77 where none can be had.
ON_A_SMALL_DISK = """
mount -t tmpfs -o size=64k tmpfs "$0" 2>/dev/null || exit 77
"$@"; code=$?
cp -a "$0/." "$0-after"
exit $code
"""


@pytest.mark.slow
def test_a_full_disk(place, monkeypatch):
    """A real one where this user may mount one, else fsync that says so."""
    place.out.mkdir()
    after = place.folder / "out-after"
    write_scan(place.scan, np.random.default_rng(0).random(SHAPE).astype(np.float32) + voxels())
    command = Path(sys.executable).with_name("seg3dcam")
    words = ["explain", place.scan, "--model", place.model, "--out", place.out]
    try:
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", ON_A_SMALL_DISK, place.out, command, *words],
            capture_output=True,
            text=True,
            check=False,
        )
        mounted = after.exists()
    except FileNotFoundError:  # no unshare on this system
        mounted = False
    if mounted:
        code, said = done.returncode, done.stderr
    else:
        monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC, 5))
        outcome = place.explain(*PICTURES)
        code, said, after = outcome.code, outcome.err, place.out
    assert code == 1
    assert said.startswith("error: ")
    assert "The disk is full: free some space" in said
    assert "Traceback" not in said
    assert_only_whole_files(after)
