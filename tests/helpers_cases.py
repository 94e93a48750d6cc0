"""Tiny cases on disk, and the command line run inside of the test's own process.

The network is a U-Net of two levels whose weights are set by hand: a class's logit rises with the
brightness of the scan, `logit[k] = sum over channels of gain[k, c] * brightness[c] + bias[k]`,
interpolated from every second voxel. So it is known what is predicted where.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np
import torch
import yaml
from monai.networks.nets import UNet
from safetensors.torch import save_file
from scipy.spatial.transform import Rotation
from torch import nn

from seg3dcam.cli.commands import main
from seg3dcam.explaining.explain import explain_each
from seg3dcam.explaining.explanation import Explanation
from seg3dcam.geometry import FeatureGrid
from seg3dcam.models import SegModel
from seg3dcam.network.facts import key_of
from seg3dcam.network.grids.measurement import measure_grids
from seg3dcam.network.layers import LayerRef
from seg3dcam.scan import Scan, place_code

TURN = Rotation.from_euler("xyz", [5, -1, 5], degrees=True).as_matrix()
#: Oblique, anisotropic and left-handed, with more digits than float32 holds. Its axes stand at
#: right angles, since a qform cannot say any other.
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = TURN * [-1.4, 1.4, 2.45]
OBLIQUE[:3, 3] = 90.3, -120.7, -519.1
#: Options for volumes and PNGs, without what takes longer to write.
PICTURES = ("--format", "nifti", "--format", "png")
#: The same with one picture, and without the overviews, which take most of the time.
PICTURE = (*PICTURES, "--slice", 8)

SHAPE = (20, 24, 18)
CLASSES = ["background", "organ", "lesion"]

#: Brightness: background 0.1, organ 0.5, lesion 1; the classes change at 0.3 and 0.7.
ORGAN, LESION = np.s_[4:16, 6:18, 4:14], np.s_[8:14, 10:16, 6:12]
IN_BACKGROUND, IN_ORGAN, IN_LESION = (1, 2, 1), (5, 8, 8), (10, 12, 8)
GAINS, BIASES = [[0], [10], [30]], [0, -3, -17]

#: Everything that a spec says beside factory, weights and classes.
SETTINGS: Mapping[str, Any] = {"window": {"roi_size": 16}}


class Calls:
    """An object of a stranger's file: a function is called when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *given: Any) -> None:
        self.call = (function, given)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def voxels(*, lesion: bool = True, organ: bool = True) -> np.ndarray:
    """Return the scan's voxels, float32."""
    noise = np.random.default_rng(0).uniform(0.05, 0.15, SHAPE)
    if organ:
        noise[ORGAN] += 0.4
    if lesion:
        noise[LESION] += 0.5
    return noise.astype(np.float32)


def write_scan(path: Path, array: np.ndarray | None = None, affine: np.ndarray = OBLIQUE) -> Path:
    """Save a scan as NIfTI; both forms say where it lies."""
    image = nib.Nifti1Image(voxels() if array is None else array, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1, strip_shears=True)
    nib.save(image, path)
    return path


def arguments(gains: Sequence[Sequence[float]] = GAINS) -> dict[str, Any]:
    """Return the arguments of MONAI's UNet."""
    return {
        "spatial_dims": 3,
        "in_channels": len(gains[0]),
        "out_channels": len(gains),
        "channels": [4, 8],
        "strides": [2],
        "act": "relu",
        "norm": None,
    }


def brightness_network(
    gains: Sequence[Sequence[float]] = GAINS, biases: Sequence[float] = BIASES
) -> nn.Module:
    """Return the network; half of the evidence goes through its bottleneck."""
    network = UNet(**arguments(gains))
    down, bottom, up = network.model[0].conv, network.model[1].submodule.conv, network.model[2].conv
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    line = torch.tensor([0.5, 1, 0.5])
    interpolation = torch.einsum("i,j,k->ijk", line, line, line)
    with torch.no_grad():
        for channel in range(len(gains[0])):
            down.weight[channel, channel, 1, 1, 1] = 1
            bottom.weight[channel, channel, 1, 1, 1] = 1
            for level in (0, 4):  # the skip connection's 4 channels, then the bottleneck's 8
                for index, row in enumerate(gains):
                    up.weight[level + channel, index] = row[channel] / 2 * interpolation
        up.bias.copy_(torch.tensor(biases))
    return network


