"""Train the demo's model from nothing, on copies of one brain template with planted lesions.

    python examples/train_demo_model.py --minutes 20 --out my_model

Each copy is the ICBM152 template, warped, given other contrasts, and with dark lesions planted in
it, never within 30 mm of where the demo's lesion lies. The script writes `model.safetensors` and
`model.yaml` to the `--out` folder and prints Dice on copies that it never trained on, half of them
with their lesion in that place, and on the demo's own scan.

The model is a demonstration: it knows one brain and one kind of lesion, and is no medical device.

`--seed` fixes every copy and the starting weights. With `--minutes`, how many steps are taken
depends on the machine; `--steps` fixes that too.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import yaml
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.transforms import (
    Compose,
    EnsureChannelFirst,
    LoadImage,
    Orientation,
    RandAdjustContrast,
    RandBiasField,
    RandCropByLabelClassesd,
    RandGaussianNoise,
    RandGaussianSmooth,
    ResampleToMatch,
    ScaleIntensityRangePercentiles,
    Spacing,
)
from safetensors.torch import load_file, save_file

from seg3dcam.demo.scan import (
    HELD_OUT_CENTRE_MM,
    LABELS,
    DemoVolumes,
    demo_volumes,
    is_held_out,
    plant_lesion,
    truth_labels,
    voxels,
    write_demo_scan,
)

BATCH = 4
PATCHES_PER_COPY = 24
SHUFFLED_PATCHES = 72
LEARNING_RATE = 3e-3
CLASS_WEIGHTS = [1.0, 1.0, 1.0, 3.0]  # a lesion is small, and is what the demo is about

LESION_RADII_MM = (7.0, 12.0)
# Only dark lesions: the preparation clips everything brighter than nearly all white matter.
LESION_CONTRASTS = (-0.55, -0.35)
LESIONS_PER_COPY = [0, 1, 1, 2, 3]  # without any now and then, so that it can answer "none"


def model_spec(spacing: float, roi: int) -> dict:
    """Describe the model, what its input must look like and how to run it: the model.yaml."""
    return {
        "factory": "monai.networks.nets:UNet",
        "arguments": {
            "spatial_dims": 3,
            "in_channels": 1,
            "out_channels": len(LABELS),
            "channels": [16, 32, 64, 128],
            "strides": [2, 2, 2],
            "num_res_units": 0,
            "act": "relu",
            "norm": "batch",
        },
        "weights": "model.safetensors",
        "classes": list(LABELS),
        "activation": "softmax",
        "prepare": {
            "orientation": "RAS",
            "spacing": [spacing] * 3,
            "intensity": {"percentiles": [0.5, 99.5]},
        },
        "window": {"roi_size": [roi] * 3, "overlap": 0.25, "mode": "gaussian"},
    }


# ---------------------------------------------------------------- copies of the template


Place = Callable[[np.random.Generator], np.ndarray]  # chooses a lesion's centre, mm


class CopyMaker:
    """Makes warped, re-contrasted copies of the template, with lesions, on the model's grid.

    A copy is an image (1, X, Y, Z), prepared as the model wants it, and its labels (1, X, Y, Z).
    """

    def __init__(self, volumes: DemoVolumes, spec: dict, seed: int):
        self.volumes = volumes
        self.t1, self.grey, self.white = map(voxels, volumes)
        self.tissue = volumes.tissue()
        self.random = np.random.default_rng(seed)
        prepared = orient_and_space(spec)(MetaTensor(self.t1[None], volumes.t1.affine))
        self.points = world_points(prepared.shape[1:], prepared.affine)
        self.change_contrast = contrast_changes(seed)
        self.scale = scale_intensity(spec)

    def copy(self, place: Place | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Make one copy; `place` says where its only lesion goes, instead of random places."""
        image, lesion = self._with_lesions(self._other_tissue_contrast(), place)
        template = [image, self.grey, self.white, lesion]
        t1, grey, white, lesion = self._warped(np.stack(template))
        labels = truth_labels(grey.numpy(), white.numpy(), lesion.numpy())
        prepared = torch.as_tensor(self.scale(self.change_contrast(t1[None])))
        return prepared, torch.from_numpy(labels)[None].long()

    def _other_tissue_contrast(self) -> np.ndarray:
        grey, white, fluid = self.random.uniform(-0.08, 0.08, 3).astype(np.float32)
        change = grey * self.grey + white * self.white + fluid * (1 - self.tissue)
        return self.t1 * (1 + change)

    def _with_lesions(self, t1: np.ndarray, place: Place | None) -> tuple[np.ndarray, np.ndarray]:
        image = nib.Nifti1Image(t1, self.volumes.t1.affine)
        lesions = np.zeros(t1.shape, dtype=np.float32)
        for _ in range(1 if place else self.random.choice(LESIONS_PER_COPY)):
            image, mask = plant_lesion(
                image,
                place(self.random) if place else self.training_place(),
                self.random.uniform(*LESION_RADII_MM),
                contrast=self.random.uniform(*LESION_CONTRASTS),
                edge_mm=self.random.uniform(0.7, 2.0),
                tissue=self.tissue,
                seed=int(self.random.integers(2**31)),
            )
            lesions = np.maximum(lesions, voxels(mask))
        return voxels(image), lesions

    def training_place(self) -> np.ndarray:
        """Choose a place in the tissue, in millimetres, that is not kept for the demo."""
        while True:
            index = self.random.integers(self.tissue.shape)
            centre = nib.affines.apply_affine(self.volumes.t1.affine, index)
            around = self.tissue[tuple(slice(max(i - 6, 0), i + 7) for i in index)]
            if around.mean() > 0.9 and not is_held_out(centre):
                return centre

    def _warped(self, channels: np.ndarray) -> torch.Tensor:
        """Sample channels of the template (C, 197, 233, 189) on the model's grid, moved about."""
        points = self._moved_points()  # world millimetres
        to_voxel = torch.as_tensor(np.linalg.inv(self.volumes.t1.affine), dtype=torch.float32)
        points = points @ to_voxel[:3, :3].T + to_voxel[:3, 3]
        size = torch.tensor(channels.shape[1:], dtype=torch.float32)
        grid = (points / (size - 1) * 2 - 1).flip(-1)  # grid_sample wants -1..1, last axis first
        return torch.nn.functional.grid_sample(
            torch.from_numpy(channels)[None], grid[None], align_corners=True
        )[0]

    def _moved_points(self) -> torch.Tensor:
        """Move each point of the model's grid, affinely and smoothly: (X, Y, Z, 3), mm."""
        middle = self.points.mean((0, 1, 2))
        turn = np.eye(3) + np.cross(np.eye(3), self.random.uniform(-0.15, 0.15, 3))  # radians
        stretch = np.diag(self.random.uniform(0.92, 1.08, 3))
        shift = torch.as_tensor(self.random.uniform(-6, 6, 3), dtype=torch.float32)
        linear = torch.as_tensor(turn @ stretch, dtype=torch.float32)
        return (self.points - middle) @ linear.T + (middle + shift) + self._elastic_shift()

    def _elastic_shift(self, knots: int = 6, most_mm: float = 5.0) -> torch.Tensor:
        coarse = self.random.uniform(-most_mm, most_mm, (1, 3, knots, knots, knots))
        fine = torch.nn.functional.interpolate(
            torch.as_tensor(coarse, dtype=torch.float32),
            size=self.points.shape[:3],
            mode="trilinear",
            align_corners=True,
        )
        return fine[0].movedim(0, -1)


