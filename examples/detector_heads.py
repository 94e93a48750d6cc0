"""CAMs of a detector at each of its scales, beside the maps that its heads give by themselves.

    python examples/detector_heads.py --out detector_heads --find leaf

A YOLO-like network returns a list of heads, one per scale, each (B, anchors * (5 + classes), h, w):
for every anchor of every cell 4 numbers of a box, its objectness and its class scores. Two maps of
one class answer two questions:

- objectness x class probability, cell by cell: *what* does this head detect here?
- the CAM of that score at a layer before the head: *why*, by which features?

The network here is set by hand and knows things by their colour, so the maps can be judged by eye.
Grad-CAM lights up leaves for a tomato, too: green, like any colour, raises the objectness, and one
weight per channel serves the whole picture. HiResCAM asks voxel by voxel, and does not.

Writes `<class>.png`: one row per scale, the three maps over the picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from seg3dcam import GradCAM, HiResCAM
from seg3dcam.targets import DetectionClass, detection_map

CLASSES = ("tomato", "leaf", "berry")  # red, green, blue
ANCHORS = 2
STRIDES = (8, 16, 32)
BOX, WIDTH = 4, 5 + len(CLASSES)


class Detector(nn.Module):
    """Three stages of strides 8, 16 and 32, each with a head.

    Args:
        flatten: return all predictions of all scales in one tensor (B, n, 5 + classes).
    """

    def __init__(self, flatten: bool = False) -> None:
        super().__init__()
        colours = len(CLASSES)
        self.flatten = flatten
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(colours, colours, step, stride=step), nn.ReLU())
            for step in (8, 2, 2)
        )
        self.heads = nn.ModuleList(nn.Conv2d(colours, ANCHORS * WIDTH, 1) for _ in STRIDES)
        self._set_by_hand()

    def forward(self, x: torch.Tensor) -> list[torch.Tensor] | torch.Tensor:
        heads = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x)
            heads.append(head(x))
        return torch.cat([flattened(head) for head in heads], 1) if self.flatten else heads

    @torch.no_grad()
    def _set_by_hand(self) -> None:
        """Make channel k see colour k: the mean of it less that of the two others, over a cell."""
        same = torch.eye(len(CLASSES))[..., None, None]
        for number, stage in enumerate(self.stages):
            mean = stage[0].weight.new_ones(stage[0].kernel_size) / stage[0].kernel_size[0] ** 2
            others = (1 - same) / 2 if number == 0 else 0
            stage[0].weight.copy_((same - others) * mean)
            stage[0].bias.zero_()
        for head in self.heads:
            weight, bias = torch.zeros(ANCHORS, WIDTH, len(CLASSES)), torch.zeros(ANCHORS, WIDTH)
            weight[:, BOX], bias[:, BOX] = 8, -4  # objectness: any colour
            weight[:, BOX + 1 :], bias[:, BOX + 1 :] = 8 * torch.eye(len(CLASSES)), -4
            head.weight.copy_(weight.flatten(0, 1)[..., None, None])
            head.bias.copy_(bias.flatten())


def flattened(head: torch.Tensor) -> torch.Tensor:
    """Return a head's predictions one by one, (B, n, 5 + classes)."""
    return head.unflatten(1, (ANCHORS, WIDTH)).permute(0, 1, 3, 4, 2).flatten(1, 3)


def draw_picture(size: int = 256) -> np.ndarray:
    """Return two tomatoes, a leaf and two berries on a grey table, (size, size, 3) in [0, 1]."""
    y, x = np.mgrid[:size, :size] / size
    picture = np.ones((size, size, 3)) * (0.55 + 0.1 * y[..., None])
    for middle, radii, colour in (
        ((0.28, 0.3), (0.2, 0.2), (0.9, 0.1, 0.1)),
        ((0.82, 0.88), (0.05, 0.05), (0.9, 0.1, 0.1)),
        ((0.7, 0.35), (0.1, 0.25), (0.15, 0.75, 0.15)),
        ((0.2, 0.8), (0.08, 0.08), (0.1, 0.15, 0.85)),
        ((0.45, 0.75), (0.06, 0.06), (0.1, 0.15, 0.85)),
    ):
        inside = sum(((a - b) / r) ** 2 for a, b, r in zip((y, x), middle, radii, strict=True))
        picture[inside < 1] = colour
    return picture


def explain_head(
    network: nn.Module, x: torch.Tensor, find: int | str, number: int
) -> dict[str, np.ndarray]:
    """Return the maps of a class at one scale: two CAMs (H, W), and the head's own (h, w)."""
    target = DetectionClass(find, CLASSES, anchors=ANCHORS)
    layer = f"stages.{number}"
    grad_cam = GradCAM(network, layer, output=number)(x, target)
    hires_cam = HiResCAM(network, layer, output=number)(x, target)
    head = grad_cam.logits  # the output that was chosen, as the network gave it
    return {
        "Grad-CAM": grad_cam.volume()[0].numpy(),
        "HiResCAM": hires_cam.volume()[0].numpy(),
        "objectness x class": detection_map(head, find, CLASSES, anchors=ANCHORS)[0].numpy(),
    }


def draw_maps(picture: np.ndarray, rows: list[dict[str, np.ndarray]]) -> Figure:
    """Return a page with one row per scale."""
    height, width = picture.shape[:2]
    page = Figure(figsize=(9, 9.6), layout="constrained")
    axes = page.subplots(len(rows), len(rows[0]))
    for line, stride, maps in zip(axes, STRIDES, rows, strict=True):
        for place, (title, values) in zip(line, maps.items(), strict=True):
            place.imshow(picture, extent=(0, width, height, 0))
            place.imshow(values, "jet", vmin=0, vmax=1, alpha=0.5, extent=(0, width, height, 0))
            place.set_title(f"{title}, stride {stride}")
            place.set_axis_off()
    return page


def main(out: Path, find: int | str = "tomato") -> None:
    """Explain one class, by name or index, at each scale."""
    picture = draw_picture()
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float()

    # A class that does not exist is refused, with the legal ones listed.
    network = Detector()
    rows = [explain_head(network, x, find, number) for number in range(len(STRIDES))]
    for stride, maps in zip(STRIDES, rows, strict=True):
        print(f"stride {stride}: the best cell scores {maps['objectness x class'].max():.2f}")

    # All predictions in one tensor: the three layers are then explained by one score.
    cam = GradCAM(Detector(flatten=True), [f"stages.{number}" for number in range(len(STRIDES))])
    result = cam(x, DetectionClass(find, CLASSES))
    print(f"{result.target}: {float(result.score):.1f} in all")

    name = find if isinstance(find, str) else CLASSES[find]
    out.mkdir(parents=True, exist_ok=True)
    draw_maps(picture, rows).savefig(out / f"{name}.png")
    print(f"wrote {out / name}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("detector_heads"), help="folder to fill")
    parser.add_argument(
        "--find",
        type=lambda text: int(text) if text.isdigit() else text,
        default="tomato",
        help=f"a class, by name or index: {', '.join(CLASSES)}",
    )
    main(**vars(parser.parse_args()))
