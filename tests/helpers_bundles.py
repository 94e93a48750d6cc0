"""Small MONAI bundles in the layouts of the model zoo, and what MONAI itself makes of them."""

from __future__ import annotations

import copy
import importlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import yaml
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.engines.utils import IterationEvents
from torch import nn

Config = dict[str, Any]


def of_image(target: str, **arguments: Any) -> Config:
    return {"_target_": target, "keys": "image", **arguments}


def of_prediction(target: str, **arguments: Any) -> Config:
    return {"_target_": target, "keys": "pred", **arguments}


INVERT = of_prediction(
    "Invertd",
    transform="@preprocessing",
    orig_keys="image",
    meta_key_postfix="meta_dict",
    nearest_interp=False,
    to_tensor=True,
)
SAVE = of_prediction("SaveImaged", meta_keys="pred_meta_dict", output_dir="@output_dir")

COMMON: Config = {
    "imports": ["$import glob", "$import os"],
    "bundle_root": "/workspace/bundle",
    "output_dir": "$@bundle_root + '/eval'",
    "dataset_dir": "/workspace/data/no_such_place",
    "datalist": "$list(sorted(glob.glob(@dataset_dir + '/imagesTs/*.nii.gz')))",
    "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
    "network": "$@network_def.to(@device)",
    "dataset": {
        "_target_": "Dataset",
        "data": "$[{'image': i} for i in @datalist]",
        "transform": "@preprocessing",
    },
    "dataloader": {
        "_target_": "DataLoader",
        "dataset": "@dataset",
        "batch_size": 1,
        "shuffle": False,
        "num_workers": 4,
    },
    "handlers": [
        {
            "_target_": "CheckpointLoader",
            "load_path": "$@bundle_root + '/models/model.pt'",
            "load_dict": {"model": "@network"},
        },
        {"_target_": "StatsHandler", "iteration_log": False},
    ],
    "evaluator": {
        "_target_": "SupervisedEvaluator",
        "device": "@device",
        "val_data_loader": "@dataloader",
        "network": "@network",
        "inferer": "@inferer",
        "postprocessing": "@postprocessing",
        "val_handlers": "@handlers",
        "amp": True,
    },
    "run": ["$@evaluator.run()"],
}

#: Like the zoo's spleen segmentation: one CT, two classes that exclude each other.
SPLEEN: Config = {
    **COMMON,
    "network_def": {
        "_target_": "UNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 2,
        "channels": [4, 8, 8],
        "strides": [2, 2],
        "num_res_units": 1,
        "norm": "batch",
    },
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            of_image("LoadImaged"),
            of_image("EnsureChannelFirstd"),
            of_image("Orientationd", axcodes="RAS", labels=None),
            of_image("Spacingd", pixdim=[1.5, 1.5, 2.0], mode="bilinear"),
            of_image("ScaleIntensityRanged", a_min=-57, a_max=164, b_min=0, b_max=1, clip=True),
            of_image("EnsureTyped"),
        ],
    },
    "inferer": {
        "_target_": "SlidingWindowInferer",
        "roi_size": [16, 16, 16],
        "sw_batch_size": 4,
        "overlap": 0.5,
    },
    "postprocessing": {
        "_target_": "Compose",
        "transforms": [
            of_prediction("Activationsd", softmax=True),
            INVERT,
            of_prediction("AsDiscreted", argmax=True),
            SAVE,
        ],
    },
}

#: Like the zoo's brain tumour segmentation: four MR channels, three regions that overlap.
BRATS: Config = {
    **COMMON,
    "network_def": {
        "_target_": "SegResNet",
        "blocks_down": [1, 1],
        "blocks_up": [1],
        "init_filters": 8,
        "in_channels": 4,
        "out_channels": 3,
        "dropout_prob": 0.2,
    },
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            of_image("LoadImaged"),
            of_image("EnsureChannelFirstd"),
            of_image("NormalizeIntensityd", nonzero=True, channel_wise=True),
        ],
    },
    "inferer": {
        "_target_": "SlidingWindowInferer",
        "roi_size": [16, 16, 16],
        "sw_batch_size": 1,
        "overlap": 0.5,
        "mode": "gaussian",
    },
    "postprocessing": {
        "_target_": "Compose",
        "transforms": [
            of_prediction("Activationsd", sigmoid=True),
            INVERT,
            of_prediction("AsDiscreted", threshold=0.5),
            SAVE,
        ],
    },
}

NAMES = {2: ["background", "spleen"], 3: ["Tumor core", "Whole tumor", "Enhancing tumor"]}


