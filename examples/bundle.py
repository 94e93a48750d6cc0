"""A MONAI bundle explained as it is: its own preparation, window, class names and way back.

    python examples/bundle.py --out bundle
    python examples/bundle.py --bundle spleen_ct_segmentation --scan ct.nii.gz --out bundle

Without `--bundle`, a small one is made that finds bright balls, in the layout of MONAI's model zoo.
A bundle's config can run any code: only load one that you know. On the command line the same is
`seg3dcam explain ct.nii.gz --model bundle:spleen_ct_segmentation --trust`.

Writes `cam_<class>.nii.gz` on the scan's own grid, and `cam_<class>.png`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.networks.nets import UNet

from seg3dcam import explain_each, load_model, load_scan
from seg3dcam.files import unique_names
from seg3dcam.review import review_explanation, save_montage

NETWORK = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 2,
    "channels": [4, 8],
    "strides": [2],
    "norm": None,
}

CONFIG = {
    "bundle_root": ".",
    "device": "$torch.device('cpu')",
    "network_def": {"_target_": "UNet", **NETWORK},
    "network": "$@network_def.to(@device)",
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "LoadImaged", "keys": "image"},
            {"_target_": "EnsureChannelFirstd", "keys": "image"},
            {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
            {"_target_": "Spacingd", "keys": "image", "pixdim": [1.5, 1.5, 2.0]},
            {"_target_": "ScaleIntensityd", "keys": "image"},
        ],
    },
    "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [24, 24, 16], "overlap": 0.5},
    "postprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "Activationsd", "keys": "pred", "softmax": True},
            {
                "_target_": "Invertd",
                "keys": "pred",
                "transform": "@preprocessing",
                "orig_keys": "image",
                "nearest_interp": False,
            },
            {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
        ],
    },
    "handlers": [
        {
            "_target_": "CheckpointLoader",
            "load_path": "$@bundle_root + '/models/model.pt'",
            "load_dict": {"model": "@network"},
        }
    ],
    "dataset": {"_target_": "Dataset", "data": [], "transform": "@preprocessing"},
    "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
    "evaluator": {
        "_target_": "SupervisedEvaluator",
        "device": "@device",
        "val_data_loader": "@dataloader",
        "network": "@network",
        "inferer": "@inferer",
        "postprocessing": "@postprocessing",
        "val_handlers": "@handlers",
    },
    "run": ["$@evaluator.run()"],
}

METADATA = {
    "version": "0.1.0",
    "monai_version": "1.5.0",
    "network_data_format": {
        "inputs": {"image": {"num_channels": 1}},
        "outputs": {"pred": {"num_channels": 2, "channel_def": {"0": "background", "1": "ball"}}},
    },
}


def make_scan(file: Path) -> Path:
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


def make_bundle(folder: Path) -> Path:
    """Write a bundle whose network was trained for a few steps to find bright voxels."""
    torch.manual_seed(0)
    network = UNet(**NETWORK)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(40):
        x = torch.rand(2, 1, 24, 24, 16)
        x = torch.nn.functional.avg_pool3d(x, 5, stride=1, padding=2)
        x = (x - x.min()) / (x.max() - x.min())
        loss = torch.nn.functional.cross_entropy(network(x), (x[:, 0] > 0.6).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for place in ("configs", "models"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    (folder / "configs" / "inference.json").write_text(json.dumps(CONFIG, indent=2))
    (folder / "configs" / "metadata.json").write_text(json.dumps(METADATA, indent=2))
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    return folder


def main(out: Path, bundle: Path | None = None, scan: Path | None = None) -> None:
    """Explain every predicted class of a scan."""
    out.mkdir(parents=True, exist_ok=True)
    bundle = bundle or make_bundle(out / "ball_segmentation")
    scan = scan or make_scan(out / "scan.nii.gz")
    model = load_model(f"bundle:{bundle}", trust=True)
    names = []
    for found in explain_each(load_scan(scan), model):
        names.append(found.label)
        name = unique_names(names)[-1]
        print(found.save(out / f"cam_{name}.nii.gz"))
        print(save_montage(out / f"cam_{name}.png", review_explanation(found)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bundle"))
    parser.add_argument("--bundle", type=Path, help="a bundle's folder")
    parser.add_argument("--scan", type=Path, help="a NIfTI file")
    arguments = parser.parse_args()
    main(arguments.out, arguments.bundle, arguments.scan)
