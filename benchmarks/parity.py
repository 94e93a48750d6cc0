"""Every method against an independent reference and against the other tools; writes parity.md.

    python benchmarks/parity.py

Two small networks with fixed seeds, in float64: a 2D classifier and a 3D segmentation network,
without in-place layers, explained at a ReLU on the input's grid. The reference knows the network
cut in two at that layer (`tests/reference`). Then everything that is known to go wrong in the other
tools is run, and measured beside the same case here. A tool that is not installed is left out.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import platform
import sys
import tracemalloc
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import torch
from monai.data import MetaTensor
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import toy  # noqa: E402
from reference import maps  # noqa: E402
from reference import methods as slow  # noqa: E402
from reference import scores as cut_scores  # noqa: E402

import seg3dcam as ours  # noqa: E402
from seg3dcam.geometry import FeatureGrid, interpolate  # noqa: E402
from seg3dcam.targets import ClassLogit  # noqa: E402

CLASS = 1
#: Above this deviation a tool computes something else.
AGREES = 1e-5
TORCHVISION = ["torchvision" + end for end in ("", ".ops", ".transforms", ".transforms.functional")]


# ------------------------------------------------------------------------------------------- tools


def load(name: str) -> ModuleType | None:
    """Import a tool, or None; pytorch-grad-cam also beside a torchvision that does not import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ImportError, RuntimeError, OSError):
            return importlib.import_module(name)
        sys.modules.update({part: mock.MagicMock() for part in TORCHVISION})
        try:
            return importlib.import_module(name)
        except ImportError:
            return None
        finally:
            for part in TORCHVISION:
                del sys.modules[part]


PACKAGES = {
    "pytorch-grad-cam": ("pytorch_grad_cam", "grad-cam"),
    "captum": ("captum.attr", "captum"),
    "torchcam": ("torchcam.methods", "torchcam"),
    "MONAI": ("monai.visualize", "monai"),
    "M3d-Cam": ("medcam", "medcam"),
    "nnunetv2-cam": ("nnunetv2_cam", "nnunetv2-cam"),
}
TOOLS = {name: load(module) for name, (module, _) in PACKAGES.items()}
GRAD_CAM, CAPTUM, TORCHCAM, MONAI = (TOOLS[name] for name in list(PACKAGES)[:4])
COLUMNS = ("pytorch-grad-cam", "captum", "torchcam", "MONAI")


# ---------------------------------------------------------------------------------------- subjects


