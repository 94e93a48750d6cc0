"""Grad-CAM of a 2D classifier: where does the picture look like its class?

    python examples/classifier_2d.py --out classifier_2d
    python examples/classifier_2d.py --image cat.jpg --weights resnet18.pth --category 281

A segmentation network gives a score per voxel, a classifier one per picture, (B, classes); for
seg3dcam that is the same thing. Without `--weights`, a state dict of torchvision's ResNet-18, the
network is random: the colours then show how a map is made, and say nothing about the picture.

Writes `picture.png`, and the map over it in the two usual ways: `heat_on_picture.png` and
`sum_with_picture.png`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
from matplotlib.image import imsave
from torch import nn

from seg3dcam import GradCAM
from seg3dcam.targets import ClassLogit

try:
    from torchvision.models import resnet18
except (ImportError, RuntimeError):  # not installed, or made for another PyTorch
    resnet18 = None

SIZE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_network(weights: Path | None = None) -> nn.Module:
    """Return a ResNet-18 of 1000 classes: torchvision's, or MONAI's with the same parameters."""
    torch.manual_seed(0)
    if resnet18 is not None:
        network = resnet18()
    else:
        from monai.networks import nets

        network = nets.resnet18(
            spatial_dims=2,
            n_input_channels=3,
            num_classes=1000,
            conv1_t_stride=2,
            bias_downsample=False,
        )
    if weights is not None:
        network.load_state_dict(torch.load(weights, weights_only=True))
    return network


def draw_picture(size: int = SIZE) -> np.ndarray:
    """Return a ball at the upper left of a striped cloth, (size, size, 3) in [0, 1]."""
    y, x = np.mgrid[:size, :size] / size
    cloth = 0.45 + 0.1 * np.sin(60 * (x + 0.4 * y))
    picture = cloth[..., None] * (0.7, 0.8, 1.0)
    ball = (y - 0.35) ** 2 + (x - 0.3) ** 2 < 0.2**2
    light = 1 - 2 * np.hypot(y - 0.28, x - 0.24)
    picture[ball] = light[ball, None] * (1.0, 0.55, 0.2)
    return picture.clip(0, 1)


def read_picture(path: Path, size: int = SIZE) -> np.ndarray:
    """Return a picture file as (size, size, 3) in [0, 1]."""
    picture = cv2.imread(str(path))
    if picture is None:
        raise SystemExit(f"{path} is no picture that OpenCV can read")
    return cv2.resize(picture, (size, size))[..., ::-1] / 255


def as_input(picture: np.ndarray) -> torch.Tensor:
    """Return a picture as the network was trained to see it, (1, 3, H, W)."""
    normalised = (picture - IMAGENET_MEAN) / IMAGENET_STD
    return torch.from_numpy(normalised).permute(2, 0, 1)[None].float()


def top_class(logits: torch.Tensor) -> torch.Tensor:
    """Return the logit of each item's own arg-max class: any such function is a target."""
    return logits.amax(1)


def jet(heat: np.ndarray) -> np.ndarray:
    """Return the colours (H, W, 3) of a map (H, W) in [0, 1]."""
    return matplotlib.colormaps["jet"](heat)[..., :3]


def heat_on(picture: np.ndarray, heat: np.ndarray, strength: float = 0.4) -> np.ndarray:
    """Return 0.4 * heat + picture; what is brighter than white is cut."""
    return (strength * jet(heat) + picture).clip(0, 1)


def sum_with(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Return heat + picture, divided by its maximum: darker, and nothing is cut."""
    if picture.min() < 0 or picture.max() > 1:
        raise ValueError(
            f"the picture must lie in [0, 1]; it runs from {picture.min():g} to "
            f"{picture.max():g}. Divide 8-bit values by 255"
        )
    total = jet(heat) + picture
    return total / total.max()


def main(
    out: Path,
    image: Path | None = None,
    weights: Path | None = None,
    category: int | None = None,
) -> None:
    """Explain a class of one picture, the arg-max class if none is named."""
    picture = draw_picture() if image is None else read_picture(image)
    cam = GradCAM(build_network(weights), target_layers="layer4")  # the last convolutional block
    target = top_class if category is None else ClassLogit(category, region="volume")
    result = cam(as_input(picture), target)

    # The map is resized from 7 x 7 by where layer4's features really lie in the picture.
    heat = result.volume()[0].numpy()
    number = int(result.prediction) if category is None else category
    print(f"class {number}, logit {float(result.score):.2f}; layer4: {result.status['layer4']}")

    out.mkdir(parents=True, exist_ok=True)
    for name, pixels in {
        "picture": picture,
        "heat_on_picture": heat_on(picture, heat),
        "sum_with_picture": sum_with(picture, heat),
    }.items():
        imsave(out / f"{name}.png", pixels)
        print(f"wrote {out / name}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("classifier_2d"), help="folder to fill")
    parser.add_argument("--image", type=Path, help="a picture file; default: one made here")
    parser.add_argument("--weights", type=Path, help="a ResNet-18's state dict")
    parser.add_argument("--category", type=int, help="the class; default: the arg-max class")
    main(**vars(parser.parse_args()))
