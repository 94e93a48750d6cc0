"""Trains a small nnU-Net on balls in noise, with nnU-Net's own planner, preprocessor and trainer.

Run by a test in a process of its own, where nnUNet_raw and the other two places are set.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

DATASET = "Dataset901_Balls"


def write_cases(folder: Path) -> None:
    """Write six scans of 32 x 32 x 24 voxels of 1 x 1 x 1.5 mm, and their labels."""
    rng = np.random.default_rng(0)
    for place in ("imagesTr", "labelsTr"):
        (folder / place).mkdir(parents=True)
    affine = np.diag([1, 1, 1.5, 1])
    for number in range(6):
        centre = rng.uniform([10, 10, 8], [22, 22, 16])
        grid = np.stack(np.meshgrid(*map(np.arange, (32, 32, 24)), indexing="ij"), -1)
        ball = np.linalg.norm((grid - centre) * [1, 1, 1.5], axis=-1) < 8
        scan = rng.normal(10, 1, ball.shape) + 6 * ball
        for place, values, end in (("imagesTr", scan, "_0000"), ("labelsTr", ball, "")):
            image = nib.Nifti1Image(values.astype(np.float32), affine)
            nib.save(image, folder / place / f"case_{number:02d}{end}.nii.gz")
    dataset = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "ball": 1},
        "numTraining": 6,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(dataset))


def make_small(plans_file: Path) -> None:
    """Give the planned network three levels of few channels, and a small patch."""
    plans = json.loads(plans_file.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    configuration["patch_size"] = [24, 24, 24]
    arguments = configuration["architecture"]["arch_kwargs"]
    arguments.update(
        n_stages=3,
        features_per_stage=[8, 16, 32],
        kernel_sizes=[[3, 3, 3]] * 3,
        strides=[[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        n_conv_per_stage=[1, 1, 1],
        n_conv_per_stage_decoder=[1, 1],
    )
    plans_file.write_text(json.dumps(plans))


def main() -> None:
    """Plan, preprocess and train."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as planning
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    torch.set_num_threads(2)
    torch.manual_seed(0)
    np.random.seed(0)
    os.environ["nnUNet_n_proc_DA"] = "1"  # noqa: SIM112
    raw, prepared = (Path(os.environ[n]) / DATASET for n in ("nnUNet_raw", "nnUNet_preprocessed"))
    write_cases(raw)
    planning.extract_fingerprints([901], num_processes=1, check_dataset_integrity=False)
    planning.plan_experiments([901])
    make_small(prepared / "nnUNetPlans.json")
    planning.preprocess([901], configurations=["3d_fullres"], num_processes=[1])

    os.environ["nnUNet_n_proc_DA"] = "0"  # noqa: SIM112 (no processes of its own)
    trainer = nnUNetTrainer(
        json.loads((prepared / "nnUNetPlans.json").read_text()),
        "3d_fullres",
        0,
        json.loads((prepared / "dataset.json").read_text()),
        device=torch.device("cpu"),
    )
    trainer.num_epochs, trainer.num_iterations_per_epoch = 2, 8
    trainer.num_val_iterations_per_epoch = 2
    trainer.run_training()


if __name__ == "__main__":
    main()
