"""What a MONAI bundle's run does: explained as MONAI's own run makes it, or refused with a word."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers_bundles import (
    SPLEEN,
    Config,
    of_image,
    of_prediction,
    random,
    run_by_monai,
    write_bundle,
    write_scan,
    write_weights,
)
from helpers_crossed import crossed
from scipy import ndimage
from torch import nn

from seg3dcam import load_model, load_scan
from seg3dcam.cams.attributions import Gradient
from seg3dcam.errors import ModelError, Seg3dcamWarning
from seg3dcam.targets import ClassLogit

pytestmark = [  # MONAI's own, where it runs a bundle
    pytest.mark.filterwarnings("ignore:inverse has been called but no invertible"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:layer .*(shows nothing|mostly evidence against)"),
]

OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.2, -0.15, 0.1) @ np.diag([-0.9, 1.1, 2.4]), [12.0, -30.0, 55.0]
)

LOADER = SPLEEN["handlers"][0]
OTHER = {**LOADER, "load_path": "$@bundle_root + '/models/other.pt'"}
LOADS_OTHER = "$@network_def.load_state_dict(torch.load(@bundle_root + '/models/other.pt'))"
RUN = "$@evaluator.run()"
TORCH = ["$import torch", "$import monai.handlers"]

SCRIPTS = {
    "parts": """
import torch
from ignite.engine import Events
from monai.handlers import CheckpointLoader

class Swapped(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x).flip(1)

class Loader(CheckpointLoader):
    pass

class Halving(CheckpointLoader):
    def __call__(self, engine):
        super().__call__(engine)
        with torch.no_grad():
            next(engine.network.parameters()).mul_(0.5)

class Negating:
    def attach(self, engine):
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine):
        for parameter in engine.network.parameters():
            parameter.data.neg_()
""",
    "loading": """
import torch

def loaded(network, path):
    network.load_state_dict(torch.load(path))
    return network
