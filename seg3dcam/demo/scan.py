"""The demo's scan: the real ICBM152 brain template with one lesion planted where we know.

Both the demo command and the script that trains the demo's model
(`examples/train_demo_model.py`) plant their lesions with this module, so that the model is shown
the kind of lesion that it learnt and only the position is new to it.

The template and its tissue maps ship inside nilearn, an optional extra: nothing is downloaded.
Positions are RAS+ world coordinates in millimetres, as NIfTI and MNI space have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine

from seg3dcam.errors import MissingExtraError, ScanError

LABELS = {"background": 0, "grey matter": 1, "white matter": 2, "lesion": 3}

#: Where the demo's lesion lies: deep white matter of the right hemisphere (RAS+, MNI space).
HELD_OUT_CENTRE_MM = (30.0, -20.0, 34.0)
#: Training places no lesion centre this close. The demo's lesion and the largest one that
#: training plants reach 13.75 and 15 mm from their centres, so they never share any tissue.
HELD_OUT_DISTANCE_MM = 30.0

DEMO_RADIUS_MM = 11.0
DEMO_CONTRAST = -0.4
DEMO_SEED = 3

#: A lesion's surface lies between these multiples of its radius, because it is irregular.
_IRREGULARITY = 0.25
#: How much of the tissue's own pattern still shows inside a lesion.
_TEXTURE_LEFT = 0.25

_MNI152_CODE = 4  # NIfTI's code for "aligned with the MNI152 template"
_STORED_WHITE = 1000  # the scan is stored as integers, as scanners do; 1.0 becomes this


class DemoVolumes(NamedTuple):
    """The template on one 1 mm grid, shape (197, 233, 189), with values from 0 to 1."""

    t1: nib.Nifti1Image
    """T1-weighted brain without its skull; outside the brain it is exactly 0."""
    grey: nib.Nifti1Image
    """Probability of grey matter."""
    white: nib.Nifti1Image
    """Probability of white matter."""

    def tissue(self) -> np.ndarray:
        """Probability of being grey or white matter, not fluid or outside: float32, 0 to 1."""
        return np.clip(voxels(self.grey) + voxels(self.white), 0.0, 1.0)


def voxels(image: nib.Nifti1Image) -> np.ndarray:
    """Give an image's values as float32."""
    return np.asarray(image.dataobj, dtype=np.float32)


def demo_volumes() -> DemoVolumes:
    """Load the ICBM152 T1 template and its tissue maps at 1 mm from the nilearn package."""
    try:
        from nilearn import datasets
    except ImportError as error:
        raise MissingExtraError(
            "The demo's brain template comes with nilearn, which is not installed. "
            'Run: pip install "seg3dcam[demo]"'
        ) from error
    return DemoVolumes(
        t1=datasets.load_mni152_template(resolution=1),
        grey=datasets.load_mni152_gm_template(resolution=1),
        white=datasets.load_mni152_wm_template(resolution=1),
    )


def is_held_out(centre_mm: Sequence[float]) -> bool:
    """Say whether a lesion centred here is too close to the demo's for training to use.

    >>> is_held_out((30, -20, 34)), is_held_out((-30, -20, 34))
    (True, False)
    """
    offset = np.asarray(centre_mm, dtype=float) - HELD_OUT_CENTRE_MM
    return float(np.linalg.norm(offset)) < HELD_OUT_DISTANCE_MM


def plant_lesion(
    image: nib.Nifti1Image,
    centre_mm: Sequence[float],
    radius_mm: float,
    *,
    contrast: float = DEMO_CONTRAST,
    edge_mm: float = 1.0,
    tissue: np.ndarray | None = None,
    seed: int = DEMO_SEED,
) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """Plant one soft-edged, slightly irregular lesion, darker or brighter than around it.

    Args:
        image: The scan, 3D. It is not changed.
        centre_mm: Where the lesion's centre lies, RAS+ world millimetres.
        radius_mm: Mean radius; the surface lies within a quarter of it.
        contrast: Brightness relative to the tissue around the lesion: -0.4 is 40 % darker.
        edge_mm: Width of the soft edge.
        tissue: How much of each voxel can turn into lesion (0 to 1, the scan's shape), to keep
            the lesion out of fluid and air. By default, all voxels can.
        seed: Fixes the lesion's shape.

    Returns:
        The scan with its lesion (float32), and the lesion's mask (uint8, 0 or 1), both on the
        grid of `image`.
    """
    values = voxels(image).copy()
    centre = np.asarray(centre_mm, dtype=float)
    box = _box_around(image, centre, radius_mm * (1 + _IRREGULARITY) + 3 * edge_mm + 3.0)
    inside = _lesion_fraction(image.affine, box, centre, radius_mm, edge_mm, seed)
    share = np.ones_like(inside) if tissue is None else tissue[box]
    inside = inside * share

    mask = np.zeros(values.shape, dtype=np.uint8)
    mask[box] = inside > 0.5
    if not mask.any():
        raise ScanError(
            f"no lesion of radius {radius_mm:g} mm fits at {tuple(map(float, centre))} mm: "
            "there is no tissue inside the scan there. Choose a centre inside the brain."
        )

    around = (inside < 0.05) & (share > 0.5)
    normal = values[box]
    level = float(normal[around].mean()) if around.any() else float(normal.mean())
    ill = level * (1 + contrast) + _TEXTURE_LEFT * (normal - level)
    values[box] = (1 - inside) * normal + inside * ill
    return nib.Nifti1Image(values, image.affine), nib.Nifti1Image(mask, image.affine)


