"""MONAI bundles: MONAI's own prediction, in its place; nothing runs without trust."""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers_bundles import (
    BRATS,
    SPLEEN,
    metadata,
    of_image,
    run_by_monai,
    write_bundle,
    write_scan,
)
from helpers_cases import Calls, seg3dcam, write_yaml
from helpers_crossed import crossed
from monai.bundle import ConfigParser
from safetensors.torch import save_file
from scipy import ndimage
from torch import nn

from seg3dcam import WindowPlan, explain, load_model, load_scan
from seg3dcam.cams.attributions import Gradient
from seg3dcam.errors import ConfigError, ModelError, Seg3dcamWarning
from seg3dcam.targets import ClassLogit

pytestmark = [  # MONAI's own, where it runs a bundle
    pytest.mark.filterwarnings("ignore:inverse has been called but no invertible"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

#: Turned about two axes, flipped, and thick: voxel -> RAS mm.
SPACING = [0.9, 1.1, 2.4]
OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.2, -0.15, 0.1) @ np.diag(SPACING) @ np.diag([-1, 1, 1]),
    [12.0, -30.0, 55.0],
)

TWO_CLASSES = metadata(1, ["background", "spleen"])


def noise(channels: int = 1, shape: tuple[int, ...] = (26, 30, 17)) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(channels, *shape))
    return ndimage.gaussian_filter(values, (0, 1.5, 1.5, 1.0)) * 500 + 60


def trusted(root: Path, **settings):
    return load_model(f"bundle:{root}", trust=True, **settings)


def has(model, state):
    own = model.module.state_dict()
    return all(torch.equal(own[key], value) for key, value in state.items())


CASES = {
    "spleen": (SPLEEN, 1, "json"),
    "spleen, YAML": (SPLEEN, 1, "yaml"),
    "brats": (BRATS, 4, "json"),
    "brats, YAML": (BRATS, 4, "yaml"),
}


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:layer .* (explains|shows) nothing")  # the network is random
@pytest.mark.parametrize("case", crossed(CASES, rows=2))
def test_the_prediction_is_monais_own(case, tmp_path):
    config, channels, kind = CASES[case]
    root = write_bundle(tmp_path / "bundle", config, kind=kind)
    file = write_scan(tmp_path / "scan.nii.gz", noise(channels), OBLIQUE)
    logits, written = run_by_monai(root, file, kind)

    model, scan = trusted(root), load_scan(file)
    found = explain(scan, model, ClassLogit(0, "volume"), method="gradient")
    prepared = model.prepare(scan)
    gradient = Gradient(model.module, sliding_window=model.window, activation=model.activation)
    own = gradient(prepared.as_tensor()[None], ClassLogit(0, "volume")).logits[0]
    assert (own - logits).abs().max() < 1e-4
    masks, labels = found.prediction.numpy(), np.asarray(written.dataobj)
    if model.activation == "sigmoid":
        assert np.array_equal(np.moveaxis(masks, 0, -1), labels > 0.5)
    else:
        assert np.array_equal(masks.argmax(0), labels)
    assert any(0.01 < mask.mean() < 0.99 for mask in masks)  # something to compare
    assert np.array_equal(found.affine, nib.load(file).affine)
    assert np.allclose(written.affine, found.affine, atol=1e-4)


@pytest.mark.parametrize(("config", "channels"), [(SPLEEN, 1), (BRATS, 4)], ids=["ct", "mr"])
def test_what_the_network_sees_is_what_the_bundle_prepares(config, channels, tmp_path):
    root = write_bundle(tmp_path / "b", config)
    file = write_scan(tmp_path / "scan.nii.gz", noise(channels), OBLIQUE)
    scan = load_scan(file)
    before = scan.data.clone()
    prepared = trusted(root).prepare(scan)
    own = ConfigParser(config).get_parsed_content("preprocessing")({"image": str(file)})
    assert torch.equal(prepared.as_tensor(), own["image"].as_tensor())
    torch.testing.assert_close(prepared.affine, own["image"].affine, rtol=0, atol=1e-9)
    assert torch.equal(scan.data, before)


