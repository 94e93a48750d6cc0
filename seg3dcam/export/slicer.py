"""Write a case for 3D Slicer, which opens it with one click, in the right place and colours.

    save_scene("slicer", explanations, Look(window="soft tissue"))

scene.mrml             the file to open
case.mrb               the whole folder in one file, ready to be sent
scan.nrrd              the scan; if it has several channels, scan_1.nrrd and so on
cam_<n>_<target>.nrrd  what `Explanation.volume` gives; of several layers, also each by itself
cam.ctbl               the colours of the CAMs; for a signed look the middle is transparent
masks.seg.nrrd         prediction and truth of every class, and every explained region, as a lesion

Volumes are NRRD, Slicer's own format. NIfTI rounds affines to float32, and Slicer ignores shear
(gantry tilt) in it. Slicer draws a CAM with the same opacity everywhere above the threshold. All
masks are in the scene; at first only those of the CAM that is shown are visible.
"""

from __future__ import annotations

import colorsys
import itertools
import re
import shutil
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from seg3dcam.errors import InputError
from seg3dcam.explaining.explanation import Explanation
from seg3dcam.export.mrml import LEAST_THRESHOLD, SceneVolume, Viewpoint, scene_xml
from seg3dcam.files import atomic
from seg3dcam.files.writers.nrrd import (
    Segment,
    same_voxels,
    segment,
    segment_id,
    write_nrrd,
    write_segments,
)
from seg3dcam.geometry import peak_voxel, same_grid, spacing_of, to_world
from seg3dcam.review.look import Look, choose_window, colours
from seg3dcam.review.writing import write_all
from seg3dcam.scan import Scan

__all__ = ["SlicerScene", "save_scene"]

#: Kind of mask -> hue of the first class, and how far the hues of other classes may lie from it.
HUES = {"prediction": (1 / 2, 0.2), "truth": (1 / 3, -0.15), "region": (0.8, 0.15)}
_GOLDEN = 0.618  # multiples of this, modulo 1, are spread evenly

_TABLE, _MASKS = "cam.ctbl", "masks.seg.nrrd"

CAUTION = "Relative, not a probability. Research use only, not for diagnosis."


class Grid(NamedTuple):
    """Number of voxels along each axis, and the affine to RAS mm."""

    shape: tuple[int, ...]
    affine: NDArray[np.float64]


class Front(NamedTuple):
    """What is visible at first: the keys of the masks, and the CAM's peak in RAS mm."""

    masks: list[tuple[str, str]]
    peak: tuple[float, ...] | None


def save_scene(
    folder: str | Path,
    explanations: Explanation | Iterable[Explanation],
    look: Look = Look(),  # noqa: B008 (frozen)
    *,
    case: str = "case",
) -> list[Path]:
    """Write a 3D Slicer scene of the explanations of one scan; open `scene.mrml` or `case.mrb`.

    Args:
        folder: created if it is missing.
        explanations: one or several of the same scan. The first one with heat is shown.
        look: window, threshold, opacity and colours.
        case: the scan's name in Slicer.

    Returns:
        The files, the scene first.

    Raises:
        InputError: there is no explanation, or they are of different scans.
        OutputError: the folder cannot be written.
    """
    return write_all(SlicerScene(folder, look, case), explanations, lambda one: one.label)


