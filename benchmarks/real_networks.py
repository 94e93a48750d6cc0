"""What do the masks of a network that nobody here trained depend on, and which maps show it?

A published MeshNet (brainchop, MIT licence) segments a real T1 into 17 structures. Its maps of
three of them, at several layers and by several methods, are held against maps that know nothing of
it; beside them stands what the mask depends on by deletion alone, without any map. The network and
the scan are read from a folder outside of the project, ../shared/real.

    python benchmarks/real_networks.py [--only hippocampus] [--size 80] [--picture FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import yaml
from measure import machine
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy import ndimage
from torch import nn

from seg3dcam import EigenCAM, GradCAM, HiResCAM, LayerCAM
from seg3dcam.cams.attributions import Gradient, IntegratedGradients
from seg3dcam.errors import EvaluationError
from seg3dcam.evaluate import Rerun, compare, mass_inside, randomisation
from seg3dcam.evaluate.areas import PartialCurve
from seg3dcam.evaluate.baselines import baseline_of
from seg3dcam.evaluate.blocks import Blocks, Subject
from seg3dcam.evaluate.context import (
    INPUT_ALONE,
    MASK_ALONE,
    NEARNESS,
    ContextEvidence,
    evidence_against,
)
from seg3dcam.evaluate.controls import input_alone, mask_alone, nearness, random_maps
from seg3dcam.evaluate.segments import grown
from seg3dcam.evaluate.trial import Rivals, Trial
from seg3dcam.geometry import FeatureGrid
from seg3dcam.targets import ClassLogOdds

REAL = Path(__file__).parents[2] / "shared" / "real"
NETWORK = "model18cls"
MARGIN, BLOCK = 2, 4

#: The first for all maps, the second for those that pass with it. A blurred surrounding is still a
#: head to this network, while a few blocks of a constant anywhere destroy its small structures.
BASELINES = ("blur", "mean")

LAYERS = ("blocks.2", "blocks.4", "blocks.8")
MIDDLE = "blocks.4"
CAMS = {"hires_cam": HiResCAM, "grad_cam": GradCAM}
IN_THE_MIDDLE = {"layer_cam": LayerCAM, "eigen_cam": EigenCAM}
OF_THE_INPUT = {
    "gradient": (Gradient, {}),
    "integrated_gradients": (IntegratedGradients, {"steps": 8, "batch": 1}),
}

#: Steps of a curve, random maps, and predictions that a map may cost beyond what its rivals do.
STEPS, DRAWS, EACH = 16, 10, 10


@dataclass(frozen=True)
class Structure:
    """A class of the network.

    Attributes:
        centre: the voxel of the foreground around which the scan is cropped.
        all_maps: whether all maps are held against their rivals, or those of one method and the
            gradient alone.
    """

    index: int
    centre: tuple[int, int, int]
    all_maps: bool = False


STRUCTURES = {
    "hippocampus": Structure(14, (57, 100, 97), all_maps=True),
    "thalamus": Structure(7, (81, 83, 100)),
    "white matter": Structure(1, (57, 60, 97)),
}


def mesh_net(folder: Path = REAL) -> tuple[nn.Module, list[str]]:
    """Return the network and the names of its classes."""
    spec = importlib.util.spec_from_file_location("mesh_nets", folder / "nets.py")
    nets = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(nets)  # type: ignore[union-attr]
    settings = yaml.safe_load((folder / f"{NETWORK}.yaml").read_text())
    network = nets.MeshNet(**settings["arguments"])
    network.load_state_dict(load_file(folder / f"{NETWORK}.safetensors"))
    return network.eval(), settings["classes"]


def foreground(folder: Path = REAL) -> torch.Tensor:
    """Return the foreground of the scan (1, 1, *S): axes to the left, down and forward, 0 to 1."""
    image = nib.load(folder / "t1_crop.nii.gz")
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt("LIA")
    )
    voxels = image.as_reoriented(turn).get_fdata(dtype=np.float32)
    voxels = voxels[ndimage.find_objects((voxels > 0).astype(int))[0]]
    voxels = (voxels - voxels.min()) / (voxels.max() - voxels.min())
    return torch.from_numpy(np.ascontiguousarray(voxels))[None, None]


def cropped(x: torch.Tensor, centre: tuple[int, int, int], size: int) -> torch.Tensor:
    """Return `size` voxels along every axis around a voxel."""
    starts = [max(0, middle - size // 2) for middle in centre]
    return x[(..., *(slice(start, start + size) for start in starts))].clone()


def maps_of(
    network: nn.Module, x: torch.Tensor, structure: Structure
) -> Iterator[tuple[str, str, Any]]:
    """Yield layer, method and map (*S) on the input's grid."""
    target, every = ClassLogOdds(structure.index), structure.all_maps
    for name, cam in list(CAMS.items())[: None if every else 1]:
        result = cam(network, list(LAYERS))(x, target)
        for layer in LAYERS:
            yield layer, name, result.maps[layer][0]
    for name, cam in IN_THE_MIDDLE.items() if every else ():
        yield MIDDLE, name, cam(network, MIDDLE)(x, target).maps[MIDDLE][0]
    for name, (attribution, settings) in list(OF_THE_INPUT.items())[: None if every else 1]:
        yield "input", name, attribution(network, **settings)(x, target).maps["input"][0]


