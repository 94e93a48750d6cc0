"""What it costs to hold a map against its controls on a large volume in windows.

A volume of 192 x 192 x 192 voxels holds balls of three kinds. Class 1 is drawn because of a dark
spot beside the ball, and fills a tenth of the volume; class 3 needs nothing but itself. The network
is constructed, so that both are certain, and as cheap as possible, which makes the time outside of
the network look large: with a real one its part is smaller. Run one row or all:

    python benchmarks/evaluation.py [--cells 4] [--overlap 0.25] [--only NAME]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np
import torch
from measure import growth, machine
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

from seg3dcam import WindowPlan
from seg3dcam.evaluate import Rerun, context_evidence
from seg3dcam.geometry import FeatureGrid, interpolate

CELL = 48
STRIDE = 8
WINDOW = 64

#: Seconds of the processor that each run of the network took.
SPENT: list[float] = []

#: The parts of the cells with a ball of each kind.
KINDS = {1: 0.66, 3: 0.2, 2: 0.08}


class BySpots(nn.Module):
    """Balls of brightness 1 are class 1 where a spot of -2 is near, else class 2; -1 is class 3."""

    width, least = 49, 0.0004

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        smooth, spots = F.avg_pool3d(x, 3, 1, 1), (-x - 1.4).clamp(0, 0.5)
        for axis in range(3):
            size = [self.width if axis == other else 1 for other in range(3)]
            spots = F.avg_pool3d(spots, size, 1, [length // 2 for length in size])
        bright, near = 4 * (0.5 - (smooth - 1).abs()), 2000 * (spots - self.least)
        dark = 4 * (-smooth - 0.5)
        return torch.cat(
            [0 * bright, torch.minimum(bright, near), torch.minimum(bright, -near), dark], 1
        )


def scene(cells: int, seed: int = 0) -> tuple[torch.Tensor, NDArray[np.bool_]]:
    """Return a volume (1, 1, *S) of `cells` cells along every axis, and where the spots are."""
    draws = np.random.default_rng(seed)
    counts = {kind: round(part * cells**3) for kind, part in KINDS.items()}
    kinds = np.repeat([*counts, 0], [*counts.values(), cells**3 - sum(counts.values())])
    shape = (CELL * cells,) * 3
    x = 0.1 * draws.standard_normal(shape).astype(np.float32)
    spots = np.zeros(shape, dtype=bool)
    middle = np.stack(np.meshgrid(*[np.arange(CELL) - (CELL - 1) / 2] * 3, indexing="ij"))
    for number, kind in enumerate(draws.permutation(kinds)):
        place = np.unravel_index(number, (cells,) * 3)
        box = tuple(slice(CELL * start, CELL * (start + 1)) for start in place)
        radius = draws.uniform(14, 17)
        ball = (middle**2).sum(0) < radius**2
        beside = draws.choice([-1, 1], (3, 1, 1, 1)) / 3**0.5 * (radius + 9)
        spot = ((middle - beside) ** 2).sum(0) < draws.uniform(3, 5) ** 2
        x[box][ball] += {0: 0, 1: 1, 2: 1, 3: -1}[int(kind)]
        if kind == 1:
            x[box][spot & ~ball] -= 2
            spots[box] |= spot & ~ball
    return torch.from_numpy(x)[None, None], spots


def maps_of(spots: NDArray[np.bool_], grid: FeatureGrid) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Yield name, map and class: of the spots with some noise, noise alone, and both classes."""
    of_spots = F.avg_pool3d(torch.from_numpy(spots)[None, None].double(), STRIDE)[0, 0]
    noise = torch.rand(grid.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    voxels = FeatureGrid.of_voxels(spots.shape)
    true = interpolate(of_spots + 0.3 * of_spots.max() * noise, grid, voxels)
    yield "the spots", true, 1
    yield "noise", interpolate(noise, grid, voxels), 1
    yield "needs no context", true, 3


class Timed(BySpots):
    """Notes how long it took, outside of itself: what a network keeps is put back after a call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = time.process_time()
        logits = super().forward(x)
        SPENT.append(time.process_time() - start)
        return logits


def main() -> None:
    """Print a row for each map."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=4)
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    x, spots = scene(given.cells)
    plan = WindowPlan(WINDOW, overlap=given.overlap)
    size = CELL * given.cells // STRIDE
    grid = FeatureGrid((size,) * 3, (float(STRIDE),) * 3, ((STRIDE - 1) / 2,) * 3)
    print(machine())
    network = BySpots()
    start = time.process_time()
    rerun = Rerun(network, x, sliding_window=plan)
    once = time.process_time() - start
    parts = torch.bincount(rerun.logits.argmax(1).flatten(), minlength=4) / x[0, 0].numel()
    filled = ", ".join(f"{100 * float(part):.1f} %" for part in parts)
    print(
        f"{tuple(x.shape[2:])}, {len(rerun.windows)} windows; classes fill {filled}; one prediction"
        f" takes {once:.1f} s of the processor"
    )
    del rerun
    print("| map | predictions | s of the processor | in the network | memory | verdict |")
    print("|---|---|---|---|---|---|")
    for name, values, index in maps_of(spots, grid):
        if given.only in name:
            row(name, values, x, index, grid, plan)


def row(
    name: str,
    values: torch.Tensor,
    x: torch.Tensor,
    index: int,
    grid: FeatureGrid,
    plan: WindowPlan,
) -> None:
    """Print the figures of one map."""
    SPENT.clear()
    network, start = Timed(), time.process_time()
    memory, found = growth(
        lambda: context_evidence(
            values,
            x,
            network,
            index,
            grid=grid,
            steps=25,
            baselines=("mean", "blur", "noise"),
            draws=10,
            sliding_window=plan,
        )
    )
    seconds = time.process_time() - start
    print(
        f"| {name} | {found.cost:.1f} | {seconds:.0f} | {sum(SPENT):.0f} | +{memory:.0f} MB "
        f"| {found.words} |"
    )
    print(
        f"  {len(found.curve.dice)} steps of the map; errors "
        + ", ".join(f"{what} {error:.3f}" for what, error in found.errors.items()),
        flush=True,
    )


if __name__ == "__main__":
    main()
