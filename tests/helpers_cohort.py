"""Small cohorts on disk: scans, some of which raise or end the process, and a network that does."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from helpers_cases import SHAPE, arguments, voxels, write_model, write_scan, write_yaml

#: A voxel of this brightness in the corner: the network raises, or its process ends at once.
RAISES, CRASHES = 500.0, 1000.0

_FRAGILE = f'''
import os

from monai.networks.nets import UNet


class Fragile(UNet):
    """A network with faults that only some scans bring out."""

    def forward(self, x):
        if (x == {CRASHES}).any():
            os._exit(9)
        if (x == {RAISES}).any():
            raise ValueError("a scan that the network cannot take")
        return super().forward(x)
'''


def write_cohort(
    root: Path, names: Iterable[str], *, raises: Iterable[str] = (), crashes: Iterable[str] = ()
) -> Path:
    """Write a folder of scans that differ a little, and a model beside it; return the folder.

    Args:
        raises, crashes: names of more scans, which need the model "fragile.yaml" with trust.
    """
    folder = root / "scans"
    folder.mkdir(parents=True, exist_ok=True)
    write_model(root)
    for number, name in enumerate(names):
        write_scan(folder / f"{name}.nii.gz", voxels() + np.float32(0.001 * number))
    for brightness, bad in ((RAISES, raises), (CRASHES, crashes)):
        for name in bad:
            array = voxels()
            array[0, 0, 0] = brightness
            write_scan(folder / f"{name}.nii.gz", array)
    return folder


def write_fragile(root: Path) -> Path:
    """Write a model with the weights of "model.yaml" that ends at some scans."""
    (root / "fragile.py").write_text(_FRAGILE, encoding="utf-8")
    spec = {
        "factory": "fragile:Fragile",
        "arguments": arguments(),
        "weights": "model.safetensors",
        "classes": ["background", "organ", "lesion"],
        "window": {"roi_size": list(SHAPE)},
    }
    return write_yaml(root / "fragile.yaml", spec)


def content_of(out: Path, name: str) -> dict[str, str]:
    """Return the files of a case -> their hashes."""
    return {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted((out / name).rglob("*"))
        if file.is_file()
    }


def timeless(name: str, content: bytes) -> bytes:
    """Return a file's content without the seconds that its case took."""
    if name.endswith(".ended.json"):
        note = json.loads(content)
        return json.dumps(note | {"seconds": list(note["seconds"])}).encode()
    if name.endswith("cohort.csv"):
        rows = list(csv.reader(content.decode().splitlines()))
        assert rows[0][-1] == "seconds"
        return "\n".join(",".join(row[:-1]) for row in rows).encode()
    if name.endswith("cohort.parquet"):
        from pyarrow import parquet

        table = parquet.read_table(io.BytesIO(content))
        return repr(table.drop_columns(["seconds"]).to_pylist()).encode()
    return content


def leftovers(out: Path) -> list[str]:
    """Return hidden files and folders in a cohort: what a run that ended has left behind."""
    return sorted(str(path.relative_to(out)) for path in out.rglob(".*"))


#: A layer, as a case's record has it.
LAYER = {"status": "ok", "spacing_mm": [2.0, 2.0, 2.0]}


def write_page_of(root: Path, count: int) -> Path:
    """Write the page of so many made-up cases, with a picture for each; return the page."""
    from PIL import Image

    from seg3dcam.cohort.cases import CohortCase
    from seg3dcam.cohort.page import write_page
    from seg3dcam.cohort.plan import PlannedCase
    from seg3dcam.cohort.table import Summary
    from seg3dcam.cohort.triage import Unusual
    from seg3dcam.job.record import Entry
    from seg3dcam.job.settings import Job

    random = np.random.default_rng(0)
    found = []
    for number in range(count):
        name = f"case{number:04d}"
        folder = root / name
        folder.mkdir()
        picture = random.integers(0, 255, (160, 160, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / "thumb_lesion.webp", quality=50)
        (folder / "report.html").write_text(f"<p>report of {name}</p>", encoding="utf-8")
        score = float(random.exponential())
        entry = Entry(
            label="lesion" if number % 3 else "organ </script><b>",
            name="lesion",
            run="r",
            thumb_file="thumb_lesion.webp",
            method={"name": "hires_cam", "settings": {}},
            layers={"conv": LAYER},
            found={
                "predicted_ml": float(random.uniform(1, 90)),
                "cam_outside": float(random.uniform()),
                "confidence": float(random.uniform(0.5, 1)) if number % 7 else None,
            },
        )
        reasons = ("<img src=x onerror=alert(1)>",) if number == 5 else ()
        case = CohortCase(name, (folder / "scan.nii.gz",))
        planned = PlannedCase(case, Job(scan="s", model="m"), "code", "done")
        found.append(Summary(planned, ((entry, Unusual(score, reasons)),), "report.html"))
    failed = PlannedCase(
        CohortCase("broken", (root / "b",)), Job(scan="s", model="m"), "c", "failed", "no <scan>"
    )
    return write_page(root, [*found, Summary(failed, (), None)])
