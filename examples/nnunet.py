"""A trained nnU-Net explained as it is: its own preparation, windows, folds, flips and way back.

    python examples/nnunet.py --out nnunet
    python examples/nnunet.py --model Dataset009_Spleen/nnUNetTrainer__nnUNetPlans__3d_fullres \
        --case spleen_1_0000.nii.gz --out nnunet

Without `--model`, a small folder is written as nnU-Net's training leaves one, with weights set by
hand to find what is bright. Needs the extra `nnunet`. On the command line the same is
`seg3dcam explain case_0000.nii.gz --model nnunet:<folder>`.

Writes `cam_<class>.nii.gz` on the scan's own grid, and `cam_<class>.png`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet

from seg3dcam import explain_each, load_model, load_scan
from seg3dcam.files import unique_names
from seg3dcam.review import review_explanation, save_montage

RESAMPLING = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}

ARCHITECTURE = {
    "n_stages": 2,
    "features_per_stage": [4, 8],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [2, 2, 2]],
    "n_conv_per_stage": [1, 1],
    "n_conv_per_stage_decoder": [1],
    "conv_bias": True,
    "norm_op": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}

PLANS = {
    "dataset_name": "Dataset900_Ball",
    "plans_name": "nnUNetPlans",
    "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {"0": {}},
    "configurations": {
        "3d_fullres": {
            "preprocessor_name": "DefaultPreprocessor",
            "patch_size": [16, 24, 24],
            "spacing": [2.0, 1.5, 1.5],
            "normalization_schemes": ["ZScoreNormalization"],
            "use_mask_for_norm": [False],
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": RESAMPLING,
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_seg_kwargs": {**RESAMPLING, "is_seg": True},
            "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
            "resampling_fn_probabilities_kwargs": RESAMPLING,
            "architecture": {
                "network_class_name": (
                    "dynamic_network_architectures.architectures.unet.PlainConvUNet"
                ),
                "arch_kwargs": ARCHITECTURE,
                "_kw_requires_import": ["conv_op", "norm_op", "nonlin"],
            },
        }
    },
}

DATASET = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "ball": 1},
    "file_ending": ".nii.gz",
}


def make_case(file: Path) -> Path:
    """Write an oblique scan of 0.9 x 1.1 x 2.4 mm with a bright ball in it."""
    rng = np.random.default_rng(0)
    spacing = [0.9, 1.1, 2.4]
    grid = np.stack(np.meshgrid(*map(np.arange, (56, 48, 22)), indexing="ij"), -1)
    ball = np.linalg.norm((grid - [20, 28, 12]) * spacing, axis=-1) < 8
    turn = nib.eulerangles.euler2mat(0.2, -0.1, 0.1) @ np.diag([-1, 1, 1])
    affine = nib.affines.from_matvec(turn @ np.diag(spacing), [20, -30, 50])
    values = 100 + rng.normal(0, 4, ball.shape) + 100 * ball
    nib.save(nib.Nifti1Image(values.astype(np.float32), affine), file)
    return file


def make_network() -> PlainConvUNet:
    """Return a network whose class 1 is what is two standard deviations above the mean."""
    settings = {
        **ARCHITECTURE,
        "conv_op": torch.nn.Conv3d,
        "nonlin": torch.nn.LeakyReLU,
        "deep_supervision": True,
    }
    network = PlainConvUNet(input_channels=1, num_classes=2, **settings)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.encoder.stages[0][0].convs[0].conv.weight[0, 0, 1, 1, 1] = 1
        network.decoder.stages[0].convs[0].conv.weight[0, 4, 1, 1, 1] = 1  # behind 4 upsampled
        network.decoder.seg_layers[-1].weight[1, 0] = 4
        network.decoder.seg_layers[-1].bias[1] = -8
    return network


def make_model(parent: Path) -> Path:
    """Write a model folder as nnU-Net's training leaves it."""
    folder = parent / "Dataset900_Ball" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    (folder / "fold_0").mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(PLANS, indent=2))
    (folder / "dataset.json").write_text(json.dumps(DATASET, indent=2))
    checkpoint = {
        "network_weights": make_network().state_dict(),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres"},
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    return folder


def main(out: Path, folder: Path | None = None, case: list[Path] | None = None) -> None:
    """Explain every predicted class of a case."""
    out.mkdir(parents=True, exist_ok=True)
    # By hand only the first layer was set: nothing passes the bottleneck, which "auto" is.
    layer = "auto" if folder else "encoder.stages.0"
    folder = folder or make_model(out)
    case = case or [make_case(out / "case_0000.nii.gz")]
    model = load_model(f"nnunet:{folder}")
    names = []
    for found in explain_each(load_scan(case), model, layers=layer):
        names.append(found.label)
        name = unique_names(names)[-1]
        print(found.save(out / f"cam_{name}.nii.gz"))
        print(save_montage(out / f"cam_{name}.png", review_explanation(found)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("nnunet"))
    parser.add_argument("--model", type=Path, help="the folder that nnU-Net trained into")
    parser.add_argument("--case", type=Path, nargs="+", help="the case's files, one per channel")
    arguments = parser.parse_args()
    main(arguments.out, arguments.model, arguments.case)
