"""Which weights of a MONAI bundle are loaded, and the user's own values of its config."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers_bundles import NAMES, SPLEEN, metadata, write_bundle, write_scan
from helpers_cases import seg3dcam

from seg3dcam import load_model
from seg3dcam.errors import ConfigError, ModelError, Seg3dcamWarning

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MONAI's own

LOADER = {
    "_target_": "CheckpointLoader",
    "load_path": "$@bundle_root + '/models/right.pt'",
    "load_dict": {"model": "@network"},
}
CALLED = "$@loader(@evaluator)"
RUN = "$@evaluator.run()"
BY_CODE = "network_def.load_state_dict(torch.load(@bundle_root + '/models/right.pt'))"

#: What a config says -> what is left to it; `handlers` holds no loader unless it is named.
WAYS = {
    "called in initialize": {"loader": LOADER, "initialize": ["$None", CALLED]},
    "initialize is no list": {"loader": LOADER, "initialize": CALLED},
    "if it is wanted": {
        "loader": LOADER,
        "load_pretrain": True,
        "initialize": ["$@loader(@evaluator) if @load_pretrain else None"],
    },
    "called in run": {"loader": LOADER, "run": [CALLED, RUN]},
    "attached": {"loader": LOADER, "initialize": ["$@loader.attach(@evaluator)"]},
    "a handler by reference": {"loader": LOADER, "handlers": ["@loader"]},
    "handlers elsewhere": {
        "validate": {"handlers": [LOADER]},
        "evaluator": {**SPLEEN["evaluator"], "val_handlers": "@validate#handlers"},
    },
    "handlers joined": {
        "more": [LOADER],
        "evaluator": {**SPLEEN["evaluator"], "val_handlers": "$@handlers + @more"},
    },
    "among the engine's arguments": {
        "evaluator": {**SPLEEN["evaluator"], "val_handlers": [LOADER]},
    },
    "a full name": {"handlers": [{**LOADER, "_target_": "monai.handlers.CheckpointLoader"}]},
    "the last of two": {
        "handlers": [{**LOADER, "load_path": "$@bundle_root + '/models/model.pt'"}, LOADER]
    },
    "not the disabled one": {
        "loader": LOADER,
        "initialize": [CALLED],
        "handlers": [
            {**LOADER, "load_path": "$@bundle_root + '/models/model.pt'", "_disabled_": True}
        ],
    },
    "a path by itself": {
        "place": "models/right.pt",
        "handlers": [{**LOADER, "load_path": "@place"}],
    },
    "load_dict elsewhere": {
        "what": {"model": "@network"},
        "handlers": [{**LOADER, "load_dict": "@what"}],
    },
    "with its optimizer": {
        "optimizer": "$torch.optim.SGD(@network.parameters(), lr=1)",
        "handlers": [{**LOADER, "load_dict": {"opt": "@optimizer", "model": "@network"}}],
    },
    "by code in initialize": {"initialize": [f"$@{BY_CODE}"]},
    "a macro": {"base": LOADER, "handlers": ["%base"]},
}


def two_weights(root: Path, change: dict) -> tuple[Path, dict]:
    """Write a bundle whose `right.pt` is what the config loads, and `model.pt` is not."""
    write_bundle(root, SPLEEN, change=lambda c: c.update({"handlers": [], **change}))
    wrong = torch.load(root / "models" / "model.pt")
    right = {key: value + (value.ndim > 1) for key, value in wrong.items()}
    torch.save(right, root / "models" / "right.pt")
    return root, right


def has(model, state) -> bool:
    own = model.module.state_dict()
    return all(torch.equal(own[key], value) for key, value in state.items())


@pytest.mark.few(6)
@pytest.mark.parametrize("way", WAYS)
def test_the_weights_are_those_that_the_config_loads(way, tmp_path):
    root, right = two_weights(tmp_path / "b", WAYS[way])
    model = load_model(f"bundle:{root}", trust=True)
    assert has(model, right)
    assert model.spec["weights"] in ("models/right.pt", "loaded by the config's own code")


NOT_CALLED = {
    "switched off": {
        "loader": LOADER,
        "load_pretrain": False,
        "initialize": ["$@loader(@evaluator) if @load_pretrain else None"],
    },
    "one of two": {"loader": LOADER, "loader2": {**LOADER, "load_path": "models/model.pt"}},
    "disabled": {"handlers": [{**LOADER, "_disabled_": True}]},
    "of another network": {
        "teacher": SPLEEN["network_def"],
        "loader": {**LOADER, "load_dict": {"model": "@teacher"}},
        "initialize": [CALLED],
    },
    "code that nothing runs": {"loader": f"$@{BY_CODE}"},
}


@pytest.mark.few(2)
@pytest.mark.parametrize("way", NOT_CALLED)
def test_a_network_that_monai_would_leave_random_is_refused(way, tmp_path):
    root, _ = two_weights(tmp_path / "b", NOT_CALLED[way])
    message = r"(loader|handlers#0).* can load weights, but nothing .*random.*Call it in initialize"
    with pytest.raises(ModelError, match=message):
        load_model(f"bundle:{root}", trust=True)


def test_the_one_loader_that_nothing_calls_is_said(tmp_path):
    """As in a config without its evaluator, or where a script calls the loader."""
    root, right = two_weights(tmp_path / "b", {"loader": LOADER})
    with pytest.warns(Seg3dcamWarning, match=r"loader is .* nothing .* calls; its right\.pt is"):
        model = load_model(f"bundle:{root}", trust=True)
    assert has(model, right)
    assert model.spec["weights"] == "models/right.pt"


def test_a_loader_is_called_as_the_message_says(tmp_path):
    root, right = two_weights(tmp_path / "b", NOT_CALLED["switched off"])
    called = {"initialize": ["$@loader(@evaluator)"]}
    assert has(load_model(f"bundle:{root}", trust=True, overrides=called), right)


@pytest.mark.parametrize("path", [None, 3, ["a.pt"], "a\0b.pt"], ids=["none", "3", "list", "nul"])
def test_a_path_that_is_none_is_refused(path, tmp_path):
    root, _ = two_weights(tmp_path / "b", {"handlers": [{**LOADER, "load_path": path}]})
    with pytest.raises(ModelError, match=r"load_path .* the path of a file|clear path to load"):
        load_model(f"bundle:{root}", trust=True)


def test_a_loader_that_is_not_strict_leaves_out_what_is_unknown(tmp_path):
    root, right = two_weights(tmp_path / "b", {"handlers": [{**LOADER, "strict": False}]})
    torch.save({**right, "extra": torch.zeros(1)}, root / "models" / "right.pt")
    with pytest.warns(Seg3dcamWarning, match="does not have are left out: extra"):
        assert has(load_model(f"bundle:{root}", trust=True), right)
    right.pop(next(iter(right)))
    torch.save(right, root / "models" / "right.pt")
    with pytest.raises(ModelError, match="missing in the file"):  # it would stay random
        load_model(f"bundle:{root}", trust=True)


# ---------------------------------------------------------------- the user's own values


def test_values_go_where_monai_puts_them(tmp_path):
    root = write_bundle(tmp_path / "b", SPLEEN)
    source = f"bundle:{root}"
    values = {
        "inferer#roi_size": [32, 16, 16],
        "inferer::mode": "gaussian",  # a new key, with MONAI's newer sign
        "preprocessing#transforms#3#pixdim": "$[2.0, 2.0, 3.0]",
        "postprocessing": {"_target_": "Activationsd", "keys": "pred", "sigmoid": True},
    }
    model = load_model(source, trust=True, overrides=values)
    assert (model.window.roi_size, model.window.mode) == ((32, 16, 16), "gaussian")
    assert model.activation == "sigmoid"
    assert model.restore is None
    assert model.spec["set"] == values
    assert "set" not in load_model(source, trust=True).spec
    file = tmp_path / "model.yaml"
    file.write_text(yaml.safe_dump({"bundle": "b", "set": {"inferer#overlap": 0.25}}))
    model = load_model(file, trust=True, overrides={"inferer#roi_size": [32] * 3})
    assert (model.window.roi_size, model.window.overlap) == ((32, 32, 32), 0.25)


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ("inferers", "set inferers: no 'inferers' in inference.json: did you mean 'inferer'"),
        ("inferrer#roi_size", "no 'inferrer' in inference.json: did you mean 'inferer'"),
        ("inferer#roi_size#5", "no '5' in inference.json: inferer#roi_size; legal are 0 to 2"),
        ("network#channels", "network is .* which has nothing inside"),
        ("device", "device: this is an option of its own, --device"),
        ("bundle_root", "bundle_root: this is the bundle's own folder"),
        ("", "no '' in inference.json"),
        ("inferer#", "no '' in inference.json: inferer"),
    ],
)
def test_values_for_what_is_not_there_are_refused(identity, message, tmp_path):
    root = write_bundle(tmp_path / "b", SPLEEN)
    with pytest.raises(ConfigError, match=message):
        load_model(f"bundle:{root}", trust=True, overrides={identity: 3})


def test_values_are_for_bundles_alone_and_trusted_no_more_than_they(tmp_path):
    with pytest.raises(ConfigError, match="those of a MONAI bundle's config"):
        load_model("nnunet:x", overrides={"a": 1})
    with pytest.raises(ConfigError, match="ids and their values"):
        load_model("bundle:x", overrides=["a"])
    marker = tmp_path / "ran"
    root = write_bundle(tmp_path / "b", SPLEEN)
    code = f"$open({str(marker)!r}, 'w')"
    with pytest.raises(ModelError, match=r"It would run\n(.|\n)*ran'(.|\n)*--trust"):
        load_model(f"bundle:{root}", overrides={"inferer": code})
    assert not marker.exists()


@pytest.mark.slow
def test_values_on_the_command_line_and_in_a_job(tmp_path):
    root = write_bundle(tmp_path / "b", SPLEEN)
    shape = (20, 24, 18)
    data = np.random.default_rng(0).normal(size=(1, *shape)) * 100
    scan = write_scan(tmp_path / "scan.nii.gz", data, np.diag([-1.5, 1.5, 2, 1]))
    common = ["--model", f"bundle:{root}", "--trust"]
    values = ["--set", "inferer#roi_size=[16, 16, 8]", "--set", "inferer#mode=gaussian"]
    outcome = seg3dcam(
        *("explain", scan, *common, *values, "--set", "inferer#overlap=$1 / 4"),
        *("--target", "1", "--region", "volume", "--format", "nifti", "--out", tmp_path / "out"),
    )
    assert outcome.code == 0, outcome.err
    record = json.loads((tmp_path / "out" / "case.json").read_text())
    window = record["explanations"][0]["model"]["window"]
    assert (window["roi_size"], window["mode"], window["overlap"]) == (
        [16, 16, 8],
        "gaussian",
        0.25,
    )

    job = {"scan": "scan.nii.gz", "model": "bundle:b", "target": 1, "region": "volume"}
    job |= {"format": "nifti", "out": "again", "set": {"inferer#overlap": 0.25}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    outcome = seg3dcam("explain", "--config", tmp_path / "job.yaml", "--trust", *values)
    assert outcome.code == 0, outcome.err
    again = json.loads((tmp_path / "again" / "case.json").read_text())
    assert again["explanations"][0]["model"]["window"] == window

    outcome = seg3dcam("layers", *common, "--set", "inferer#roi_size=[8, 16, 24]")
    assert outcome.code == 0, outcome.err
    assert "8x16x24" in outcome.out or "4x8x12" in outcome.out
    outcome = seg3dcam("features", scan, *common, *values, "--top", "1", "--out", tmp_path / "f")
    assert outcome.code == 0, outcome.err
    for wrong in ("inferer#roi_size", "inferer#roi_size=[1"):
        outcome = seg3dcam("layers", *common, "--set", wrong)
        assert outcome.code == 2
        assert "--set inferer#roi_size" in outcome.err.replace("'", "")


def test_the_names_of_the_classes_come_from_either_key(tmp_path):
    about = metadata(1, NAMES[2])
    prediction = about["network_data_format"]["outputs"]["pred"]
    prediction["label_def"] = prediction.pop("channel_def")
    root = write_bundle(tmp_path / "b", SPLEEN, about=about)
    assert load_model(f"bundle:{root}", trust=True).class_names == tuple(NAMES[2])