def world_points(shape: Sequence[int], affine: torch.Tensor) -> torch.Tensor:
    """Give the place of each voxel of a grid: (X, Y, Z, 3), world millimetres."""
    axes = [torch.arange(n, dtype=torch.float32) for n in shape]
    index = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    affine = affine.to(torch.float32)
    return index @ affine[:3, :3].T + affine[:3, 3]


def orient_and_space(spec: dict) -> Compose:
    """Bring a scan (1, X, Y, Z) to the orientation and spacing that the model wants."""
    prepare = spec["prepare"]
    return Compose(
        [
            Orientation(
                axcodes=prepare["orientation"], labels=(("L", "R"), ("P", "A"), ("I", "S"))
            ),
            Spacing(pixdim=prepare["spacing"], mode="bilinear"),
        ]
    )


def scale_intensity(spec: dict) -> ScaleIntensityRangePercentiles:
    """Bring intensities to 0..1, as the model wants them."""
    low, high = spec["prepare"]["intensity"]["percentiles"]
    return ScaleIntensityRangePercentiles(low, high, 0.0, 1.0, clip=True)


def contrast_changes(seed: int) -> Compose:
    """Change what scanners differ in: bias field, gamma, sharpness, noise."""
    changes = Compose(
        [
            RandBiasField(prob=0.7, degree=3, coeff_range=(-0.06, 0.06)),
            RandAdjustContrast(prob=0.7, gamma=(0.8, 1.25)),
            RandGaussianSmooth(
                prob=0.2, sigma_x=(0.25, 0.7), sigma_y=(0.25, 0.7), sigma_z=(0.25, 0.7)
            ),
            RandGaussianNoise(prob=0.6, std=0.03),
        ]
    )
    changes.set_random_state(seed)
    return changes