def truth_labels(
    grey: np.ndarray, white: np.ndarray, lesion: np.ndarray, threshold: float = 0.5
) -> np.ndarray:
    """Turn tissue probabilities and a lesion mask into one label per voxel (see `LABELS`).

    The lesion paints over the tissues. All arrays share one shape; the result is uint8.
    """
    labels = np.zeros(grey.shape, dtype=np.uint8)
    labels[grey > threshold] = LABELS["grey matter"]
    labels[white > threshold] = LABELS["white matter"]
    labels[lesion > threshold] = LABELS["lesion"]
    return labels


def write_demo_scan(folder: str | Path) -> tuple[Path, Path]:
    """Write the demo's scan and its true labels; say where they are: (scan, truth).

    The lesion lies at `HELD_OUT_CENTRE_MM`. The demo's model has never seen a lesion there: its
    training rejects every lesion centre within `HELD_OUT_DISTANCE_MM` of it (`is_held_out`).

    `demo_scan.nii.gz` holds int16 intensities, `demo_truth.nii.gz` uint8 labels (`LABELS`). Both
    have the template's grid and affine, with qform and sform both coded as MNI152 space.
    """
    volumes = demo_volumes()
    scan, lesion = plant_lesion(
        volumes.t1, HELD_OUT_CENTRE_MM, DEMO_RADIUS_MM, tissue=volumes.tissue()
    )
    stored = np.rint(voxels(scan) * _STORED_WHITE).astype(np.int16)
    labels = truth_labels(voxels(volumes.grey), voxels(volumes.white), voxels(lesion))

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scan_path, truth_path = folder / "demo_scan.nii.gz", folder / "demo_truth.nii.gz"
    _save(scan_path, stored, volumes.t1.affine)
    _save(truth_path, labels, volumes.t1.affine)
    return scan_path, truth_path


def _box_around(
    image: nib.Nifti1Image, centre: np.ndarray, reach_mm: float
) -> tuple[slice, slice, slice]:
    """Give the part of the grid that holds every voxel within `reach_mm` of `centre`."""
    to_voxel = np.linalg.inv(image.affine)
    middle = apply_affine(to_voxel, centre)
    # A ball in world space is an ellipsoid in voxel space; this is its half width on each axis.
    reach = reach_mm * np.linalg.norm(to_voxel[:3, :3], axis=1)
    low = np.clip(np.floor(middle - reach), 0, image.shape).astype(int)
    high = np.clip(np.ceil(middle + reach) + 1, 0, image.shape).astype(int)
    i, j, k = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return i, j, k


def _lesion_fraction(
    affine: np.ndarray,
    box: tuple[slice, slice, slice],
    centre: np.ndarray,
    radius_mm: float,
    edge_mm: float,
    seed: int,
) -> np.ndarray:
    """Say how much of each voxel in `box` is lesion (float32, 0 to 1), before any tissue map."""
    index = np.stack(np.meshgrid(*(np.arange(s.start, s.stop) for s in box), indexing="ij"), -1)
    offset = apply_affine(affine, index) - centre
    distance = np.linalg.norm(offset, axis=-1)
    surface = radius_mm * (1 + _IRREGULARITY * _smooth_noise(offset / radius_mm, seed))
    steps = np.clip((surface - distance) / edge_mm, -30, 30)  # no overflow in exp
    return (1 / (1 + np.exp(-4 * steps))).astype(np.float32)


def _smooth_noise(points: np.ndarray, seed: int, waves: int = 6) -> np.ndarray:
    """Sum a few random plane waves: smooth values from -1 to 1 for points of shape (..., 3)."""
    random = np.random.default_rng(seed)
    directions = random.normal(size=(waves, 3))
    directions *= random.uniform(1.5, 3.0, (waves, 1)) / np.linalg.norm(
        directions, axis=1, keepdims=True
    )
    phases = random.uniform(0, 2 * np.pi, waves)
    waves_there = np.cos(points @ directions.T + phases)
    return np.clip(waves_there.sum(-1) / np.sqrt(waves), -1, 1)


def _save(path: Path, data: np.ndarray, affine: np.ndarray) -> None:
    """Write a NIfTI file in millimetres whose qform and sform both carry `affine`."""
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, _MNI152_CODE)
    image.set_qform(affine, _MNI152_CODE)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