def randomised(network: nn.Module, x: torch.Tensor, index: int, layer: str, name: str) -> float:
    """Return how the map's ranks correlate with those of the network with random weights."""
    if layer == "input":
        attribution, settings = OF_THE_INPUT[name]
        cam = attribution(network, **settings)
    else:
        cam = (CAMS | IN_THE_MIDDLE)[name](network, layer)
    try:
        return randomisation(cam, x, ClassLogOdds(index), stages=1).spearman[-1]
    except EvaluationError:
        return float("nan")


def rivals_of(subject: Subject, x: torch.Tensor, draws: int = DRAWS) -> Rivals:
    """Return what all maps of a structure are held against: every layer has the input's grid."""
    mask, shape = subject.mask, tuple(subject.mask.shape)
    return Rivals(
        Blocks.of(subject, BLOCK, kept=grown(mask.numpy(), MARGIN)),
        baseline=BASELINES[0],
        steps=STEPS,
        seed=0,
        controls={
            MASK_ALONE: mask_alone(mask),
            INPUT_ALONE: input_alone(x),
            NEARNESS: nearness(mask),
        },
        strict=(MASK_ALONE, NEARNESS),
        random=random_maps(FeatureGrid.of_voxels(shape), shape, draws=draws),
    )


def leans_on(subject: Subject, labels: NDArray[np.int64], names: list[str]) -> dict[str, float]:
    """Return the Dice with one structure deleted outside of the grown mask, or all beyond a radius.

    This needs no map.
    """
    rerun, free = subject.rerun, ~grown(subject.mask.numpy(), MARGIN)
    distance = ndimage.distance_transform_edt(~subject.mask.numpy())
    blurred = baseline_of(BASELINES[0], rerun.x, seed=0)(torch.from_numpy(free))
    parts = {f"without {name}": labels == number for number, name in enumerate(names)}
    parts |= {f"without all beyond {far} mm": distance > far for far in (5, 10, 15, 20, 30)}
    found = {}
    for name, part in parts.items():
        gone = torch.from_numpy(part & free)
        if int(gone.sum()) >= 100:
            changed = torch.where(gone, blurred, rerun.x)
            found[name] = subject.dice_at(rerun.start().change(changed))
    return found


def outside_by_structure(
    values: torch.Tensor, subject: Subject, labels: NDArray[np.int64], names: list[str]
) -> dict[str, float]:
    """Return which part of the positive map outside of the grown mask lies in each structure."""
    free = ~grown(subject.mask.numpy(), MARGIN)
    positive = values.double().clamp(min=0).numpy() * free
    sums = np.bincount(labels.reshape(-1), positive.reshape(-1), minlength=len(names))
    total = max(float(sums.sum()), 1e-300)
    return {name: float(part) / total for name, part in zip(names, sums, strict=True)}


