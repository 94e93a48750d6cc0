"""Feature maps: what the channels of a layer hold, as single pictures and as one mosaic.

    python examples/feature_maps.py --out feature_maps

A CAM is a weighted sum of a layer's channels; this shows what is summed. Three stages of a 2D
network give one folder each, and one slice of a 3D U-Net's bottleneck another. With a target the
channels come with Grad-CAM's weights and are ranked by them.

Writes `stage_1/channel_000.png`, ... and `stage_1/mosaic.png`, the same for stages 2 and 3, and
`unet/rank_000_channel_....png`, ... and `unet/mosaic.png`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from monai.networks.nets import UNet
from torch import nn

from seg3dcam.cams.feature_maps import FeatureMaps, feature_maps
from seg3dcam.review import save_features
from seg3dcam.targets import ClassLogit


def build_backbone() -> nn.Sequential:
    """Return three stages as of a detector: each halves the grid and doubles the channels."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(
            nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.LeakyReLU(0.1))
            for a, b, stride in ((3, 8, 1), (8, 16, 2), (16, 32, 2))
        )
    )


def draw_picture(size: int = 128) -> torch.Tensor:
    """Return a yellow disc at the upper left of dark checks, (1, 3, size, size) in [0, 1]."""
    y, x = torch.meshgrid(*[torch.arange(size) / size] * 2, indexing="ij")
    checks = 0.25 + 0.2 * ((8 * y).int() + (8 * x).int() & 1)
    disc = (y - 0.35) ** 2 + (x - 0.35) ** 2 < 0.2**2
    colours = [torch.where(disc, value, checks) for value in (1.0, 0.85, 0.2)]
    return torch.stack(colours)[None]


def build_unet() -> nn.Module:
    """Return a small 3D U-Net of two classes."""
    torch.manual_seed(0)
    return UNet(3, in_channels=1, out_channels=2, channels=(8, 16), strides=(2,), norm="batch")


def draw_volume(size: int = 48) -> torch.Tensor:
    """Return a ball and a rod in noise, (1, 1, size, size, size)."""
    z, y, x = torch.meshgrid(*[torch.arange(size) / size] * 3, indexing="ij")
    ball = (z - 0.5) ** 2 + (y - 0.3) ** 2 + (x - 0.3) ** 2 < 0.15**2
    rod = (y - 0.7) ** 2 + (x - 0.65) ** 2 < 0.08**2
    noise = torch.randn(size, size, size, generator=torch.Generator().manual_seed(0))
    return (ball + 0.6 * rod + 0.05 * noise)[None, None]


def show_stages(out: Path) -> list[FeatureMaps]:
    """Write every channel of each stage of the 2D network."""
    backbone, picture = build_backbone(), draw_picture()
    stages = []
    for number in range(len(backbone)):
        found = feature_maps(backbone, picture, str(number))
        files = save_features(out / f"stage_{number + 1}", found)
        print(f"stage {number + 1}: {found.values.shape}, {len(files)} files, last {files[-1]}")
        stages.append(found)
    return stages


def show_slice(out: Path, index: int) -> FeatureMaps:
    """Write one slice of the bottleneck, the channels that speak most for class 1 first."""
    found = feature_maps(
        build_unet(),
        draw_volume(),
        "auto",  # the bottleneck
        target=ClassLogit(1, region="volume"),
        index=index,  # counted in the layer's own voxels
    )
    # One scale for all channels, so that they can be compared.
    files = save_features(out / "unet", found, scale="layer")
    best = int(found.order[0])
    print(
        f"{found.layer}, slice {found.index} of {found.grid.shape[0]}: channel {best} speaks most "
        f"for the target, weight {found.weights[best]:+.2g}; {len(files)} files, last {files[-1]}"
    )
    return found


def main(out: Path, index: int = 11) -> None:
    """Show the channels of a 2D and of a 3D network."""
    show_stages(out)
    show_slice(out, index)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("feature_maps"), help="folder to fill")
    parser.add_argument("--index", type=int, default=11, help="slice of the 3D layer")
    main(**vars(parser.parse_args()))