def write_model(
    folder: Path,
    *,
    gains: Sequence[Sequence[float]] = GAINS,
    biases: Sequence[float] = BIASES,
    classes: Sequence[str] = CLASSES,
    **changes: Any,
) -> Path:
    """Save the network's weights and its spec; a change to None leaves a key out."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(brightness_network(gains, biases).state_dict(), folder / "model.safetensors")
    spec = {
        "factory": "monai.networks.nets:UNet",
        "arguments": arguments(gains),
        "weights": "model.safetensors",
        "classes": list(classes),
        **SETTINGS,
        **changes,
    }
    return write_yaml(
        folder / "model.yaml", {key: value for key, value in spec.items() if value is not None}
    )


def write_yaml(path: Path, content: Mapping[str, Any]) -> Path:
    """Save settings."""
    path.write_text(yaml.safe_dump(dict(content), allow_unicode=True), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Place:
    """A folder with a scan, a model, and room for what is found."""

    folder: Path

    @classmethod
    def at(cls, folder: Path, **model: Any) -> Place:
        """Write the scan and the model; `model` is for `write_model`."""
        place = cls(folder)
        write_scan(place.scan)
        write_model(folder, **model)
        return place

    @property
    def scan(self) -> Path:
        return self.folder / "scan.nii.gz"

    @property
    def model(self) -> Path:
        return self.folder / "model.yaml"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def record(self) -> dict[str, Any]:
        """What case.json holds."""
        return json.loads((self.out / "case.json").read_text(encoding="utf-8"))

    def explain(self, *options: object, scans: Sequence[Path] = ()) -> Outcome:
        """Run `seg3dcam explain` on the scan, without pictures unless asked for."""
        wanted = {"--format", "--slice"} & set(options)
        pictures = () if "--format" in wanted else PICTURES if wanted else ("--format", "nifti")
        words = (*(scans or [self.scan]), "--model", self.model, "--out", self.out)
        return seg3dcam("explain", *words, *pictures, *options)

    def explain_by_default(self, *options: object, scans: Sequence[Path] = ()) -> Outcome:
        """The same into the default folder."""
        words = (*(scans or [self.scan]), "--model", self.model, "--format", "nifti")
        return seg3dcam("explain", *words, *options)

    def volume(self, name: str) -> np.ndarray:
        """Return the voxels of a NIfTI file of the case."""
        return np.asarray(nib.load(self.out / name).dataobj)


@dataclass(frozen=True)
class Outcome:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """Standard error as one line without frames."""
        return " ".join(re.sub("[╭╮╰╯│─]", "", self.err).split())

    @property
    def files(self) -> list[Path]:
        """Every path that the output names."""
        lines = re.findall(r"^ *[\w ]+?  (\S.*)$", self.out, re.MULTILINE)
        return [Path(line) for line in lines if "/" in line]


def seg3dcam(*words: object) -> Outcome:
    """Run a command; an exception that is not an exit fails the test, as a traceback would be."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = ["seg3dcam", *map(str, words)]
    with mock.patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    # Typer colours its own messages also where nobody sees them, as on GitHub.
    plain = [re.sub(r"\x1b\[[\d;]*m", "", text.getvalue()) for text in (out, err)]
    return Outcome(code, *plain)


_EXPLAINED: dict[tuple[Any, ...], list[Explanation]] = {}


def explain_once(
    scan: Scan, model: SegModel, targets: Any, *, progress: Any = None, **asked: Any
) -> Iterator[Explanation]:
    """Do as `explain_each`, and remember what was found for a call that asks for the same."""
    of_scan = scan.name, place_code(scan), scan.data.numpy().tobytes()
    of_model = model.name, model.class_names, model.activation, model.window, model.spec
    key = (*of_scan, model.fingerprint(), repr(of_model), pickle.dumps((targets, asked)))
    if key not in _EXPLAINED:
        _EXPLAINED[key] = list(explain_each(scan, model, targets, progress=progress, **asked))
    return iter(_EXPLAINED[key])


_MEASURED: dict[tuple[Any, ...], list[FeatureGrid]] = {}


def measure_once(
    network: nn.Module, x: torch.Tensor, shapes: Mapping[LayerRef, tuple[int, ...]]
) -> dict[LayerRef, FeatureGrid]:
    """Do as `measure_grids`, and remember the grids also for other networks that are the same."""
    layers = [key_of(layer) for layer in shapes]
    if None in layers:  # of a layout that is somebody's own function
        return measure_grids(network, x, shapes)
    of_network = repr(network), SegModel(network).fingerprint()
    key = (*of_network, x.shape, x.dtype, *layers, *shapes.values())
    if key not in _MEASURED:
        _MEASURED[key] = list(measure_grids(network, x, shapes).values())
    return dict(zip(shapes, _MEASURED[key], strict=True))


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return every path below a folder with its bytes; None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
