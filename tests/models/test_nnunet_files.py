"""What a stranger's nnU-Net folder may hold: every fault said by file and key, nothing run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_nnunet import INSTANCE_NORM, OLD_UNET, random, write_folder
from torch import nn

from seg3dcam import load_model
from seg3dcam.errors import ConfigError, InputError, ModelError, Seg3dcamWarning
from seg3dcam.models.nnunet import parts as nnunet_parts
from seg3dcam.models.nnunet.parts import TRUSTED

NAME = "3d_fullres"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path, arguments=INSTANCE_NORM)


def changed(folder: Path, file: str, **changes: Any) -> None:
    """Replace values in a JSON file; a name with dots goes inside, ... drops the key."""
    content = json.loads((folder / file).read_text())
    for path, value in changes.items():
        *outer, last = path.split(".")
        place = content
        for key in outer:
            place = place[key]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    (folder / file).write_text(json.dumps(content))


def changed_checkpoint(folder: Path, **changes: Any) -> Path:
    file = folder / "fold_0" / "checkpoint_final.pth"
    content = {**torch.load(file, weights_only=False), **changes}
    torch.save({key: value for key, value in content.items() if value is not ...}, file)
    return file


# ---------------------------------------------------------------- messages by file and key

OF_PLANS = {
    "reader of pictures": ("image_reader_writer", "Tiff3DIO", "'Tiff3DIO' reads no volumes"),
    "no reader": ("image_reader_writer", ..., "image_reader_writer: missing"),
    "no transpose": ("transpose_forward", ..., "transpose_forward: missing"),
    "transposed twice": ("transpose_forward", [0, 0, 1], "must be an order of the axes 0, 1, 2"),
    "not the way back": ("transpose_backward", [1, 2, 0], "its way back"),
    "a list of configurations": ("configurations", [1], "configurations: .* dictionary"),
    "a list as configuration": (f"configurations.{NAME}", [1], f"configurations.{NAME}: .*dict"),
    "no spacing": (f"configurations.{NAME}.spacing", ..., r"3d_fullres:\s+spacing: missing"),
    "spacing 0": (
        f"configurations.{NAME}.spacing",
        [1, 0, 1],
        "spacing.1: .*greater than 0, got 0",
    ),
    "spacing NaN": (f"configurations.{NAME}.spacing", [1, float("nan"), 1], "spacing.1: .*finite"),
    "patch of strings": (f"configurations.{NAME}.patch_size", ["8"] * 3, "size.0: .*integer"),
    "parent unknown": (f"configurations.{NAME}.inherits_from", "x", "inherits_from: .*got 'x'"),
    "own parent": (f"configurations.{NAME}.inherits_from", NAME, "inherits_from: .*got '3d"),
    "a list as parent": (
        f"configurations.{NAME}.inherits_from",
        [1],
        r"inherits_from: .*got \[1\]",
    ),
    "no class": (
        f"configurations.{NAME}.architecture.network_class_name",
        ...,
        "architecture.network_class_name: missing",
    ),
    "no architecture": (f"configurations.{NAME}.architecture", ..., "UNet_class_name: missing"),
    "a key without argument": (
        f"configurations.{NAME}.architecture._kw_requires_import",
        ["act"],
        "names 'act', which arch_kwargs lacks",
    ),
    "no class to import": (
        f"configurations.{NAME}.architecture._kw_requires_import",
        ["strides"],
        "arch_kwargs.strides is to be imported, so it must be a class name",
    ),
    "beyond reason": (
        f"configurations.{NAME}.architecture.arch_kwargs.n_conv_per_stage",
        10**6,
        "no number of a network is beyond 8192",
    ),
    "no interpolation": (
        f"configurations.{NAME}.resampling_fn_probabilities_kwargs.order",
        99,
        "resampling_fn_probabilities_kwargs.order: .*less than or equal to 5, got 99",
    ),
    "no normalization": (f"configurations.{NAME}.normalization_schemes", [], "normalization_sch"),
    "no intensities": ("foreground_intensity_properties_per_channel", {}, "channel.0: missing"),
}

OF_DATASET = {
    "labels of nnU-Net 1": ("labels", {"0": "background", "1": "organ"}, "labels.0: .*integer"),
    "a list of labels": ("labels", ["background", "organ"], "labels: .*dictionary"),
    "no background": ("labels", {"organ": 1, "lesion": 2}, "background must be there, and be 0"),
    "background 1": ("labels", {"background": 1, "organ": 0}, "background must be there, and be 0"),
    "a negative label": ("labels", {"background": 0, "organ": -1}, "labels.organ: .*got -1"),
    "half a label": ("labels", {"background": 0, "organ": 1.5}, "labels.organ: .*got 1.5"),
    "no label": ("labels", {"background": 0, "organ": []}, r"labels.organ: .*at least 1 item"),
    "ignored in between": (
        "labels",
        {"background": 0, "ignore": 1, "organ": 2},
        "ignore must be the highest label, 3",
    ),
    "no order of regions": (
        "labels",
        {"background": 0, "whole": [1, 2], "core": [2]},
        "regions_class_order: one label for each region .* whole, core",
    ),
    "strings in regions": (
        "labels",
        {"background": "0", "whole": [1, 2]},
        "where one is a list, all must be numbers",
    ),
    "no channels": ("channel_names", ..., "channel_names: missing"),
    "channels without names": ("channel_names", {"0": None}, "channel_names.0: .*string"),
    "an order of strings": ("regions_class_order", ["a"], "regions_class_order.0: .*integer"),
}


@pytest.mark.parametrize("case", OF_PLANS)
def test_plans(case, folder):
    key, value, message = OF_PLANS[case]
    changed(folder, "plans.json", **{key: value})
    with pytest.raises(ConfigError, match=rf"(?s)plans.json.*{message}"):
        load_model(f"nnunet:{folder}")


@pytest.mark.parametrize("case", OF_DATASET)
def test_dataset(case, folder):
    key, value, message = OF_DATASET[case]
    changed(folder, "dataset.json", **{key: value})
    with pytest.raises(ConfigError, match=rf"(?s)dataset.json.*{message}"):
        load_model(f"nnunet:{folder}")


def test_intensities_of_ct_must_be_numbers(tmp_path):
    folder = write_folder(tmp_path, norm="CTNormalization")
    changed(
        folder, "plans.json", **{"foreground_intensity_properties_per_channel.0.std": float("nan")}
    )
    with pytest.raises(ConfigError, match=r"channel\.0\.std: a finite number is needed for CTN"):
        load_model(f"nnunet:{folder}")


def test_many_problems_are_counted(folder):
    labels = {"background": 0, **{f"organ {n}": None for n in range(50)}}
    changed(folder, "dataset.json", labels=labels)
    with pytest.raises(ConfigError, match="and 88 more") as caught:
        load_model(f"nnunet:{folder}")
    assert len(str(caught.value).splitlines()) == 14


def plain(**settings: Any) -> torch.Tensor:
    return torch.zeros(4, 1, 3, 3, 3, **settings)


OF_CHECKPOINT = {
    "no arguments": ({"init_args": None}, "init_args: .*got None"),
    "a list as configuration": ({"init_args": {"configuration": [NAME]}}, r"init_args.conf.*\['3d"),
    "no trainer": ({"trainer_name": ...}, "trainer_name: missing"),
    "odd trainer": ({"trainer_name": "../x"}, "trainer_name: .*got '../x'"),
    "hidden trainer": ({"trainer_name": "__name__"}, "trainer_name: .*got '__name__'"),
    "mirroring 7": ({"inference_allowed_mirroring_axes": 7}, "mirroring_axes: .*got 7"),
    "mirroring a string": (
        {"inference_allowed_mirroring_axes": "01"},
        "mirroring_axes: .*got '01'",
    ),
    "mirroring -1": ({"inference_allowed_mirroring_axes": (-1,)}, "mirroring_axes.0: .*got -1"),
    "mirroring twice": ({"inference_allowed_mirroring_axes": (1, 1)}, "mirroring_axes: each axis"),
    "weights None": ({"network_weights": None}, "network_weights: .*got None"),
    "a key that is no string": (
        {"network_weights": {3: plain()}},
        r"network_weights.3.\[key\]: .*string",
    ),
    "a list of weights": ({"network_weights": {"w": [plain()]}}, "network_weights.w: .*Tensor"),
    "complex": (
        {"network_weights": {"w": plain(dtype=torch.complex64)}},
        "is of type torch.complex64",
    ),
    "float8": (
        {"network_weights": {"w": plain(dtype=torch.float8_e4m3fn)}},
        "is of type torch.float8",
    ),
    "meta": ({"network_weights": {"w": plain(device="meta")}}, "on the meta device"),
    "sparse": ({"network_weights": {"w": torch.eye(3).to_sparse()}}, "it is sparse"),
}


@pytest.mark.parametrize("case", OF_CHECKPOINT)
def test_checkpoint(case, folder):
    changes, message = OF_CHECKPOINT[case]
    changed_checkpoint(folder, **changes)
    with pytest.raises(
        ModelError, match=rf"(?s)fold_0/checkpoint_final.pth: no checkpoint .*{message}"
    ):
        load_model(f"nnunet:{folder}")


def test_a_checkpoint_that_is_a_list(folder):
    torch.save([1, 2], folder / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(ModelError, match="v2: it holds one list"):
        load_model(f"nnunet:{folder}")


def test_mirroring_must_fit_the_patch(tmp_path):
    folder = write_folder(tmp_path, configuration="2d", patch=(8, 8), spacing=(1, 1), mirror=(2,))
    with pytest.raises(ModelError, match=r"mirroring_axes \(2,\) .* more axes than the 2"):
        load_model(f"nnunet:{folder}")
    assert load_model(f"nnunet:{folder}", mirroring=False).spec["mirror_axes"] == []


def test_numbers_of_numpy_are_numbers(folder):
    changed_checkpoint(
        folder, inference_allowed_mirroring_axes=[np.int64(1)], current_epoch=np.int64(7)
    )
    spec = load_model(f"nnunet:{folder}").spec
    assert (spec["mirror_axes"], spec["epochs"]) == ([1], [7])
    assert json.loads(json.dumps(dict(spec))) == dict(spec)


# ---------------------------------------------------------------- what is legal after all


def test_labels_in_other_forms(tmp_path):
    folder = write_folder(tmp_path)
    labels = {"background": "0", "organ": [1], "tumour": "4"}  # strings, lists of one, with a gap
    changed(folder, "dataset.json", labels={"background": 0, "organ": [1], "tumour": 4})
    assert load_model(f"nnunet:{folder}").class_names == ("background", "organ", "tumour")
    changed(folder, "dataset.json", labels={**labels, "organ": "1", "cyst": "4"})
    assert load_model(f"nnunet:{folder}").class_names == ("background", "organ", "tumour or cyst")


def test_channels_of_older_datasets(folder):
    changed(folder, "dataset.json", channel_names=..., modality={"0": "CT"})
    assert load_model(f"nnunet:{folder}").spec["channels"] == {"0": "CT"}
    changed(folder, "dataset.json", modality=..., channel_names=["MR"])
    assert load_model(f"nnunet:{folder}").spec["channels"] == {"0": "MR"}


def test_a_configuration_may_inherit(folder):
    whole = load_model(f"nnunet:{folder}")
    content = json.loads((folder / "plans.json").read_text())
    inner = content["configurations"].pop(NAME)
    content["configurations"] = {
        "base": {**inner, "batch_size": 5},
        "middle": {"inherits_from": "base", "patch_size": [8, 8, 8]},
        NAME: {"inherits_from": "middle", "patch_size": inner["patch_size"]},
    }
    (folder / "plans.json").write_text(json.dumps(content))
    model = load_model(f"nnunet:{folder}")
    assert model.window == whole.window
    assert model.fingerprint() == whole.fingerprint()
    content["configurations"]["base"]["inherits_from"] = NAME
    (folder / "plans.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"configurations.base.inherits_from: another"):
        load_model(f"nnunet:{folder}")


def test_residual_networks_of_older_plans_are_found(tmp_path):
    """The module that older plans lead to is no more; the class lies in another one."""

    def fill(network: nn.Module, fold: int) -> None:
        random(network, fold)

    folder = write_folder(
        tmp_path, network="ResidualEncoderUNet", arguments=INSTANCE_NORM, fill=fill
    )
    new = load_model(f"nnunet:{folder}")
    content = json.loads((folder / "plans.json").read_text())
    configuration = content["configurations"][NAME]
    del configuration["architecture"]
    configuration |= {"UNet_class_name": "ResidualEncoderUNet", **OLD_UNET}
    (folder / "plans.json").write_text(json.dumps(content))
    assert load_model(f"nnunet:{folder}").fingerprint() == new.fingerprint()
    changed(folder, "plans.json", **{f"configurations.{NAME}.UNet_class_name": "MyUNet"})
    with pytest.raises(ConfigError, match=r"UNet_class_name: .*'PlainConvUNet'.*got 'MyUNet'"):
        load_model(f"nnunet:{folder}")


# ---------------------------------------------------------------- files that are none

BYTES = {
    "not UTF-8": b'{"labels": "\xff"}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "NUL": b"{\x00}",
    "empty": b"",
    "cut short": b'{"labels": {"backgr',
    "5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "deep nesting": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deeper than any": b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}",
    "a list": b"[1, 2]",
}


@pytest.mark.parametrize("file", ["plans.json", "dataset.json"])
@pytest.mark.parametrize("case", BYTES)
def test_no_json_file(file, case, folder):
    (folder / file).write_bytes(BYTES[case])
    with pytest.raises(ConfigError, match=file) as caught:
        load_model(f"nnunet:{folder}")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["plans.json", "dataset.json", "fold_0/checkpoint_final.pth"])
def test_folders_and_circles_in_place_of_files(name, folder):
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ModelError, match=r"missing|no fold_\*/checkpoint_final.pth"):
        load_model(f"nnunet:{folder}")
    (folder / name).rmdir()
    (folder / name).symlink_to(folder / name)
    with pytest.raises(ModelError, match=r"missing|no fold_\*/checkpoint_final.pth"):
        load_model(f"nnunet:{folder}")


@pytest.mark.parametrize("name", ["x" * 5000, "a\x00b", "plans\n.json"])
def test_odd_names_of_folders(name):
    with pytest.raises(ModelError, match=r"cannot be looked at|no such folder"):
        load_model(f"nnunet:{name}")


def test_what_is_no_fold_is_left_out(folder):
    weights = (folder / "fold_0" / "checkpoint_final.pth").read_bytes()
    for name in ("fold_0_old", "fold_01", "fold_", "fold_10", "fold_2", "fold_all", "fold_٣"):
        (folder / name).mkdir()
        (folder / name / "checkpoint_final.pth").write_bytes(weights)
    with pytest.warns(Seg3dcamWarning, match="fold_, fold_٣, fold_01, fold_0_old left out"):
        model = load_model(f"nnunet:{folder}")
    assert model.spec["folds"] == [0, 2, 10]
    assert load_model(f"nnunet:{folder}", folds=["all"]).spec["folds"] == ["all"]


# ---------------------------------------------------------------- nothing foreign runs

PARTS = {
    "no network": ("architecture.network_class_name", "os.system"),
    "a network's neighbour": (
        "architecture.network_class_name",
        "dynamic_network_architectures.architectures.unet.torch.nn.Conv3d",
    ),
    "a class by another's module": (
        "architecture.network_class_name",
        "torch.nn.functional.Tensor",
    ),
    "a module of somebody": ("architecture.network_class_name", "stranger.Network"),
    "inside of a trusted name": ("architecture.network_class_name", "torch.nn.stranger.Network"),
    "an operation": ("architecture.arch_kwargs.conv_op", "stranger.conv"),
    "a function": ("architecture.arch_kwargs.nonlin", "torch.nn.functional.relu"),
    "through a module": ("architecture.arch_kwargs.nonlin", "torch.nn.functional.torch.os.system"),
    "a preprocessor": ("preprocessor_name", "isfile"),
    "a normalization": ("normalization_schemes", ["ABC"]),
    "another normalization": ("normalization_schemes", ["number"]),
    "a resampling": ("resampling_fn_data", "map_coordinates"),
    "another resampling": ("resampling_fn_probabilities", "OrderedDict"),
}


@pytest.mark.parametrize("case", PARTS)
def test_names_lead_to_parts_of_networks_alone(case, folder, tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    (tmp_path / "stranger.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    load_model(f"nnunet:{folder}")  # so that nnU-Net itself has been imported
    before = set(sys.modules)
    key, value = PARTS[case]
    changed(folder, "plans.json", **{f"configurations.{NAME}.{key}": value})
    files = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"(?s)plans.json.*(run its code|this is no|there is no)"):
        load_model(f"nnunet:{folder}")
    assert not {name for name in set(sys.modules) - before if not name.startswith(TRUSTED)}
    assert sorted(tmp_path.rglob("*")) == files


def test_a_label_manager_must_be_one(folder):
    changed(folder, "plans.json", label_manager="insert_crop_into_image")
    with pytest.raises(ModelError, match=r"label_manager 'insert_crop.*: this is no LabelManager"):
        load_model(f"nnunet:{folder}")


def test_a_trainer_must_be_one(folder):
    for name in ("nn", "torch", "join", "nnUNetDataLoader"):
        changed_checkpoint(folder, trainer_name=name)
        with pytest.raises(ModelError, match=f"trainer '{name}' is not in the installed nnU-Net"):
            load_model(f"nnunet:{folder}")


def test_more_than_the_weights_hold_takes_no_memory(folder, monkeypatch):
    """Two layers of 8000 channels would need 14 GB, of which nothing is taken."""
    changed(
        folder,
        "plans.json",
        **{f"configurations.{NAME}.architecture.arch_kwargs.features_per_stage": [8000, 8000]},
    )
    built = []
    own = nnunet_parts._built

    def noted(parts: Any, channels: int) -> nn.Module:
        built.append(own(parts, channels))
        return built[-1]

    monkeypatch.setattr(nnunet_parts, "_built", noted)
    with pytest.raises(ModelError, match=r"the weights do not fit the network of plans.json"):
        load_model(f"nnunet:{folder}")
    assert [next(network.parameters()).is_meta for network in built] == [True]


def test_strides_must_lead_back_to_the_patch(folder):
    """The weights do not tell the strides: the first stage's change the size of the output."""
    place = f"configurations.{NAME}.architecture.arch_kwargs.strides"
    changed(folder, "plans.json", **{place: [[2, 2, 2], [2, 2, 2]]})
    with pytest.raises(ModelError, match=r"makes \(1, 3, 8, 8, 8\), but \(1, 3, 16, 16, 16\)"):
        load_model(f"nnunet:{folder}")
    changed(folder, "plans.json", **{place: [[1, 1, 1], [2, 2, 2, 2]]})
    with pytest.raises(ConfigError, match=r"arch_kwargs.strides: \[2, 2, 2, 2\] must have 3"):
        load_model(f"nnunet:{folder}")
