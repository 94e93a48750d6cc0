"""The original recipe of Grad-CAM for 3D segmentation, by hand and by seg3dcam, line by line.

    python examples/original_recipe.py --out original_recipe

The recipe takes the mask output of a network that may return a tuple, backpropagates ones, gives
each channel one weight per slice, adds up the weighted channels, cuts what is negative, scales to
[0, 1] and looks at one slice. `by_hand` does that with plain hooks; `main` does it with seg3dcam,
each line under what the recipe does for it, and prints the largest difference.

The recipe explains the whole mask, all channels and voxels at once. For one class, give a target.

Writes `scan.nii.gz` and `cam.nii.gz`, to be opened as an overlay, and a picture of slice 10.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import interpolate

from seg3dcam import SliceGradCAM
from seg3dcam.export import write_nifti
from seg3dcam.review import review_volumes, save_slices

SLICE = 10
LAYERS = ("encoder", "decoder")

#: Voxel (z, y, x) -> mm towards the patient's right, front and head: slices of 4 mm, pixels of 1.5.
AFFINE = np.array([[0, 0, -1.5, 36], [0, -1.5, 0, 36], [4, 0, 0, 0], [0, 0, 0, 1]])


def _conv(inputs: int, outputs: int) -> nn.Module:
    """Return a convolution of 3 x 3 x 3; zeros around the volume would light up its border."""
    return nn.Conv3d(inputs, outputs, 3, padding=1, padding_mode="replicate")


class Encoder(nn.Module):
    """Halves the slices' resolution, not their number; returns (features, skip connection)."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(_conv(1, 6), nn.ReLU())
        self.coarse = nn.Sequential(nn.AvgPool3d((1, 2, 2)), nn.Conv3d(6, 8, 1), nn.ReLU())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        skip = self.fine(x)
        return self.coarse(skip), skip


class Network(nn.Module):
    """Returns (mask logits (B, C, Z, Y, X), features), as networks with several outputs do."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = nn.Sequential(_conv(14, 6), nn.ReLU())
        self.head = nn.Conv3d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features, skip = self.encoder(x)
        features = interpolate(features, scale_factor=(1, 2, 2), mode="nearest")
        features = self.decoder(torch.cat([features, skip], 1))
        return self.head(features), features


def draw_scan() -> torch.Tensor:
    """Return a bright ball in noise, (1, 1, 20, 48, 48); it is largest in slice 10."""
    z, y, x = torch.meshgrid(*[torch.arange(n) for n in (20, 48, 48)], indexing="ij")
    ball = (4 * (z - SLICE)) ** 2 + (1.5 * (y - 16)) ** 2 + (1.5 * (x - 30)) ** 2 < 16**2
    noise = torch.randn(ball.shape, generator=torch.Generator().manual_seed(0))
    return (ball + 0.1 * noise)[None, None]


def min_max(cam: torch.Tensor) -> torch.Tensor:
    """Return a map in [0, 1], as the recipe scales it."""
    cam = cam - cam.min()
    return cam / (1e-7 + cam.max())


def by_hand(network: nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return each layer's map before ReLU, on its own grid, and the fused volume in [0, 1]."""
    activations, gradients, hooks = [], [], []

    def keep(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
        output = output[0] if isinstance(output, tuple) else output
        activations.append(output.detach())
        output.register_hook(lambda gradient: gradients.insert(0, gradient))  # last layer first

    for name in LAYERS:
        hooks.append(network.get_submodule(name).register_forward_hook(keep))
    try:
        mask = network(x)[0]
        mask.backward(torch.ones_like(mask))
    finally:
        for hook in hooks:
            hook.remove()
        network.zero_grad()

    maps, views = [], []
    for activation, gradient in zip(activations, gradients, strict=True):
        weights = gradient.mean((3, 4), keepdim=True)  # (B, C, Z, 1, 1)
        cam = (weights * activation).sum(1)
        view = min_max(cam.clamp(min=0))
        maps.append(cam)
        views.append(interpolate(view[None], x.shape[2:], mode="trilinear")[0])
    return maps, min_max(torch.stack(views).mean(0))


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference of two maps."""
    return float((a - b).abs().max())


def main(out: Path) -> float:
    """Compute the recipe both ways and return the largest difference of the two volumes."""
    torch.manual_seed(6)  # random weights; most draws light up nothing worth seeing
    network, x = Network().eval(), draw_scan()
    out.mkdir(parents=True, exist_ok=True)

    # By hand: a forward and a backward hook per layer, which take element [0] of a layer that
    # returns a tuple; activations appended, gradients prepended; release() at the end. Here: names.
    # By hand: output = model(x); output = output[0] if it is a tuple. Here: output=0.
    cam = SliceGradCAM(network, target_layers=["encoder[0]", "decoder"], output=0)

    # By hand: output.backward(torch.ones_like(output)). Here: no target means just that.
    # By hand: weights = gradients.mean((3, 4), keepdims), (B, C, Z, 1, 1), one for each channel
    # and slice; cam = (weights * activations).sum(1). Here: the method's name says it.
    result = cam(x)

    # By hand: (weights[:, :, 10] * activations[:, :, 10]).sum(1). Here: slice 10 of a raw map on
    # the layer's own grid.
    raw_slice = result.native["encoder[0]"][:, SLICE]

    # By hand: ReLU, min-max and resizing per layer, the mean of all layers, min-max again.
    volume = result.volume(scale="minmax", per_layer=True)  # (B, Z, Y, X)

    # By hand: 10 stands for any 0 <= z < Z, since a volume cannot be looked at at once.
    one_slice = result.slice(SLICE, scale="minmax", per_layer=True)  # (B, Y, X)

    # By hand: nothing; the map never comes back to the patient. Here: a file on the scan's grid.
    write_nifti(out / "scan.nii.gz", x[0, 0], AFFINE, display_range=None)
    result.save(out / "cam.nii.gz", affine=AFFINE, scale="minmax", per_layer=True)
    review = review_volumes(x[0, 0], volume[0], AFFINE, slices=SLICE)
    (picture,) = save_slices(out, review)
    print(f"wrote {out / 'scan.nii.gz'}, {out / 'cam.nii.gz'}, {picture}")

    maps, fused = by_hand(network, x)
    print(
        f"slice {SLICE} of encoder[0], raw: {largest_difference(raw_slice, maps[0][:, SLICE]):.1g}"
    )
    print(f"slice {SLICE} of both, fused: {largest_difference(one_slice, fused[:, SLICE]):.1g}")
    difference = largest_difference(volume, fused)
    print(f"the whole volume: largest difference {difference:.1g}")
    return difference


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("original_recipe"), help="folder to fill")
    main(**vars(parser.parse_args()))
