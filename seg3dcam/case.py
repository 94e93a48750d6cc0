"""A case on disk: everything that one scan's explanation leaves behind, in one folder.

prediction.nii.gz            predicted labels (sigmoid: one file per class)
cam_<target>.nii.gz          what is looked at: 0 to 1, negative evidence cut, layers averaged
raw_<target>_<layer>.nii.gz  raw signed map of one layer
slices/<target>/axial_*.png  scan beside overlay
montage_<target>.png         the slices that matter
case.json                    what was done and found; written last

A target is named by its class, and by its region and method where there are several.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from seg3dcam.config import Job
from seg3dcam.errors import ConfigError
from seg3dcam.explain import Explanation, anatomical_axis
from seg3dcam.export.nifti import write_nifti
from seg3dcam.files import check_writable, write_json
from seg3dcam.findings import findings
from seg3dcam.look import Look
from seg3dcam.models import SegModel
from seg3dcam.review import save_montage, save_slices
from seg3dcam.scan import Scan

#: Settings that do not change what is written.
_WHERE = {"scan", "model", "out", "device", "truth"}


def case_key(scan: Scan, model: SegModel, job: Job) -> str:
    """Return a hash of scan, weights and settings: same key, same results."""
    digest = hashlib.sha256(np.ascontiguousarray(scan.data.numpy()).data)
    digest.update(np.ascontiguousarray(scan.affine).data)
    if job.truth is not None:
        digest.update(Path(job.truth).read_bytes())
    settings = {k: v for k, v in job.model_dump().items() if k not in _WHERE}
    use = [
        model.name,
        model.fingerprint(),
        list(model.class_names),
        model.activation,
        model.spec,
        version("seg3dcam"),
        repr(model.window),
        str(model.output),
        settings,
    ]
    digest.update(json.dumps(use, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def is_done(folder: str | Path, key: str) -> bool:
    """Tell whether a folder holds a complete case with this key."""
    record = _record(Path(folder))
    files = record.get("files", [])
    return record.get("key") == key and all((Path(folder) / name).is_file() for name in files)


def write_case(
    folder: str | Path, explanations: Iterable[Explanation], job: Job, *, key: str = ""
) -> Mapping[str, Any]:
    """Write a case; what an earlier run of the same folder left is replaced.

    Returns:
        what `case.json` holds.

    Raises:
        OutputError: the folder cannot be written; `case.json` is then absent.
    """
    folder = Path(folder)
    check_writable(folder)
    _remove_earlier(folder)
    files: list[Path] = []
    cases: list[dict[str, Any]] = []
    names: list[str] = []
    for explanation in explanations:
        several = len(job.methods) > 1
        names.append(f"{explanation.label} {explanation.method}" if several else explanation.label)
        name = unique_names(names)[-1]
        if not cases:
            files += _write_prediction(folder, explanation)
        files += _write_maps(folder, explanation, name)
        if job.pictures:
            files += _write_pictures(folder, explanation, name, job)
        cases.append(
            {"label": explanation.label, **explanation.provenance, "found": findings(explanation)}
        )
    record = {
        "seg3dcam": cases[0]["versions"]["seg3dcam"],
        "key": key,
        "job": {k: v for k, v in job.model_dump().items() if k not in _WHERE},
        "files": [str(file.relative_to(folder)) for file in files],
        "explanations": cases,
    }
    write_json(folder / "case.json", record)
    return record


def unique_names(names: Sequence[str]) -> list[str]:
    """Return names that are safe in file names, and different.

    >>> unique_names(["grey matter", "grey_matter", "../x", "Läsion"])
    ['grey_matter', 'grey_matter_2', 'x', 'L_sion']
    """
    found: list[str] = []
    for name in names:
        safe = re.sub(r"[^A-Za-z0-9-]+", "_", name).strip("_")[:60] or "target"
        choices = (safe if n == 1 else f"{safe}_{n}" for n in itertools.count(1))
        taken = {other.lower() for other in found}  # on some disks A is a
        found.append(next(choice for choice in choices if choice.lower() not in taken))
    return found


def _write_prediction(folder: Path, explanation: Explanation) -> list[Path]:
    """Write labels where classes exclude each other, one mask per class where they may overlap."""
    masks, scan = explanation.prediction.numpy(), explanation.scan
    if not explanation.has_background and len(masks) > 1:
        names = unique_names(explanation.class_names)
        volumes = {f"prediction_{n}": m.astype(np.uint8) for n, m in zip(names, masks, strict=True)}
    else:
        values = np.arange(len(masks)) if len(masks) > 1 else np.ones(1)
        labels = np.zeros(scan.shape, dtype=np.uint8 if len(masks) < 256 else np.int16)
        for value, mask in zip(values, masks, strict=True):
            labels[mask] = value
        volumes = {"prediction": labels}
    return [
        write_nifti(
            folder / f"{name}.nii.gz",
            volume,
            scan.affine,
            reference=scan.header,
            intent_name=name,
            dtype=volume.dtype,
        )
        for name, volume in volumes.items()
    ]


def _write_maps(folder: Path, explanation: Explanation, name: str) -> list[Path]:
    layers = unique_names(list(explanation.maps))
    return [
        explanation.save(folder / f"cam_{name}.nii.gz"),
        *(
            explanation.save_raw(folder / f"raw_{name}_{short}.nii.gz", layer)
            for short, layer in zip(layers, explanation.maps, strict=True)
        ),
    ]


def _write_pictures(folder: Path, explanation: Explanation, name: str, job: Job) -> list[Path]:
    scan = explanation.scan
    mask = explanation.mask
    layers = ", ".join(explanation.maps)
    view: dict[str, Any] = {
        "prediction": None if mask is None else mask.numpy(),
        "axis": job.axis,
        "window": job.intensity_window,
        "threshold": job.threshold,
        "colormap": job.colormap,
        "title": explanation.label,
        "caption": {"method": explanation.method, "layer": layers, "target": explanation.target},
    }
    volumes = (scan.data[0].numpy(), explanation.volume().float().numpy(), explanation.affine)
    which: Literal["relevant"] | int = "relevant" if job.slice is None else job.slice
    files = save_slices(folder / "slices" / name, *volumes, slices=which, **view)
    if job.slice is None:
        files.append(save_montage(folder / f"montage_{name}.png", *volumes, **view))
    return files


def check_slice(scan: Scan, job: Job) -> None:
    """Raise ConfigError early where the wanted slice lies outside of the scan."""
    if job.slice is None:
        return
    size = scan.shape[anatomical_axis(scan.affine, job.axis)]
    if not 0 <= job.slice < size:
        raise ConfigError(
            f"{job.axis} slice {job.slice}: legal are 0 to {size - 1} for {scan.name}"
        )


def look_of(job: Job) -> Look:
    """Return how scan and CAM are shown; ConfigError where that is illegal."""
    return Look(job.intensity_window, job.threshold, colormap=job.colormap)


def _record(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        content = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}


def _remove_earlier(folder: Path) -> None:
    """Remove what an earlier case.json lists, and it first: a run that dies leaves none."""
    files = _record(folder).get("files")
    listed = [str(name) for name in files] if isinstance(files, list) else []
    (folder / "case.json").unlink(missing_ok=True)
    for name in listed:
        file = folder / name
        if file.resolve().is_relative_to(folder.resolve()) and file.is_file():
            file.unlink()
            for parent in file.relative_to(folder).parents[:-1]:
                with suppress(OSError):  # not empty: it holds a file of somebody else's
                    (folder / parent).rmdir()
