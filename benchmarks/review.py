"""Time and memory of the review pictures of a 512 x 512 x 300 scan.

The scan is made up: noise in an ellipse with a bright ring, heat around one place, a prediction
and a truth there. Every slice is drawn, the scan beside the scan with heat and outlines.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from measure import growth, machine, summary

from seg3dcam.review import (
    Review,
    review_volumes,
    save_cine,
    save_montage,
    save_planes,
    save_profile,
    save_slices,
)
from seg3dcam.review.look import Look
from seg3dcam.review.pictures import cine, page


def make_case(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Scan and CAM in float32, both masks as bool, and the affine."""
    rng = np.random.default_rng(0)
    x, y, z = np.meshgrid(
        *(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij", sparse=True
    )
    body = (x / 0.8) ** 2 + (y / 0.65) ** 2 + 0 * z
    scan = np.where(body < 1, np.float32(40), np.float32(-1000))
    scan[(body > 0.8) & (body < 0.9)] = 900
    for index in range(shape[2]):
        scan[..., index] += rng.normal(0, 15, shape[:2])
    away = ((x - 0.3) / 0.15) ** 2 + ((y + 0.2) / 0.15) ** 2 + ((z - 0.1) / 0.3) ** 2
    cam = np.exp(-away / 2)
    return {
        "scan": scan,
        "cam": cam / cam.max(),
        "affine": np.diag([-0.8, -0.8, 1.0, 1.0]),
        "prediction": away < 1,
        "truth": away < 1.2,
    }


def gif_bytes(review: Review, path: Path) -> int:
    """Size of the same film as an animated GIF, with the encoder's own palette of each frame."""
    first, *others = cine.draw_frames(review)
    first.save(path, save_all=True, append_images=others, duration=50, loop=0)
    return path.stat().st_size


def main(depth: int, rounds: int) -> None:
    """Print a table: seconds of wall clock and of the processor, growth of memory, file sizes."""
    case = make_case((512, 512, depth))
    look = Look(window="soft tissue")
    review = review_volumes(**case, look=look, slices="all", title="case")
    ways: dict[str, Callable[[Path], object]] = {
        "plan (checks, window, profile)": lambda _: review_volumes(**case, look=look),
        "slices": lambda folder: save_slices(folder, review),
        "montage": lambda folder: save_montage(folder / "montage.png", review.along("axial")),
        "planes": lambda folder: save_planes(folder / "planes.png", review),
        "profile": lambda folder: save_profile(folder / "profile.png", review),
        "film": lambda folder: save_cine(folder / "film.webp", review),
    }
    print(f"{machine()}, {page.WORKERS} workers; 512 x 512 x {depth}, {rounds} rounds")
    for name, way in ways.items():
        wall, cpu, grown = [], [], []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                place = Path(folder)
                start, used = time.perf_counter(), time.process_time()
                megabytes, _ = growth(lambda way=way, place=place: way(place))
                wall.append(time.perf_counter() - start)
                cpu.append(time.process_time() - used)
                grown.append(megabytes)
                size = sum(file.stat().st_size for file in place.iterdir()) / 1e6
        print(
            f"{name}: {summary(wall, ' s')}, processor {summary(cpu, ' s')}, "
            f"+{statistics.median(grown):.0f} MB, files {size:.1f} MB"
        )
    with tempfile.TemporaryDirectory() as folder:
        print(f"the film as GIF: {gif_bytes(review, Path(folder) / 'film.gif') / 1e6:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=300, help="slices")
    parser.add_argument("--rounds", type=int, default=5)
    main(**vars(parser.parse_args()))