def examine(
    name: str, network: nn.Module, names: list[str], x: torch.Tensor, check: torch.Tensor | None
) -> dict[str, Any]:
    """Print and return the rows of a structure.

    Args:
        check: a smaller crop for the check by randomisation, None for none.
    """
    structure = STRUCTURES[name]
    index = structure.index
    rerun = Rerun(network, x)
    subject = Subject(rerun, index, "softmax")
    labels = rerun.logits[0].argmax(0).numpy()
    rivals = rivals_of(subject, x)
    print(f"\n## {name}: {int(subject.mask.sum())} voxels; Dice {rivals.left:.2f} with all deleted")
    print("| layer | method | inside | context deletion | verdict | random weights |")
    print("|---|---|---|---|---|---|", flush=True)
    rows = []
    points = (4 if structure.all_maps else 2) * EACH
    Trial(rivals, input_alone(x)).run(rivals.cost + points)  # so that the rivals are known
    for layer, method, values in maps_of(network, x, structure):
        found = evidence_against(rivals, values, (), rivals.cost + EACH)
        if found.passed:
            found = evidence_against(rivals, values, BASELINES[1:], rivals.cost + EACH)
        row = row_of(layer, method, values, subject, found)
        if check is not None and layer in (MIDDLE, "input"):
            row["random weights"] = randomised(network, check, index, layer, method)
        row["parts"] = outside_by_structure(values, subject, labels, names)
        rows.append(row)
        print(
            f"| {layer} | {method} | {100 * row['inside']:.0f} % | {row['auc']:.2f} | "
            f"{found.words} | {row.get('random weights', float('nan')):.2f} |",
            flush=True,
        )
    deleted = leans_on(subject, labels, names)
    for what, dice in sorted(deleted.items(), key=lambda pair: pair[1]):
        print(f"Dice {dice:.2f} {what}")
    controls = {control: curve.area for control, curve in rivals.controls.items()}
    random = [curve.area for curve in rivals.random]
    print(f"controls {controls}, random {min(random):.2f}-{max(random):.2f}; {rerun.cost:.0f} runs")
    volumes = np.bincount(labels.reshape(-1), minlength=len(names)).tolist()
    return {
        "rows": rows,
        "deleted": deleted,
        "controls": controls,
        "random": random,
        "left": rivals.left,
        "volumes": dict(zip(names, volumes, strict=True)),
        "cost": rerun.cost,
    }


def row_of(
    layer: str, method: str, values: torch.Tensor, subject: Subject, found: ContextEvidence
) -> dict[str, Any]:
    """Return a row of the table."""
    try:
        inside = mass_inside(values, {"mask": subject.mask})["mask"]
    except EvaluationError:
        inside = float("nan")
    return {
        "layer": layer,
        "method": method,
        "inside": inside,
        "auc": found.curve.auc,
        "baselines": dict(found.baselines),
        "p": found.p_value,
        "passed": found.passed,
        "certain": found.certain,
        "words": found.words,
    }


def whole_curves(network: nn.Module, x: torch.Tensor, name: str) -> None:
    """Print how far areas from few steps are from those of all 25, and how far curves rise."""
    subject = Subject(Rerun(network, x), STRUCTURES[name].index, "softmax")
    mask, shape = subject.mask, tuple(subject.mask.shape)
    blocks = Blocks.of(subject, BLOCK, kept=grown(mask.numpy(), MARGIN))
    (noise,) = random_maps(FeatureGrid.of_voxels(shape), shape, draws=1)
    hires = HiResCAM(network, MIDDLE)(x, ClassLogOdds(STRUCTURES[name].index)).maps[MIDDLE][0]
    maps = {NEARNESS: nearness(mask), "random": noise, f"hires_cam, {MIDDLE}": hires}
    print("| map | area of 25 steps | rise | from 3 steps | within 0.02 |")
    print("|---|---|---|---|---|")
    for of, values in maps.items():
        baseline = BASELINES[0]
        curve = blocks.deleted(values, steps=25, baseline=baseline, seed=0)
        whole = PartialCurve(lambda step, c=curve: c.dice[step], curve.fractions, 1, curve.dice[-1])
        for step in (12, 6, 18):
            whole.take(step)
        few, bound = whole.area, whole.error(whole.rise)
        while whole.error(whole.rise) > 0.02:
            whole.take(whole.widest(whole.rise))
        more = f"{whole.area:.3f} with {len(whole.heights) - 2} steps"
        for step in range(26):
            whole.take(step)
        print(
            f"| {of} | {curve.auc:.3f} | {whole.rise:.3f} | {few:.3f} ± {bound:.3f} | {more} |",
            flush=True,
        )


