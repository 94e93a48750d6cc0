"""What the quick verdict adds to an explanation: processor time with and without it, in turns.

python benchmarks/quick_verdict.py
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from measure import machine, summary
from monai.networks.nets import BasicUNet, UNet

from seg3dcam import SegModel, WindowPlan, explain, load_scan
from seg3dcam.cams.calls import explain_targets
from seg3dcam.explaining.judging import Judge
from seg3dcam.targets import ClassLogOdds

ROUNDS = 5


def unet() -> torch.nn.Module:
    return UNet(3, 1, 3, (8, 16, 32), (2, 2))


def basic_unet() -> torch.nn.Module:
    return BasicUNet(3, 1, 3, features=(8, 8, 16, 32, 64, 8))


#: Name -> network, voxels along each axis, windows.
CASES: dict[str, tuple[Any, int, WindowPlan | None]] = {
    "UNet, 64³ in one window": (unet, 64, None),
    "BasicUNet, 96³ in one window": (basic_unet, 96, None),
    "UNet, 128³ in windows of 64³": (unet, 128, WindowPlan(64, overlap=0.25)),
}


@contextmanager
def without_verdict() -> Iterator[None]:
    """Explain as it was before there were verdicts."""

    def plainly(*args: Any, examines: bool, **more: Any) -> Any:
        return explain_targets(*args, examines=False, **more)

    with (
        patch("seg3dcam.explaining.explain.explain_targets", plainly),
        patch.object(Judge, "verdicts", lambda *_: {}),
    ):
        yield


def seconds_of(run: Any) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(machine())
    for name, (make, size, plan) in CASES.items():
        values = np.random.default_rng(0).random((size,) * 3).astype(np.float32)
        model = SegModel(make(), window=plan)
        scan = load_scan(values, affine=np.eye(4))
        run = partial(explain, scan, model, ClassLogOdds(1, "volume"))
        run()  # the grids are measured once
        ratios, plain = [], []
        for _ in range(ROUNDS):
            with without_verdict():
                plain.append(seconds_of(run))
            ratios.append(seconds_of(run) / plain[-1])
        print(f"{name}: {statistics.median(plain):.2f} s, with the verdict × {summary(ratios)}")


if __name__ == "__main__":
    main()