""",
}


def transforms(config: Config) -> list[Any]:
    return config["preprocessing"]["transforms"]


def evaluator(**arguments: Any) -> Config:
    return {"evaluator": {**SPLEEN["evaluator"], **arguments}}


def by_loaders(**more: Any) -> Config:
    """Return two loaders that nothing calls yet."""
    return {"imports": TORCH, "handlers": [], "one": LOADER, "two": OTHER, **more}


def more_transforms(*added: Config, at: int = 4) -> Config:
    each = list(SPLEEN["preprocessing"]["transforms"])
    return {
        "preprocessing": {"_target_": "Compose", "transforms": [*each[:at], *added, *each[at:]]}
    }


SHIFTED = of_image("ShiftIntensityd", offset=0.4)
SHRUNK = of_image("Resized", spatial_size=[16, 16, 16], mode="trilinear")
POST = SPLEEN["postprocessing"]["transforms"]

#: What a config says otherwise -> what is loaded, as provenance says it.
SAME: dict[str, tuple[Config, str]] = {
    "a teacher beside it": (
        {
            "teacher": SPLEEN["network_def"],
            "handlers": [LOADER, {**OTHER, "load_dict": {"model": "@teacher"}}],
        },
        "models/model.pt",
    ),
    "a part of a wrapper": (
        {
            "network": {"_target_": "scripts.parts.Swapped", "network": "@network_def"},
            "handlers": [{**OTHER, "load_dict": {"model": "@network_def"}}],
        },
        "models/other.pt",
    ),
    "spread over devices": (
        {"imports": TORCH, "network": "$torch.nn.DataParallel(@network_def)"},
        "models/model.pt",
    ),
    "one, then two": (by_loaders(initialize="$(@one(@evaluator), @two(@evaluator))"), "other.pt"),
    "two, then one": (by_loaders(initialize="$(@two(@evaluator), @one(@evaluator))"), "model.pt"),
    "an attached one after those called": (
        by_loaders(initialize=["$@one.attach(@evaluator)", "$@two(@evaluator)"]),
        "model.pt",
    ),
    "handlers that choose": (by_loaders(handlers="$[@one] if True else [@two]"), "model.pt"),
    "handlers that choose the other": (
        by_loaders(handlers="$[@one] if False else [@two]"),
        "other.pt",
    ),
    "a list that is not run": (
        by_loaders(run=["$@one(@evaluator)", RUN], evaluate=["$@two(@evaluator)", RUN]),
        "model.pt",
    ),
    "code after a loader": (
        by_loaders(initialize=["$@one(@evaluator)", LOADS_OTHER]),
        "models/model.pt, then changed by the config's own code",
    ),
    "code before a loader": (
        by_loaders(initialize=[LOADS_OTHER], handlers=["@one"]),
        "models/model.pt",
    ),
    "parameters that are changed": (
        by_loaders(
            initialize=[
                "$@one(@evaluator)",
                "$[p.data.mul_(-1) for p in @network_def.parameters()]",
            ]
        ),
        "models/model.pt, then changed by the config's own code",
    ),
    "parameters that run changes": (
        by_loaders(
            run=["$@one(@evaluator)", "$[p.data.mul_(-1) for p in @network.parameters()]", RUN]
        ),
        "models/model.pt, then changed by the config's own code",
    ),
    "a hook": (
        {"initialize": ["$@network_def.register_forward_hook(lambda m, i, o: -o)"]},
        "models/model.pt",
    ),
    "another forward": (
        {
            "initialize": [
                "$setattr(@network_def, 'forward', "
                "(lambda f: lambda x: -f(x))(@network_def.forward))"
            ]
        },
        "models/model.pt",
    ),
    "an id that loads": (
        by_loaders(loading=LOADS_OTHER, initialize=["$@loading"]),
        "loaded by the config's own code",
    ),
    "an id without an expression": (
        by_loaders(loading=LOADS_OTHER, initialize=["@loading"]),
        "loaded by the config's own code",
    ),
    "what the evaluator requires": (
        by_loaders(loading=LOADS_OTHER, **evaluator(_requires_="@loading")),
        "loaded by the config's own code",
    ),
    "a function of its own": (
        by_loaders(
            initialize=[
                {
                    "_target_": "scripts.loading.loaded",
                    "network": "@network",
                    "path": "$@bundle_root + '/models/other.pt'",
                }
            ]
        ),
        "loaded by the config's own code",
    ),
    "a handler as an expression": (
        by_loaders(
            handlers="$[monai.handlers.CheckpointLoader("
            "load_path=@bundle_root + '/models/other.pt', load_dict={'model': @network})]"
        ),
        "models/other.pt",
    ),
    "a loader of its own class": (
        {"handlers": [{**OTHER, "_target_": "scripts.parts.Loader"}]},
        "models/other.pt",
    ),
    "a loader that does more": (
        {"handlers": [{**OTHER, "_target_": "scripts.parts.Halving"}]},
        "models/other.pt, then changed by the config's own code",
    ),
    "a handler of its own": (
        {"handlers": [LOADER, {"_target_": "scripts.parts.Negating"}]},
        "models/model.pt, then changed by the config's own code",
    ),
    "the evaluator's own inferer": (
        {
            **more_transforms(SHRUNK),
            **evaluator(inferer={"_target_": "SimpleInferer"}),
        },
        "models/model.pt",
    ),
    "the evaluator's own postprocessing": (
        evaluator(
            postprocessing={
                "_target_": "Compose",
                "transforms": [
                    *POST[:3],
                    of_prediction("Lambdad", func="$lambda x: 1 - x"),
                    POST[3],
                ],
            }
        ),
        "models/model.pt",
    ),
    "the dataset's own transforms": (
        {
            "test_transforms": {
                "_target_": "Compose",
                "transforms": ["$@preprocessing", of_image("Lambdad", func="$lambda x: x * 3")],
            },
            "dataset": {**SPLEEN["dataset"], "transform": "@test_transforms"},
        },
        "models/model.pt",
    ),
    "images in half the precision": (
        {
            "preprocessing": {
                "_target_": "Compose",
                "transforms": [
                    of_image("LoadImaged", dtype="float16"),
                    *SPLEEN["preprocessing"]["transforms"][1:-1],
                    of_image("EnsureTyped", dtype="$torch.float32"),
                ],
            },
            "imports": TORCH,
        },
        "models/model.pt",
    ),
}


def negated(network: nn.Module) -> None:
    random(network)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.data.neg_()


def written(root: Path, change: Config | Callable[[Config], object]) -> Path:
    """Write a bundle with two files of weights, one the other's negative, and code of its own."""
    made = change if callable(change) else lambda config: config.update(copy.deepcopy(change))
    write_bundle(root, SPLEEN, change=made, scripts=SCRIPTS, weights=False)
    for name, fill in (("model.pt", random), ("other.pt", negated)):
        write_weights(root / "models" / name, SPLEEN, fill)
    return root


def scanned(file: Path) -> Path:
    values = np.random.default_rng(0).normal(size=(1, 26, 30, 17))
    smooth = ndimage.gaussian_filter(values, (0, 1.5, 1.5, 1.0)) * 500 + 60
    return write_scan(file, smooth, OBLIQUE)


