"""A model that looks fine by Dice, and is exposed by its map and its verdict.

    python examples/shortcut.py --out shortcut

A network segments lesions in a body, with a Dice of 0.9 and more on new scans of its own hospital.
There a letter was burnt into the corner of every slice with a lesion, and of no others. The network
has learnt the letter. The script shows its map, the verdict of context deletion, and the answers
if the letter is painted over or added. Volumes and network are those of the benchmark with known
answers (docs/known_answers.md). Writes `shortcut.png`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmark is not installed

from benchmarks.known import PROBLEMS, Scene
from benchmarks.known.volumes import shortcut
from seg3dcam.cams.attributions import IntegratedGradients
from seg3dcam.evaluate import context_evidence

LESION = 1
SEEDS = range(100, 108)  # of scans that the network has not seen


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Return Dice of two masks."""
    return 2 * int((one & other).sum()) / max(1, int(one.sum() + other.sum()))


def predicted(network: nn.Module, image: np.ndarray) -> np.ndarray:
    """Return where the network draws a lesion, (*S) bool."""
    with torch.no_grad():
        return network(as_input(image)).argmax(1)[0].numpy() == LESION


def as_input(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image)[None, None].float()


def validate(network: nn.Module) -> dict[str, float]:
    """Return what is measured: median Dice with the nodule, in three situations."""
    found: dict[str, list[float]] = {"own": [], "painted": [], "added": []}
    for seed in SEEDS:
        own = PROBLEMS["shortcut"].scene(seed)
        harmless = shortcut(np.random.default_rng(seed), False, letter=True)
        found["own"].append(dice(predicted(network, own.image), own.labels == LESION))
        found["painted"].append(dice(predicted(network, own.changed), own.labels == LESION))
        found["added"].append(dice(predicted(network, harmless.image), harmless.objects["nodule"]))
    return {name: statistics.median(values) for name, values in found.items()}


def draw(scene: Scene, network: nn.Module, values: np.ndarray, path: Path) -> None:
    """Write the slice through the lesion: what is drawn, why, and what is left without the letter.

    Args:
        values: the map, (*S).
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    k = int(np.argwhere(scene.labels == LESION)[:, 2].mean().round())
    heat = np.clip(values, 0, None) / values.max()
    figure, axes = pyplot.subplots(1, 3, figsize=(10.5, 3), layout="constrained")
    panels = (
        ("what it draws: a lesion", scene.image, None),
        ("Integrated Gradients: the letter", scene.image, heat),
        ("letter painted over: no lesion", scene.changed, None),
    )
    for axis, (title, image, overlay) in zip(axes, panels, strict=True):
        axis.imshow(image[..., k].T, cmap="gray", vmin=-0.2, vmax=1.6, interpolation="nearest")
        if overlay is not None:
            on_slice = overlay[..., k].T
            shown = axis.imshow(on_slice, cmap="inferno", alpha=0.9 * on_slice**0.5, vmin=0, vmax=1)
            figure.colorbar(shown, ax=axis, label="map / its maximum", shrink=0.8)
        mask = predicted(network, image)[..., k].T
        if mask.any():
            axis.contour(mask, [0.5], colors="cyan", linewidths=1.5)
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(out: Path) -> None:
    """Look at the network as its makers would, and then at why."""
    network, scene = PROBLEMS["shortcut"].load(), PROBLEMS["shortcut"].scene(SEEDS[0])
    found = validate(network)
    print(f"Dice on {len(SEEDS)} new scans of the same hospital: {found['own']:.2f} (median)")

    x = as_input(scene.image)
    values = IntegratedGradients(network)(x, target=LESION).maps["input"][0]
    evidence = context_evidence(values, x, network, LESION)
    print(f"Integrated Gradients: {evidence.words}")
    letter = scene.evidence & (values.numpy() > 0)
    inside = float(values[torch.from_numpy(letter)].sum() / values.clamp(min=0).sum())
    print(
        f"{100 * inside:.0f} % of the map lies on the letter, which fills "
        f"{100 * scene.evidence.mean():.1f} % of the scan"
    )

    print(f"the letter painted over: Dice {found['painted']:.2f}")
    print(f"the letter added to a harmless nodule: Dice {found['added']:.2f} with the nodule")
    draw(scene, network, values.numpy(), out / "shortcut.png")
    print(f"wrote {out / 'shortcut.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("shortcut"), help="folder")
    main(**vars(parser.parse_args()))