def metadata(channels: int, names: Sequence[str]) -> Config:
    return {
        "version": "0.5.8",
        "monai_version": "1.4.0",
        "name": "A small bundle",
        "network_data_format": {
            "inputs": {"image": {"type": "image", "num_channels": channels, "is_patch_data": True}},
            "outputs": {
                "pred": {
                    "type": "image",
                    "num_channels": len(names),
                    "channel_def": {str(n): name for n, name in enumerate(names)},
                }
            },
        },
    }


def write_bundle(
    root: Path,
    config: Config,
    *,
    kind: str = "json",
    change: Callable[[Config], object] | None = None,
    about: Config | None = None,
    fill: Callable[[nn.Module], object] | None = None,
    scripts: dict[str, str] | None = None,
    weights: bool = True,
) -> Path:
    """Write a bundle; its network is random, or as `fill` says.

    Args:
        kind: "json" or "yaml".
        change: called with the config before it is written.
        about: the metadata; default: those of the config's network.
        scripts: name -> text of the modules in its package `scripts`.
        weights: whether to write the weights of the config's network.
    """
    config = copy.deepcopy(config)
    if change is not None:
        change(config)
    for place in ("configs", "models", *(["scripts"] if scripts else [])):
        (root / place).mkdir(parents=True)
    for name, text in {**({"__init__": ""} if scripts else {}), **(scripts or {})}.items():
        file = root / "scripts" / f"{name.replace('.', '/')}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    text = json.dumps(config, indent=2) if kind == "json" else yaml.safe_dump(config)
    (root / "configs" / f"inference.{kind}").write_text(text)
    if about is None:
        of_network = config["network_def"]
        about = metadata(of_network["in_channels"], NAMES[of_network["out_channels"]])
    (root / "configs" / "metadata.json").write_text(json.dumps(about))
    if weights:
        write_weights(root / "models" / "model.pt", config, fill or random)
    return root


def write_weights(file: Path, config: Config, fill: Callable[[nn.Module], object]) -> None:
    """Save the filled network of a config in a bundle's folder `models`."""
    content = {**copy.deepcopy(config), "bundle_root": str(file.parents[1])}
    with own_modules(file.parents[1]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = ConfigParser(content).get_parsed_content("network_def")
    fill(network)
    torch.save(network.state_dict(), file)


def random(network: nn.Module) -> None:
    """Fill a network with numbers that make masks of every class."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)


def write_scan(file: Path, data: np.ndarray, affine: np.ndarray) -> Path:
    """Write (C, X, Y, Z) as the zoo's data: channels on the last axis, if there are several."""
    values = data[0] if len(data) == 1 else np.moveaxis(data, 0, -1)
    nib.save(nib.Nifti1Image(values.astype(np.float32), affine), file)
    return file


def run_by_monai(
    root: Path,
    scan: Path | dict[str, str],
    kind: str = "json",
    *,
    run: str = "run",
    first: str = "",
    **values: Any,
) -> tuple[torch.Tensor, Any]:
    """Run a bundle's own evaluator in full precision; return its logits (K, *S) and its file.

    Args:
        scan: the file of `image`, or every image key with its file.
        run: the key of the expressions that run it.
        first: how the name of the wanted file begins, where several are written.
        values: more of the config, by ids with `__` for `#`.
    """
    images = scan if isinstance(scan, dict) else {"image": str(scan)}
    with warnings.catch_warnings(), own_modules(root):
        warnings.simplefilter("ignore")
        workflow = ConfigWorkflow(
            config_file=str(root / "configs" / f"inference.{kind}"),
            meta_file=str(root / "configs" / "metadata.json"),
            logging_file=False,
            workflow_type="inference",
            run_id=run,
            bundle_root=str(root),
            device="$torch.device('cpu')",
            **{
                "dataset#data": [images],
                "dataloader#num_workers": 0,
                "evaluator#amp": False,
                **{key.replace("__", "#"): value for key, value in values.items()},
            },
        )
        workflow.initialize()
        logits: list[torch.Tensor] = []
        workflow.parser.get_parsed_content("evaluator").add_event_handler(
            IterationEvents.FORWARD_COMPLETED,
            lambda engine: logits.append(torch.as_tensor(engine.state.output["pred"]).clone()),
        )
        workflow.run()
    (written,) = (root / "eval").rglob(f"{first}*.nii.gz")
    return logits[0][0], nib.load(written)


@contextmanager
def own_modules(root: Path) -> Iterator[None]:
    """Let MONAI import a bundle's `scripts`, as where it runs in the bundle's folder."""
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(root))
        for name in [name for name in sys.modules if name.partition(".")[0] == "scripts"]:
            del sys.modules[name]
