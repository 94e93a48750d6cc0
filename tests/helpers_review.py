"""A phantom with one marker off centre in every direction, stored in any orientation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import cv2
import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from seg3dcam.review import Review, review_volumes
from seg3dcam.review.look import Look
from seg3dcam.review.pictures import frame, text

# In patient space: size in mm, and the marker's centre from the middle (R, A, S positive).
CUBE_MM = 120.0
MARKER_MM = np.array([30.0, 20.0, 25.0])

SPACINGS = {"even": (2.0, 2.0, 2.0), "thick": (1.6, 1.6, 5.0)}
ORIENTATIONS = ["RAS", "LAS", "LPS", "LPI", "PIR", "SLA", "IPR", "ASL"]


def make_affine(
    codes: str, spacing: tuple[float, float, float], rotation: NDArray[np.float64] | None = None
) -> tuple[tuple[int, int, int], NDArray[np.float64]]:
    """Shape and voxel -> RAS affine of a grid centred on the origin, axes towards `codes`.

    `spacing` is in the order R-L, A-P, S-I.
    """
    sides = ["RL", "AP", "SI"]
    matrix = np.zeros((3, 3))
    shape = []
    for column, code in enumerate(codes):
        world = next(n for n, pair in enumerate(sides) if code in pair)
        matrix[world, column] = spacing[world] * (1 if code == sides[world][0] else -1)
        shape.append(round(CUBE_MM / spacing[world]))
    if rotation is not None:
        matrix = rotation @ matrix
    affine = np.eye(4)
    affine[:3, :3] = matrix
    affine[:3, 3] = -matrix @ ((np.array(shape) - 1) / 2)
    return (shape[0], shape[1], shape[2]), affine


def make_scan(
    shape: tuple[int, int, int], affine: NDArray[np.float64], at: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """A dim volume with one bright voxel nearest to `at` (RAS mm), and that voxel's index."""
    index = np.rint(nibabel.affines.apply_affine(np.linalg.inv(affine), at)).astype(int)
    scan = np.full(shape, 10, np.float32)
    scan[tuple(index)] = 100
    return scan, index


def review_of(scan: Any, cam: Any, affine: Any, **settings: Any) -> Review:
    """The review of arrays, the fields of its look among the settings."""
    look = {f.name: settings.pop(f.name) for f in fields(Look) if f.name in settings}
    return review_volumes(scan, cam, affine, look=Look(**look), **settings)


def brightest(picture: NDArray[np.uint8]) -> tuple[float, float]:
    """Centre of the bright blob, (row, column) in pixels from the picture's top left corner."""
    weight = np.maximum(picture[..., 0].astype(float) - 40, 0)
    rows, columns = np.indices(weight.shape) + 0.5
    return (rows * weight).sum() / weight.sum(), (columns * weight).sum() / weight.sum()


def read(file: Path) -> NDArray[np.uint8]:
    """The pixels of a PNG, blue green red."""
    picture = cv2.imread(str(file))
    assert picture is not None
    return picture


def blob_case(
    shape: tuple[int, int, int] = (30, 32, 12), spacing: tuple[float, float, float] = (1, 1, 3)
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Noise, and a box of heat that rises with k; with its affine."""
    rng = np.random.default_rng(1)
    scan = rng.normal(100, 30, shape)
    cam = np.zeros(shape)
    cam[5:15, 8:20, 3:9] = np.linspace(0.1, 1, 6)
    return scan, cam, np.diag([*spacing, 1.0])


def find(picture: NDArray[np.uint8], part: NDArray[np.uint8]) -> tuple[int, int]:
    """Row and column where a part stands in a picture, to the pixel."""
    match = cv2.matchTemplate(picture[..., 0], part[..., 0], cv2.TM_SQDIFF)
    left, top = cv2.minMaxLoc(match)[2]
    there = picture[top : top + part.shape[0], left : left + part.shape[1]]
    np.testing.assert_array_equal(there, part)
    return top, left


@contextmanager
def written_words() -> Iterator[list[str]]:
    """All lines of text that are written into pictures, as the text function gets them."""
    lines: list[str] = []
    real = text.put_text

    def spy(picture: Any, line: str, *rest: Any, **more: Any) -> None:
        lines.append(line)
        real(picture, line, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        for module in (text, frame):
            patch.setattr(module, "put_text", spy)
        yield lines


def lines_of(figure):
    """Label -> (x, y) of every line of a figure."""
    axes = [*figure.axes]
    return {line.get_label(): line.get_xydata().T for axis in axes for line in axis.get_lines()}


def decode(file):
    """The frames of a film, (N, height, width, 3); each one's time in ms; and the loops."""
    frames, times = [], []
    with Image.open(file) as film:
        assert film.format == "WEBP"
        for number in range(film.n_frames):
            film.seek(number)
            film.load()
            times.append(film.info["duration"])
            frames.append(np.asarray(film.convert("RGB")))
        return np.stack(frames), times, film.info["loop"]