BLOB = (9, 17, 10)

BRIGHT = (
    "$torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3, padding=1), torch.nn.ReLU(), "
    "torch.nn.Conv3d(2, 2, 1))"
)


def bright(network: nn.Module) -> None:
    """Let class 1 be what is brighter than the middle of the intensity range."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network[0].weight[0, 0, 1, 1, 1] = 1
        network[2].weight[1, 0] = 10
        network[2].bias[1] = -5


def test_a_planted_cue_is_found_at_its_place(tmp_path):
    def change(config):
        config["network_def"] = BRIGHT
        config["preprocessing"]["transforms"].insert(
            4, of_image("CropForegroundd", source_key="image", allow_smaller=True)
        )

    about = metadata(1, ["background", "blob"])
    root = write_bundle(tmp_path / "b", SPLEEN, change=change, about=about, fill=bright)
    data = np.zeros((1, 26, 34, 19))
    data[0, 3:-5, 5:-3, 2:-2] = 20
    grid = np.stack(np.meshgrid(*map(np.arange, data.shape[1:]), indexing="ij"), -1)
    distance = np.linalg.norm((grid - BLOB) * SPACING, axis=-1)
    data[0] += 120 * np.exp(-((distance / 3.5) ** 2)) * (data[0] > 0)
    file = write_scan(tmp_path / "scan.nii.gz", data, OBLIQUE)
    out = tmp_path / "out"
    outcome = seg3dcam(
        *("explain", file, "--model", f"bundle:{root}", "--trust", "--target", "blob"),
        *("--layer", "1", "--format", "nifti", "--out", out),
    )
    assert outcome.code == 0, outcome.err
    cam = nib.load(out / "cam_blob.nii.gz")
    assert np.array_equal(cam.affine, nib.load(file).affine)
    values, mask = cam.get_fdata(), nib.load(out / "prediction.nii.gz").get_fdata() == 1
    assert tuple(np.unravel_index(values.argmax(), values.shape)) == BLOB
    centre = ndimage.center_of_mass(np.where(values > 0.4, values, 0))
    assert np.linalg.norm(np.subtract(centre, BLOB) * SPACING) < 0.5  # mm
    assert mask[BLOB]


def test_all_settings_come_from_the_bundle(tmp_path):
    model = trusted(write_bundle(tmp_path / "brain", BRATS))
    assert model.class_names == ("Tumor core", "Whole tumor", "Enhancing tumor")
    assert (model.activation, model.in_channels) == ("sigmoid", 4)
    assert model.window == WindowPlan((16, 16, 16), overlap=0.5, mode="gaussian")
    assert model.name == "bundle brain 0.5.8"
    assert model.spec["monai_version"] == "1.4.0"
    assert str(tmp_path) not in json.dumps(dict(model.spec))
    assert not model.module.training
    assert next(model.module.parameters()).dtype == torch.float32

    def simple(config):
        config["inferer"] = {"_target_": "SimpleInferer"}

    assert trusted(write_bundle(tmp_path / "whole", SPLEEN, change=simple)).window is None
    spec = write_yaml(tmp_path / "m.yaml", {"bundle": "brain", "classes": ["a", "b", "c"]})
    assert load_model(spec, trust=True).class_names == ("a", "b", "c")


def test_a_gpu_that_the_config_names_is_not_needed(tmp_path):
    def change(config):
        config["net"] = config["network_def"]
        config["network_def"] = "$@net.to('cuda:0').cuda().to(device=\"cuda\")"
        transforms(config)[-1]["device"] = "cuda"

    root = write_bundle(tmp_path / "b", SPLEEN, about=TWO_CLASSES)
    state = torch.load(root / "models" / "model.pt")
    other = write_bundle(tmp_path / "c", SPLEEN, change=change, about=TWO_CLASSES, weights=False)
    torch.save(state, other / "models" / "model.pt")
    model = trusted(other)
    assert has(model, state)
    assert model.prepare(load_scan(noise()[0], affine=OBLIQUE)).device.type == "cpu"


def test_loading_leaves_nothing_behind(tmp_path):
    root = write_bundle(tmp_path / "b", SPLEEN)
    before = (list(sys.path), logging.getLogger().level, torch.get_rng_state())
    model = trusted(root)
    model.prepare(load_scan(noise()[0], affine=OBLIQUE))
    assert list(sys.path) == before[0]
    assert logging.getLogger().level == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("kind", ["plain", "checkpoint"])
def test_weights_come_through_the_handler(kind, tmp_path):
    root = write_bundle(tmp_path / "b", SPLEEN)
    file = root / "models" / "model.pt"
    state = torch.load(file)
    content = {
        "plain": state,
        "checkpoint": {"model": state, "optimizer": {"state": {}, "step": 3}},
    }[kind]
    torch.save(content, file)
    assert has(trusted(root), state)


def test_weights_without_a_handler_are_looked_for_or_missed(tmp_path):
    root = write_bundle(tmp_path / "b", SPLEEN, change=lambda c: c.update(handlers=[]))
    state = torch.load(root / "models" / "model.pt")
    with pytest.warns(Seg3dcamWarning, match=r"no CheckpointLoader in it .* models/model.pt is"):
        assert has(trusted(root), state)
    (root / "models" / "model.pt").unlink()
    with pytest.raises(ModelError, match=r"no weights. inference.json has no CheckpointLoader"):
        trusted(root)
    save_file(state, root / "models" / "model.safetensors")
    with pytest.warns(Seg3dcamWarning, match=r"models/model.safetensors is taken"):
        assert has(trusted(root), state)


def test_a_network_may_load_its_weights_itself(tmp_path):
    state = torch.load(write_bundle(tmp_path / "b", SPLEEN) / "models" / "model.pt")

    def change(config):
        config["handlers"] = []
        config["empty"] = config["network_def"]
        config["network_def"] = (
            "$[(n, n.load_state_dict(torch.load(@bundle_root + '/models/own.pt')))"
            " for n in [@empty]][0][0]"
        )

    root = write_bundle(tmp_path / "c", SPLEEN, change=change, about=TWO_CLASSES, weights=False)
    torch.save(state, root / "models" / "own.pt")
    assert has(trusted(root), state)


def test_a_random_network_is_never_explained(tmp_path):
    root = write_bundle(tmp_path / "b", SPLEEN)
    file = root / "models" / "model.pt"
    state = torch.load(file)
    file.unlink()
    (root / "large_files.yml").write_text(
        "large_files:\n- path: models/model.pt\n  url: https://example.org/model.pt\n"
    )
    with pytest.raises(ModelError, match=r"large_files.yml lists models/model.pt: download with"):
        trusted(root)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match="pointer of Git LFS"):
        trusted(root)
    torch.save({**state, "extra": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match="unknown to the network: extra"):
        trusted(root)
    torch.save({"optimizer": 3}, file)
    with pytest.raises(ModelError, match="no state dict of tensors"):
        trusted(root)
    file.write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"model.pt: cannot be read as weights"):
        trusted(root)


def test_weights_that_change_nothing_are_refused(tmp_path):
    def constant(config):
        config["network_def"] = (
            "$[(n, [torch.nn.init.zeros_(p) for p in n.parameters()]) "
            "for n in [torch.nn.Conv3d(1, 2, 1)]][0][0]"
        )

    root = write_bundle(
        tmp_path / "b", SPLEEN, change=constant, about=TWO_CLASSES, fill=lambda network: None
    )
    with pytest.raises(ModelError, match="the file holds an untrained network"):
        trusted(root)


@pytest.mark.filterwarnings("ignore:.*no CheckpointLoader in it")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_weights_of_a_torchscript_file_serve_too(tmp_path):
    root = write_bundle(tmp_path / "b", SPLEEN, change=lambda c: c.update(handlers=[]))
    state = torch.load(root / "models" / "model.pt")
    network = trusted(root).module
    (root / "models" / "model.pt").unlink()
    torch.jit.trace(network, torch.rand(1, 1, 16, 16, 16)).save(root / "models" / "model.ts")
    assert has(trusted(root), state)


# ---------------------------------------------------------------- code of its own

NETWORK = """
import torch
from scripts.parts import SCALE

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv3d(1, 2, 1)

    def forward(self, x):
        return self.conv(x) * SCALE