# ---------------------------------------------------------------- training


def training_batches(maker: CopyMaker, roi: int, seed: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield batches of windows forever: images and labels, each (BATCH, 1, roi, roi, roi).

    Windows of several copies wait in a shuffled stock, so that a batch mixes copies.
    """
    crop = RandCropByLabelClassesd(
        keys=["image", "labels"],
        label_key="labels",
        spatial_size=[roi] * 3,
        ratios=[1, 1, 1, 3],  # which class a window is centred on: often the small one
        num_classes=len(LABELS),
        num_samples=PATCHES_PER_COPY,
        warn=False,  # a copy without any lesion is no accident
    )
    crop.set_random_state(seed)
    draw = random.Random(seed)
    stock: list[dict] = []
    while True:
        while len(stock) < SHUFFLED_PATCHES:
            image, labels = maker.copy()
            stock += crop({"image": image, "labels": labels})
        for _ in range(PATCHES_PER_COPY // BATCH):
            chosen = [stock.pop(draw.randrange(len(stock))) for _ in range(BATCH)]
            yield tuple(
                torch.stack([torch.as_tensor(patch[key]) for patch in chosen])
                for key in ("image", "labels")
            )


def train(model: torch.nn.Module, batches: Iterator, progress: Callable[[int], float]) -> None:
    """Train until `progress(steps taken)` reaches 1; it also drives the learning rate."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    # Dice over the whole batch: a window without any lesion has no Dice of its own.
    loss_of = DiceCELoss(
        to_onehot_y=True, softmax=True, batch=True, weight=torch.tensor(CLASS_WEIGHTS)
    )
    model.train()
    step, shown = 0, 0.0
    while (done := progress(step)) < 1:
        warm_up = min(1.0, (step + 1) / 20)
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * warm_up * (0.5 + 0.5 * math.cos(math.pi * done))
        image, labels = next(batches)
        loss = loss_of(model(image), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        step += 1
        shown = loss.item() if step == 1 else 0.95 * shown + 0.05 * loss.item()
        if step % 25 == 0:
            print(f"step {step:5d}  {done:4.0%} done  loss {shown:.3f}", flush=True)
    model.eval()
    print(f"trained for {step} steps")


def progress_by(steps: int | None, minutes: float) -> Callable[[int], float]:
    """Measure progress from 0 to 1 by steps where they are given, else by the clock."""
    if steps is not None:
        return lambda step: step / max(steps, 1)
    start = time.monotonic()
    return lambda step: (time.monotonic() - start) / (60 * minutes)


# ---------------------------------------------------------------- evaluation


@torch.no_grad()
def predict(model: torch.nn.Module, image: torch.Tensor, spec: dict) -> torch.Tensor:
    """Predict class probabilities (classes, X, Y, Z) with exactly the windows of the spec."""
    window = spec["window"]
    logits = sliding_window_inference(
        image[None], window["roi_size"], 1, model, overlap=window["overlap"], mode=window["mode"]
    )
    return logits.softmax(1)[0]


def dice_per_class(predicted: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Compare two label volumes of one shape, class by class, background left out."""
    result = {}
    for name, label in list(LABELS.items())[1:]:
        a, b = predicted == label, truth == label
        result[name] = 2 * (a & b).sum().item() / max((a.sum() + b.sum()).item(), 1)
    return result


def near_demo_place(generator: np.random.Generator) -> np.ndarray:
    """Choose a place within 8 mm of the demo's lesion, in millimetres: training has none."""
    return HELD_OUT_CENTRE_MM + generator.uniform(-4.6, 4.6, 3)


def evaluate_on_copies(model: torch.nn.Module, maker: CopyMaker, spec: dict, copies: int) -> None:
    """Print Dice on new copies, half of them with a lesion where training never had one."""
    places = {
        "near the demo's place": near_demo_place,
        "elsewhere": lambda _: maker.training_place(),
    }
    for where, place in places.items():
        scores = []
        for _ in range(copies):
            image, labels = maker.copy(place)
            scores.append(dice_per_class(predict(model, image, spec).argmax(0), labels[0]))
        for name in scores[0]:
            all_of_it = [score[name] for score in scores]
            print(
                f"held-out copies, lesion {where}: Dice of {name} "
                f"{np.mean(all_of_it):.3f} (lowest {min(all_of_it):.3f})"
            )


def evaluate_on_demo_scan(model: torch.nn.Module, spec: dict) -> None:
    """Print Dice on the demo's scan, from file to file: on the scan's own 1 mm grid."""
    with tempfile.TemporaryDirectory() as folder:
        scan_path, truth_path = write_demo_scan(folder)
        load = Compose([LoadImage(image_only=True), EnsureChannelFirst()])
        scan, truth = load(scan_path), load(truth_path)
    prepared = scale_intensity(spec)(orient_and_space(spec)(scan))
    start = time.monotonic()
    probabilities = predict(model, prepared, spec)
    seconds = time.monotonic() - start
    on_scan = ResampleToMatch(mode="bilinear")(probabilities, img_dst=scan)
    for name, dice in dice_per_class(on_scan.argmax(0), truth[0]).items():
        print(f"demo scan: Dice of {name} {dice:.3f}")
    print(f"demo scan: {tuple(prepared.shape[1:])} voxels predicted in {seconds:.1f} s")


# ---------------------------------------------------------------- command


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20, help="how long to train (20)")
    parser.add_argument("--steps", type=int, help="train this many steps instead of minutes")
    parser.add_argument("--out", type=Path, default=Path("demo_model"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="go on from the weights in this folder")
    parser.add_argument("--roi", type=int, default=64, help="window edge, voxels; multiple of 8")
    parser.add_argument("--spacing", type=float, default=1.5, help="voxel size, mm (1.5)")
    parser.add_argument("--copies", type=int, default=6, help="held-out copies of each kind")
    parser.add_argument(
        "--fast-check", action="store_true", help="a few coarse steps, to see that all of it runs"
    )
    arguments = parser.parse_args()
    if arguments.fast_check:
        arguments.steps, arguments.roi = 3, 32
        arguments.spacing, arguments.copies = 4.0, 1
    return arguments


def main() -> None:
    """Train, save, evaluate."""
    arguments = read_arguments()
    torch.manual_seed(arguments.seed)
    spec = model_spec(arguments.spacing, arguments.roi)
    volumes = demo_volumes()
    model = UNet(**spec["arguments"])
    if arguments.start:
        model.load_state_dict(load_file(arguments.start / spec["weights"]))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

    batches = training_batches(
        CopyMaker(volumes, spec, arguments.seed), arguments.roi, arguments.seed
    )
    train(model, batches, progress_by(arguments.steps, arguments.minutes))

    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), arguments.out / spec["weights"])
    text = yaml.safe_dump(spec, sort_keys=False, default_flow_style=None)
    (arguments.out / "model.yaml").write_text(text, encoding="utf-8")

    evaluate_on_copies(
        model, CopyMaker(volumes, spec, arguments.seed + 1000), spec, arguments.copies
    )
    evaluate_on_demo_scan(model, spec)


if __name__ == "__main__":
    main()