class SlicerScene:
    """Writes a 3D Slicer scene one explanation at a time, and keeps none of their volumes.

    The arguments are those of `save_scene`.
    """

    def __init__(
        self,
        folder: str | Path,
        look: Look = Look(),  # noqa: B008 (frozen)
        case: str = "case",
    ) -> None:
        self._folder = Path(folder)
        self._look = look
        self._case = case
        self._grid: Grid | None = None
        self._scans: list[SceneVolume] = []
        self._cams: list[SceneVolume] = []
        self._segments: dict[tuple[str, str], Segment] = {}
        self._front: Front | None = None

    def add(self, explanation: Explanation, name: str) -> None:
        """Write the volumes of an explanation and remember its masks; file names contain `name`."""
        scan = explanation.scan
        if self._grid is None:
            self._grid = Grid(tuple(scan.shape), scan.affine)
            self._add_channels(scan)
        _check_same(scan, self._grid)
        peaks = [self._add_cam(explanation, name, layer) for layer in explanation.shown_layers]
        masks = self._add_masks(explanation)
        peak = next((peak for peak in peaks if peak is not None), None)
        if self._front is None or (self._front.peak is None and peak is not None):
            self._front = Front(masks, peak)

    def finish(self) -> list[Path]:
        """Write the files about all explanations, and return every file, the scene first."""
        if self._grid is None:
            raise InputError("no explanation was given, so there is nothing to show in 3D Slicer")
        files = [self._folder / volume.file for volume in (*self._scans, *self._cams)]
        files.append(_write_table(self._folder / _TABLE, self._look))
        if masks := list(self._segments.values()):
            files.append(write_segments(self._folder / _MASKS, masks, *self._grid))
        scene, bundle = self._folder / "scene.mrml", self._folder / "case.mrb"
        with atomic(scene) as temporary:
            temporary.write_bytes(self._xml(self._grid))
        _write_bundle(bundle, _safe(self._case), self._xml(self._grid, "Data/"), files)
        return [scene, bundle, *files]

    @property
    def scan_files(self) -> list[Path]:
        """Files of the scan's channels, in the order of the channels."""
        return [self._folder / volume.file for volume in self._scans]

    def _add_channels(self, scan: Scan) -> None:
        """Write every channel as a volume of its own, since Slicer refuses 4-D volumes."""
        several = len(scan.data) > 1
        for number, channel in enumerate(scan.data, 1):
            low, high, words = choose_window(channel.numpy(), self._look.window)
            shown = SceneVolume(
                name=f"{self._case}, channel {number}" if several else self._case,
                file=f"scan_{number}.nrrd" if several else "scan.nrrd",
                low=low,
                high=high,
                description=words,
            )
            self._scans.append(shown)
            write_nrrd(self._folder / shown.file, channel, scan.affine)

    def _add_cam(
        self, explanation: Explanation, name: str, layer: str | None
    ) -> tuple[float, ...] | None:
        """Write a CAM and return its peak in RAS mm, None if there is no heat.

        A CAM without heat is written too, so that its name can say why there is none.
        """
        look = self._look
        volume = explanation.volume(layer, scale=look.scale)
        notice = explanation.notice(layer, look.scale)
        low, high = look.ends
        layer_name = explanation.layer_name(layer)
        caution, said = explanation.caution(layer), explanation.verdict(layer)
        verdict = "" if said is None else said.words
        words = f"CAM {explanation.label}, {explanation.method}, {layer_name}"
        part = name if layer is None else f"{name}_{layer}"
        shown = SceneVolume(
            name=f"{words} ({notice})" if notice else words,
            file=f"cam_{len(self._cams) + 1}_{_safe(part)}.nrrd",
            low=low,
            high=high,
            threshold=look.threshold,
            heat=not notice,
            description=" ".join(
                f"{words}." for words in (explanation.target, caution, verdict) if words
            )
            + f" {CAUTION}",
            attributes={
                "Class": explanation.class_name,
                "Target": explanation.target,
                "Layer": layer_name,
                "Method": explanation.method,
                "Verdict": verdict,
                "Use": CAUTION,
            },
        )
        self._cams.append(shown)
        write_nrrd(self._folder / shown.file, volume, explanation.affine)
        if notice:
            return None
        return to_world(explanation.affine, peak_voxel(look.strength(volume)))

    def _add_masks(self, explanation: Explanation) -> list[tuple[str, str]]:
        """Remember the masks of an explanation, equal ones only once, and return their keys."""
        name = explanation.class_name
        masks = {
            ("prediction", f"{name}, prediction"): explanation.mask,
            ("truth", f"{name}, truth"): explanation.truth,
            ("region", explanation.label): explanation.region,
        }
        return [self._kept(*key, mask) for key, mask in masks.items() if mask is not None]

    def _kept(self, kind: str, title: str, mask: torch.Tensor) -> tuple[str, str]:
        """Remember a mask and return its key.

        Equal masks share a key; different masks with the same name get numbers.
        """
        before = sum(earlier == kind for earlier, _ in self._segments)
        new = segment(mask, title, outline(kind, before))
        keys = ((kind, title if n == 1 else f"{title} {n}") for n in itertools.count(1))
        return next(
            key
            for key in keys
            if same_voxels(self._segments.setdefault(key, replace(new, name=key[1])), new)
        )

    def _xml(self, grid: Grid, folder: str = "") -> bytes:
        front = self._front or Front([], None)
        shown = [self._segments[key] for key in front.masks]
        return scene_xml(
            [*self._scans, *self._cams],
            _viewpoint(grid, front.peak, shown),
            table=(f"CAM {self._look.colormap}", _TABLE),
            masks=_MASKS if self._segments else None,
            hidden=[segment_id(n) for n, k in enumerate(self._segments) if k not in front.masks],
            opacity=self._look.opacity,
            folder=folder,
        )


