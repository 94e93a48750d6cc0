"""The layouts of MONAI's volumetric segmentation bundles: their structure, with small networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers_bundles import Config, of_image, of_prediction

Masks = np.ndarray  # (K, X, Y, Z) bool


def labels_of(masks: Masks) -> np.ndarray:
    """Return the label map of classes that exclude each other and leave nothing out."""
    assert (masks.sum(0) == 1).all()
    return masks.argmax(0)


@dataclass(frozen=True)
class Layout:
    """One bundle's layout.

    Attributes:
        config: of inference; `@image_key` and the like as there.
        names: the classes.
        images: the image keys of a scan with so many channels.
        about: more of the metadata's entry of the prediction.
        joined: masks -> the array of the file that the bundle writes of them.
        for_monai: values that MONAI itself needs to run it here, by ids with `__` for `#`.
        run: the key of the expressions that run it.
        channels: of the network.
        prepare: called with the written folder, before weights are made.
        weights: the file that the config loads.
    """

    config: Config
    names: Sequence[str]
    kind: str = "json"
    images: Sequence[str] = ("image",)
    scan_channels: int = 1
    channels: int = 1
    joined: Callable[[Masks], np.ndarray] = labels_of
    for_monai: Config = field(default_factory=dict)
    run: str = "run"
    scripts: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[Path], object] = lambda root: None
    weights: str = "model.pt"
    defined: str = "channel_def"
    warns: str = ""
    dropped: Sequence[str] = ()

    def about(self) -> Config:
        """Return its metadata."""
        names = {str(number): name for number, name in enumerate(self.names)}
        return {
            "version": "0.1.0",
            "monai_version": "1.4.0",
            "network_data_format": {
                "inputs": {"image": {"type": "image", "num_channels": self.channels}},
                "outputs": {"pred": {"num_channels": len(names), self.defined: names}},
            },
        }


def _engine(amp: bool = True) -> Config:
    arguments = {
        "device": "@device",
        "val_data_loader": "@dataloader",
        "network": "@network",
        "inferer": "@inferer",
        "postprocessing": "@postprocessing",
        "val_handlers": "@handlers",
        "amp": amp,
    }
    return {"_target_": "SupervisedEvaluator", **arguments}


def _bundle(network: Any, transforms: Any, inferer: Config, post: list[Config], **more: Any) -> Any:
    """Return what all configs have, with weights through an id `checkpointloader`."""
    return {
        "imports": ["$import glob", "$import numpy", "$import os"],
        "bundle_root": ".",
        "image_key": "image",
        "output_dir": "$@bundle_root + '/eval'",
        "output_dtype": "$numpy.float32",
        "load_pretrain": True,
        "dataset_dir": "/workspace/elsewhere",
        "datalist": "$sorted(glob.glob(@dataset_dir + '/*.nii.gz'))",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": network,
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": transforms},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': i} for i in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "num_workers": 4},
        "inferer": inferer,
        "postprocessing": {"_target_": "Compose", "transforms": post},
        "handlers": [{"_target_": "StatsHandler", "iteration_log": False}],
        "evaluator": _engine(),
        "checkpointloader": {
            "_target_": "CheckpointLoader",
            "load_path": "$@bundle_root + '/models/model.pt'",
            "load_dict": {"model": "@network"},
        },
        "initialize": [
            "$setattr(torch.backends.cudnn, 'benchmark', False)",
            "$@checkpointloader(@evaluator) if @load_pretrain else None",
        ],
        "run": ["$@evaluator.run()"],
        **more,
    }


def _by_handler(config: Config, file: str = "model.pt", run: str = "run", **more: Any) -> Config:
    """Return a config whose weights come through a handler."""
    config = copy.deepcopy(config)
    for key in ("checkpointloader", "load_pretrain", "initialize", "run"):
        del config[key]
    loader = {
        "_target_": "CheckpointLoader",
        "load_path": f"$@bundle_root + '/models/{file}'",
        "load_dict": {"model": "@network"},
        **more,
    }
    config["handlers"].insert(0, loader)
    config[run] = ["$setattr(torch.backends.cudnn, 'benchmark', False)", "$@evaluator.run()"]
    return config


def _load(keys: Any = "@image_key", **more: Any) -> Config:
    return {"_target_": "LoadImaged", "keys": keys, **more}


def _ct(low: int, high: int, pixdim: Sequence[float], keys: Any = "@image_key", **load: Any) -> Any:
    return [
        _load(keys, **load),
        {"_target_": "EnsureChannelFirstd", "keys": keys},
        {"_target_": "Orientationd", "keys": keys, "axcodes": "RAS"},
        {"_target_": "Spacingd", "keys": keys, "pixdim": list(pixdim), "mode": "bilinear"},
        {
            "_target_": "ScaleIntensityRanged",
            "keys": keys,
            **{"a_min": low, "a_max": high, "b_min": 0.0, "b_max": 1.0, "clip": True},
        },
        {"_target_": "EnsureTyped", "keys": keys},
    ]


def _invert(nearest: bool = False, **more: Any) -> Config:
    arguments = {"orig_keys": "image", "nearest_interp": nearest, "to_tensor": True, **more}
    return of_prediction("Invertd", transform="@preprocessing", **arguments)


def _save(**more: Any) -> Config:
    return of_prediction("SaveImaged", output_dir="@output_dir", **more)


def _windows(size: int = 16, overlap: float = 0.5, **more: Any) -> Config:
    roi = {"roi_size": [size] * 3, "sw_batch_size": 4, "overlap": overlap}
    return {"_target_": "SlidingWindowInferer", **roi, **more}


SOFTMAX = of_prediction("Activationsd", softmax=True)
SIGMOID = of_prediction("Activationsd", sigmoid=True)
ARGMAX = of_prediction("AsDiscreted", argmax=True)
THRESHOLD = of_prediction("AsDiscreted", threshold=0.5)
EXCLUSIVE = [SOFTMAX, _invert(), ARGMAX, _save(output_dtype="@output_dtype")]


def _unet(classes: int) -> Config:
    sizes = {"channels": [4, 8, 8], "strides": [2, 2], "num_res_units": 1}
    return {
        "_target_": "UNet",
        **{"spatial_dims": 3, "in_channels": 1, "out_channels": classes, "norm": "batch", **sizes},
    }


def _segresnet(inputs: int, classes: int, **more: Any) -> Config:
    sizes = {"blocks_down": [1, 1], "blocks_up": [1], "init_filters": 8, "dropout_prob": 0.2}
    return {
        "_target_": "SegResNet",
        **{"in_channels": inputs, "out_channels": classes, **sizes, **more},
    }


def _dynunet(inputs: Any, classes: Any) -> Config:
    return {
        "_target_": "DynUNet",
        **{"spatial_dims": 3, "in_channels": inputs, "out_channels": classes},
        **{"kernel_size": [3, 3, 3], "strides": [1, 2, [2, 2, 1]]},
        **{"upsample_kernel_size": [2, [2, 2, 1]], "filters": [4, 8, 8]},
        **{"norm_name": "instance", "deep_supervision": False, "res_block": True},
    }


# ---------------------------------------------------------------- dints

_ARCHITECTURE = {
    "arch_ckpt_path": "$@bundle_root + '/models/search_code.pt'",
    "arch_ckpt": "$torch.load(@arch_ckpt_path, map_location=torch.device('cuda'))",
    "dints_space": {
        "_target_": "monai.networks.nets.TopologyInstance",
        **{"channel_mul": 0.25, "num_blocks": 2, "num_depths": 3, "use_downsample": True},
        "arch_code": ["$@arch_ckpt['arch_code_a']", "$@arch_ckpt['arch_code_c']"],
        "device": "$torch.device('cuda')",
    },
}


def _dints(classes: int) -> Config:
    return {
        "_target_": "monai.networks.nets.DiNTS",
        **{"dints_space": "@dints_space", "in_channels": 1, "num_classes": classes},
        **{"use_downsample": True, "node_a": "$torch.from_numpy(@arch_ckpt['node_a'])"},
    }


def _search_code(root: Path) -> None:
    """Save an architecture as numpy arrays, as the search does."""
    paths = {"arch_code_a": np.ones((2, 7)), "arch_code_c": np.ones((2, 7)), "score": np.float64(1)}
    torch.save({**paths, "node_a": np.ones((3, 3))}, root / "models" / "search_code.pt")


_DINTS_HERE = {
    "arch_ckpt": "$torch.load(@arch_ckpt_path, weights_only=False)",
    "dints_space__device": "cpu",
}

# ---------------------------------------------------------------- code of their own

_NEST = """
import torch

