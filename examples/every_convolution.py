"""Grad-CAM of every convolution of a ResNet-18, for one forward and one backward pass.

    python examples/every_convolution.py --out every_convolution

Writes one picture per convolution, `01_conv1.png` and so on in the order of the network: the map,
resized to the picture, over the picture. Early maps are fine and follow edges and colours, late
ones are coarse. The weights are random, so none of them says why this is a bus.

Beside the two passes the network runs on some small probes, once: they show where each layer's
features lie in the picture, and whether the gradients are whole.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.image import imsave
from monai.networks.nets import resnet18
from torch import nn

from seg3dcam import CamResult, GradCAM

SIZE = 224


def build_network() -> nn.Module:
    """Return a ResNet-18 for colour pictures: 20 convolutions, three of them in shortcuts."""
    torch.manual_seed(0)
    return resnet18(spatial_dims=2, n_input_channels=3, num_classes=1000, conv1_t_stride=2)


def draw_picture(size: int = SIZE) -> np.ndarray:
    """Return a bus on a road, (size, size, 3) in [0, 1]."""
    picture = np.ones((size, size, 3)) * (0.75, 0.85, 0.95)

    def box(top: float, bottom: float, left: float, right: float, colour: tuple) -> None:
        rows, columns = (
            slice(int(a * size), int(b * size)) for a, b in ((top, bottom), (left, right))
        )
        picture[rows, columns] = colour

    box(0.72, 1.0, 0.0, 1.0, (0.35, 0.35, 0.38))
    box(0.3, 0.78, 0.15, 0.8, (0.85, 0.3, 0.2))
    for left in (0.2, 0.35, 0.5, 0.65):
        box(0.38, 0.54, left, left + 0.1, (0.2, 0.25, 0.35))
    y, x = np.mgrid[:size, :size] / size
    for middle in (0.3, 0.65):
        picture[(y - 0.78) ** 2 + (x - middle) ** 2 < 0.065**2] = 0.08
    return picture


def top_class(logits: torch.Tensor) -> torch.Tensor:
    """Return the arg-max class's logit: its gradient is the one-hot vector at that class."""
    return logits.amax(1)


def blend(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Return 0.6 * picture + 0.4 * heat, which stays in [0, 1]."""
    return 0.6 * picture + 0.4 * matplotlib.colormaps["jet"](heat)[..., :3]


def dropped(network: nn.Module, result: CamResult) -> list[str]:
    """Return the convolutions without a map: "all" leaves out those that the score never meets."""
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    return [name for name in names if name not in result.layers]


def explain_every_convolution(network: nn.Module, picture: np.ndarray, out: Path) -> CamResult:
    """Write one picture per convolution and return the maps."""
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    result = GradCAM(network, target_layers="all")(x, top_class)
    out.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(result.layers, 1):
        # per_layer: what is negative is cut on the layer's own grid, before it is resized.
        heat = result.volume(name, scale="minmax", per_layer=True)[0].numpy()
        path = out / f"{number:02d}_{name}.png"
        imsave(path, blend(picture, heat))
        height, width = result.native[name].shape[1:]
        print(f"wrote {path}: {height} x {width}, {result.status[name]}")
    for name in dropped(network, result):
        print(f"no map of {name}: the warning says why")
    return result


def main(out: Path) -> None:
    """Explain the predicted class at every convolution."""
    result = explain_every_convolution(build_network(), draw_picture(), out)
    print(f"{len(result.layers)} maps of class {int(result.prediction)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("every_convolution"), help="folder")
    main(**vars(parser.parse_args()))
