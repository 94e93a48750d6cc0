"""Whatever a stranger wrote into a nnU-Net folder: an error of our own, or nnU-Net's own result."""

from __future__ import annotations

import json
import random
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz.nested import EXTREMES, changed, mutated
from helpers_nnunet import INSTANCE_NORM, write_case, write_folder

from seg3dcam import load_model, load_scan
from seg3dcam.errors import Seg3dcamError, Seg3dcamWarning

FILES = ("plans.json", "dataset.json", "checkpoint")

FOLDERS: dict[str, dict[str, Any]] = {
    "labels": {"arguments": INSTANCE_NORM, "norm": "CTNormalization", "mirror": (0, 2)},
    "regions": {"labels": {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}},
    "2d": {
        "configuration": "2d",
        "patch": (8, 8),
        "spacing": (1.2, 1.2),
        "transpose": (2, 0, 1),
        "mirror": (0, 1),
    },
}


def _tensors() -> tuple[Any, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how old quantized and nested tensors are
        return (
            torch.zeros(()),
            torch.zeros(2, 3),
            torch.full((4,), float("nan")),
            torch.zeros(4, dtype=torch.complex64),
            torch.zeros(4, dtype=torch.float8_e4m3fn),
            torch.zeros(4, device="meta"),
            torch.eye(3).to_sparse(),
            torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8),
            torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
            np.float64(1.5),
            np.int64(1),
            b"bytes",
        )


#: Values for a checkpoint: what its places must not hold, beside plain data.
TENSORS = _tensors()


@dataclass
class Bench:
    """A folder of which one file at a time is changed, and a small scan."""

    kind: str
    folder: Path
    scan_file: Path

    def contents(self) -> dict[str, Any]:
        """Return what the three files hold."""
        return {
            "plans.json": json.loads((self.folder / "plans.json").read_text()),
            "dataset.json": json.loads((self.folder / "dataset.json").read_text()),
            "checkpoint": torch.load(self.checkpoint, weights_only=False),
        }

    @property
    def checkpoint(self) -> Path:
        return self.folder / "fold_0" / "checkpoint_final.pth"

    def write(self, file: str, content: Any) -> None:
        """Write one of the three files."""
        if file == "checkpoint":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of how old quantized tensors are
                torch.save(content, self.checkpoint)
        else:
            (self.folder / file).write_text(json.dumps(content))


@pytest.fixture(
    scope="module",
    params=[pytest.param(k, marks=[pytest.mark.slow] * (k != "labels")) for k in FOLDERS],
)
def bench(request, tmp_path_factory) -> Bench:
    place = tmp_path_factory.mktemp("nnunet")
    folder = write_folder(place, **{"patch": (8, 8, 8), **FOLDERS[request.param]})
    values = np.abs(np.random.default_rng(0).normal(size=(1, 10, 9, 8))) + 1
    (file,) = write_case(place, values, np.diag([1.1, 1.2, 1.3, 1]))
    return Bench(request.param, folder, file)


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def outcome(bench: Bench) -> str:
    """Return "refused" where an error of our own says why, "equal" where the result is nnU-Net's.

    Anything else fails.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Seg3dcamWarning)
            model = load_model(f"nnunet:{bench.folder}")
            scan = load_scan(bench.scan_file)
            prepared = model.prepare(scan)
            heads = len(model.class_names)
            logits = torch.randn(
                heads, *prepared.shape[1:], generator=torch.Generator().manual_seed(0)
            )
            masks = model.restore(logits, scan, prepared)
            assert masks.shape == (heads, *scan.shape)
    except Seg3dcamError as error:
        return "refused" if 20 < len(str(error)) < 4000 else f"said badly: {error}"
    _compare(bench, model, prepared, logits, masks)
    return "equal"


def _compare(bench: Bench, model: Any, prepared: Any, logits: torch.Tensor, masks: torch.Tensor):
    """Compare with what nnU-Net's own predictor makes of the same files."""
    from nnunetv2.inference.export_prediction import (
        convert_predicted_logits_to_segmentation_with_correct_shape as converted,
    )
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    own = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    own.initialize_from_trained_model_folder(str(bench.folder), use_folds=(0,))
    preprocessor = own.configuration_manager.preprocessor_class(verbose=False)
    data, _, properties = preprocessor.run_case(
        [str(bench.scan_file)],
        None,
        own.plans_manager,
        own.configuration_manager,
        own.dataset_json,
    )
    assert np.array_equal(prepared.numpy(), data, equal_nan=True)

    patch = own.configuration_manager.patch_size
    if np.prod(patch) < 2**15:
        x = torch.randn(1, len(data), *patch, generator=seeded(1))
        with torch.no_grad():
            theirs = own._internal_maybe_mirror_and_predict(x)
            ours = model.module(x if len(patch) == 3 else x[:, :, None])
            ours = ours if len(patch) == 3 else ours[:, :, 0]
        assert torch.allclose(ours, theirs, atol=1e-4, equal_nan=True)

    segmentation = converted(
        logits,
        own.plans_manager,
        own.configuration_manager,
        own.label_manager,
        properties,
        num_threads_torch=1,
    )
    if own.label_manager.has_regions:
        labels = torch.zeros(masks.shape[1:], dtype=torch.int64)
        for mask, label in zip(masks, own.label_manager.regions_class_order, strict=True):
            labels[mask] = int(label)
    else:
        labels = masks.int().argmax(0)
    assert np.array_equal(labels.numpy().transpose(2, 1, 0), segmentation)