def trusted(root: Path, **settings: Any):
    return load_model(f"bundle:{root}", trust=True, **settings)


def check_same(root: Path, file: Path, model: Any, **values: Any) -> None:
    """Compare logits and masks with those of MONAI's own run."""
    logits, saved = run_by_monai(root, file, **values)
    scan = load_scan(file)
    prepared = model.prepare(scan)
    # No map is wanted here, and this one has no layer whose place would be measured.
    gradient = Gradient(model.module, sliding_window=model.window, activation=model.activation)
    own = gradient(prepared.as_tensor()[None], ClassLogit(0, "volume")).logits[0]
    assert own.shape == logits.shape
    assert (own - logits).abs().max() < 1e-4
    masks = model.restore(own, scan, prepared).numpy()
    assert np.array_equal(masks.argmax(0), np.asarray(saved.dataobj))
    assert 0.01 < masks[1].mean() < 0.99  # something to compare


@pytest.mark.parametrize("case", crossed(SAME, rows=5))
def test_what_runs_is_what_monai_runs(case, tmp_path):
    change, weights = SAME[case]
    root = written(tmp_path / "b", change)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Seg3dcamWarning)  # none would be true
        model = trusted(root)
    check_same(root, scanned(tmp_path / "scan.nii.gz"), model)
    assert model.spec["weights"].endswith(weights)


def test_a_value_that_is_set_inside_of_the_evaluator_takes_effect(tmp_path):
    root = written(tmp_path / "b", more_transforms(SHRUNK))
    simple = {"_target_": "SimpleInferer"}
    model = trusted(root, overrides={"evaluator#inferer": simple})
    assert model.window is None
    check_same(root, scanned(tmp_path / "scan.nii.gz"), model, evaluator__inferer=simple)


def test_transforms_inside_of_the_evaluator_are_those_of_the_network(tmp_path):
    loader = copy.deepcopy(SPLEEN["dataloader"])
    loader["dataset"] = {
        **SPLEEN["dataset"],
        "transform": more_transforms(SHIFTED)["preprocessing"],
    }
    inside = trusted(written(tmp_path / "a", evaluator(val_data_loader=loader)))
    beside = trusted(written(tmp_path / "b", more_transforms(SHIFTED)))
    scan = load_scan(scanned(tmp_path / "scan.nii.gz"))
    seen, wanted = inside.prepare(scan), beside.prepare(scan)
    assert torch.equal(seen.as_tensor(), wanted.as_tensor())


def loading(**arguments: Any) -> Config:
    first, *others = SPLEEN["preprocessing"]["transforms"]
    return {
        "preprocessing": {"_target_": "Compose", "transforms": [{**first, **arguments}, *others]}
    }


def chosen_from(target: str) -> Config:
    each = [SHIFTED, of_image("ShiftIntensityd", offset=0.8)]
    return more_transforms({"_target_": target, "transforms": each})