@dataclass(frozen=True)
class Subject:
    """A network, a layer of it, an input, and what is explained."""

    network: nn.Sequential
    at: int
    x: torch.Tensor

    @property
    def layer(self) -> str:
        return str(self.at)

    @property
    def module(self) -> nn.Module:
        return self.network[self.at]

    @property
    def target(self) -> ClassLogit:
        return ClassLogit(CLASS, "volume")

    def score(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logit, summed over space if there is any: (B,)."""
        return logits[:, CLASS].reshape(len(logits), -1).sum(1)

    def fresh(self) -> Subject:
        """Return a copy, for tools that leave something behind."""
        return Subject(copy.deepcopy(self.network), self.at, self.x.clone())

    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return activations and gradients of the layer."""
        case = toy.cut(self.network, self.at, self.x)
        return cut_scores.activations_and_gradients(case.front, case.back, case.x, self.score)

    def native(self, cam: type[ours.BaseCAM], **settings: object) -> torch.Tensor:
        """Return our map of the layer."""
        result = cam(self.network, self.layer, **settings)(self.x, self.target)
        return next(iter(result.native.values()))


def classifier() -> Subject:
    """Return a 2D network of three classes; layer 3 is a ReLU on the input's grid."""
    layers = [
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    ]
    return Subject(toy.seeded(nn.Sequential(*layers), 3), 3, toy.random_input(2, 1, 16, 14))


def segmenter() -> Subject:
    """Return a 3D network of three classes; layer 3 is a ReLU on the input's grid."""
    layers = [
        nn.Conv3d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv3d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv3d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose3d(8, 8, 2, stride=2),
        nn.ReLU(),
        nn.Conv3d(8, 3, 1),
    ]
    return Subject(toy.seeded(nn.Sequential(*layers), 4), 3, toy.random_input(2, 1, 8, 10, 6))


def smooth(ndim: int) -> Subject:
    """Return a tiny network of smooth activations, whose whole Hessian fits."""
    conv = toy.CONV[ndim]
    layers = [
        conv(1, 4, 3, padding=1),
        nn.Softplus(),
        conv(4, 4, 3, padding=1),
        nn.GELU(),
        conv(4, 3, 1),
    ]
    x = toy.random_input(2, 1, *((6, 5) if ndim == 2 else (4, 3, 3)))
    return Subject(toy.seeded(nn.Sequential(*layers), 2), 1, x)


# -------------------------------------------------------------- raw maps (B, *S) of the other tools


def by_grad_cam(name: str, subject: Subject, mean: bool = False) -> np.ndarray:
    """Return pytorch-grad-cam's map before it is cut, resized and scaled."""
    subject, kept = subject.fresh(), []

    def target(output: torch.Tensor) -> torch.Tensor:
        return output[CLASS].mean() if mean else output[CLASS].sum()

    with quiet(), getattr(GRAD_CAM, name)(subject.network, [subject.module]) as cam:
        made = cam.get_cam_image
        cam.get_cam_image = lambda *args: kept.append(made(*args)) or kept[-1]
        cam(subject.x, [target] * len(subject.x))
    return np.asarray(kept[0])


def by_captum(name: str, subject: Subject) -> np.ndarray:
    """Return captum's map, or one that follows from its attributions by a sum over channels."""
    subject = subject.fresh()

    def forward(x: torch.Tensor) -> torch.Tensor:
        return subject.score(subject.network(x))

    if name == "GradCAM":
        found = CAPTUM.LayerGradCam(forward, subject.module).attribute(subject.x)
    elif name == "AblationCAM":
        a = subject.network[: subject.at + 1](subject.x).detach()
        channels = torch.arange(a.shape[1]).reshape(1, -1, *[1] * (a.ndim - 2)).expand(a[:1].shape)
        losses = CAPTUM.LayerFeatureAblation(forward, subject.module).attribute(
            subject.x, layer_mask=channels
        )
        score = forward(subject.x).abs().reshape(-1, *[1] * (a.ndim - 1))
        found = (losses / score * a).sum(1, keepdim=True)
    else:
        found = CAPTUM.LayerGradientXActivation(forward, subject.module).attribute(subject.x)
        found = found if name == "HiResCAM" else found.relu()
    return found.sum(1).detach().numpy()


def by_torchcam(name: str, subject: Subject, mean: bool = False) -> np.ndarray:
    """Return torchcam's map before it is scaled; it is cut at zero."""
    subject = subject.fresh()
    with getattr(TORCHCAM, name)(subject.network, subject.layer) as cam:
        logits = subject.network(subject.x)
        return cam(
            scores=logits,
            normalized=False,
            targets=lambda item: item[CLASS].mean() if mean else item[CLASS].sum(),
        )[0].numpy()


def by_monai(name: str, subject: Subject) -> np.ndarray:
    """Return MONAI's map before it is resized and scaled; it is cut at zero.

    Item by item: its GradCAMpp fails on a batch.
    """
    cam = getattr(MONAI, name)(subject.fresh().network, subject.layer)
    return np.concatenate(
        [cam.compute_map(x[None], class_idx=CLASS)[:, 0].detach().numpy() for x in subject.x]
    )


BY = dict(zip(COLUMNS, (by_grad_cam, by_captum, by_torchcam, by_monai), strict=True))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what a tool prints."""
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


# -------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Row:
    """A method: our class, its reference, and what the other tools call it."""

    cam: type[ours.BaseCAM]
    reference: Callable[[torch.Tensor, torch.Tensor], np.ndarray] | None
    others: dict[str, str]
    up_to_sign: bool = False


G, C, T, M = COLUMNS
ROWS = [
    Row(ours.GradCAM, maps.grad_cam, {G: "GradCAM", C: "GradCAM", T: "GradCAM", M: "GradCAM"}),
    Row(ours.SliceGradCAM, maps.slice_grad_cam, {}),
    Row(ours.HiResCAM, maps.hires_cam, {G: "HiResCAM", C: "HiResCAM"}),
    Row(ours.XResCAM, lambda a, g: maps.xres_cam(a, g, 2, "mean"), {}),
    Row(
        ours.GradCAMPlusPlus,
        slow.grad_cam_plus_plus,
        {G: "GradCAMPlusPlus", T: "GradCAMpp", M: "GradCAMpp"},
    ),
    Row(ours.XGradCAM, lambda a, g: slow.xgrad_cam(a, g)[0], {G: "XGradCAM", T: "XGradCAM"}),
    Row(ours.LayerCAM, slow.layer_cam, {G: "LayerCAM", C: "products", T: "LayerCAM"}),
    Row(
        ours.GradCAMElementWise,
        slow.grad_cam_elementwise,
        {G: "GradCAMElementWise", C: "products"},
    ),
    Row(ours.EigenCAM, slow.eigen_cam, {G: "EigenCAM"}, up_to_sign=True),
    Row(ours.EigenGradCAM, slow.eigen_grad_cam, {G: "EigenGradCAM"}, up_to_sign=True),
    Row(ours.SegEigenCAM, slow.seg_eigen_cam, {G: "SegEigenCAM"}),
    Row(ours.KPCACAM, slow.kpca_cam, {G: "KPCA_CAM"}, up_to_sign=True),
    Row(ours.FEM, slow.fem, {G: "FEM"}),
    Row(ours.ScoreCAM, None, {G: "ScoreCAM", T: "ScoreCAM"}),
    Row(ours.AblationCAM, None, {G: "AblationCAM", C: "AblationCAM"}),
    Row(ours.ShapleyCAM, None, {G: "ShapleyCAM"}),
    Row(ours.FullGrad, None, {}),
]


def deviation(found: object, expected: object, up_to_sign: bool = False) -> float:
    """Return the largest difference, relative to the largest expected value."""
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    if up_to_sign:  # of each item
        products = (found * expected).reshape(len(found), -1).sum(1)
        found = found * np.sign(products).reshape(-1, *[1] * (found.ndim - 1))
    return float(abs(found - expected).max() / abs(expected).max())


def correlation(one: object, other: object) -> float:
    return float(np.corrcoef(np.asarray(one).ravel(), np.asarray(other).ravel())[0, 1])


def expected_of(row: Row, subject: Subject) -> np.ndarray:
    """Return the slow reference of a method on a subject."""
    a, g = subject.reference()
    if row.reference is not None:
        return row.reference(a, g)
    case = toy.cut(subject.network, subject.at, subject.x)
    if row.cam is ours.ScoreCAM:
        voxels = case.network(case.x)[0, CLASS].numel()
        return slow.score_cam(a, through(subject, a).numpy() / voxels)
    if row.cam is ours.AblationCAM:
        return slow.ablation_cam(a, *ablated(subject))
    if row.cam is ours.ShapleyCAM:
        product = slow.curvature(lambda item: subject.score(case.back(item))[0], a)
        return slow.shapley_cam(a, g, product)
    parts = slow.full_grad(subject.network, subject.x, subject.score).values()
    return sum(part.reshape(len(part), -1).sum(1) for part in parts)


def ablated(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores (B, C) with each channel at zero, and the whole score (B,)."""
    case = toy.cut(subject.network, subject.at, subject.x)
    a = case.front(case.x).detach()
    losses = []
    for k in range(a.shape[1]):
        without = a.clone()
        without[:, k] = 0
        losses.append(subject.score(case.back(without)))
    score = subject.score(case.network(case.x))
    return torch.stack(losses, 1).detach().numpy(), score.detach().numpy()


def parity(subject: Subject, ndim: int) -> list[list[str]]:
    """Return the rows of the table: deviations from the reference."""
    rows = []
    for row in ROWS:
        chosen = smooth(ndim) if row.cam is ours.ShapleyCAM else subject
        found, expected = chosen.native(row.cam), expected_of(row, chosen)
        found = found.flatten(1).sum(1) if row.cam is ours.FullGrad else found
        cells = [f"`{row.cam.__name__}`", shown(deviation(found, expected))]
        for tool in COLUMNS:
            cells.append(_cell(row, tool, chosen, expected))
        rows.append(cells)
        print("  ".join(cells), flush=True)
    return rows


def _cell(row: Row, tool: str, subject: Subject, expected: np.ndarray) -> str:
    name = row.others.get(tool)
    if name is None:
        return "–"
    if TOOLS[tool] is None:
        return "not installed"
    cut = tool in (T, M)  # these give ReLU of the map
    mean = {"mean": True} if row.cam is ours.ScoreCAM else {}
    found = attempt(lambda: BY[tool](name, subject, **mean))
    if isinstance(found, Exception):
        return f"**{type(found).__name__}**"
    return shown(deviation(found, np.maximum(expected, 0) if cut else expected, row.up_to_sign))


def attempt(function: Callable[[], object]) -> object:
    """Return what a function gives, or the exception that it raises."""
    try:
        return function()
    except Exception as error:
        return error


def shown(value: float) -> str:
    text = "0" if value == 0 else f"{value:.0e}" if value < 0.01 else f"{value:.2g}"
    return f"**{text}**" if value > AGREES else text


# ------------------------------------------------------------------------------------ known faults


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong: measured in a tool, and the same case here."""

    tool: str
    what: str
    theirs: str
    here: str


def number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.2f}" if 0.01 <= abs(value) < 1000 else f"{value:.0e}"


def raised(found: object) -> str:
    """Return the name of an exception, or "runs"."""
    return type(found).__name__ if isinstance(found, Exception) else "runs"


def in_place_activations() -> Iterator[Fault]:
    """The same weights with an activation in place and not, explained at the layer before it."""
    for layer in ("norm", "convolution"):
        plain, hidden = (before_activation(layer, inplace=inplace) for inplace in (False, True))
        right = plain.native(ours.GradCAM)
        here = f"deviation {number(deviation(hidden.native(ours.GradCAM), right))}"
        for tool in COLUMNS:
            if TOOLS[tool] is None:
                continue
            expected = right.relu() if tool in (T, M) else right
            found = attempt(lambda tool=tool, subject=hidden: BY[tool]("GradCAM", subject))
            if isinstance(found, Exception):
                theirs = raised(found)
            elif deviation(found, expected) < AGREES:
                continue
            else:
                theirs = (
                    f"deviation {number(deviation(found, expected))}, "
                    f"correlation {number(correlation(found, expected))}"
                )
            what = f"Grad-CAM at a {layer} before an in-place activation, against not in place"
            yield Fault(tool, what, theirs, here)


def before_activation(layer: str, *, inplace: bool) -> Subject:
    """Return a network with a norm (as in nnU-Net) or a convolution before an activation."""
    if layer == "norm":
        return Subject(toy.normed(3, inplace=inplace, seed=3), 4, toy.random_input(2, 1, 6, 8, 7))
    layers = [
        nn.Conv3d(1, 6, 3, padding=1),
        nn.LeakyReLU(0.01, inplace=inplace),
        nn.Conv3d(6, 6, 3, padding=1),
        nn.LeakyReLU(0.01, inplace=inplace),
        nn.Conv3d(6, 3, 3, padding=1),
    ]
    return Subject(toy.seeded(nn.Sequential(*layers), 3), 2, toy.random_input(2, 1, 6, 8, 7))


def grad_cam_plus_plus() -> Iterator[Fault]:
    """The score as a mean over voxels instead of a sum makes gradients N times smaller."""
    subject = segmenter()
    a, g = subject.reference()
    voxels = subject.network(subject.x)[0, CLASS].numel()
    averaged = slow.grad_cam_plus_plus(a, g / voxels)
    cam = ours.GradCAMPlusPlus(subject.network, "3")
    found = cam(subject.x, lambda z: subject.score(z) / voxels).native["3"]
    here = f"deviation {number(deviation(found, averaged))}"
    if GRAD_CAM:
        found = by_grad_cam("GradCAMPlusPlus", subject, mean=True)
        what = "Grad-CAM++ adds 1e-6 to its divisor: of a score that is a mean, gradients drown"
        yield Fault(G, what, f"deviation {number(deviation(found, averaged))}", here)
    subject = classifier()
    a, g = subject.reference()
    right = np.maximum(slow.grad_cam_plus_plus(a, g), 0)
    here = f"deviation {number(deviation(subject.native(ours.GradCAMPlusPlus).relu(), right))}"
    if TORCHCAM:
        found = by_torchcam("GradCAMpp", subject)
        cubes = slow.weighted((g.relu() ** 3).flatten(2).sum(-1).numpy(), a.numpy())
        what = "Grad-CAM++ loses its alpha: the weight is the sum of ReLU(G)³"
        theirs = (
            f"deviation {number(deviation(found, right))}; "
            f"from sum ReLU(G)³: {number(deviation(found, np.maximum(cubes, 0)))}"
        )
        yield Fault(T, what, theirs, here)
    found = by_monai("GradCAMpp", subject)
    what = "Grad-CAM++ sums A G³ where the paper multiplies the sum of A with G³"
    yield Fault(M, what, f"deviation {number(deviation(found, right))}", here)

    coarse = Subject(segmenter().network, 5, segmenter().x)
    cam = MONAI.GradCAMpp(coarse.fresh().network, coarse.layer)
    theirs = raised(attempt(lambda: cam.compute_map(coarse.x[:1], class_idx=CLASS)))
    here = raised(attempt(lambda: coarse.native(ours.GradCAMPlusPlus)))
    yield Fault(M, "Grad-CAM++ of a segmentation at a layer of half the resolution", theirs, here)


def eigen_memory() -> Iterator[Fault]:
    """The SVD of an N x C matrix with an N x N left factor that is thrown away."""
    if not GRAD_CAM:
        return
    projection = importlib.import_module("pytorch_grad_cam.utils.svd_on_activations")
    peaks = {}
    for side in (8, 12, 16):
        batch = np.random.default_rng(0).normal(size=(1, 4, side, side, side))
        tracemalloc.start()
        projection.get_2d_projection(batch)
        peaks[side] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    square = {side: (side**3) ** 2 * 8 for side in (*peaks, 64)}
    ratios = ", ".join(f"{peak / 1e6:.0f} MB at {side}³" for side, peak in peaks.items())
    theirs = (
        f"{ratios} ({peaks[16] / square[16]:.1f} × 8 N² bytes); at 64³ 8 N² is "
        f"{square[64] / 2**30:.0f} GiB"
    )
    a = torch.randn(1, 4, 64, 64, 64, dtype=torch.float64)
    found = attempt(lambda: ours.METHODS["eigen_cam"](a))
    here = f"64³ {raised(found)}: the matrix is C × C"
    yield Fault(G, "EigenCAM asks for N × N numbers", theirs, here)


def eigen_sign() -> Iterator[Fault]:
    """A component and its negative are the same component."""
    if not GRAD_CAM:
        return
    projection = importlib.import_module("pytorch_grad_cam.utils.svd_on_activations")
    batch = np.stack([toy.random_input(6, 8, 8, seed=seed).abs().numpy() for seed in range(20)])
    batch *= 1 + 3 * toy.random_input(20, 1, 8, 8, seed=99).abs().numpy()
    theirs = projection.get_2d_projection(batch).reshape(20, -1)
    here = ours.METHODS["eigen_cam"](torch.as_tensor(batch)).flatten(1).numpy()
    brightest = batch.sum(1).reshape(20, -1)

    def upside_down(maps_: np.ndarray) -> int:
        return sum(correlation(m, b) < 0 for m, b in zip(maps_, brightest, strict=True))

    what = "EigenCAM leaves the sign to chance: maps of 20 inputs that are low where A is high"
    yield Fault(G, what, f"{upside_down(theirs)} of 20", f"{upside_down(here)} of 20")


def swapped_fem() -> Iterator[Fault]:
    """The paper: the channel's mean where it stands out. Swapped: A times how often it does."""
    if not GRAD_CAM:
        return
    subject = classifier()
    a, _ = subject.reference()
    found, expected = by_grad_cam("FEM", subject), slow.fem(a)
    flat = a.numpy().reshape(*a.shape[:2], -1)
    often = (flat > flat.mean(-1, keepdims=True) + 2 * flat.std(-1, keepdims=True)).mean(-1)
    swapped = slow.weighted(often, a.numpy())
    theirs = (
        f"deviation {number(deviation(found, expected))}; "
        f"from the swapped formula {number(deviation(found, swapped))}"
    )
    here = f"deviation {number(deviation(subject.native(ours.FEM), expected))}"
    yield Fault(G, "FEM swaps the mean and the mask", theirs, here)


def ablation() -> Iterator[Fault]:
    """A negative score, activations below zero, and three dimensions."""
    if not GRAD_CAM:
        return
    subject = classifier()
    subject.network[-1].bias.data[CLASS] = -10
    a, _ = subject.reference()
    expected = slow.ablation_cam(a, *ablated(subject))
    found, here = by_grad_cam("AblationCAM", subject), subject.native(ours.AblationCAM)
    what = "Ablation-CAM divides by S, not |S|: a negative score turns the map round"
    yield Fault(
        G, what, *(f"correlation {number(correlation(m, expected))}" for m in (found, here))
    )

    subject = Subject(classifier().network, 2, classifier().x)
    subject.network[3] = nn.LeakyReLU(0.01)
    expected = slow.ablation_cam(subject.reference()[0], *ablated(subject))
    found, here = by_grad_cam("AblationCAM", subject), subject.native(ours.AblationCAM)
    what = "Ablation-CAM before a LeakyReLU sets a channel to -1e7, not to 0"
    yield Fault(G, what, *(f"deviation {number(deviation(m, expected))}" for m in (found, here)))

    subject = segmenter()
    before = type(subject.network[3]).__name__
    theirs = attempt(lambda: _run_in_place(GRAD_CAM.AblationCAM, subject))
    after = type(subject.network[3]).__name__
    subject = segmenter()
    here = raised(attempt(lambda: subject.native(ours.AblationCAM)))
    what = "Ablation-CAM in 3D"
    theirs = f"{raised(theirs)}; the model's layer is {after} afterwards, was {before}"
    yield Fault(G, what, theirs, f"{here}; {type(subject.network[3]).__name__}")


def _run_in_place(cam_class: type, subject: Subject) -> np.ndarray:
    """Run pytorch-grad-cam on the subject's own network, not on a copy."""
    with quiet(), cam_class(subject.network, [subject.module]) as cam:
        return cam(subject.x, [lambda output: output[CLASS].sum()] * len(subject.x))


def xgrad_after_instance_norm() -> Iterator[Fault]:
    """InstanceNorm makes every channel's sum zero, and the weights are divided by it."""
    network = toy.seeded(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.InstanceNorm2d(4),
            nn.LeakyReLU(0.1),
            nn.Conv2d(4, 2, 1),
        ),
        3,
    )
    subject = Subject(network, 1, toy.random_input(2, 1, 12, 10))
    a, g = subject.reference()
    largest = float((a * g).sum(1).abs().max())
    result = ours.XGradCAM(network, "1")(subject.x, subject.target)
    size = number(float(result.native["1"].abs().max()) / largest)
    here = f"{size} ×, status `{result.status['1']}`"
    for tool in (G, T):
        if TOOLS[tool]:
            found = BY[tool]("XGradCAM", subject)
            what = "XGrad-CAM after InstanceNorm: largest value, against HiResCAM's"
            yield Fault(tool, what, f"{abs(found).max() / largest:.0e} ×", here)


