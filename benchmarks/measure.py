"""What the benchmarks share: resident memory, and rounds that take turns."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch


def machine() -> str:
    """Return the machine and the versions in a line."""
    return (
        f"python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads"
    )


def take_turns(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time several ways in turn; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for counted in [False] + [True] * rounds:
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if counted:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(values: Sequence[float], unit: str = "") -> str:
    """Return median and range, written out."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.3g}{unit} ({low:.3g}-{high:.3g})"


def growth(function: Callable[[], object]) -> tuple[float, object]:
    """Return by how many MB resident memory grows while `function` runs, at most; and its result.

    Linux only: the peak is reset first, so earlier work of the process does not hide it.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = function()
    return _status("VmHWM") - before, result


def resident() -> float:
    """Return how many MB this process holds now. Linux only."""
    return _status("VmRSS")


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1e3 for line in lines if line.startswith(key + ":"))