#: What is said -> the change of the config that it is said of.
REFUSED: dict[str, Config] = {
    "evaluator#mode is 'train', by .*--set evaluator#mode=null": evaluator(mode="train"),
    "evaluator#prepare_batch is '.lambda": evaluator(prepare_batch="$lambda batch, *a, **k: batch"),
    "evaluator#iteration_update is": evaluator(iteration_update="$lambda engine, batch: {}"),
    "evaluator#decollate is False": evaluator(decollate=False),
    "evaluator is EnsembleEvaluator; legal is SupervisedEvaluator": evaluator(
        _target_="EnsembleEvaluator"
    ),
    "evaluator is scripts.parts.SupervisedEvaluator; legal is": evaluator(
        _target_="scripts.parts.SupervisedEvaluator"
    ),
    "evaluator is an expression": {"evaluator": "$print(@network)"},
    "dataset is '.None', so which transforms .*; legal is Dataset with transform": {
        "dataset": "$None"
    },
    "dataset is Dataset without transform": {"dataset": {"_target_": "Dataset", "data": []}},
    "dataset is GridPatchDataset, so which": {
        "dataset": {**SPLEEN["dataset"], "_target_": "GridPatchDataset"}
    },
    "dataloader#collate_fn is '.lambda x: x'": {
        "dataloader": {**SPLEEN["dataloader"], "collate_fn": "$lambda x: x"}
    },
    "reads with as_closest_canonical True.*Take it out with --set": loading(
        as_closest_canonical=True
    ),
    "reads with reverse_indexing True": loading(reverse_indexing=True),
    "reads with affine_lps_to_ras False": loading(affine_lps_to_ras=False),
    "reads with channel_dim 1": loading(channel_dim=1),
    "reads with squeeze_non_spatial_dims True": loading(squeeze_non_spatial_dims=True),
    "reads with dtype 'int16'": loading(dtype="int16"),
    "LoadImaged reads with as_closest_canonical True": loading(
        reader={"_target_": "NibabelReader", "as_closest_canonical": True}
    ),
    "reads with mmap_mode": loading(reader={"_target_": "NumpyReader", "mmap_mode": "r"}),
    "reads with reader '.monai.data.ITKReader.reverse_indexing=True": loading(
        reader="$monai.data.ITKReader(reverse_indexing=True)"
    ),
    "reads with reader 'scripts.parts.Reader'": loading(
        reader={"_target_": "scripts.parts.Reader"}
    ),
    r"Compose resamples lazily.*--set preprocessing#lazy=false": {
        "preprocessing": {**SPLEEN["preprocessing"], "lazy": True}
    },
    "Resized resamples lazily": more_transforms({**SHRUNK, "lazy": True}),
    "what is run is validate#evaluator, where the id evaluator": {
        "validate": {"evaluator": SPLEEN["evaluator"]},
        "run": ["$@validate#evaluator.run()"],
    },
    "preprocessing has OneOf, which is random": chosen_from("OneOf"),
    "preprocessing has SomeOf, which is random": chosen_from("SomeOf"),
    "preprocessing has RandomOrder, which is random": chosen_from("RandomOrder"),
    "postprocessing has RandFlipd, which is random": {
        "postprocessing": [*POST, of_prediction("RandFlipd", prob=0.5)]
    },
    "strict_shape false leaves weights out": {"handlers": [{**LOADER, "strict_shape": False}]},
    r"no state dict of tensors found.*looked for one under net alone.*load_dict": {
        "handlers": [{**LOADER, "load_path": "models/keyed.pt", "load_dict": {"net": "@network"}}]
    },
    "unknown to the network: module.model": {
        "handlers": [{**LOADER, "load_path": "models/prefixed.pt"}]
    },
    "holds a part of the network's weights only": {
        "handlers": [
            {**LOADER, "load_path": "models/part.pt", "load_dict": {"a": "$@network_def.model[0]"}}
        ]
    },
    "the handler PostProcessing changes what the evaluator gives": {
        "handlers": [LOADER, {"_target_": "PostProcessing", "transform": "@postprocessing"}]
    },
    "a handler of its own is attached to the event iteration_completed": {
        "initialize": ["$@evaluator.add_event_handler('iteration_completed', lambda engine: None)"]
    },
    "a trainer runs before the evaluator": {
        "trainer": {"_target_": "SupervisedTrainer", "network": "@network"},
        "run": ["$@trainer.run()", RUN],
    },
    "infer and evaluate but no run, so which of them": {
        "run": None,
        "infer": [RUN],
        "evaluate": ["$@evaluator.run() or None"],
    },
    "run#0 runs the network without an evaluator": {"run": ["$print(@network)"]},
}


@pytest.mark.few(13)
@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_followed_is_refused(message, tmp_path):
    root = written(tmp_path / "b", REFUSED[message])
    state = torch.load(root / "models" / "model.pt")
    files = {
        "keyed": {"model": state, "state_dict": state},
        "prefixed": {f"module.{key}": value for key, value in state.items()},
        "part": {
            key.removeprefix("model.0."): value
            for key, value in state.items()
            if key.startswith("model.0.")
        },
    }
    for name, content in files.items():
        torch.save(content, root / "models" / f"{name}.pt")
    with pytest.raises(ModelError, match=f"(?s){message}"):
        trusted(root)


def test_a_crop_around_the_truth_says_that_it_is_left_out(tmp_path):
    both = {"keys": ["image", "label"]}
    change = more_transforms({"_target_": "CropForegroundd", **both, "source_key": "label"}, at=2)
    change = copy.deepcopy(change)
    for transform in change["preprocessing"]["transforms"][:2]:
        transform.update(both)
    root = written(tmp_path / "b", change)
    message = "CropForegroundd with source_key 'label', a truth, which is left out on purpose"
    with pytest.raises(ModelError, match=message):
        trusted(root)


def test_a_warning_of_a_guess_is_true(tmp_path):
    """Only where nothing in the config loads is the usual place taken, and that is said."""
    root = written(tmp_path / "b", {"handlers": []})
    with pytest.warns(Seg3dcamWarning, match=r"no CheckpointLoader .* models/model.pt is taken"):
        assert trusted(root).spec["weights"] == "models/model.pt"