def monai_display() -> Iterator[Fault]:
    subject = segmenter().fresh()
    cam = MONAI.GradCAM(subject.network, subject.layer)
    raw = cam.compute_map(subject.x[:1], class_idx=CLASS).detach()
    shown_ = cam(subject.x[:1], class_idx=CLASS)
    right = subject.native(ours.GradCAM)[:1]
    result = ours.GradCAM(subject.network, "3")(subject.x[:1], subject.target)
    what = "what is drawn is turned round: correlation with the raw map's positive part"
    theirs = number(correlation(shown_, raw))
    yield Fault(M, what, theirs, number(correlation(result.volume(), right.relu())))

    x, middle = toy.random_input(1, 1, 5, 5), ours.targets.Voxel((2, 2))
    result = ours.GradCAM(toy.cancelling(2), "0")(x, ClassLogit(CLASS, middle))
    zeros = MONAI.default_normalizer(torch.zeros(1, 1, 5, 5))
    theirs = f"{float(zeros.max()):.0f} everywhere, on a scale where 0 is the most important"
    here = f"{float(result.volume().max()):.0f} everywhere, status `{result.status['0']}`"
    yield Fault(M, "how a map that is zero is drawn", theirs, here)


def monai_segmentation() -> Iterator[Fault]:
    """Without a class, every voxel's class index selects a whole logit volume."""
    network = toy.plain(3)
    wrapped = MONAI.GradCAM(network, "1").nn_module
    logits = network(toy.random_input(1, 1, 4, 4, 4))
    selected = wrapped.class_score(logits, logits.max(1)[-1]).numel()
    what = "no class given: numbers that are picked from the logits of a volume of N voxels"
    theirs = f"{selected} = N² at 4³; at 96³ N² × 4 bytes are {96**6 * 4 / 1e12:.1f} TB"
    picked = ours.GradCAM(network, "1")(toy.random_input(1, 1, 4, 4, 4)).logits.numel()
    yield Fault(M, what, theirs, f"{picked}: without a target, all {logits.shape[1]} N are summed")