class UNesT(torch.nn.Module):
    def __init__(self, in_channels, out_channels, **rest):
        super().__init__()
        self.nest = torch.nn.Conv3d(in_channels, 4, 3, padding=1, bias=False)
        self.out = torch.nn.Conv3d(4, out_channels, 1, bias=False)

    def forward(self, x):
        return self.out(torch.relu(self.nest(x)))
"""

_PHASES = """
import numpy as np
import torch
from monai.transforms import InvertibleTransform, MapTransform

class Joind(MapTransform, InvertibleTransform):
    def __init__(self, keys_merge, keys_out):
        self.keys_merge, self.keys_out = keys_merge, keys_out
        self.allow_missing_keys = True

    def __call__(self, data):
        data[self.keys_out] = np.concatenate([data[key] for key in self.keys_merge])
        data[self.keys_out + "_meta_dict"] = data[self.keys_merge[0] + "_meta_dict"]
        return data

    def inverse(self, data):
        return data

class OneMapd(MapTransform):
    def __call__(self, data):
        for key in self.keys:
            found = data[key]
            number = torch.arange(len(found), device=found.device).view(-1, 1, 1, 1)
            data[key] = (found * number).amax(0, keepdim=True)
        return data
"""

_CLICKS = """
from monai.transforms import Transform

