"""A 512 x 512 x 300 CT, its CAM and its masks written in every format: seconds and memory.

    python benchmarks/all_formats.py            # all formats in one case, and each by itself
    python benchmarks/all_formats.py html png   # some

Every run is a process of its own. Memory is the peak resident size of the process while it writes,
with libraries, scan, map and masks in it; the goal is 90 s and 3 GiB on 2 cores for all formats
together.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import growth, machine, resident

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

SHAPE = (512, 512, 300)
SPACING = (0.8, 0.8, 1.5)
NOISE_HU = 12.0
FORMATS = ["nifti", "png", "cine", "html", "slicer", "nrrd", "fused", "dicom"]


def make_case():
    """Return an explained CT-like scan: a body with organs and noise, an oblique affine."""
    from helpers_dicom import make_headers
    from scipy.spatial.transform import Rotation

    from seg3dcam.explaining.explanation import Explanation
    from seg3dcam.scan import Scan

    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", [4, -3, 5], degrees=True).as_matrix()
    affine[:3, :3] = turn @ np.diag([-SPACING[0], -SPACING[1], SPACING[2]])
    affine[:3, 3] = 180, 160, -700
    rng = np.random.default_rng(0)
    x, y, z = np.meshgrid(
        *(np.linspace(-1, 1, n, dtype=np.float32) for n in SHAPE), indexing="ij", sparse=True
    )

    def ball(cx, cy, cz, rx, ry, rz):
        return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2

    voxels = np.where(ball(0, 0, 0, 0.85, 0.62, 1.5) < 1, np.float32(45), np.float32(-1000))
    voxels[ball(-0.4, 0.05, -0.6, 0.3, 0.4, 0.7) < 1] = -850
    voxels[ball(0.4, 0.05, -0.6, 0.3, 0.4, 0.7) < 1] = -850
    voxels[ball(0, 0.42, 0, 0.09, 0.1, 2) < 1] = 500
    lesion = ball(-0.35, -0.1, 0.3, 0.12, 0.12, 0.16)
    voxels[lesion < 1] = 110
    for plane in range(SHAPE[2]):
        voxels[..., plane] += rng.normal(0, NOISE_HU, SHAPE[:2]).astype(np.float32).round()
    prediction = torch.zeros((2, *SHAPE), dtype=torch.bool)
    prediction[1] = torch.from_numpy(lesion < 1.2)
    prediction[0] = ~prediction[1]
    return Explanation(
        scan=Scan(torch.from_numpy(voxels)[None], affine, "ct", series=make_headers(SHAPE, affine)),
        maps={"encoder.4": torch.from_numpy(3 * np.exp(-lesion / 6) - 0.3)},
        status={"encoder.4": "ok"},
        prediction=prediction,
        class_names=["background", "lesion"],
        target="log-odds of class lesion over the predicted mask",
        method="hires_cam",
        class_index=1,
        score=1.0,
        native_spacing={"encoder.4": (12.8, 12.8, 12.0)},
        label="lesion",
        truth=torch.from_numpy(lesion < 1),
    )


def write(formats: list[str]) -> None:
    """Write the case in this process and print seconds, processor seconds, MB and files."""
    from seg3dcam.job.case import write_case
    from seg3dcam.job.settings import Job

    explanation = make_case()
    job = Job(scan="ct", model="model", format=formats, intensity_window="soft tissue")
    before = resident()
    with tempfile.TemporaryDirectory() as folder:
        start, used = time.perf_counter(), time.process_time()
        grown, record = growth(lambda: write_case(folder, [explanation], job))
        seconds, used = time.perf_counter() - start, time.process_time() - used
        megabytes = sum((Path(folder) / name).stat().st_size for name in record["files"]) / 1e6
    print(
        f"{' + '.join(formats):>60}  {seconds:6.1f} s  {used:6.1f} s of processor  "
        f"{before / 1e3:.2f} + {grown / 1e3:.2f} GB  {megabytes:7.1f} MB, "
        f"{len(record['files'])} files"
    )


def main() -> None:
    """Run every way in a process of its own."""
    if sys.argv[1:2] == ["--here"]:
        write(sys.argv[2:])
        return
    print(machine())
    wanted = sys.argv[1:] or FORMATS
    for formats in [wanted, *([name] for name in wanted if len(wanted) > 1)]:
        subprocess.run([sys.executable, __file__, "--here", *formats], check=True)


if __name__ == "__main__":
    main()
