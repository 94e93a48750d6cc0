"""What a Grad-CAM costs, beside the least that the arithmetic needs and beside captum.

    python benchmarks/single_window.py

MONAI's UNet, one 96x96x96 input, the target layer at the bottleneck and at the last decoder level.
Three ways, each in a process of its own, so that peak memory is its own:

- baseline: forward pass + torch.autograd.grad to the layer, by hand;
- seg3dcam: GradCAM, the map on the input's grid included;
- captum: LayerGradCam.

Times are interleaved within one process and compared as ratios; memory is how much the peak
resident size grows from the first call on (a warm-up call of a 32x32x32 input has happened).
A third part shows that a windowed scan's memory does not grow with the number of windows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
from captum.attr import LayerGradCam
from measure import growth, machine, summary, take_turns
from monai.networks.nets import UNet

from seg3dcam import GradCAM, HiResCAM, WindowPlan, targets

LAYERS = {
    "bottleneck": "model.1.submodule.1.submodule.1.submodule.1.submodule",
    "last decoder level": "model.1",
}
TARGET = targets.ClassLogit(1, region="volume")


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return UNet(3, 1, 4, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2).eval()


def ways(model: torch.nn.Module, layer: str) -> dict[str, Callable[[torch.Tensor], object]]:
    """Return the three ways as functions of the input."""
    module = model.get_submodule(layer)
    cam = GradCAM(model, layer)

    def baseline(x: torch.Tensor) -> object:
        kept: list[torch.Tensor] = []
        hook = module.register_forward_hook(lambda m, i, output: kept.append(output))
        score = model(x)[:, 1].sum()
        hook.remove()
        return torch.autograd.grad(score, kept)

    def ours(x: torch.Tensor) -> object:
        return cam(x, TARGET).maps

    def captum(x: torch.Tensor) -> object:
        grad_cam = LayerGradCam(lambda x: model(x)[:, 1].flatten(1).sum(1), module)
        return grad_cam.attribute(x)

    return {"baseline": baseline, "seg3dcam": ours, "captum": captum}


def compare_times(layer: str, size: int, rounds: int) -> dict[str, list[float]]:
    """Time the three ways in turn; the first round is not counted."""
    x = torch.rand(1, 1, size, size, size)
    functions = ways(network(), layer)
    return take_turns({name: partial(way, x) for name, way in functions.items()}, rounds)


def peak_growth(way: str, layer: str, size: int) -> float:
    """Return by how many MB the peak memory of this process grows in one call."""
    function = ways(network(), layer)[way]
    function(torch.rand(1, 1, 32, 32, 32))
    x = torch.rand(1, 1, size, size, size)
    return growth(lambda: function(x))[0]


def windowed_growth(cam: str, depth: int, overlap: float) -> dict[str, int]:
    """Return peak growth in MB for a scan of `depth` slices cut into windows, and its size."""
    model = network()
    kind = {"GradCAM": GradCAM, "HiResCAM": HiResCAM}[cam]
    plan = WindowPlan(64, overlap=overlap, cache_gb=0.02)
    explain = kind(model, LAYERS["bottleneck"], sliding_window=plan)
    target = targets.ClassLogit(1, region=targets.Box((0, 0, 0), (64, 64, 64)))
    explain(torch.rand(1, 1, 64, 64, 96), target)
    x = torch.rand(1, 1, 128, 128, depth)
    megabytes, result = growth(lambda: explain(x, target))
    logits = result.logits.numel() * 4 / 1e6
    return {"windows": result.windows, "growth_mb": round(megabytes), "logits_mb": round(logits)}


def _in_own_process(*arguments: str) -> object:
    command = [sys.executable, __file__, "--part", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.part:
        print(json.dumps(_part(options.part)))
        return

    print(machine())
    for level, layer in LAYERS.items():
        seconds = compare_times(layer, options.size, options.rounds)
        print(f"\n{level} ({layer}), {options.size}^3, {options.rounds} rounds")
        for name, values in seconds.items():
            ratios = [v / b for v, b in zip(values, seconds["baseline"], strict=True)]
            memory = [
                float(_in_own_process("memory", name, layer, str(options.size)))  # type: ignore[arg-type]
                for _ in range(3)
            ]
            print(
                f"  {name:9} {summary(values, ' s')}, {summary(ratios)} x baseline, "
                f"memory +{summary(memory, ' MB')}"
            )
    print("\nwindows of 64^3, a scan of 128 x 128 x depth")
    for cam in ("HiResCAM", "GradCAM"):
        for depth, overlap in ((128, 0.5), (256, 0.5), (512, 0.5), (128, 0.75)):
            found = _in_own_process("windowed", cam, str(depth), str(overlap))
            print(f"  {cam:9} depth {depth:4}, overlap {overlap}: {json.dumps(found)}")


def _part(part: list[str]) -> object:
    if part[0] == "memory":
        return peak_growth(part[1], part[2], int(part[3]))
    return windowed_growth(part[1], int(part[2]), float(part[3]))


if __name__ == "__main__":
    main()