def test_the_folder_itself_is_equal(bench):
    assert outcome(bench) == "equal"


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_mutations(file, bench):
    """Each seed changes one or two things in one of the files."""
    whole = bench.contents()[file]
    extremes = (*EXTREMES, *TENSORS) if file == "checkpoint" else EXTREMES
    found, bad = Counter(), {}
    try:
        for seed in range(60):
            rng = random.Random(f"{file} {seed}")
            content, done = mutated(whole, rng, extremes)
            if seed % 3 == 2:
                content, also = mutated(content, rng, extremes)
                done += f", {also}"
            bench.write(file, content)
            try:
                said = outcome(bench)
            except Exception as error:  # whatever it is, it is no error of our own
                said = f"{type(error).__name__}: {error!s:.200}"
            found[said] += 1
            if said not in ("refused", "equal"):
                bad[f"{seed}: {done}"] = said
    finally:
        bench.write(file, whole)
    assert not bad
    assert min(found["refused"], found["equal"]) > 2  # neither is all there is


_ARCHITECTURE = ("configurations", "3d_fullres", "architecture")
_ARGUMENTS = (*_ARCHITECTURE, "arch_kwargs")
_WEIGHT = ("network_weights", "encoder.stages.0.0.convs.0.conv.weight")

#: What once ended in somebody else's error, or in another result than nnU-Net's.
CORPUS: list[tuple[str, tuple[Any, ...], str, Any]] = [
    ("plans.json", ("configurations",), "replace", 1e308),
    ("plans.json", ("configurations", "3d_fullres"), "replace", None),
    ("plans.json", ("configurations", "3d_fullres", "inherits_from"), "replace", ["a"]),
    ("plans.json", ("configurations", "3d_fullres", "inherits_from"), "replace", "3d_fullres"),
    ("plans.json", ("configurations", "3d_fullres", "inherits_from"), "replace", None),
    ("plans.json", ("configurations", "3d_fullres", "patch_size", 0), "replace", {"a": 1}),
    ("plans.json", ("configurations", "3d_fullres", "patch_size", 1), "replace", "\r\n"),
    ("plans.json", ("configurations", "3d_fullres", "patch_size", 2), "replace", 1e308),
    ("plans.json", ("configurations", "3d_fullres", "patch_size", 0), "twice", None),
    ("plans.json", ("configurations", "3d_fullres", "patch_size"), "replace", "1"),
    ("plans.json", ("configurations", "3d_fullres", "patch_size"), "replace", [65536] * 3),
    ("plans.json", ("configurations", "3d_fullres", "spacing"), "replace", [1e-5] * 3),
    ("plans.json", ("configurations", "3d_fullres", "spacing", 0), "replace", 1e-320),
    ("plans.json", (*_ARCHITECTURE, "network_class_name"), "drop", None),
    ("plans.json", (*_ARCHITECTURE, "_kw_requires_import", 3), "replace", ["nonlin"]),
    ("plans.json", (*_ARCHITECTURE, "_kw_requires_import"), "replace", ["strides"]),
    ("plans.json", _ARGUMENTS, "replace", 1e-320),
    ("plans.json", (*_ARGUMENTS, "strides", 0, 2), "replace", "é"),
    ("plans.json", (*_ARGUMENTS, "strides", 0, 2), "replace", float("inf")),
    ("plans.json", (*_ARGUMENTS, "strides", 0, 0), "twice", None),
    ("plans.json", (*_ARGUMENTS, "strides", 0), "replace", [2, 2, 2]),
    ("plans.json", (*_ARGUMENTS, "features_per_stage"), "replace", [8000, 8000]),
    ("plans.json", (*_ARGUMENTS, "n_conv_per_stage"), "replace", 10**6),
    ("plans.json", (*_ARGUMENTS, "norm_op_kwargs", "eps"), "replace", "0.1"),
    ("plans.json", (*_ARGUMENTS, "norm_op_kwargs", "device"), "replace", "meta"),
    ("plans.json", ("image_reader_writer",), "wrap", None),
    ("plans.json", ("transpose_backward",), "twice", None),
    ("plans.json", ("transpose_backward", 1), "swap", None),
    ("plans.json", ("transpose_backward",), "replace", [1, 2, 0]),
    ("plans.json", ("label_manager",), "replace", "deepcopy"),
    (
        "plans.json",
        ("configurations", "3d_fullres", "resampling_fn_probabilities_kwargs", "order"),
        "replace",
        [[]],
    ),
    (
        "plans.json",
        ("configurations", "3d_fullres", "resampling_fn_probabilities_kwargs"),
        "replace",
        {"nonsense": 1},
    ),
    ("dataset.json", ("channel_names",), "replace", ["CT"]),
    ("dataset.json", ("channel_names",), "drop", None),
    ("dataset.json", ("channel_names",), "replace", {}),
    ("dataset.json", ("labels", "background"), "replace", "None"),
    ("dataset.json", ("labels", "lesion"), "replace", float("nan")),
    ("dataset.json", ("labels", "lesion"), "replace", float("inf")),
    ("dataset.json", ("labels", "lesion"), "replace", "2"),
    ("dataset.json", ("labels", "lesion"), "replace", []),
    ("dataset.json", ("labels", "lesion"), "replace", 3),
    ("dataset.json", ("labels", "lesion"), "replace", -1),
    ("dataset.json", ("labels", "lesion"), "replace", 1),
    ("dataset.json", ("labels",), "replace", {"0": "background", "1": "organ", "2": "lesion"}),
    ("dataset.json", ("labels",), "replace", ["background", "organ", "lesion"]),
    ("dataset.json", ("regions_class_order",), "replace", "1, 2"),
    ("checkpoint", ("init_args",), "replace", None),
    ("checkpoint", ("init_args", "configuration"), "wrap", None),
    ("checkpoint", ("trainer_name",), "replace", ""),
    ("checkpoint", ("trainer_name",), "replace", "a.b"),
    ("checkpoint", ("trainer_name",), "replace", "__name__"),
    ("checkpoint", ("trainer_name",), "replace", "nn"),
    ("checkpoint", ("inference_allowed_mirroring_axes",), "replace", "0"),
    ("checkpoint", ("inference_allowed_mirroring_axes",), "replace", 7),
    ("checkpoint", ("inference_allowed_mirroring_axes",), "replace", (7,)),
    ("checkpoint", ("inference_allowed_mirroring_axes",), "replace", (-1,)),
    ("checkpoint", ("inference_allowed_mirroring_axes",), "replace", (0, 0)),
    ("checkpoint", ("inference_allowed_mirroring_axes",), "replace", [np.int64(1)]),
    ("checkpoint", ("inference_allowed_mirroring_axes", 0), "wrap", None),
    ("checkpoint", ("inference_allowed_mirroring_axes", 0), "swap", None),
    ("checkpoint", ("current_epoch",), "replace", np.int64(7)),
    ("checkpoint", ("network_weights",), "replace", None),
    ("checkpoint", _WEIGHT, "rename", 7),
    ("checkpoint", _WEIGHT, "wrap", None),
    *[("checkpoint", _WEIGHT, "replace", value) for value in (10**5000, "a", *TENSORS)],
]


@pytest.mark.slow
def test_what_once_failed(bench):
    """The places are those of a 3-D model: of the three folders only one counts."""
    if bench.kind != "labels":
        pytest.skip("another kind of folder")
    whole, bad = bench.contents(), {}
    for file, place, change, value in CORPUS:
        bench.write(file, changed(whole[file], place, change, value))
        try:
            said = outcome(bench)
        except Exception as error:  # whatever it is, it is no error of our own
            said = f"{type(error).__name__}: {error!s:.200}"
        if said not in ("refused", "equal"):
            bad[f"{file} {place} {change} {type(value).__name__}"] = said
        bench.write(file, whole[file])
    assert not bad
