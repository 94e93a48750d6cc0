"""A Lightning training that shows, every few epochs, what the network looks at.

    python examples/train_lightning.py --out train_lightning

A `CamCallback` explains validation cases during `fit` and in `validate`, which Lightning runs in
inference mode. The training goes on exactly as it would have without it. Needs the extra
`lightning`.

Writes `cams/epoch_0002/case_0/cam_ball.nii.gz` and `.png`, and so on, and prints the loss.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from seg3dcam.integrations import CamCallback
from seg3dcam.targets import ClassLogit

SIZE = 24


def make_cases(count: int, seed: int) -> TensorDataset:
    """Return scans with a bright ball in noise (N, 1, D, H, W), and where the balls are."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(SIZE)] * 3, indexing="ij"), -1)
    balls = np.stack(
        [np.linalg.norm(grid - rng.uniform(8, 16, 3), axis=-1) < 5 for _ in range(count)]
    )
    scans = rng.normal(0, 0.5, balls.shape) + 2 * balls
    return TensorDataset(
        torch.from_numpy(scans[:, None].astype(np.float32)), torch.from_numpy(balls).long()
    )


class Segmenter(pl.LightningModule):
    """A small network, its loss and its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv3d(1, 8, 3, padding=1),
            nn.BatchNorm3d(8),
            nn.ReLU(),
            nn.Dropout3d(0.1),
            nn.Conv3d(8, 2, 3, padding=1),
        )
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        scans, balls = batch
        loss = nn.functional.cross_entropy(self.net(scans), balls)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx):
        scans, balls = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(scans), balls))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def train(out: Path, epochs: int = 4, *, explain: bool = True) -> Segmenter:
    """Train and validate, and explain every second epoch if wanted."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    pl.seed_everything(0, verbose=False)
    callback = CamCallback(
        out=out / "cams",
        network="net",
        target_layers="2",
        class_idx=ClassLogit(1, "volume"),
        class_names=["background", "ball"],
        interval=2,
    )
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback] if explain else [],
        logger=TensorBoardLogger(str(out), "tensorboard"),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        log_every_n_steps=1,
    )
    module = Segmenter()
    validation = DataLoader(make_cases(2, seed=9), batch_size=2)
    trainer.fit(module, DataLoader(make_cases(6, seed=0), batch_size=2, shuffle=True), validation)
    trainer.validate(module, validation, verbose=False)
    return module


def main(out: Path) -> None:
    """Train and say what was written."""
    losses = train(out).losses
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    for picture in sorted((out / "cams").rglob("*.png")):
        print(picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("train_lightning"))
    main(parser.parse_args().out)