def side_effects() -> Iterator[Fault]:
    """What is left of the caller's gradients, train mode, in-place flags and hooks."""

    def grad_cam(network: nn.Module, x: torch.Tensor) -> None:
        with quiet(), GRAD_CAM.GradCAM(network, [network[2]]) as cam:
            cam(x, [lambda output: output[CLASS].sum()])

    def captum(network: nn.Module, x: torch.Tensor) -> None:
        def score(x: torch.Tensor) -> torch.Tensor:
            return network(x)[:, CLASS].flatten(1).sum(1)

        CAPTUM.LayerGradCam(score, network[2]).attribute(x)

    def torchcam(network: nn.Module, x: torch.Tensor) -> None:
        with TORCHCAM.GradCAM(network, "2") as cam:
            cam(scores=network(x), targets=lambda output: output[CLASS].sum())

    def monai(network: nn.Module, x: torch.Tensor) -> None:
        MONAI.GradCAM(network, "2")(x, class_idx=CLASS)

    def here(network: nn.Module, x: torch.Tensor) -> None:
        ours.GradCAM(network, "2")(x, ClassLogit(CLASS, "volume"))

    calls = {G: grad_cam, C: captum, T: torchcam, M: monai}
    mine = _left_behind(here)
    for tool, call in calls.items():
        if TOOLS[tool]:
            left = _left_behind(call)
            if left != mine:
                yield Fault(tool, "what a Grad-CAM leaves changed in the model", left, mine)