"""

PREPARE = """
class Shiftd:
    def __call__(self, data):
        from scripts.late import SHIFT
        return {**data, "image": data["image"] + SHIFT}
"""


def with_scripts(root: Path, scale: int) -> Path:
    def change(config):
        config["network_def"] = {"_target_": "scripts.net.Net"}
        config["preprocessing"]["transforms"][2:] = [{"_target_": "scripts.prepare.Shiftd"}]

    scripts = {
        "net": NETWORK,
        "parts": f"SCALE = {scale}",
        "prepare": PREPARE,
        "late": f"SHIFT = {100 * scale}",
    }
    write_bundle(root, SPLEEN, change=change, about=TWO_CLASSES, scripts=scripts, weights=False)
    state = {"conv.weight": torch.ones(2, 1, 1, 1, 1), "conv.bias": torch.ones(2)}
    torch.save(state, root / "models" / "model.pt")
    return root


def test_two_bundles_with_scripts_do_not_collide(tmp_path):
    one, two = (trusted(with_scripts(tmp_path / str(n), n)) for n in (1, 2))
    scan = load_scan(noise()[0], affine=OBLIQUE)
    for model, scale in ((one, 1), (two, 2), (one, 1)):
        x = model.prepare(scan).as_tensor()[None]
        torch.testing.assert_close(x[0], scan.data + 100 * scale)
        with torch.no_grad():
            torch.testing.assert_close(model.module(x)[:, 0], (x[:, 0] + 1) * scale)
    assert not [name for name in sys.modules if name.partition(".")[0] == "scripts"]


def test_two_bundles_with_scripts_on_the_command_line(tmp_path):
    file = write_scan(tmp_path / "scan.nii.gz", noise(), OBLIQUE)
    data = noise().astype(np.float32)
    for scale in (1, 2):
        root, out = with_scripts(tmp_path / str(scale), scale), tmp_path / f"out{scale}"
        outcome = seg3dcam(
            *("explain", file, "--model", f"bundle:{root}", "--trust", "--score", "logit"),
            *("--target", "1", "--region", "volume", "--layer", "conv", "--format", "nifti"),
            *("--out", out),
        )
        assert outcome.code == 0, outcome.err
        record = json.loads((out / "case.json").read_text())
        score = record["explanations"][0]["target"]["score"]
        assert score == pytest.approx(float((data + 100 * scale + 1).sum()) * scale, rel=1e-4)


# ---------------------------------------------------------------- trust


@pytest.mark.parametrize("kind", ["expression", "target", "import", "scripts", "pickle"])
def test_a_malicious_bundle_runs_nothing_without_trust(kind, tmp_path):
    marker, root = tmp_path / "ran", tmp_path / "b"
    command = f"touch {marker}"

    def spoil(config):
        if kind == "expression":
            config["network_def"] = f"$__import__('os').system('{command}')"
        elif kind == "import":
            config["imports"] = [f"$import os; os.system('{command}')"]
        elif kind == "target":
            config["inferer"] = {"_target_": "os.system", "command": command}

    scripts = {"net": f"import os; os.system('{command}')"} if kind == "scripts" else None
    write_bundle(root, SPLEEN, change=spoil, about=TWO_CLASSES, scripts=scripts, weights=False)
    torch.save(Calls(os.system, command), root / "models" / "model.pt")

    shown = {"expression": "__import__", "target": "_target_: os.system", "import": "import os;"}
    with pytest.raises(ModelError, match=r"It would run\n(.|\n)*--trust") as caught:
        load_model(f"bundle:{root}")
    assert shown.get(kind, "$") in str(caught.value)
    outcome = seg3dcam("explain", "scan.nii.gz", "--model", f"bundle:{root}", "--out", tmp_path)
    assert outcome.code == 1
    assert "--trust" in outcome.err
    assert not marker.exists()
    if kind == "pickle":  # and with trust in its config, its weights are still read without code
        with pytest.raises(ModelError, match="holds more than tensors"):
            trusted(root)
        assert not marker.exists()


# ---------------------------------------------------------------- what is refused


def transforms(config):
    return config["preprocessing"]["transforms"]


REFUSED = {
    "inferer SaliencyInferer is one of its own; legal are SimpleInferer": lambda c: c.update(
        inferer={"_target_": "SaliencyInferer", "cam_name": "CAM", "target_layers": "x"}
    ),
    r"slice by slice \(SliceInferer\).*Ensemble": lambda c: c.update(
        inferer={"_target_": "SliceInferer", "roi_size": [16, 16]}
    ),
    r"several images, t1, t2. Say which file is which: --input t1=<file> --input t2": lambda c: (
        transforms(c).__setitem__(0, {"_target_": "LoadImaged", "keys": ["t1", "t2"]})
    ),
    r"inference.json has no inferer: did you mean 'inferers'": lambda c: c.update(
        inferers=c.pop("inferer")
    ),
    r"network_def cannot be built: .*no_such(.|\n)*made with MONAI 1.4.0": lambda c: c[
        "network_def"
    ].update(no_such=3),
    r"preprocessing cannot be built: (.|\n)*NoSuchd": lambda c: transforms(c).append(
        of_image("NoSuchd")
    ),
    "whether classes exclude each other is not said": lambda c: c.update(
        postprocessing={"_target_": "Compose", "transforms": []}
    ),
    "has no LoadImaged": lambda c: transforms(c).pop(0),
    r"network_def is a dict, not a torch.nn.Module": lambda c: c.update(
        network_def={"channels": 3}
    ),
    r"of another shape: model.0": lambda c: c["network_def"].update(channels=[6, 8, 8]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_bundle_that_cannot_be_explained_says_why(message, tmp_path):
    root = write_bundle(tmp_path / "b", SPLEEN)  # with the weights of the unchanged one
    file = root / "configs" / "inference.json"
    content = json.loads(file.read_text())
    REFUSED[message](content)
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=message):
        trusted(root)


def test_a_network_that_wants_clicks_is_refused(tmp_path):
    about = json.loads(json.dumps(TWO_CLASSES))
    about["network_data_format"]["inputs"]["guidance"] = {"num_channels": 2}
    root = write_bundle(tmp_path / "b", SPLEEN, about=about)
    with pytest.raises(ModelError, match=r"wants more than a scan \(guidance\)"):
        trusted(root)


def test_channels_must_be_numbered(tmp_path):
    about = json.loads(json.dumps(TWO_CLASSES))
    about["network_data_format"]["outputs"]["pred"]["channel_def"] = {"1": "spleen"}
    root = write_bundle(tmp_path / "b", SPLEEN, about=about)
    with pytest.raises(ModelError, match="channel_def must name the channels 0, 1, 2"):
        trusted(root)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            of_image("Lambdad", func="$lambda x: torch.as_tensor(x)[:, ::2]"),
            "Lambdad turns .* does not say where they lie",
        ),
        (of_image("RandFlipd", prob=0.5), "RandFlipd, which is random"),
        (of_image("Resized", spatial_size="$3 / 0"), "preprocessing cannot be built"),
        ({"_target_": "CopyItemsd", "keys": "label", "names": "x"}, "CopyItemsd failed on this"),
        ({"_target_": "DeleteItemsd", "keys": "image"}, "gives no 'image' that knows where"),
    ],
)
def test_preparations_that_lead_nowhere_are_refused(transform, message, tmp_path):
    root = write_bundle(tmp_path / "b", SPLEEN, change=lambda c: transforms(c).append(transform))
    with pytest.raises(ModelError, match=message):
        trusted(root).prepare(load_scan(noise()[0], affine=OBLIQUE))


def test_a_way_back_that_fails_is_said_and_gone_without(tmp_path):
    def change(config):
        config["postprocessing"]["transforms"][1]["keys"] = ["pred", "other"]

    root = write_bundle(tmp_path / "b", SPLEEN, change=change)
    scan = load_scan(noise()[0], affine=OBLIQUE)
    with pytest.warns(Seg3dcamWarning, match="postprocessing Invertd failed .*other.* linearly"):
        found = explain(scan, trusted(root), ClassLogit(0, "volume"), method="gradient")
    linearly = replace(trusted(root), restore=None)
    expected = explain(scan, linearly, ClassLogit(0, "volume"), method="gradient")
    assert torch.equal(found.prediction, expected.prediction)


def test_a_folder_that_is_no_bundle_says_so(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        trusted(tmp_path / "none")
    with pytest.raises(ModelError, match=r"no configs/inference.json or .* it is no MONAI bundle"):
        trusted(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "train.json").write_text("{}")
    with pytest.raises(ModelError, match=r"configs holds configs/train.json"):
        trusted(tmp_path)
    (tmp_path / "configs" / "inference.json").write_text("{")
    with pytest.raises(ConfigError, match=r"inference.json: cannot be read as JSON"):
        trusted(tmp_path)


# ---------------------------------------------------------------- several images


def two_images(config):
    both = {"keys": ["t1", "t2"]}
    config["preprocessing"]["transforms"] = [
        {"_target_": "LoadImaged", **both},
        {"_target_": "EnsureChannelFirstd", **both},
        {"_target_": "ScaleIntensityd", "keys": "t1", "minv": None, "maxv": None, "factor": 1},
        {"_target_": "ConcatItemsd", "keys": ["t2", "t1"], "name": "image"},
    ]
    config["network_def"]["in_channels"] = 2


@pytest.mark.slow
def test_files_go_to_the_image_keys_that_are_named(tmp_path):
    root = write_bundle(tmp_path / "b", SPLEEN, change=two_images)
    files = {
        key: write_scan(tmp_path / f"{key}.nii.gz", noise(shape=(20, 20, 18)) + 100 * n, OBLIQUE)
        for n, key in enumerate(("t1", "t2"))
    }
    model = trusted(root, inputs=["t1", "t2"])
    scan = load_scan([files["t1"], files["t2"]])
    prepared = model.prepare(scan).as_tensor()
    torch.testing.assert_close(prepared[0], scan.data[1])
    torch.testing.assert_close(prepared[1], scan.data[0] * 2)
    out = tmp_path / "out"
    command = ["explain", "--model", f"bundle:{root}", "--trust", "--out", out, "--format", "nifti"]
    pairs = [f"--input={key}={file}" for key, file in files.items()]
    outcome = seg3dcam(
        *command, *pairs, "--target", "spleen", "--score", "logit", "--region", "volume"
    )
    assert outcome.code == 0, outcome.err
    record = json.loads((out / "case.json").read_text())["explanations"][0]
    with torch.no_grad():
        direct = explain(scan, model, ClassLogit(1, "volume")).score
    assert record["target"]["score"] == pytest.approx(direct)
    outcome = seg3dcam(*command, *files.values())
    assert outcome.code == 1
    assert "--input t1=<file> --input t2=<file>" in " ".join(outcome.err.split())
    with pytest.raises(ConfigError, match="inputs t1, t3; the bundle reads t1, t2"):
        trusted(root, inputs=["t1", "t3"])


def test_image_keys_are_for_bundles_alone(tmp_path):
    outcome = seg3dcam("explain", "--input", "a=b.nii.gz", "--model", "nnunet:x", "--out", tmp_path)
    assert outcome.code == 2
    assert "are those of a MONAI bundle" in " ".join(outcome.err.split())
    outcome = seg3dcam("explain", "x.nii.gz", "--input", "a=b.nii.gz", "--model", "nnunet:x")
    assert outcome.code == 2
    assert "leave out the others" in outcome.err
