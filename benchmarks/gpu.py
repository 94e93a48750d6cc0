"""What a GPU makes of it: the tests that need one, then a first table of time and memory.

    python benchmarks/gpu.py

One script for a machine with a card, in less than ten minutes: `tests/test_cuda.py`, then MONAI's
UNet at the bottleneck, one input and windows, beside the least that the arithmetic needs and
captum's LayerGradCam. Times are medians of rounds that take turns, with the card waited for; memory
is `torch.cuda.max_memory_allocated` above what was allocated before the call. What is found is
printed and written to `benchmarks/gpu.md`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from captum.attr import LayerGradCam
from measure import machine, summary, take_turns
from monai.networks.nets import UNet

from seg3dcam import GradCAM, HiResCAM, WindowPlan, targets

DEVICE = "cuda"
HERE = Path(__file__).parent
BOTTLENECK = "model.1.submodule.1.submodule.1.submodule.1.submodule"
TARGET = targets.ClassLogit(1, region="volume")

Ways = Mapping[str, Callable[[], object]]


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    made = UNet(3, 1, 4, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2)
    return made.eval().requires_grad_(False).to(DEVICE)


def card() -> str:
    """Return the card, its memory and the versions in a line."""
    found = torch.cuda.get_device_properties(0)
    return (
        f"{found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, "
        f"cuDNN {torch.backends.cudnn.version()}, MONAI {version('monai')}, "
        f"captum {version('captum')}; {machine()}"
    )


def waited_for(way: Callable[[], object]) -> Callable[[], object]:
    """Return a call that ends when the card has done its work."""

    def call() -> object:
        result = way()
        torch.cuda.synchronize()
        return result

    return call


def peak(way: Callable[[], object]) -> float:
    """Return by how many MB the card's allocated memory grows during a call, at most."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def one_window(size: int) -> Ways:
    """Return the ways to explain one input that lies on the card."""
    model = network()
    module = model.get_submodule(BOTTLENECK)
    cam = GradCAM(model, BOTTLENECK)
    x = torch.rand(1, 1, size, size, size, device=DEVICE)

    def by_hand() -> object:
        kept: list[torch.Tensor] = []

        def keep(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            kept.append(output.detach().requires_grad_())
            return kept[-1].clone()

        hook = module.register_forward_hook(keep)
        score = model(x)[:, 1].sum()
        hook.remove()
        return torch.autograd.grad(score, kept)

    def captum() -> object:
        # captum needs a graph that begins at the input where the weights are frozen.
        score = LayerGradCam(lambda x: model(x)[:, 1].flatten(1).sum(1), module)
        return score.attribute(x.clone().requires_grad_())

    return {
        "by hand": by_hand,
        "seg3dcam `GradCAM`": lambda: cam(x, TARGET).maps,
        "captum `LayerGradCam`": captum,
    }


def windowed(size: int) -> Ways:
    """Return the ways to explain a scan in windows, beside its prediction alone."""
    from monai.inferers import sliding_window_inference

    model = network()
    x = torch.rand(1, 1, size, size, size)
    plan = WindowPlan(96, overlap=0.25, sw_batch_size=4)

    def prediction() -> object:
        with torch.no_grad():
            return sliding_window_inference(
                x, (96,) * 3, 4, model, 0.25, "gaussian", sw_device=DEVICE, device="cpu"
            )

    def explained(kind: type, x: torch.Tensor) -> Callable[[], object]:
        cam = kind(model, BOTTLENECK, sliding_window=plan)
        return lambda: cam(x, TARGET).maps

    on_card = x.to(DEVICE)
    return {
        "MONAI's prediction, scan on the CPU": prediction,
        "seg3dcam `HiResCAM`, scan on the CPU": explained(HiResCAM, x),
        "seg3dcam `GradCAM`, scan on the CPU": explained(GradCAM, x),
        "seg3dcam `GradCAM`, scan on the GPU": explained(GradCAM, on_card),
    }


def table(title: str, ways: Ways, rounds: int) -> list[str]:
    """Return the lines of a table; ratios are those of each round to the first way."""
    seconds = take_turns({name: waited_for(way) for name, way in ways.items()}, rounds)
    first = next(iter(seconds.values()))
    lines = [f"## {title}", "", "| | seconds | × the first | memory |", "|---|---|---|---|"]
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, first, strict=True)]
        memory = [peak(ways[name]) for _ in range(3)]
        lines.append(
            f"| {name} | {summary(values)} | {summary(ratios)} | +{summary(memory, ' MB')} |"
        )
    return [*lines, ""]


def run_tests() -> str:
    """Run the tests that need a GPU; return pytest's last line."""
    command = [sys.executable, "-m", "pytest", str(HERE.parent / "tests" / "test_cuda.py"), "-q"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=HERE.parent, capture_output=True, text=True
    )
    print(done.stdout[-6000:] + done.stderr[-2000:])
    return ([*done.stdout.splitlines(), *done.stderr.splitlines()] or ["no output"])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", type=int, default=128, help="voxels of the one input")
    parser.add_argument("--scan", type=int, default=256, help="voxels of the scan in windows")
    parser.add_argument("--out", type=Path, default=HERE / "gpu.md")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU in this machine: nothing was run and nothing written")
    warnings.simplefilter("ignore")  # a random network may speak against a class everywhere
    lines = ["# On a GPU", "", f"Written by `gpu.py`. {card()}", ""]
    print(lines[2])
    lines += [f"`tests/test_cuda.py`: {run_tests().strip('= ')}", ""]
    lines += [f"Medians of {options.rounds} rounds that take turns (range).", ""]
    one, many = (f"{n} × {n} × {n} voxels" for n in (options.size, options.scan))
    lines += table(f"One input of {one}", one_window(options.size), options.rounds)
    title = f"A scan of {many} in windows of 96³, overlap 0.25, 4 at once"
    lines += table(title, windowed(options.scan), max(3, options.rounds // 3))
    print("\n".join(lines))
    options.out.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
