"""What many maps of one scan cost, beside one; and the memory of EigenCAM on a large layer.

    python benchmarks/many_maps.py

MONAI's UNet, without windows and in windows. "one" is one class at one layer by one method;
"many" are 4 classes at 3 layers; "all" the same by every method that takes gradients. "by hand"
takes the gradients alone, without any map: the least that autograd needs. One run, rounds take
turns, ratios of each round. nnU-Net's residual encoder network is measured without windows.
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial

import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from measure import growth, machine, summary, take_turns
from monai.networks.nets import UNet

from seg3dcam import METHODS, EigenCAM, GradCAM, WindowPlan, targets
from seg3dcam.cams.calls import each_by
from seg3dcam.cams.catalogue import CAMS

BOTTLENECK = "model.1.submodule.1.submodule.1.submodule.1.submodule"
LAYERS = [BOTTLENECK, "model.1.submodule.1", "model.1"]
CLASSES = 4

#: One forward pass and one backward pass per target, by their docstrings.
GRADIENTS = [
    "grad_cam",
    "slice_grad_cam",
    "hires_cam",
    "xres_cam",
    "grad_cam_plus_plus",
    "xgrad_cam",
    "layer_cam",
    "grad_cam_elementwise",
]


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return UNet(
        3, 1, CLASSES, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2, norm="batch"
    ).eval()


def residual_encoder() -> torch.nn.Module:
    torch.manual_seed(0)
    conv, norm, act = torch.nn.Conv3d, torch.nn.InstanceNorm3d, torch.nn.LeakyReLU
    return ResidualEncoderUNet(
        1, 5, [16, 32, 64, 128, 256], conv, 3, [1, 2, 2, 2, 2], [1, 3, 4, 6, 6], CLASSES, 1,
        conv_bias=True, norm_op=norm, norm_op_kwargs={"affine": True}, nonlin=act,
        nonlin_kwargs={"inplace": True},
    ).eval()  # fmt: skip


def every_class(region: str) -> list[targets.ClassLogOdds]:
    return [targets.ClassLogOdds(c, region=region) for c in range(CLASSES)]


def by_hand(
    model: torch.nn.Module, x: torch.Tensor, layers: list[str], asked: list[targets.ClassLogOdds]
) -> object:
    """Take the gradients alone: one forward pass, one call of torch.autograd.grad per target."""
    kept: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        kept.append(output if output.requires_grad else output.detach().requires_grad_())
        return kept[-1].clone()

    hooks = [model.get_submodule(layer).register_forward_hook(keep) for layer in layers]
    logits = model(x)
    for hook in hooks:
        hook.remove()
    scores = [target(logits).sum() for target in asked]
    return [torch.autograd.grad(score, kept, retain_graph=True) for score in scores]


def ratios(
    model: torch.nn.Module,
    layers: list[str],
    size: int,
    plan: WindowPlan | None,
    layer: str,
    rounds: int,
) -> None:
    """Print how many times as much as one map the many take; `layer` is that of the one map."""
    x = torch.rand(1, 1, size, size, size)
    one = GradCAM(model, layer, sliding_window=plan)
    many = GradCAM(model, layers, sliding_window=plan)
    every = [CAMS[key](model, layers, sliding_window=plan) for key in GRADIENTS]
    ways = {
        "one": lambda: one(x, every_class("volume")[1]),
        "many": lambda: many.each(x, every_class("volume")),
        "all": lambda: each_by(every, x, every_class("volume")),
    }
    if plan is None:
        model.requires_grad_(False)
        asked = every_class("volume")
        ways["one by hand"] = lambda: by_hand(model, x, [layer], asked[1:2])
        ways["many by hand"] = lambda: by_hand(model, x, layers, asked)
    seconds = take_turns(ways, rounds)
    for name, values in seconds.items():
        base = seconds["one by hand" if name.endswith("by hand") else "one"]
        times = [value / one for value, one in zip(values, base, strict=True)]
        print(f"  {name:12} {summary(values, ' s'):28} {summary(times)} x one")


def eigen_memory(size: int, channels: int) -> None:
    """Print by how much memory grows, in units of the activations."""
    activations = torch.rand(1, channels, size, size, size)
    megabytes = activations.numel() * activations.element_size() / 1e6
    grown, _ = growth(partial(METHODS["eigen_cam"], activations))
    print(f"  function   +{grown:.0f} MB beside the activations' {megabytes:.0f} MB: "
          f"{1 + grown / megabytes:.2f} times the activations in all")  # fmt: skip
    del activations

    layers = [torch.nn.Conv3d(1, channels, 1), torch.nn.ReLU(), torch.nn.Conv3d(channels, 2, 1)]
    cam = EigenCAM(torch.nn.Sequential(*layers), "1")
    target = targets.ClassLogit(1, region="volume")
    cam(torch.rand(1, 1, 8, 8, 8), target)
    x = torch.rand(1, 1, size, size, size)
    grown, _ = growth(lambda: cam(x, target))
    print(f"  EigenCAM   +{grown:.0f} MB, forward pass included: "
          f"{grown / megabytes:.2f} times the activations in all")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # a random network may speak against a class everywhere
    torch.set_num_threads(2)
    print(machine())
    for plan, name in ((None, "no windows"), (WindowPlan(64, overlap=0.25), "windows of 64^3")):
        for layer, level in ((BOTTLENECK, "bottleneck"), (LAYERS[-1], "last decoder level")):
            print(f"\n{options.size}^3, {name}; the one map at the {level}")
            ratios(network(), LAYERS, options.size, plan, layer, options.rounds)
    layers = ["encoder.stages.4", "decoder.stages.1", "decoder.stages.3"]
    print(f"\n{options.size}^3, no windows, nnU-Net's ResidualEncoderUNet; at the bottleneck")
    ratios(residual_encoder(), layers, options.size, None, layers[0], options.rounds)
    print("\nEigenCAM of a layer of 256 channels and 64^3 voxels")
    eigen_memory(64, 256)


if __name__ == "__main__":
    main()