class Orientd(Transform):
    def __init__(self, ref_image, label_names):
        self.label_names = label_names

    def __call__(self, data):
        return {**data, **{key: data[key] for key in self.label_names if key in data}}
"""

_PROMPTS = """
class PromptInferer:
    def __init__(self, roi_size, overlap=0.3, use_point_window=True):
        self.roi_size = roi_size
"""


def _largest_number(masks: Masks) -> np.ndarray:
    return (masks * np.arange(len(masks))[:, None, None, None]).max(0)


def _tumour_labels(masks: Masks) -> np.ndarray:
    core, whole, enhancing = masks
    return np.where(enhancing, 4, np.where(core, 1, np.where(whole, 2, 0)))


_KEEP = of_prediction("KeepLargestConnectedComponentd", applied_labels=[1, 2])
_PHASE_KEYS = ["artery", "vein", "excret"]
_ONE_LABEL = (
    "$lambda x: torch.where(x[[2]] > 0, 4, torch.where(x[[0]] > 0, 1, "
    "torch.where(x[[1]] > 0, 2, 0)))"
)

_SPLEEN = _bundle(_unet(2), _ct(-57, 164, [1.5, 1.5, 2.0]), _windows(), EXCLUSIVE)

_PROSTATE = [
    *_ct(0, 1, [0.8, 0.8, 1.2])[:4],
    of_image("ScaleIntensityd", minv=0, maxv=1),
    of_image("NormalizeIntensityd"),
    of_image("EnsureTyped"),
]

_KIDNEY = [
    *_ct(0, 1, [1.2] * 3, _PHASE_KEYS)[1:4],
    {"_target_": "scripts.phases.Joind", "keys_merge": _PHASE_KEYS, "keys_out": "image"},
    of_image("ScaleIntensityRanged", a_min=-1000, a_max=1000, b_min=0.0, b_max=1.0, clip=True),
    of_image("EnsureTyped"),
]

_WHOLE = [
    _load(),
    of_image("EnsureTyped"),
    of_image("EnsureChannelFirstd"),
    of_image("Orientationd", axcodes="RAS"),
    of_image("Spacingd", pixdim="@pixdim", mode="bilinear"),
    of_image("NormalizeIntensityd", nonzero=True),
    of_image("ScaleIntensityd", minv=-1.0, maxv=1.0),
]

WHOLE_BODY = _bundle(
    _segresnet(1, 5),
    _WHOLE,
    _windows(
        sw_batch_size="@displayable_configs#sw_batch_size",
        padding_mode="replicate",
        mode="gaussian",
        device="$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
    ),
    [SOFTMAX, ARGMAX, _invert(nearest=True), _save()],
    displayable_configs={"highres": True, "sw_batch_size": 1},
    pixdim="$[1.5, 1.5, 1.5] if @displayable_configs#highres else [3.0, 3.0, 3.0]",
    modelname="$'model.pt' if @displayable_configs#highres else 'model_lowres.pt'",
)
WHOLE_BODY["checkpointloader"]["load_path"] = "$@bundle_root + '/models/' + @modelname"

_DEEPEDIT = _bundle(
    _dynunet("$len(@label_names) + @number_intensity_ch", "$len(@label_names)"),
    "$@first + @clicks + @last",
    {"_target_": "SimpleInferer"},
    [of_prediction("EnsureTyped"), *EXCLUSIVE],
    label_names={"spleen": 1, "background": 0},
    number_intensity_ch=1,
    first=[_load(reader="ITKReader"), *_ct(-175, 250, [1, 1, 1])[1:3]],
    clicks=[
        {"_target_": "scripts.clicks.Orientd", "ref_image": "image", "label_names": "@label_names"},
        {
            "_target_": "AddGuidanceFromPointsDeepEditd",
            **{"ref_image": "image", "guidance": "guidance", "label_names": "@label_names"},
        },
        of_image("Resized", spatial_size=[24, 24, 24], mode="area"),
        {
            "_target_": "ResizeGuidanceMultipleLabelDeepEditd",
            **{"guidance": "guidance", "ref_image": "image"},
        },
        of_image("AddGuidanceSignalDeepEditd", guidance="guidance", number_intensity_ch=1),
    ],
    last=[of_image("EnsureTyped")],
)

_SWIN = {
    "_target_": "SwinUNETR",
    **{"spatial_dims": 3, "img_size": 96, "in_channels": 1, "out_channels": 4},
    **{"feature_size": 12, "depths": [1, 1, 1, 1], "norm_name": "batch"},
}
_SWIN_BUNDLE = _bundle(
    _SWIN,
    _ct(-175, 250, [1.5, 1.5, 2.0], reader="ITKReader"),
    _windows(32, 0.25),
    EXCLUSIVE,
    checkpoint="$@bundle_root + '/models/model.pt'",
)
_SWIN_BUNDLE["checkpointloader"]["load_path"] = "$@checkpoint"

_NO_ITK = {"preprocessing__transforms__0__reader": None}

#: Every layout by the name of its bundle.
LAYOUTS = {
    "spleen_ct": Layout(_SPLEEN, ["background", "spleen"]),
    "swin_unetr_btcv": Layout(
        _SWIN_BUNDLE,
        ["background", "spleen", "right kidney", "left kidney"],
        for_monai=_NO_ITK,
        dropped=["img_size"],
        warns="SwinUNETR no longer takes img_size",
    ),
    "brats_mri": Layout(
        _bundle(
            _segresnet(4, 3),
            [_load(image_only=False), of_image("NormalizeIntensityd", nonzero=True)],
            _windows(),
            [
                SIGMOID,
                _invert(meta_keys="pred_meta_dict"),
                THRESHOLD,
                of_prediction("Lambdad", func=_ONE_LABEL),
                _save(output_dtype="uint8", resample=False, squeeze_end_dims=True),
            ],
        ),
        ["tumor core", "whole tumor", "enhancing tumor"],
        **{"scan_channels": 4, "channels": 4, "joined": _tumour_labels},
    ),
    "prostate_mri_anatomy": Layout(
        _by_handler(
            _bundle(
                _unet(3), _PROSTATE, _windows(), [ARGMAX, _KEEP, _invert(), _save(resample=False)]
            ),
            map_location={"_target_": "torch.device", "device": "@device"},
        ),
        ["background", "central gland", "peripheral zone"],
    ),
    "pancreas_ct_dints": Layout(
        _bundle(
            _dints(3), _ct(-87, 199, [1.5] * 3), _windows(16, 0.25), EXCLUSIVE, **_ARCHITECTURE
        ),
        ["background", "pancreas", "tumor"],
        **{"kind": "yaml", "prepare": _search_code, "for_monai": _DINTS_HERE},
    ),
    "multi_organ": Layout(
        _by_handler(
            _bundle(
                _dints(4), _ct(-500, 500, [1.5] * 3), _windows(16, 0.25), EXCLUSIVE, **_ARCHITECTURE
            )
        ),
        ["background", "artery", "portal vein", "liver"],
        **{"kind": "yaml", "prepare": _search_code, "for_monai": _DINTS_HERE},
    ),
    "pediatric_abdominal_ct": Layout(
        _by_handler(
            _bundle(
                _dynunet(1, 4),
                [
                    *_ct(-250, 400, [1.5, 1.5, 3.0], reader="ITKReader")[:5],
                    of_image("CropForegroundd", source_key="image", mode=["minimum"]),
                    of_image("EnsureTyped"),
                    of_image("CastToTyped", dtype="$torch.float32"),
                ],
                _windows(16, 0.75),
                [SOFTMAX, _invert(), ARGMAX, _save(output_dtype="$torch.int16")],
            ),
            "dynunet_FT.pt",
        ),
        ["background", "liver", "spleen", "pancreas"],
        **{"kind": "yaml", "for_monai": _NO_ITK, "weights": "dynunet_FT.pt"},
        defined="label_def",
    ),
    "renalStructures_CECT": Layout(
        _by_handler(
            _bundle(
                _segresnet(3, 4, upsample_mode="deconv", norm_name="group"),
                [_load([*_PHASE_KEYS, "label"], image_only=False), *_KIDNEY],
                _windows(16, 0.25),
                [
                    {**_invert(device="@device", meta_keys="m"), "orig_keys": "artery"},
                    of_prediction("Activationsd", softmax=False, sigmoid=True),
                    THRESHOLD,
                    of_prediction("scripts.phases.OneMapd"),
                    _save(meta_keys="pred_meta_dict"),
                    {**_save(), "keys": "label"},
                ],
            ),
            run="inference",
            strict="True",
        ),
        ["background", "artery", "vein", "ureter"],
        **{"images": _PHASE_KEYS, "scan_channels": 3, "channels": 3, "run": "inference"},
        **{"scripts": {"phases": _PHASES}, "joined": _largest_number},
    ),
    "renalStructures_UNEST": Layout(
        _by_handler(
            _bundle(
                {"_target_": "scripts.networks.unest.UNesT", "in_channels": 1, "out_channels": 4},
                [
                    _load(),
                    of_image("EnsureChannelFirstd", channel_dim="no_channel"),
                    *_ct(-175, 250, [1.5] * 3)[2:],
                ],
                _windows(),
                [SOFTMAX, _invert(), ARGMAX, _save()],
            ),
            run="evaluating",
            strict="True",
        ),
        ["background", "cortex", "medulla", "pelvicalyceal system"],
        scripts={"networks.__init__": "", "networks.unest": _NEST},
        run="evaluating",
    ),
    "wholeBrainSeg_Large_UNEST": Layout(
        _by_handler(
            _bundle(
                {
                    "_target_": "scripts.networks.unest_base_patch_4.UNesT",
                    **{"in_channels": 1, "out_channels": 7, "patch_size": 4, "depths": [2, 2, 8]},
                },
                [
                    _load(),
                    of_image("EnsureChannelFirstd"),
                    of_image("NormalizeIntensityd", nonzero="True", channel_wise="True"),
                    of_image("EnsureTyped"),
                ],
                _windows(16, 0.7),
                [SOFTMAX, _invert(meta_key_postfix="meta_dict"), ARGMAX, _save()],
            ),
            run="evaluating",
            strict="True",
        ),
        [f"region {number}" for number in range(7)],
        scripts={"networks.__init__": "", "networks.unest_base_patch_4": _NEST},
        run="evaluating",
    ),
    "wholeBody_ct": Layout(WHOLE_BODY, ["background", "spleen", "kidney", "liver", "aorta"]),
    "spleen_deepedit": Layout(
        _DEEPEDIT,
        ["background", "spleen"],
        channels=3,
        scripts={"clicks": _CLICKS},
        for_monai={"first__0__reader": None},
        warns="can be given clicks; it is explained without any",
    ),
}

#: One of one label map, one of overlapping regions, one with a network of its own.
QUICK = ("spleen_ct", "brats_mri", "renalStructures_UNEST")

#: Layouts of networks whose layers take long to be measured.
LARGE = ("swin_unetr_btcv", "pancreas_ct_dints", "multi_organ")

#: Layouts that are refused, with what is said.
REFUSED = {
    "ventricular_short_axis_3label": (
        _bundle(
            {**_unet(4), "spatial_dims": 2},
            [_load(), of_image("EnsureChannelFirstd"), of_image("ScaleIntensityd")],
            {"_target_": "SliceInferer", "roi_size": [16, 16], "spatial_dim": 2},
            EXCLUSIVE,
        ),
        {},
        r"slice by slice \(SliceInferer\).*Ensemble",
    ),
    "vista3d": (
        _bundle(
            "$monai.networks.nets.vista3d132(in_channels=1)",
            [_load(), of_image("EnsureChannelFirstd")],
            {"_target_": "scripts.prompts.PromptInferer", "roi_size": [128] * 3},
            [_invert(nearest=True), _save()],
        ),
        {"prompts": _PROMPTS},
        "inferer PromptInferer is one of its own",
    ),
}
