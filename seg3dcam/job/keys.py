"""Which case a run belongs to, where the case goes, and hashes by which a run is known again."""

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
from seg3dcam.files.remote import fingerprint, place
from seg3dcam.job.record import is_somebody_elses, record_of, voxels_sha256
from seg3dcam.job.settings import OUT, Job
from seg3dcam.job.targets import class_indices
from seg3dcam.models import SegModel
from seg3dcam.review.look import Look
from seg3dcam.scan import Scan, place_code

#: Settings that name inputs, or where and on what a run works; they do not change what is written.
_WHERE = {"scan", "model", "out", "device", "truth"}

#: Packages that make volumes and pictures.
_MAKERS = ("seg3dcam", "torch", "monai", "numpy", "scipy", "nibabel", "matplotlib", "pillow")


class Keys(NamedTuple):
    """Hashes of what a run is asked for.

    Attributes:
        voxels: of the scan's voxels alone. It tells scans apart, wherever their headers place them.
        job: of the scan's voxels, the model, the truth and the settings.
        all: of all that, the scan's place and the versions of the packages that write. Runs with
            the same hash write the same files.
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
    """Return the name under which a scan is shown: what the job says, else a code."""
    return printable(job.case or "") or f"scan {scan_code(scan)[:8]}"


def case_folder(scan: Scan, job: Job, keys: Keys) -> Path:
    """Return where a scan's case goes: what the job says, or a folder of its own by default.

    Where the job's folder holds another scan's case, or a `case.json` of another program, the case
    goes to a folder of its own inside of it.
    """
    name = case_name(scan, job)
    # Where a file has this name, the writer raises the error.
    if job.out is not None and (Path(job.out).is_file() or _may_hold(Path(job.out), keys)):
        return Path(job.out)
    parent = Path(OUT if job.out is None else job.out)
    # More than two names are needed only where somebody else's links or files have them.
    names = unique_names([name, *[f"{name} {keys.voxels[:8]}"] * 99])
    below = (parent / one for one in names)
    return next(place for place in below if not place.is_symlink() and _may_hold(place, keys))


def _may_hold(folder: Path, keys: Keys) -> bool:
    """Tell whether a scan's case may go to a folder: one that holds no other scan's case."""
    if not folder.is_dir():
        return not os.path.lexists(folder)
    record = record_of(folder)
    if record is None:
        return not is_somebody_elses(folder)
    return record.voxels_sha256 == keys.voxels


def case_keys(scan: Scan, model: SegModel, job: Job, truth: Scan | None = None) -> Keys:
    """Return the hashes of a run, by which it is found to be done already."""
    voxels = voxels_sha256(scan)
    of_truth = "" if truth is None else voxels_sha256(truth)
    return _keys(scan, voxels, voxels + of_truth + _json(_use(model, job)), _makers())


def cohort_code(model: SegModel, job: Job) -> str:
    """Return a hash of everything but the scan and the truth that decides what a job writes."""
    return hashlib.sha256((_json(_use(model, job)) + _makers()).encode()).hexdigest()[:16]


def inputs_code(job: Job, cohort: str) -> str:
    """Return a hash of a job's files by their names, sizes and times, and of its cohort's code.

    It is made without reading the files. Of folders those files count that lie in them.

    Args:
        cohort: see `cohort_code`.
    """
    digest = hashlib.sha256(cohort.encode())
    for file in (*job.scans, *([] if job.truth is None else [job.truth])):
        path = place(file)
        inside: list[Any] = sorted(path.iterdir(), key=str) if path.is_dir() else [path]
        for one in inside:
            digest.update(fingerprint(one).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:16]


def _use(model: SegModel, job: Job) -> list[Any]:
    """Return what decides on a run, beside the scan and the truth."""
    return [
        model.name,
        model.fingerprint(),
        list(model.class_names),
        model.activation,
        model.spec,
        repr(model.window),
        str(model.output),
        _code_of(model.module),
        settings_of(job) | {"target": class_indices(job, model) or None},
        *([] if model.temperature == 1 else [model.temperature]),
    ]


def _makers() -> str:
    """Return the versions of all packages that write."""
    # Packages of several names install OpenCV, so the module itself is asked for its version.
    return json.dumps(
        {package: version(package) for package in _MAKERS} | {"opencv": cv2.__version__}
    )


def keys_of_explanation(explanation: Explanation, job: Job) -> Keys:
    """Return the keys of a run whose model is known only by an explanation's provenance."""
    scan, model = explanation.scan, explanation.provenance.get("model")
    voxels = voxels_sha256(scan)
    return _keys(scan, voxels, _json([voxels, model, settings_of(job)]))


def _keys(scan: Scan, voxels: str, of_job: str, of_makers: str = "") -> Keys:
    """Return hashes of texts.

    Args:
        voxels: the hash of the scan's voxels.
        of_job: says what is asked for.
        of_makers: says by which versions of packages it is made.
    """
    digest = hashlib.sha256(of_job.encode())
    job_key = digest.hexdigest()[:16]
    digest.update((place_code(scan) + of_makers).encode())
    return Keys(voxels, job_key, digest.hexdigest()[:16])


def _json(content: Any) -> str:
    return json.dumps(content, sort_keys=True, default=str)


def _code_of(module: nn.Module) -> str:
    """Return a hash of the Python files of a network's classes.

    Functions that other modules have put into a class are left out: `torch.compile` exchanges one
    of `nn.Module`, and a network is the same after something else was compiled.
    """
    kinds = {kind for part in module.modules() for kind in type(part).__mro__}
    functions = [
        function
        for kind in kinds
        for function in vars(kind).values()
        if inspect.isfunction(function) and function.__module__ == kind.__module__
    ]
    files = {Path(function.__code__.co_filename) for function in functions}
    return digest_of_all(file for file in files if file.is_file())


def settings_of(job: Job) -> dict[str, Any]:
    """Return the settings that decide on the results, in one form however a job writes them."""
    settings = {k: v for k, v in job.model_dump().items() if k not in _WHERE}
    same = {
        "method": job.methods,
        "layer": job.layers,
        "format": sorted(job.formats),
        "axis": job.axes,
        "region": job.region_name,
        "case": job.case or None,
        "colormap": look_of(job).colormap,
    }
    # What a job did before there were full verdicts is what it does now without one.
    return {k: v for k, v in (settings | same).items() if k != "verdict" or v}


def look_of(job: Job) -> Look:
    """Return how scan and CAM are shown; ConfigError where that is illegal."""
    colormap = "" if job.colormap is None else job.colormap
    return Look(job.intensity_window, job.threshold, colormap=colormap, signed=job.signed)
