"""Small nnU-Net v2 model folders, made without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import nn

TRAINER = "nnUNetTrainer"
RESAMPLING = "resample_data_or_seg_to_shape"

#: Arguments of a network: what nnU-Net plans.
INSTANCE_NORM = {
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
}

#: How plans described the U-Net of `write_folder` before nnU-Net 2.5, apart from its class.
OLD_UNET = {
    "UNet_base_num_features": 4,
    "unet_max_num_features": 320,
    "n_conv_per_stage_encoder": [1, 1],
    "n_conv_per_stage_decoder": [1],
    "num_pool_per_axis": [1, 1, 1],
    "pool_op_kernel_sizes": [[1, 1, 1], [2, 2, 2]],
    "conv_kernel_sizes": [[3, 3, 3], [3, 3, 3]],
}

#: Changes of a configuration: nnU-Net's faster resampling.
TORCH_RESAMPLING = {
    f"resampling_fn_{what}{end}": value
    for what in ("data", "seg", "probabilities")
    for end, value in (
        ("", "resample_torch_fornnunet"),
        (
            "_kwargs",
            {"is_seg": what == "seg", "force_separate_z": False, "memefficient_seg_resampling": 0},
        ),
    )
}


def write_folder(
    parent: Path,
    *,
    configuration: str = "3d_fullres",
    labels: dict[str, Any] | None = None,
    channels: int = 1,
    patch: Sequence[int] = (16, 16, 16),
    spacing: Sequence[float] = (1.5, 1.5, 1.5),
    transpose: Sequence[int] = (0, 1, 2),
    folds: Sequence[int | str] = (0,),
    mirror: Sequence[int] | None = None,
    reader: str = "SimpleITKIO",
    norm: str = "ZScoreNormalization",
    network: str = "PlainConvUNet",
    arguments: dict[str, Any] | None = None,
    fill: Callable[[nn.Module, int], None] | None = None,
    **changes: Any,
) -> Path:
    """Write a folder as nnU-Net's training leaves it; the networks are random, or as `fill` says.

    Args:
        fill: called with a network and the number of its fold.
        network, arguments: a class of dynamic_network_architectures, and changes of its arguments.
        changes: of the configuration in plans.json.
    """
    labels = labels or {"background": 0, "organ": 1, "lesion": 2}
    folder = parent / "Dataset900_Tiny" / f"{TRAINER}__nnUNetPlans__{configuration}"
    folder.mkdir(parents=True)
    dims = len(patch)
    architecture = {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{network}",
        "arch_kwargs": {
            "n_stages": 2,
            "features_per_stage": [4, 8],
            "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
            "kernel_sizes": [[3] * dims] * 2,
            "strides": [[1] * dims, [2] * dims],
            "n_conv_per_stage" if network == "PlainConvUNet" else "n_blocks_per_stage": [1, 1],
            "n_conv_per_stage_decoder": [1],
            "conv_bias": True,
            "norm_op": None,
            "norm_op_kwargs": None,
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
            **(arguments or {}),
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    resampling = {"force_separate_z": None, "order_z": 0}
    of_configuration = {
        "data_identifier": f"nnUNetPlans_{configuration}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch),
        "median_image_size_in_voxels": [40.0] * dims,
        "spacing": list(spacing),
        "normalization_schemes": [norm] * channels,
        "use_mask_for_norm": [False] * channels,
        "resampling_fn_data": RESAMPLING,
        "resampling_fn_seg": RESAMPLING,
        "resampling_fn_probabilities": RESAMPLING,
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **resampling},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **resampling},
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, **resampling},
        "architecture": architecture,
        "batch_dice": True,
        **changes,
    }
    plans = {
        "dataset_name": "Dataset900_Tiny",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [40, 40, 40],
        "image_reader_writer": reader,
        "transpose_forward": list(transpose),
        "transpose_backward": [int(n) for n in np.argsort(transpose)],
        "configurations": {configuration: of_configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            str(n): {"mean": 10.0, "std": 5.0, "percentile_00_5": 0.0, "percentile_99_5": 30.0}
            for n in range(channels)
        },
    }
    dataset: dict[str, Any] = {
        "channel_names": {str(n): f"channel {n}" for n in range(channels)},
        "labels": labels,
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    regions = any(isinstance(value, list) for value in labels.values())
    heads = len(labels) - regions - ("ignore" in labels)
    if regions:
        dataset["regions_class_order"] = list(range(1, heads + 1))
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    for number, fold in enumerate(folds):
        module = network_of(plans, configuration, channels, heads)
        (fill or random)(module, number)
        checkpoint = {
            "network_weights": module.state_dict(),
            "trainer_name": TRAINER,
            "init_args": {"configuration": configuration, "fold": fold},
            "inference_allowed_mirroring_axes": None if mirror is None else tuple(mirror),
            "logging": {"mean_fg_dice": [np.float64(0.5)]},
            "current_epoch": 3,
        }
        (folder / f"fold_{fold}").mkdir()
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


def network_of(plans: dict[str, Any], configuration: str, channels: int, heads: int) -> nn.Module:
    """Return the network as it is trained, with deep supervision."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    architecture = plans["configurations"][configuration]["architecture"]
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        channels,
        heads,
        deep_supervision=True,
    )


