"""An explained scan whose every mark is known in the patient: right, in front, above.

A dim body with a bright ball, the marker, at `MARKER_MM`. The CAM is highest there, the prediction
is a ball around it, and the truth the same ball, 4 mm further to the left.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from seg3dcam.explaining.explanation import Explanation
from seg3dcam.scan import Scan

#: Where the marker is: right of the middle, in front of it and above it (RAS mm).
MARKER_MM = np.array([30.0, 22.0, 26.0])
#: Where what speaks against the target is, in `make_signed_phantom`: left, behind, below.
AGAINST_MM = np.array([-32.0, -20.0, -18.0])
MARKER_RADIUS_MM = 8.0
MASK_RADIUS_MM = 11.0
TRUTH_SHIFT_MM = np.array([-4.0, 0.0, 0.0])
#: Hounsfield units.
AIR, BODY, MARKER = -1000.0, 40.0, 180.0

#: Field of view in mm along R-L, A-P, S-I.
FIELD_MM = (150.0, 130.0, 140.0)
SPACING = (0.8 * 2, 0.8 * 2, 5.0)
OBLIQUE = Rotation.from_euler("xyz", [9, -6, 12], degrees=True).as_matrix()


def make_grid(
    codes: str = "LPS",
    spacing: tuple[float, float, float] = SPACING,
    rotation: NDArray[np.float64] = OBLIQUE,
    middle_mm: tuple[float, float, float] = (12.0, -31.0, 405.0),
) -> tuple[tuple[int, int, int], NDArray[np.float64]]:
    """Return shape and affine of a grid whose axes go towards `codes`, turned by `rotation`.

    `spacing` is in the order R-L, A-P, S-I. The grid's middle lies far from the origin.
    """
    sides = ["RL", "AP", "SI"]
    axes = [next(n for n, pair in enumerate(sides) if code in pair) for code in codes]
    matrix = np.zeros((3, 3))
    for column, (code, world) in enumerate(zip(codes, axes, strict=True)):
        matrix[world, column] = spacing[world] * (1 if code == sides[world][0] else -1)
    shape = tuple(round(FIELD_MM[world] / spacing[world]) for world in axes)
    affine = np.eye(4)
    affine[:3, :3] = rotation @ matrix
    affine[:3, 3] = np.array(middle_mm) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return shape, affine  # type: ignore[return-value]


def positions(shape: tuple[int, ...], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """RAS mm of every voxel centre, (X, Y, Z, 3)."""
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return voxels @ affine[:3, :3].T + affine[:3, 3]


def marker_mm(affine: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Where the marker is on a grid: `MARKER_MM` from its middle."""
    middle = affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]
    return middle + MARKER_MM


def make_phantom(
    codes: str = "LPS",
    spacing: tuple[float, float, float] = SPACING,
    rotation: NDArray[np.float64] = OBLIQUE,
    layers: tuple[str, ...] = ("model.1",),
    classes: tuple[str, ...] = ("background", "lesion"),
    name: str = "phantom",
) -> Explanation:
    """Return the explanation of the last class; layers after the first have wider heat."""
    shape, affine = make_grid(codes, spacing, rotation)
    place, marker = positions(shape, affine), marker_mm(affine, shape)
    middle = marker - MARKER_MM
    away = np.linalg.norm(place - marker, axis=-1)
    body = (((place - middle) / (np.array(FIELD_MM) / 2)) ** 2).sum(-1) < 1
    voxels = np.where(away < MARKER_RADIUS_MM, MARKER, np.where(body, BODY, AIR))
    maps = {
        layer: torch.tensor(3.5 * np.exp(-((away / (10.0 + 5 * n)) ** 2) / 2) - 0.5).float()
        for n, layer in enumerate(layers)
    }
    prediction = torch.zeros((len(classes), *shape), dtype=torch.bool)
    prediction[-1] = torch.tensor(away < MASK_RADIUS_MM)
    prediction[0] = ~prediction[-1]
    truth = np.linalg.norm(place - marker - TRUTH_SHIFT_MM, axis=-1) < MASK_RADIUS_MM
    scan = Scan(torch.tensor(voxels, dtype=torch.float32)[None], affine, name)
    return Explanation(
        scan=scan,
        maps=maps,
        status=dict.fromkeys(maps, "ok"),
        prediction=prediction,
        class_names=list(classes),
        target=f"log-odds of class {classes[-1]} over the predicted mask",
        method="hires_cam",
        class_index=len(classes) - 1,
        score=12.5,
        native_spacing={layer: (6.4, 6.4, 10.0) for layer in layers},
        label=classes[-1],
        truth=torch.tensor(truth),
    )


def make_signed_phantom(codes: str = "LPS", height: float = 1.0, **others: Any) -> Explanation:
    """Return a phantom with a bump of `height` at the marker, and one of -2 at `AGAINST_MM`.

    On one scale the marker has the value `height` / 2, the other place -1.
    """
    phantom = make_phantom(codes, **others)
    place = positions(phantom.scan.shape, phantom.affine)
    marker = marker_mm(phantom.affine, phantom.scan.shape)

    def bump(middle: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.exp(-((np.linalg.norm(place - middle, axis=-1) / 10) ** 2) / 2)

    values = height * bump(marker) - 2 * bump(marker - MARKER_MM + AGAINST_MM)
    values[np.abs(values) < 0.01] = 0
    return replace(phantom, maps={name: torch.tensor(values).float() for name in phantom.maps})


def make_phantom_against(codes: str = "LPS", **others: Any) -> Explanation:
    """Return a signed phantom whose map holds nothing for its target."""
    phantom = make_signed_phantom(codes, height=0.0, **others)
    status: dict[str, Any] = dict.fromkeys(phantom.maps, "zero")
    return replace(phantom, status=status, only_against=list(phantom.maps))


def against_mm(explanation: Explanation) -> NDArray[np.float64]:
    """Where a signed phantom holds most against its target, in RAS mm."""
    return marker_mm(explanation.affine, explanation.scan.shape) - MARKER_MM + AGAINST_MM


def silent(explanation: Explanation, status: str) -> Explanation:
    """Return the same where the method found nothing: "zero", "nonfinite" or "degenerate"."""
    value = float("nan") if status == "nonfinite" else 0.0
    return replace(
        explanation,
        maps={name: torch.full_like(m, value) for name, m in explanation.maps.items()},
        status=dict.fromkeys(explanation.maps, status),
    )


def offset_mm(
    weights: NDArray[np.floating], affine: NDArray[np.float64], wanted: NDArray[np.float64]
) -> float:
    """Return how far the weights' centre of mass lies from a point, in mm."""
    place = positions(weights.shape, affine)
    centre = (place * weights[..., None]).sum((0, 1, 2)) / weights.sum()
    return float(np.linalg.norm(centre - wanted))