def picture(path: Path, network: nn.Module, x: torch.Tensor, name: str, rows: list[Any]) -> None:
    """Draw the maps of a structure beside each other: one sagittal slice through its middle.

    Anterior is left. Each map is cut at 0 and has a scale of its own; the line is the mask.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    structure = STRUCTURES[name]
    with torch.no_grad():
        mask = network(x)[0].argmax(0).numpy() == structure.index
    at = int(mask.sum((1, 2)).argmax())
    figure, axes = plt.subplots(3, 4, figsize=(11, 8.6), layout="constrained")
    panels = list(axes.flat)
    for panel in panels:
        panel.imshow(x[0, 0, at, :, :].numpy()[:, ::-1], cmap="gray")
        panel.contour(mask[at][:, ::-1], [0.5], colors="deepskyblue", linewidths=1)
        panel.axis("off")
    panels[0].set_title(f"{name}: T1 and mask", fontsize=10)
    verdicts = {(row["layer"], row["method"]): row for row in rows}
    maps = maps_of(network, x, structure)
    for panel, (layer, method, values) in zip(panels[1:], maps, strict=False):
        shown = values.double().clamp(min=0).numpy()[at][:, ::-1]
        shown = shown / max(float(values.max()), 1e-300)
        panel.imshow(shown, cmap="inferno", alpha=np.clip(2 * shown, 0, 0.85), vmin=0, vmax=1)
        row = verdicts[layer, method]
        panel.set_title(
            f"{method}, {layer}\n{100 * row['inside']:.0f} % inside, area {row['auc']:.2f}",
            fontsize=9,
        )
    panels[-1].remove()
    figure.savefig(path, dpi=72)


def compared(network: nn.Module, x: torch.Tensor, structure: Structure) -> None:
    """Print what `compare` makes of early, middle and late layers, and of the gradient."""
    found = compare(
        network,
        x,
        structure.index,
        layers=[f"blocks.{number}" for number in (0, 1, 2, 3, 4, 6, 8)],
        methods=["hires_cam", "grad_cam", "layer_cam", "gradient"],
        baselines=BASELINES,
        steps=STEPS,
    )
    controls = ", ".join(f"{name} {area:.3f}" for name, area in found.controls.items())
    print(f"{found.words}\n{controls}; {found.cost:.0f} predictions\n")
    for one in found.candidates:
        print(f"| {one.method} | {one.layer} | {one.area:.3f} ± {one.error:.3f} | {one.fault} |")


def main() -> None:
    """Examine the structures and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=STRUCTURES)
    parser.add_argument("--size", type=int, default=80)
    parser.add_argument("--check", type=int, default=64, help="crop for random weights, 0: none")
    parser.add_argument("--json", type=Path, help="where what was found is written")
    parser.add_argument("--picture", type=Path, help="where the maps of --only are drawn")
    parser.add_argument("--curves", action="store_true", help="whole curves beside few steps")
    parser.add_argument("--compare", action="store_true", help="rank layers and methods instead")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    network, names = mesh_net()
    whole, found = foreground(), {}
    for name, structure in STRUCTURES.items():
        if given.compare and given.only in (None, name):
            print(f"\n{name}")
            compared(network, cropped(whole, structure.centre, given.size), structure)
        elif given.curves and given.only in (None, name):
            whole_curves(network, cropped(whole, structure.centre, given.size), name)
        elif given.only in (None, name):
            start = time.process_time()
            x = cropped(whole, structure.centre, given.size)
            checks = given.check and structure.all_maps
            check = cropped(whole, structure.centre, given.check) if checks else None
            found[name] = examine(name, network, names, x, check)
            print(f"{time.process_time() - start:.0f} s of the processor", flush=True)
            if given.picture and given.only:
                picture(given.picture, network, x, name, found[name]["rows"])
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