def random(network: nn.Module, seed: int) -> None:
    """Fill a network with numbers that make logits of a few units, and masks of every class."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        with torch.no_grad():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    with torch.no_grad():
        for head in network.decoder.seg_layers:  # contrasts, so that each class wins somewhere
            head.weight -= head.weight.mean(1, keepdim=True)
            head.weight[1] = -head.weight[0]
            head.bias.zero_()


def bright(network: nn.Module, fold: int = 0) -> None:
    """Let class 1 be what is brighter than 1, on the way of the first channels alone."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        middle = (1,) * (next(network.parameters()).ndim - 2)
        first = network.encoder.stages[0][0].convs[0].conv
        first.weight[(0, 0, *middle)] = 1
        skip = network.decoder.stages[0].convs[0].conv  # takes [upsampled, skip]
        skip.weight[(0, skip.in_channels // 2, *middle)] = 1
        head = network.decoder.seg_layers[-1]
        head.weight[1, 0] = 4
        head.bias[1] = -4


def write_case(
    folder: Path, data: np.ndarray, affine: np.ndarray, name: str = "case"
) -> list[Path]:
    """Write the channels (C, X, Y, Z) of a case as nnU-Net names its files."""
    files = []
    for channel, values in enumerate(data):
        files.append(folder / f"{name}_{channel:04d}.nii.gz")
        nib.save(nib.Nifti1Image(values.astype(np.float32), affine), files[-1])
    return files


def predicted(
    folder: Path, files: Sequence[Path], *, mirroring: bool = True
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Let nnU-Net's own predictor prepare and predict a case, in full and in half precision.

    Returns:
        logits (K, *S) summed up in float32 and as nnU-Net does it, in float16, and the
        segmentation (X, Y, Z) of the former, as nnU-Net writes it.
    """
    from nnunetv2.inference.export_prediction import (
        convert_predicted_logits_to_segmentation_with_correct_shape as converted,
    )
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        use_mirroring=mirroring,
        perform_everything_on_device=False,
        device=torch.device("cpu"),
        allow_tqdm=False,
    )
    predictor.initialize_from_trained_model_folder(str(folder), use_folds=None)
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    data, _, properties = preprocessor.run_case(
        [str(file) for file in files],
        None,
        predictor.plans_manager,
        predictor.configuration_manager,
        predictor.dataset_json,
    )
    x = torch.from_numpy(data)
    in_half = predictor.predict_logits_from_preprocessed_data(x)
    half, torch.half = torch.half, torch.float32
    try:
        logits = predictor.predict_logits_from_preprocessed_data(x)
    finally:
        torch.half = half
    segmentation = converted(
        logits,
        predictor.plans_manager,
        predictor.configuration_manager,
        predictor.label_manager,
        properties,
        num_threads_torch=1,
    )
    written = files[0].with_name("predicted.nii.gz")
    writer = predictor.plans_manager.image_reader_writer_class()
    writer.write_seg(np.asarray(segmentation), str(written), properties)
    return logits.float(), in_half.float(), np.asarray(nib.load(written).dataobj)