def _left_behind(call: Callable[[nn.Module, torch.Tensor], None]) -> str:
    layers = [
        nn.Conv3d(1, 4, 3, padding=1),
        nn.BatchNorm3d(4),
        nn.LeakyReLU(0.1, inplace=True),
        nn.Conv3d(4, 3, 1),
    ]
    network = toy.seeded(nn.Sequential(*layers), 1).train()
    network[1].eval()  # frozen, as in fine-tuning
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 7)
    mode = [module.training for module in network.modules()]
    failed = attempt(lambda: call(network, toy.random_input(1, 1, 6, 6, 6)))
    changed = []
    if isinstance(failed, Exception):
        changed.append(f"(fails: {type(failed).__name__})")
    if not all(p.grad is not None and (p.grad == 7).all() for p in network.parameters()):
        changed.append("gradients")
    if [module.training for module in network.modules()] != mode:
        changed.append("train/eval mode")
    if not network[2].inplace:
        changed.append("in-place flag")
    if any(m._forward_hooks or m._backward_hooks for m in network.modules()):
        changed.append("hooks")
    return ", ".join(changed) or "nothing"


def torchcam_defaults() -> Iterator[Fault]:
    if not TORCHCAM:
        return
    subject = segmenter()
    x, network = subject.x.float(), copy.deepcopy(subject.network).float()
    with mock.patch("logging.Logger.warning"):
        cam = TORCHCAM.GradCAM(network, input_shape=tuple(x.shape[1:]))
    logits = network(x)
    found = cam(scores=logits, normalized=False, targets=lambda item: item[CLASS].sum())[0]
    drawn = logits[:, CLASS].detach().relu()
    name = cam.target_names[0] or "(the network itself)"
    auto = ours.GradCAM(subject.network)(subject.x, subject.target)
    chosen, map_ = next(iter(auto.maps.items()))
    what = "the default layer of a segmentation network, its map's correlation with ReLU(logit)"
    theirs = f"{name}, {number(correlation(found, drawn))}"
    here = f"layer {chosen}, {number(correlation(map_.relu(), drawn))}"
    yield Fault(T, what, theirs, here)

    network, x = toy.infinite_slope(), toy.random_input(1, 1, 4, 4, 4)
    with TORCHCAM.GradCAM(network, "0") as cam:
        scores = network(x.clone().requires_grad_())
        map_ = cam(scores=scores, normalized=False, targets=lambda item: item[CLASS].sum())[0]
    theirs = "zeros, and no word" if not map_.any() else "other numbers"
    status = ours.GradCAM(network, "0")(x, ClassLogit(CLASS, "volume")).status["0"]
    yield Fault(T, "Grad-CAM of gradients that are not finite", theirs, f"status `{status}`")


