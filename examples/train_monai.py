"""A MONAI training that shows, every few epochs, what the network looks at.

    python examples/train_monai.py --out train_monai

Small scans with a bright ball are segmented by a small U-Net, with MONAI's SupervisedTrainer and
SupervisedEvaluator; a `CamHandler` on the evaluator writes the maps of two validation cases. The
training goes on exactly as it would have without it. Needs the extra `ignite`.

Writes `cams/epoch_0002/case_0/cam_ball.nii.gz` and `.png`, and so on, and prints the loss.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import MeanDice, StatsHandler, ValidationHandler, from_engine
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.transforms import AsDiscreted, Compose, EnsureTyped, RandFlipd
from monai.utils import set_determinism
from torch.utils.tensorboard import SummaryWriter

from seg3dcam import WindowPlan
from seg3dcam.integrations import CamHandler
from seg3dcam.targets import ClassLogit

SIZE = 32
AFFINE = np.diag([1.5, 1.5, 2.0, 1.0])


def make_case(seed: int) -> dict[str, MetaTensor]:
    """Return a scan with a bright ball in noise, and where the ball is, (1, D, H, W) each."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(SIZE)] * 3, indexing="ij"), -1)
    ball = np.linalg.norm(grid - rng.uniform(10, 22, 3), axis=-1) < 6
    scan = rng.normal(0, 0.5, ball.shape) + 2 * ball
    return {
        "image": MetaTensor(scan[None].astype(np.float32), affine=AFFINE),
        "label": MetaTensor(ball[None].astype(np.float32), affine=AFFINE),
    }


def train(out: Path | None, epochs: int = 4, *, amp: bool = False) -> list[float]:
    """Train, explain every second epoch if there is a folder, and return the losses."""
    set_determinism(0)
    network = UNet(3, 1, 2, (4, 8, 16), (2, 2), norm="batch", dropout=0.1)
    augment = Compose([RandFlipd(["image", "label"], prob=0.5), EnsureTyped(["image", "label"])])
    training = DataLoader(Dataset([make_case(n) for n in range(6)], augment), batch_size=2)
    validation = DataLoader(Dataset([make_case(n) for n in range(90, 93)]), batch_size=2)
    device = torch.device("cpu")

    evaluator = SupervisedEvaluator(
        device=device,
        val_data_loader=validation,
        network=network,
        inferer=SlidingWindowInferer(24, overlap=0.5, mode="gaussian"),
        postprocessing=AsDiscreted(["pred", "label"], argmax=[True, False], to_onehot=2),
        key_val_metric={"dice": MeanDice(output_transform=from_engine(["pred", "label"]))},
        amp=amp,
    )
    if out is not None:
        handler = CamHandler(
            network,
            out=out / "cams",
            class_idx=ClassLogit(1, "volume"),
            class_names=["background", "ball"],
            cases=[0, 2],
            interval=2,
            sliding_window=WindowPlan(24, overlap=0.5, mode="gaussian"),  # the inferer's
            summary_writer=SummaryWriter(str(out / "tensorboard")),
        )
        handler.attach(evaluator)

    losses: list[float] = []
    trainer = SupervisedTrainer(
        device=device,
        max_epochs=epochs,
        train_data_loader=training,
        network=network,
        optimizer=torch.optim.Adam(network.parameters(), 1e-2),
        loss_function=DiceCELoss(to_onehot_y=True, softmax=True),
        train_handlers=[
            ValidationHandler(1, evaluator),
            StatsHandler(output_transform=lambda output: losses.append(output[0]["loss"]) or 0.0),
        ],
        amp=amp,
    )
    trainer.run()
    if out is not None:
        handler.summary_writer.close()
    return losses


def main(out: Path) -> None:
    """Train and say what was written."""
    losses = train(out)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    for picture in sorted((out / "cams").rglob("*.png")):
        print(picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("train_monai"))
    main(parser.parse_args().out)
