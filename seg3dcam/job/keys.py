"""Which case a run belongs to, where the case goes, and hashes that tell what was done before."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from torch import nn

from seg3dcam.explaining.explanation import Explanation
from seg3dcam.files import digest_of_all, printable, unique_names
from seg3dcam.job.record import is_somebody_elses, record_of, voxels_sha256
from seg3dcam.job.settings import OUT, Job
from seg3dcam.models import SegModel
from seg3dcam.review.look import Look
from seg3dcam.scan import Scan, place_code

#: Settings that say where something is; they do not change what is written.
_WHERE = {"scan", "model", "out", "device", "truth"}

#: Packages that make volumes and pictures.
_MAKERS = ("seg3dcam", "torch", "monai", "numpy", "scipy", "nibabel", "matplotlib", "pillow")


class Keys(NamedTuple):
    """Hashes of what a run is asked for: runs with the same hash write the same.

    Attributes:
        voxels: of the scan's voxels alone. It says which scan it is, wherever a header places it.
        job: of the scan's voxels, the model, the truth and the settings.
        all: of all that, of the scan's place, and of the versions of the packages that write.
    """

    voxels: str
    job: str
    all: str


def scan_code(scan: Scan) -> str:
    """Return a hash of the scan's voxels and place."""
    digest = hashlib.sha256(np.ascontiguousarray(scan.data.numpy()).data)
    digest.update(np.ascontiguousarray(scan.affine).data)
    return digest.hexdigest()


def case_name(scan: Scan, job: Job) -> str:
    """Return the scan's name for everybody's eyes: what the job says, else a code."""
    return printable(job.case or "") or f"scan {scan_code(scan)[:8]}"


def case_folder(scan: Scan, job: Job, keys: Keys) -> Path:
    """Return where a scan's case goes: what the job says, or a folder of its own by default.

    Beside another scan's case, or another program's, it gets a folder of its own in that folder.
    """
    name = case_name(scan, job)
    # A file of this name is for the writer to refuse.
    if job.out is not None and (Path(job.out).is_file() or _may_hold(Path(job.out), keys)):
        return Path(job.out)
    parent = Path(OUT if job.out is None else job.out)
    # The third name and more are for where links or files of others have the first two.
    names = unique_names([name, *[f"{name} {keys.voxels[:8]}"] * 99])
    below = (parent / one for one in names)
    return next(place for place in below if not place.is_symlink() and _may_hold(place, keys))


def _may_hold(folder: Path, keys: Keys) -> bool:
    """Tell whether a scan's case may go to a folder: nothing is there that it would mix with."""
    if not folder.is_dir():
        return not os.path.lexists(folder)
    record = record_of(folder)
    if record is None:
        return not is_somebody_elses(folder)
    return record.voxels_sha256 == keys.voxels


def case_keys(scan: Scan, model: SegModel, job: Job, truth: Scan | None = None) -> Keys:
    """Return the hashes of a run, by which it is found to be done already."""
    voxels = voxels_sha256(scan)
    digest = hashlib.sha256(voxels.encode())
    if truth is not None:
        digest.update(voxels_sha256(truth).encode())
    use = [
        model.name,
        model.fingerprint(),
        list(model.class_names),
        model.activation,
        model.spec,
        repr(model.window),
        str(model.output),
        _code_of(model.module),
        settings_of(job) | {"target": _classes_of(job, model)},
    ]
    digest.update(json.dumps(use, sort_keys=True, default=str).encode())
    of_job = digest.hexdigest()[:16]
    digest.update(place_code(scan).encode())
    # OpenCV is asked itself: its package has several names.
    versions = {package: version(package) for package in _MAKERS} | {"opencv": cv2.__version__}
    digest.update(json.dumps(versions).encode())
    return Keys(voxels, of_job, digest.hexdigest()[:16])


def _code_of(module: nn.Module) -> str:
    """Return a hash of the Python files of a network's classes."""
    kinds = {kind for part in module.modules() for kind in type(part).__mro__}
    functions = [f for kind in kinds for f in vars(kind).values() if inspect.isfunction(f)]
    files = {Path(function.__code__.co_filename) for function in functions}
    return digest_of_all(file for file in files if file.is_file())


def _classes_of(job: Job, model: SegModel) -> list[int] | None:
    """Return the indices of the classes that a job names, by name or by index."""
    named = job.target if isinstance(job.target, list) else [job.target]
    return None if job.target is None else [model.class_index(name) for name in named]  # type: ignore[arg-type]


def settings_of(job: Job) -> dict[str, Any]:
    """Return the settings that decide on the results, in one form however a job writes them."""
    settings = {k: v for k, v in job.model_dump().items() if k not in _WHERE}
    same = {
        "method": job.methods,
        "layer": job.layers,
        "format": sorted(job.formats),
        "axis": job.axes,
        "region": job.region or ("volume" if job.score == "mask_output" else "predicted"),
        "case": job.case or None,
        "colormap": look_of(job).colormap,
    }
    return settings | same


def keys_of_explanation(explanation: Explanation, job: Job) -> Keys:
    """Return the keys of a run whose model is known only from what an explanation says of it."""
    scan, model = explanation.scan, explanation.provenance.get("model")
    voxels = voxels_sha256(scan)
    use = [voxels, model, settings_of(job)]
    digest = hashlib.sha256(json.dumps(use, sort_keys=True, default=str).encode())
    of_job = digest.hexdigest()[:16]
    digest.update(place_code(scan).encode())
    return Keys(voxels, of_job, digest.hexdigest()[:16])


def look_of(job: Job) -> Look:
    """Return how scan and CAM are shown; ConfigError where that is illegal."""
    colormap = "" if job.colormap is None else job.colormap
    return Look(job.intensity_window, job.threshold, colormap=colormap, signed=job.signed)