# ---------------------------------------------------------------------------------------- places


def _check_same(scan: Scan, grid: Grid) -> None:
    same_shape = tuple(scan.shape) == grid.shape
    if not same_shape or not same_grid(scan.affine, grid.affine, grid.shape):
        raise InputError(
            f"a scan of {tuple(scan.shape)} voxels beside one of {grid.shape}, or elsewhere in the "
            "patient: a 3D Slicer scene shows one scan. Write a scene for each"
        )


def _viewpoint(grid: Grid, peak: tuple[float, ...] | None, masks: Iterable[Segment]) -> Viewpoint:
    """Look at the CAM's peak, or else at the first mask, or else at the middle of the scan."""
    corners = np.array(list(itertools.product(*((-0.5, size - 0.5) for size in grid.shape))))
    corners = corners @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    low, high = corners.min(0), corners.max(0)
    middle = (low + high) / 2
    filled = (mask for mask in masks if mask.inside.size)
    if peak is None and (mask := next(filled, None)):
        centre = [(part.start + part.stop - 1) / 2 for part in mask.box]
        peak = to_world(grid.affine, centre)
    point = middle if peak is None else np.array(peak)
    return Viewpoint(point, middle, high - low, min(spacing_of(grid.affine)))


# ----------------------------------------------------------------------------------------- files


def outline(kind: str, number: int) -> tuple[float, float, float]:
    """Return the colour of a class's outlines, counted from 0: red, green and blue in 0..1.

    >>> outline("prediction", 0), outline("truth", 0)
    ((0.0, 1.0, 1.0), (0.0, 1.0, 0.0))
    """
    first, width = HUES[kind]
    return colorsys.hsv_to_rgb(first + width * (number * _GOLDEN % 1), 1.0, 1.0)


def _write_table(path: Path, look: Look) -> Path:
    """Write a colour table for Slicer, with number, name, red, green, blue and opacity in a row.

    Slicer's own threshold keeps a single range of values, which would show only one sign of a
    signed CAM. So for a signed look the colours of weak values are made transparent instead.
    """
    values = np.linspace(*look.ends, 256)
    hidden = look.signed & (look.strength(values) < max(look.threshold, LEAST_THRESHOLD))
    rows = [
        f"{level} {value:.3f} {red} {green} {blue} {0 if clear else 255}"
        for level, (value, (red, green, blue), clear) in enumerate(
            zip(values, colours(look.colormap).tolist(), hidden, strict=True)
        )
    ]
    with atomic(path) as temporary:
        temporary.write_text("\n".join([f"# {look.colormap}", *rows, ""]), encoding="ascii")
    return path


def _write_bundle(path: Path, case: str, scene: bytes, files: Iterable[Path]) -> None:
    """Zip the scene and its files without compression; the volumes are compressed already."""
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as bundle:
        bundle.writestr(zipfile.ZipInfo(f"{case}/scene.mrml"), scene)
        for file in files:
            entry = zipfile.ZipInfo(f"{case}/Data/{file.name}")
            entry.file_size = file.stat().st_size  # entries of 2 GiB or more need ZIP64
            with file.open("rb") as source, bundle.open(entry, "w") as target:
                shutil.copyfileobj(source, target, 2**20)


def _safe(name: str) -> str:
    """Return a name with only those characters that Slicer accepts in file names.

    >>> _safe("../Läsion 1")
    'L_sion_1'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._")[:60] or "case"
