"""Grad-CAM of a transformer: tokens back into a picture, found out or told by a function.

    python examples/transformer_tokens.py --out transformer_tokens

A block of a vision transformer gives tokens (B, 1 + N, C): a class token, and one per patch, row
by row. A map needs (B, C, h, w). seg3dcam finds that layout from the shapes; where they allow
several, or the order is another one, `reshape_transform` says it. Swin's blocks, (B, h, w, C), are
read the same way.

Writes `tokens.png`: the picture, and beside it the map over the picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.image import imsave
from monai.networks.nets import ViT
from torch import nn

from seg3dcam import CamResult, GradCAM
from seg3dcam.network.layouts import Tokens

SIZE, PATCH, BLOCKS = 224, 16, 6
GRID = (SIZE // PATCH, SIZE // PATCH)

# The class token alone feeds the head. What the last block gives for the patches is therefore used
# by nobody: its gradient is zero, and so is a map there (seg3dcam warns). The output of the block
# before it still reaches the class token, through the last block's attention.
LAYER = f"blocks.{BLOCKS - 2}"


def build_network() -> nn.Module:
    """Return a small vision transformer that classifies colour pictures."""
    torch.manual_seed(0)
    return ViT(
        in_channels=3,
        img_size=(SIZE, SIZE),
        patch_size=(PATCH, PATCH),
        hidden_size=96,
        mlp_dim=192,
        num_layers=BLOCKS,
        num_heads=4,
        classification=True,
        num_classes=5,
        spatial_dims=2,
        post_activation=None,  # logits: a squashed score has a squashed gradient
    )


def draw_picture(size: int = SIZE) -> np.ndarray:
    """Return a red house under a blue sky, (size, size, 3) in [0, 1]."""
    y, x = np.mgrid[:size, :size] / size
    picture = np.where((y < 0.75)[..., None], (0.6, 0.75, 0.95), (0.35, 0.55, 0.3))
    picture[(abs(x - 0.35) < 0.2) & (y > 0.5) & (y < 0.85)] = (0.8, 0.35, 0.25)
    picture[(y > 0.3 + abs(x - 0.35)) & (y < 0.5) & (abs(x - 0.35) < 0.25)] = (0.4, 0.2, 0.15)
    picture[(y - 0.18) ** 2 + (x - 0.8) ** 2 < 0.1**2] = (1.0, 0.9, 0.4)
    return picture


def tokens_to_picture(tokens: torch.Tensor) -> torch.Tensor:
    """Return (B, C, h, w), given (B, 1 + N, C): drop the class token, fold the rest."""
    return tokens[:, 1:].transpose(1, 2).unflatten(2, GRID)


def top_class(logits: torch.Tensor) -> torch.Tensor:
    """Return the logit of each item's arg-max class."""
    return logits.amax(1)


def explain_in_three_ways(network: nn.Module, x: torch.Tensor) -> dict[str, CamResult]:
    """Return the same map with the layout found, written as a function, and named."""
    layouts = {
        "found": None,
        "written": tokens_to_picture,
        "named": Tokens(GRID, class_token=True),
    }
    # MONAI's ViT returns (logits, hidden states).
    return {
        how: GradCAM(network, LAYER, output=0, reshape_transform=layout)(x, top_class)
        for how, layout in layouts.items()
    }


def main(out: Path) -> None:
    """Explain the predicted class at the tokens of the last block but one."""
    picture = draw_picture()
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    results = explain_in_three_ways(build_network(), x)
    found = results["found"]
    for how, result in results.items():
        apart = (result.native[LAYER] - found.native[LAYER]).abs().max()
        shape = tuple(result.native[LAYER].shape)
        print(f"layout {how}: a map {shape}, {float(apart):g} from the first")

    heat = matplotlib.colormaps["jet"](found.volume()[0].numpy())[..., :3]
    out.mkdir(parents=True, exist_ok=True)
    imsave(out / "tokens.png", np.hstack([picture, 0.6 * picture + 0.4 * heat]))
    print(f"wrote {out / 'tokens.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("transformer_tokens"), help="folder")
    main(**vars(parser.parse_args()))
