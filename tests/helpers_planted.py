"""A U-Net by hand whose class needs a cue 8 voxels away, and volumes for it."""

from __future__ import annotations

import inspect
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import toy
from safetensors.torch import save_file
from torch import nn

SHAPE = (12, 24, 16)


class PlantedUNet(nn.Module):
    """Class 1 is where channel 0 is bright, if channel 1 is bright 8 voxels before.

    The encoder passes both channels on; the cue is moved to the organ at half the resolution, in
    the bottleneck, and joined with the organ in the decoder. So only maps of the encoder can show
    the cue in its place; those of the bottleneck and the decoder show the mask.

    Args:
        gain: how much the cue counts; with 0 the class needs nothing but the organ itself.
    """

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv3d(2, 2, 1), nn.ReLU())
        self.down = nn.Sequential(nn.Conv3d(2, 2, 2, 2), nn.ReLU())
        self.bottleneck = nn.Sequential(nn.Conv3d(2, 1, (1, 9, 1), padding=(0, 4, 0)), nn.ReLU())
        self.up = nn.ConvTranspose3d(1, 1, 2, 2)
        self.decoder = nn.Sequential(nn.Conv3d(3, 2, 1), nn.ReLU())
        self.head = nn.Conv3d(2, 2, 1)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        with torch.no_grad():
            self.encoder[0].weight[0, 0] = self.encoder[0].weight[1, 1] = 1
            self.down[0].weight[0, 0] = self.down[0].weight[1, 1] = 1 / 8
            self.bottleneck[0].weight[0, 1, 0, 0, 0] = 1  # 4 voxels of 2 before
            self.up.weight.fill_(1)
            self.decoder[0].weight[0, 0] = self.decoder[0].weight[1, 2] = 1
            self.head.weight[1, 0], self.head.weight[1, 1] = 1, gain
            self.head.bias[1] = -0.5 - gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = self.encoder(x)
        coarse = self.up(self.bottleneck(self.down(fine)))
        return self.head(self.decoder(torch.cat([fine, coarse], 1)))


def planted(seed: int = 3, noisy: float = 0.05) -> torch.Tensor:
    """Return a bright block at (4:8, 16:20, 4:8) and its cue at (4:8, 8:12, 4:8), in noise."""
    x = noisy * toy.random_input(1, 2, *SHAPE, seed=seed).float()
    x[0, 0, 4:8, 16:20, 4:8] += 1
    x[0, 1, 4:8, 8:12, 4:8] += 1
    return x


def write_planted(folder: Path, seeds: tuple[int, ...] = (3, 4)) -> Path:
    """Write the network with its code, and volumes of two channels; return the model's YAML.

    The volumes are `scan_<seed>.nii.gz`, in voxels of 2 mm.
    """
    code = "import torch\nfrom torch import nn\n\n\n" + inspect.getsource(PlantedUNet)
    (folder / "planted_net.py").write_text(code)
    save_file(PlantedUNet().state_dict(), folder / "weights.safetensors")
    for seed in seeds:
        voxels = planted(seed)[0].permute(1, 2, 3, 0).numpy()
        nib.save(nib.Nifti1Image(voxels, np.diag([2, 2, 2, 1.0])), folder / f"scan_{seed}.nii.gz")
    model = folder / "model.yaml"
    model.write_text(
        "factory: planted_net:PlantedUNet\nweights: weights.safetensors\n"
        "classes: [background, organ]\n"
    )
    return model