def meta_tensors() -> Iterator[Fault]:
    """A map of half the resolution, which says that its voxels lie where the input's do."""
    subject = Subject(segmenter().network, 5, segmenter().x)
    x = MetaTensor(subject.x[:1], affine=torch.eye(4))
    last = np.array([*(n // 2 - 1 for n in subject.x.shape[2:]), 1])
    true = np.array([2 * n for n in last[:3]])  # the stride is 2, with offset 0

    def off(map_: torch.Tensor) -> str:
        if not isinstance(map_, MetaTensor):
            return "a plain tensor"
        place = (np.asarray(map_.affine) @ last)[:3]
        return f"its last voxel is {np.linalg.norm(place - true):.1f} voxels away from its place"

    def forward(x: torch.Tensor) -> torch.Tensor:
        return subject.score(subject.network(x))

    result = ours.GradCAM(subject.network, subject.layer)(x, subject.target)
    grid = result.layers[subject.layer].grid
    place = np.array(
        [o + s * n for o, s, n in zip(grid.offset, grid.stride, last[:3], strict=True)]
    )
    here = f"{np.linalg.norm(place - true):.1f} voxels"
    what = "Grad-CAM of a MetaTensor at a layer of half the resolution"
    if CAPTUM:
        found = attempt(lambda: CAPTUM.LayerGradCam(forward, subject.module).attribute(x))
        yield Fault(C, what, off(found) if torch.is_tensor(found) else raised(found), here)
    if TORCHCAM:
        with TORCHCAM.GradCAM(subject.network, subject.layer) as cam:
            found = attempt(
                lambda: cam(scores=subject.network(x), targets=lambda z: z[CLASS].sum())[0]
            )
        yield Fault(T, what, off(found) if torch.is_tensor(found) else raised(found), here)
    if GRAD_CAM:
        found = attempt(lambda: _run_in_place(GRAD_CAM.GradCAM, Subject(subject.network, 5, x)))
        yield Fault(G, "Grad-CAM of a MetaTensor", raised(found), "runs")


def grad_cam_calls() -> Iterator[Fault]:
    """Errors that vanish, outputs that are lists, and the way a 3D map is enlarged."""
    if not GRAD_CAM:
        return
    subject = classifier()

    def wrong(output: torch.Tensor) -> torch.Tensor:
        return output[99]

    def block() -> None:
        with quiet(), GRAD_CAM.GradCAM(subject.network, [subject.module]) as cam:
            cam(subject.x, [wrong] * 2)

    here = attempt(lambda: ours.GradCAM(subject.network, "3")(subject.x, ClassLogit(99)))
    what = "a class that does not exist, inside its `with` block"
    yield Fault(G, what, raised(attempt(block)).replace("runs", "no error"), raised(here))

    subject = segmenter()
    heads = toy.Wrapped(subject.network, lambda z: [z, z])
    with quiet(), GRAD_CAM.GradCAM(heads, [subject.module]) as cam:
        cam(subject.x, [lambda output: output[CLASS].sum()] * 2)
        a, g = (
            kept[0].numpy()
            for kept in (cam.activations_and_grads.activations, cam.activations_and_grads.gradients)
        )
        raw = cam.get_cam_image(subject.x, subject.module, None, a, g, False)
    expected = maps.grad_cam(*subject.reference())
    first = ours.GradCAM(heads, "network.3", output=0)(subject.x, subject.target)
    what = "a list of two heads: targets go to heads, not to items"
    theirs = f"deviation {number(deviation(raw, expected))}"
    here = f"deviation {number(deviation(first.native['network.3'], expected))}"
    yield Fault(G, what, theirs, here)

    image = importlib.import_module("pytorch_grad_cam.utils.image")
    coarse = toy.random_input(1, 4, 5, 6).abs()
    sides = coarse.shape[1:]
    fine = tuple(4 * n for n in sides)
    scaled = coarse.numpy() - coarse.numpy().min()
    found = image.scale_cam_image(coarse.numpy().copy(), fine[::-1])
    linear = nn.functional.interpolate(
        torch.as_tensor(scaled / scaled.max())[:, None], fine, mode="trilinear"
    )
    what = "a random 3D map in [0, 1], enlarged 4 times: lowest value, correlation with trilinear"
    theirs = f"{found.min():.2f}, {number(correlation(found, linear))}"
    source = FeatureGrid(sides, (4.0,) * 3, (1.5,) * 3)
    mine = interpolate(torch.as_tensor(scaled / scaled.max()), source, FeatureGrid.of_voxels(fine))
    yield Fault(G, what, theirs, f"{float(mine.min()):.2f}, {number(correlation(mine, linear))}")


def score_cam() -> Iterator[Fault]:
    """How masks come to the input's grid, and what a sum does to the softmax."""
    subject = Subject(classifier().network, 5, classifier().x)
    a, _ = subject.reference()
    exact = a.numpy()
    for axis in (2, 3):  # the convolution of stride 2 looks at the voxels around 2 u
        places = np.arange(subject.x.shape[axis])
        exact = np.apply_along_axis(
            lambda line, places=places: np.interp(places, 2 * np.arange(len(line)), line),
            axis,
            exact,
        )
    expected = slow.score_cam(a, through(subject, torch.as_tensor(exact)).numpy())
    here = f"deviation {number(deviation(subject.native(ours.ScoreCAM), expected))}"
    what = "Score-CAM at a strided layer: masks resized as pictures, not put where voxels lie"
    for tool in (G, T):
        if TOOLS[tool]:
            found = BY[tool]("ScoreCAM", subject)
            right = np.maximum(expected, 0) if tool == T else expected
            yield Fault(tool, what, f"deviation {number(deviation(found, right))}", here)

    large = Subject(segmenter().network, 3, toy.random_input(1, 1, 28, 28, 28))
    a, _ = large.reference()
    scores = through(large, a)
    mean = (scores / 28**3).softmax(1)
    what = "Score-CAM of a score summed over 28³ voxels: the largest of 8 channel weights"
    if TORCHCAM:
        found, winner = by_torchcam("ScoreCAM", large), int(scores.argmax())
        theirs = f"{number(float(scores.softmax(1).max()))}; the map is that channel, deviation "
        theirs += number(deviation(found, a[:, winner].relu()))
        yield Fault(T, what, theirs, f"{number(float(mean.max()))}: it takes the mean")


def through(subject: Subject, fine: torch.Tensor) -> torch.Tensor:
    """Return the scores (B, C) of the input seen through channels on its grid."""
    seen = slow.masks(fine)
    with torch.no_grad():
        found = [
            subject.score(subject.network(subject.x * seen[:, k, None]))
            for k in range(seen.shape[1])
        ]
    return torch.stack(found, 1)


def full_grad() -> Iterator[Fault]:
    if not GRAD_CAM:
        return
    flat = classifier()
    score = flat.score(flat.network(flat.x)).detach().numpy()
    with quiet():
        found = GRAD_CAM.FullGrad(flat.fresh().network.float(), [])(
            flat.x.float(), [lambda output: output[CLASS]] * 2
        )
    sums = ", ".join(f"{value:.2f}" for value in found.reshape(2, -1).sum(1))
    mine = flat.native(ours.FullGrad).flatten(1).sum(1)
    what = f"FullGrad: sum of the map; the scores are {', '.join(f'{s:.2f}' for s in score)}"
    yield Fault(G, what, sums, ", ".join(f"{value:.2f}" for value in mine))

    deep = segmenter()
    found = attempt(
        lambda: GRAD_CAM.FullGrad(deep.fresh().network, [])(
            deep.x, [lambda output: output[CLASS].sum()] * 2
        )
    )
    with quiet():
        biased = len(GRAD_CAM.FullGrad(deep.fresh().network, []).bias_data)
    theirs = f"{raised(found)}; {biased} of {sum(hasattr(m, 'bias') for m in deep.network)} layers"
    here = raised(attempt(lambda: deep.native(ours.FullGrad)))
    yield Fault(G, "FullGrad in 3D, and the biases that it sees", theirs, here)


FAULTS = [
    in_place_activations,
    grad_cam_plus_plus,
    xgrad_after_instance_norm,
    eigen_memory,
    eigen_sign,
    swapped_fem,
    score_cam,
    ablation,
    full_grad,
    grad_cam_calls,
    side_effects,
    monai_display,
    monai_segmentation,
    torchcam_defaults,
    meta_tensors,
]


# ------------------------------------------------------------------------------------------ report

HEADER = """# Parity

Written by `python benchmarks/parity.py`. Largest deviation of the raw maps of a batch of two, as a
fraction of the largest value, in float64; weights and inputs are random with fixed seeds.

- The reference (`tests/reference`) is slow and independent: it knows the network cut in two at the
  layer, uses no hook, and takes decompositions and Hessians of whole matrices.
- **Bold**: above {agrees:.0e}, so the tool computes something else; or what it raises. A dash: the
  tool does not have the method. About 1e-8 is a tool's float32; 1e-9 to 1e-11 an epsilon in a
  divisor.
- torchcam and MONAI return ReLU of the map: that is compared. MONAI is called item by item, since
  its Grad-CAM++ fails on a batch. EigenCAM, EigenGrad-CAM and KPCA-CAM of pytorch-grad-cam are
  compared up to the sign, which it leaves open. Score-CAM is given the mean of the logit as target,
  since that is what this library takes.
- captum has no CAM but Grad-CAM. HiResCAM, LayerCAM and the element-wise one follow from its
  products of gradient and activation, Ablation-CAM from its layer feature ablation.
- ShapleyCAM is computed on a tiny smooth network, whose whole Hessian is the reference. Of FullGrad
  the sum of the map is compared with the sum of all contributions, which is the score.

{machine}
"""


def machine() -> str:
    """Return the machine and the versions, in words."""
    packages = {"torch": "torch", **{tool: package for tool, (_, package) in PACKAGES.items()}}
    versions = [
        f"{tool} {version(package)}"
        for tool, package in packages.items()
        if tool not in TOOLS or TOOLS[tool]
    ]
    missing = [tool for tool, module in TOOLS.items() if module is None]
    text = (
        f"Machine: {platform.machine()}, {torch.get_num_threads()} threads, Python "
        f"{platform.python_version()}, {', '.join(versions)}."
    )
    return text + (f" Not installed, so left out: {', '.join(missing)}." if missing else "")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped) + "\n"


def main() -> None:
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    # pytorch-grad-cam may fail once more where Python throws its objects away.
    sys.unraisablehook = lambda _: None
    report = [HEADER.format(agrees=AGREES, machine=machine())]
    for title, subject, ndim in (
        ("A 2D classifier", classifier(), 2),
        ("A 3D segmentation network", segmenter(), 3),
    ):
        print(f"{title}: reference, {', '.join(COLUMNS)}", flush=True)
        rows = parity(subject, ndim)
        report += [f"## {title}\n", table(("method", "seg3dcam", *COLUMNS), rows)]
    faults = []
    for find in FAULTS:
        for fault in find():
            faults.append((fault.tool, fault.what, fault.theirs, fault.here))
            print("  ".join(faults[-1]), flush=True)
    faults.sort(key=lambda fault: COLUMNS.index(fault[0]))
    report += [
        "## Where they are not right\n",
        "Each case was run in the tool and here; deviations are from the reference.\n",
        table(("tool", "case", "measured", "seg3dcam"), faults),
    ]
    (HERE / "parity.md").write_text("\n".join(report), encoding="utf-8")


if __name__ == "__main__":
    main()
