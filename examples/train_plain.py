"""A plain PyTorch training with one line that shows what the network looks at.

    python examples/train_plain.py --out train_plain

The line is in the middle of the loop, between two steps: gradients, statistics of normalisation,
dropout and random numbers are afterwards as before, and the losses are the same as without it.

Writes `cam_<epoch>.nii.gz`, in the place that the scan's affine says, and prints the loss.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from torch import nn

from seg3dcam import HiResCAM

SIZE = 24


def make_batch(seed: int) -> tuple[MetaTensor, torch.Tensor]:
    """Return two scans with a bright ball in noise (2, 1, D, H, W), and where the balls are."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(SIZE)] * 3, indexing="ij"), -1)
    balls = np.stack([np.linalg.norm(grid - rng.uniform(8, 16, 3), axis=-1) < 5 for _ in range(2)])
    scans = rng.normal(0, 0.5, balls.shape) + 2 * balls
    affine = np.diag([1.5, 1.5, 2.0, 1.0])
    return MetaTensor(scans[:, None].astype(np.float32), affine=affine), torch.from_numpy(balls)


def train(out: Path | None, epochs: int = 4) -> tuple[nn.Module, list[float]]:
    """Train, explain the first scan of every second epoch if there is a folder."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(inplace=True),
        nn.Dropout3d(0.1),
        nn.Conv3d(8, 2, 3, padding=1),
    )
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for epoch in range(1, epochs + 1):
        for step in range(8):
            batch, balls = make_batch(10 * epoch + step)
            loss = nn.functional.cross_entropy(network(batch.as_tensor()), balls.long())
            loss.backward()
            if out is not None and epoch % 2 == 0 and step == 0:
                HiResCAM(network, "2")(batch, target=1).save(out / f"cam_{epoch}.nii.gz", item=0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return network, losses


def main(out: Path) -> None:
    """Train and say what was written."""
    _, losses = train(out)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    for volume in sorted(out.glob("*.nii.gz")):
        print(volume)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("train_plain"))
    main(parser.parse_args().out)
